"""Meaning of each figure of ``csalign eval``: its formula, and the paper that defined it."""

import re
from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any

from csalign.core.figures import figure_of

# "place :: formula :: source", the first that fits applies. * matches any part of a place in the
# document, and K a number after an @.
_TEXT = """
intervals.* :: 95 % percentile interval of the bootstrap over images, each with its captions; the
    gallery is fixed :: Efron 1979; percentile method
protocol.* :: settings that affect a score besides the model
index.* :: items that are ranked: all, or those that an approximate index lists; its recall is the
    share of a query's 10 nearest items among the index's first 10 :: Aumueller et al. 2020
    (ann-benchmarks)
counts.* :: rows of the split; pairs are texts with an image
graded.*.map :: mean over queries of mean_i i / r_i, r_1 < r_2 < ... being the ranks of all items of
    the query's group :: Manning et al. 2008
graded.*.ndcg@K :: sum of 1 / log2(r_i + 1) over r_i <= K, over its largest possible value; gain 1
    for each item of the query's group :: Jarvelin and Kekalainen 2002
hubness.* :: skewness E[(N - mean N)^3] / std(N)^3 of N(g), the number of queries that have item g
    among their 10 nearest; over all rows; 0 is no hubs :: Radovanovic et al. 2010
by.values.*.images :: images with captions that have this value
by.values.*.texts :: captions of images that have this value
twins.*.R@K :: share of queries with an item among the first K that is a match, or a twin of one:
    images of one embedding, texts of one embedding or caption, in float16's precision; wrong items
    that tie rank ahead
twins.*s :: rows that are twins of another pair's
mixed.*ndcg@K :: one gallery of both sides without the query; sum of 1 / log2(r_i + 1) over right
    items of rank r_i <= K, over its largest possible value; right are all other rows of the query's
    image, and tied wrong items rank ahead; at most 2,000 queries per side; without a prefix the
    mean of both sides :: Jarvelin and Kekalainen 2002; as MixBench and GR-CLIP, Li et al. 2025
mixed.*recall@K :: mean over the same queries of the share of the right items that are among the
    first K of the gallery of both sides :: Manning et al. 2008; MixBench, Li et al. 2025
mixed.*same_side@K :: mean over the same queries of the share of the first K of the gallery of both
    sides that are of the query's side; without a gap, the share of these rows in the gallery, 0.5
    in the mean of both sides :: GR-CLIP, Li et al. 2025
groups.classes :: labels of the images that are used, at most 5,000
groups.*s :: labelled rows that are used
groups.v_measure :: 2 h c / (h + c), h = 1 - H(label | cluster) / H(label), c with the two swapped,
    of k-means with as many clusters as labels on the rows of both sides, best of ten starts; equals
    the mutual information over the arithmetic mean of both entropies (NMI) :: Rosenberg and
    Hirschberg 2007; scikit-learn
groups.ami :: (I - E[I]) / (mean entropy - E[I]), I the mutual information of labels and clusters,
    E[I] that of random clusters of these sizes; 0 is chance :: Vinh et al. 2010; scikit-learn
groups.ari :: (a - E[a]) / (most - E[a]), a the number of pairs of rows that share both label and
    cluster, most the mean number of pairs that share one; 0 is chance :: Hubert and Arabie 1985;
    scikit-learn
groups.knn.majority :: share of the largest class of the labelled rows
groups.knn.* :: accuracy of the vote of the 10 neighbours of highest cosine on the other side, five
    folds by image; image_to_text is learned from images and tested on texts :: Cover and Hart 1967;
    scikit-learn
sides :: sides that are measured
matrix.*.queries :: rows whose item has a row on the other side
matrix.*.gallery :: rows of the other side in the split
matrix.*.mean_recall :: mean of R@1, R@5 and R@10 in this direction
mean_recall :: mean of R@1, R@5 and R@10 over all directions
subsets.*.best_side :: the side of the highest mean recall with the target, both ways
subsets.*.gain :: mean recall of query_weighted less that of best_single
subsets.*.query_weighted.* :: retrieval of rows t of a side for items of several sides z_m, by
    sum_m w_m t.z_m / |sum_m w_m z_m|, w_m = exp(t.z_m / 0.1), over the sides that an item has;
    from_target: of items for rows; mean_recall: both ways :: SCALAR, arXiv 2609.15335
subsets.*.mean.* :: the same with w_m = 1: the cosine with the mean of the item's sides
subsets.*.sum.* :: the same by the mean of the cosines with the item's sides
subsets.*.best_single.* :: the same by the cosine with one side, the best that an item has in the
    order of their mean recalls with the target
effective_rank.* :: exp of the entropy of the centred rows' singular values over their sum ::
    Roy and Vetterli 2007
*.mean_recall :: mean of R@1, R@5 and R@10 in both directions
*.true_recall@K :: mean over queries of the share of the matches that are among the first K ::
    Manning et al. 2008; mteb's recall_at_k
*.R@K :: share of queries with at least one match among the first K; tied wrong items rank ahead ::
    Karpathy and Fei-Fei 2015; as CLIP_benchmark counts it
*.r_precision :: mean over queries of the share of matches among the first R, R being the query's
    matches :: Manning et al. 2008
*.median_rank :: median over queries of the rank of the best match, from 1 on
*.mean_rank :: mean over queries of the rank of the best match, from 1 on
*.mrr :: mean over queries of 1 / rank of the best match :: Voorhees 1999
*.map :: mean over queries of mean_i i / r_i, r_1 < r_2 < ... being the ranks of its matches ::
    Manning et al. 2008
gap.centroid_distance :: |mean x - mean y| :: Liang et al. 2022
gap.rmg :: p / (p + w): p is the mean of (1 - cos) / 2 over matched pairs, w over the pairs i != j
    inside a modality, averaged over the two; captions of one image are distinct rows :: Schrodi et
    al. 2024
gap.cs_divergence :: log mean k(x, x') + log mean k(y, y') - 2 log mean k(x, y), k(a, b) = exp(-|a -
    b|^2 / (2 bandwidth^2)), diagonals included :: Principe 2010; Yin et al. 2025
gap.mmd :: squared maximum mean discrepancy, mean k(x, x') + mean k(y, y') - 2 mean k(x, y),
    diagonals included :: Gretton et al. 2012
gap.frechet :: |mean x - mean y|^2 + tr(C_x + C_y - 2 (C_x C_y)^(1/2)), of Gaussian fits :: Dowson
    and Landau 1982; Heusel et al. 2017
gap.frechet_parts.centroid :: |mean x - mean y|^2, the square of the centroid distance :: Dowson and
    Landau 1982
gap.frechet_parts.distribution :: tr(C_x + C_y - 2 (C_x C_y)^(1/2)): the Frechet distance of the
    centred sides; both parts add up to gap.frechet :: Dowson and Landau 1982
gap.linear_separability :: balanced held-out accuracy of a regularised linear discriminant of the
    modalities, five folds by image; 0.5 is no gap :: Fisher 1936
gap.alignment :: mean |x - y|^2 over matched pairs :: Wang and Isola 2020
gap.uniformity.cross :: log mean exp(-2 |x_i - y_j|^2) over all i, j :: Wang and Isola 2020
gap.uniformity.* :: log mean exp(-2 |x_i - x_j|^2) over i < j :: Wang and Isola 2020
gap.standard_errors.* :: of a mean kernel over more than 5,000 rows per side, estimated from the
    kernels of all rows with landmarks (Nystrom, corrected by the mean of its residual): spread of
    the estimates with a block of landmarks left out :: Williams and Seeger 2001; Tukey 1958
gap.effective_rank.* :: exp of the entropy of the centred rows' singular values over their sum ::
    Roy and Vetterli 2007
gap.spectrum.* :: singular values of the covariance over their sum, the 64 largest: shares of the
    variance
distribution.frechet :: |mean x - mean y|^2 + tr(C_x + C_y - 2 (C_x C_y)^(1/2)), covariances over n
    - 1, of the encoder's embeddings, not normalised :: Heusel et al. 2017, with the named encoder
    in place of Inception
distribution.frechet_unit :: the same for unit rows :: Dowson and Landau 1982; Heusel et al. 2017
distribution.cmmd :: 1000 (mean k(x, x') + mean k(y, y') - 2 mean k(x, y)) of unit rows, k(a, b) =
    exp(-|a - b|^2 / (2 10^2)), diagonals included :: Jayasumana et al. 2024
images :: the real images
generated :: the generated images
encoder :: encoder of both sets
zero_shot.top1 :: share of images whose class vector, the normalised mean of its normalised prompts,
    is the nearest :: Radford et al. 2021; as CLIP_benchmark
zero_shot.top5 :: share of images whose class is among the five nearest; null below five classes ::
    Radford et al. 2021; as CLIP_benchmark
zero_shot.mean_per_class_recall :: mean over classes with images of their top-1 :: Radford et al.
    2021; as CLIP_benchmark
zero_shot.* :: counts
*.column :: column of the images that the figures use
features :: evaluated feature set
adapter :: adapter applied to the features; null for none
split :: evaluated rows of the features
fitted_on :: rows that a baseline was fitted on
fingerprints.* :: SHA-256 of the features' content and of the adapter's weights
parameters :: number of parameters of the adapter
bandwidth :: of the kernel k in cs_divergence and mmd
corrected.csls :: retrieval by 2 cos(x, y) - r(x) - r(y), r being the mean cosine to the 10 nearest
    of the other modality, among the evaluated rows :: Conneau et al. 2018
corrected.inverted-softmax :: retrieval by exp(30 cos(q, g)) over its sum for all evaluated queries
    :: Smith et al. 2017; 30 as in MUSE
corrected.centre :: retrieval by cosines after the mean of its modality is subtracted from each
    evaluated row :: Suzuki et al. 2013
"""


