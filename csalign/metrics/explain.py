"""What each figure of ``csalign eval`` means: its formula, and where it was defined."""

import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any, NamedTuple


class Explanation(NamedTuple):
    """A figure in words.

    Attributes:
        formula: what is computed.
        source: who defined it; "" for what needs no source.
    """

    formula: str
    source: str = ""


_WANG = "Wang and Isola 2020"
# By place in the document, the first that fits; * is any part of it, and K a number after an @.
EXPLANATIONS = {
    "intervals.*": Explanation(
        "95 % percentile interval of the bootstrap over images, each with its captions; the "
        "gallery stays",
        "Efron 1979; percentile method",
    ),
    "protocol.*": Explanation("what decides a score beside the model"),
    "index.*": Explanation(
        "what ranked: all items, or those that an approximate index lists; of it the share of a "
        "query's 10 nearest items that it has among its first 10",
        "Aumueller et al. 2020 (ann-benchmarks)",
    ),
    "counts.*": Explanation("rows of the split; pairs are texts with an image"),
    "graded.*.map": Explanation(
        "mean over queries of mean_i i / r_i, r_1 < r_2 < ... being the ranks of all items of the "
        "query's group",
        "Manning et al. 2008",
    ),
    "graded.*.ndcg@K": Explanation(
        "sum of 1 / log2(r_i + 1) over r_i <= K, over its largest possible value; gain 1 for each "
        "item of the query's group",
        "Jarvelin and Kekalainen 2002",
    ),
    "hubness.*": Explanation(
        "skewness E[(N - mean N)^3] / std(N)^3 of N(g), the number of queries that have item g "
        "among their 10 nearest; over all rows; 0 is no hubs",
        "Radovanovic et al. 2010",
    ),
    "by.values.*.images": Explanation("images with captions that have this value"),
    "by.values.*.texts": Explanation("captions of images that have this value"),
    "*.mean_recall": Explanation("mean of R@1, R@5 and R@10 in both directions"),
    "*.true_recall@K": Explanation(
        "mean over queries of the share of the matches that are among the first K",
        "Manning et al. 2008; mteb's recall_at_k",
    ),
    "*.R@K": Explanation(
        "share of queries with at least one match among the first K; a tied wrong item ranks ahead",
        "Karpathy and Fei-Fei 2015; as CLIP_benchmark counts it",
    ),
    "*.r_precision": Explanation(
        "mean over queries of the share of matches among the first R, R being the query's matches",
        "Manning et al. 2008",
    ),
    "*.median_rank": Explanation("median over queries of the rank of the best match, from 1 on"),
    "*.mean_rank": Explanation("mean over queries of the rank of the best match, from 1 on"),
    "*.mrr": Explanation("mean over queries of 1 / rank of the best match", "Voorhees 1999"),
    "*.map": Explanation(
        "mean over queries of mean_i i / r_i, r_1 < r_2 < ... being the ranks of its matches",
        "Manning et al. 2008",
    ),
    "gap.centroid_distance": Explanation("|mean x - mean y|", "Liang et al. 2022"),
    "gap.rmg": Explanation(
        "p / (p + w): p is the mean of (1 - cos) / 2 over matched pairs, w over the pairs i != j "
        "inside a modality, averaged over the two; captions of one image are distinct rows",
        "Schrodi et al. 2024",
    ),
    "gap.cs_divergence": Explanation(
        "log mean k(x, x') + log mean k(y, y') - 2 log mean k(x, y), "
        "k(a, b) = exp(-|a - b|^2 / (2 bandwidth^2)), diagonals included",
        "Principe 2010; Yin et al. 2025",
    ),
    "gap.mmd": Explanation(
        "squared maximum mean discrepancy, mean k(x, x') + mean k(y, y') - 2 mean k(x, y), "
        "diagonals included",
        "Gretton et al. 2012",
    ),
    "gap.frechet": Explanation(
        "|mean x - mean y|^2 + tr(C_x + C_y - 2 (C_x C_y)^(1/2)), of Gaussian fits",
        "Dowson and Landau 1982; Heusel et al. 2017",
    ),
    "gap.linear_separability": Explanation(
        "balanced held-out accuracy of a regularised linear discriminant telling the modalities "
        "apart, five folds by image; 0.5 is no gap",
        "Fisher 1936",
    ),
    "gap.alignment": Explanation("mean |x - y|^2 over matched pairs", _WANG),
    "gap.uniformity.cross": Explanation("log mean exp(-2 |x_i - y_j|^2) over all i, j", _WANG),
    "gap.uniformity.*": Explanation("log mean exp(-2 |x_i - x_j|^2) over i < j", _WANG),
    "gap.standard_errors.*": Explanation(
        "of a mean kernel over more than 5,000 rows a side: all rows meet landmarks, a low-rank "
        "kernel's mean is corrected by the mean of what it leaves, and the spread of the estimates "
        "with a block of landmarks left out tells the error",
        "Williams and Seeger 2001; Tukey 1958",
    ),
    "gap.effective_rank.*": Explanation(
        "exp of the entropy of the centred rows' singular values over their sum",
        "Roy and Vetterli 2007",
    ),
    "gap.spectrum.*": Explanation(
        "singular values of the covariance over their sum, the 64 largest: shares of the variance"
    ),
    "distribution.frechet": Explanation(
        "|mean x - mean y|^2 + tr(C_x + C_y - 2 (C_x C_y)^(1/2)), covariances over n - 1, of "
        "embeddings as the encoder gives them",
        "Heusel et al. 2017, with the named encoder in place of Inception",
    ),
    "distribution.frechet_unit": Explanation(
        "the same of unit rows", "Dowson and Landau 1982; Heusel et al. 2017"
    ),
    "distribution.cmmd": Explanation(
        "1000 (mean k(x, x') + mean k(y, y') - 2 mean k(x, y)) of unit rows, "
        "k(a, b) = exp(-|a - b|^2 / (2 10^2)), diagonals included",
        "Jayasumana et al. 2024",
    ),
    "images": Explanation("the real images"),
    "generated": Explanation("the images that are compared with them"),
    "encoder": Explanation("what embedded both"),
    "zero_shot.top1": Explanation(
        "share of images whose class vector, the normalised mean of its normalised prompts, is the "
        "nearest",
        "Radford et al. 2021; as CLIP_benchmark",
    ),
    "zero_shot.top5": Explanation(
        "share of images whose class is among the five nearest; null below five classes",
        "Radford et al. 2021; as CLIP_benchmark",
    ),
    "zero_shot.mean_per_class_recall": Explanation(
        "mean over classes with images of their top-1", "Radford et al. 2021; as CLIP_benchmark"
    ),
    "zero_shot.*": Explanation("how many there were"),
    "*.column": Explanation("which column of the images it is about"),
    "features": Explanation("what was measured"),
    "adapter": Explanation("what the features were led through; null for nothing"),
    "split": Explanation("which rows of the features"),
    "fingerprints.*": Explanation("SHA-256 of the features' content and of the adapter's weights"),
    "parameters": Explanation("of the adapter"),
    "bandwidth": Explanation("of the kernel k in cs_divergence and mmd"),
}
_CORRECTIONS = {
    "csls": Explanation(
        "retrieval by 2 cos(x, y) - r(x) - r(y), r being the mean cosine to the 10 nearest of the "
        "other modality, among the evaluated rows",
        "Conneau et al. 2018",
    ),
    "inverted-softmax": Explanation(
        "retrieval by exp(30 cos(q, g)) over its sum for all evaluated queries",
        "Smith et al. 2017; 30 as in MUSE",
    ),
    "centre": Explanation(
        "retrieval by cosines after the mean of its modality is taken from each evaluated row",
        "Suzuki et al. 2013",
    ),
}


def explain(document: dict[str, Any]) -> dict[str, dict[str, str]]:
    """What the figures of a document mean, ``{place: {"formula", "source"}}`` in its order.

    Raises:
        KeyError: of a figure nothing is known.
    """
    found: dict[str, Explanation] = {}
    for place in _places(document):
        if place.startswith("corrected."):
            name = place.split(".")[1]
            found[f"corrected.{name}"] = _CORRECTIONS[name]
        pattern = pattern_of(place)
        found[pattern] = EXPLANATIONS[pattern]
    return {name: explanation._asdict() for name, explanation in found.items()}


def pattern_of(place: str) -> str:
    """The key of `EXPLANATIONS` that a place in a document has.

    Raises:
        KeyError: it has none.
    """
    plain = re.sub(r"@\d+$", "@K", place)
    for pattern in EXPLANATIONS:
        if fnmatchcase(plain, pattern):
            return pattern
    raise KeyError(place)


def _places(document: dict[str, Any], above: str = "") -> Iterator[str]:
    for key, value in document.items():
        if isinstance(value, dict):
            yield from _places(value, f"{above}{key}.")
        else:
            yield f"{above}{key}"