_ENTRIES = (line.split(" :: ") for line in re.sub(r"\n +", " ", _TEXT.strip()).splitlines())
EXPLANATIONS = {place: (formula, "".join(source)) for place, formula, *source in _ENTRIES}


def explain(document: dict[str, Any]) -> dict[str, dict[str, str]]:
    """Explain the figures of a document, ``{place: {"name", "formula", "source"}}`` in its order.

    "name" is what tables and pages call a figure; entries that are not figures have none.

    Raises:
        KeyError: a figure has no explanation.
    """
    if "matrix" in document:  # of any pair of sides, the figures of a gap are those of two
        document = document | {"gap": next(iter(next(iter(document["gap"].values())).values()))}
    found: dict[str, str] = {}  # the first place of each pattern
    for place in _places(document):
        if place.startswith("corrected."):
            found.setdefault(".".join(place.split(".")[:2]), "")
        found.setdefault(pattern_of(place), place)
    return {
        pattern: {
            **({"name": name} if (name := _name(place, pattern)) else {}),
            "formula": EXPLANATIONS[pattern][0],
            "source": EXPLANATIONS[pattern][1],
        }
        for pattern, place in found.items()
    }


def _name(place: str, pattern: str) -> str | None:
    """Return the name of the figures that a pattern explains, None if they are not figures."""
    if pattern.startswith("subsets."):
        return pattern.split(".")[2].replace("_", " ")
    try:
        label = figure_of(place).label
    except KeyError:
        return None
    label = re.sub(r"@\d+", "@K", label)
    return label.partition(",")[0] if pattern.endswith(".*") else label


def pattern_of(place: str) -> str:
    """Find the key of `EXPLANATIONS` for a place in a document, or raise KeyError."""
    plain = re.sub(r"@\d+$", "@K", re.sub(r"^(before|baselines\.[^.]+)\.", "", place))
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
