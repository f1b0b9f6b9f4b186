"""What each part of the method does: one part at a time taken away, added or exchanged.

Usage::

    python tests/benchmarks/openclipart/ablation.py --work DIR [--seeds 3] [--json FILE]
        [--only GROUP]

DIR is the folder of ``prepare.py``; the table "tokens" needs ``tokens.py`` besides. Every table has
its baseline, to which differences are paired bootstrap differences over the test drawings, of the
mean over seeds. All but what a row names is the default of ``csalign train``, but for two things
that make the whole affordable: 20 epochs in place of 40, and the lighter adapter "mlp" in place of
"glu". Tables "scale 100" have CLIP's logit scale, which is where a gap opens, from a random start
if nothing else is said. Where a row has several weights (lambda) to choose from, each is tried in
120 steps, and the choice is made on the split val: of those whose mean recall is within one point
of the best, the one with the nearest centroids. The test split is read for the table alone.
Training makes its matrix products in bfloat16 where the processor can; ``peers.py`` has a row that
shows what this changes.

Seeds are run one after the other for all rows, and finished runs kept in DIR/runs.jsonl, from which
an interrupted run, or one with more seeds, goes on; delete it after changing csalign's code.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from measuring import TRAIN_SPLIT, Bench, Ledger, Row, print_table
from run import INFONCE, SCALE_100

from csalign.core import outputs
from csalign.core.enums import Modality
from csalign.features.reader import FeatureSet
from csalign.features.writer import FeatureWriter, Rows

SEARCH_SEED = 1_000
TRIAL = {"steps": 120, "validations": 8}
LIGHT = {"steps": 225, "adapter": "mlp"}  # 20 epochs
NEARLY_AS_GOOD = 0.01  # of mean recall on 500 drawings, about half a standard error
PAIRS_KEPT = 1_500


@dataclass(frozen=True)
class Variant:
    """A row to be.

    Attributes:
        settings: what differs from the default.
        weights: values of lambda to choose among on validation; none to leave it.
    """

    settings: Mapping[str, Any]
    weights: Sequence[float] = ()


@dataclass(frozen=True)
class Group:
    """A table.

    Attributes:
        variants: rows by name.
        baseline: which of them the others are compared with.
        features: finds or makes the feature set in the folder of ``prepare.py``.
    """

    variants: Mapping[str, Variant]
    baseline: str
    features: Callable[[Path], Path] = lambda work: work / "features"


# About alike in what they add to the loss: the Gaussian term is large, MMD small.
WEIGHTS = {
    "cs": (0.1, 1.0, 10.0),
    "mmd": (0.1, 1.0, 10.0),
    "gaussian-kl": (0.001, 0.01, 0.1),
    "sinkhorn": (0.1, 1.0, 10.0),
    "pairs-mse": (0.1, 1.0, 10.0),
}
AT_100 = {**INFONCE, **SCALE_100}
CS = {"cs_weight": 1.0, "bandwidth": 0.5}


def divergences(settings: Mapping[str, Any]) -> dict[str, Variant]:
    """Each divergence in its turn, and none."""
    none = {"none": Variant({**settings, "cs_weight": 0.0})}
    return none | {
        name: Variant({**settings, "divergence": name}, weights)
        for name, weights in WEIGHTS.items()
    }


def unpaired(settings: Mapping[str, Any]) -> dict[str, Variant]:
    """No CS, CS on the pairs alone, and CS on the rows without a partner too."""
    return {
        "none": Variant({**settings, "cs_weight": 0.0}),
        "CS on the pairs": Variant({**settings, **CS, "unpaired_ratio": 0.0}),
        "CS on all rows": Variant({**settings, **CS}),
    }


def few_pairs(work: Path) -> Path:
    """The same rows, but of the images to train on all save 1,500 have lost their texts."""
    out = work / f"features-{PAIRS_KEPT}-pairs"
    if out.exists():
        return out
    features = FeatureSet.open(work / "features")
    columns = {
        side: {
            name: features.table(side).column(name).to_pylist()
            for name in ("id", "split", *(("image_id", "caption") if side == "text" else ()))
        }
        for side in Modality
    }
    images, texts = columns[Modality.IMAGE], columns[Modality.TEXT]
    trained = [
        image
        for image, split in zip(images["id"], images["split"], strict=True)
        if split in TRAIN_SPLIT.split(",")
    ]
    lost = set(np.random.default_rng(0).permutation(trained)[PAIRS_KEPT:].tolist())
    texts["image_id"] = [None if image in lost else image for image in texts["image_id"]]
    encoders = {side: features.table(side).encoder for side in Modality}
    with (
        outputs.atomic_folder(out) as folder,
        FeatureWriter(folder, encoders, features.manifest.dtype) as writer,
    ):
        for side in Modality:
            writer.write(side, Rows(columns[side], features.table(side).embeddings()))
    return out


GROUPS = {
    "ladder": Group(
        {
            "InfoNCE on titles, random start": Variant(
                {"init": "random", "cs_weight": 0.0, "other_captions": 0.0}
            ),
            "+ CS (lambda 0.1)": Variant({"init": "random", "other_captions": 0.0}),
            "+ canonical start": Variant({"other_captions": 0.0}),
            "+ other captions": Variant({}),
            "+ GLU in place of the MLP: the default": Variant({"adapter": "glu"}),
            "without CS": Variant({"cs_weight": 0.0}),
            "closed form alone": Variant({"steps": 0}),
            "a caption drawn anew, not the first": Variant(
                {"captions": "sample", "other_captions": 0.0}
            ),
            "all captions at once": Variant({"captions": "all"}),
            "a running average of the weights": Variant({"average": 0.99}),
            "shared captions not weighted down": Variant({"caption_weights": False}),
            "no noise on the inputs": Variant({"noise": 0.0}),
        },
        "+ other captions",
    ),
    "scale 100": Group(divergences(AT_100), "none"),
    "scale 100, canonical start": Group(
        {
            "none": Variant({"logit_scale": 100.0, "cs_weight": 0.0}),
            "cs": Variant({"logit_scale": 100.0}, WEIGHTS["cs"]),
        },
        "none",
    ),
    "adapters": Group(
        {
            "mlp": Variant({}),
            "linear": Variant({"adapter": "linear"}),
            "glu (the default)": Variant({"adapter": "glu"}),
            "transformer, no tokens": Variant({"adapter": "transformer"}),
            "images frozen (identity), mlp on texts": Variant({"image_adapter": "identity"}),
            "low-rank on texts, mlp on images": Variant({"text_adapter": "low-rank"}),
        },
        "mlp",
    ),
    "losses": Group(
        {
            "InfoNCE": Variant({}),
            "sigmoid, from scale 10": Variant(
                {"pairwise": "sigmoid", "logit_scale": 10.0, "learn_scale": True}
            ),
            "mixing, Beta(1, 1)": Variant({"mixing": 1.0}),
            "label smoothing 0.1": Variant({"label_smoothing": 0.1}),
        },
        "InfoNCE",
    ),
    "unpaired": Group(unpaired({}), "none", few_pairs),
    "unpaired, scale 100": Group(unpaired(AT_100), "none", few_pairs),
    "scale 7": Group(divergences({}), "none"),
    "tokens": Group(
        {
            "no token term": Variant({}),
            "token term, mu 0.1": Variant({"token_weight": 0.1}),
            "token term, mu 1": Variant({"token_weight": 1.0}),
        },
        "no token term",
        lambda work: work / "features-tokens",
    ),
}


def main() -> None:
    """Train, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also write all figures here")
    parser.add_argument("--only", action="append", choices=GROUPS, help="this table; repeatable")
    arguments = parser.parse_args()
    groups = {name: GROUPS[name] for name in arguments.only or GROUPS}
    ledger = Ledger(arguments.work / "runs.jsonl")
    benches = {
        name: Bench(group.features(arguments.work), ledger) for name, group in groups.items()
    }
    tables: dict[str, list[Row]] = {}
    for seeds in range(1, arguments.seeds + 1):
        for name, group in groups.items():
            tables[name] = rows_of(benches[name], group, seeds)
            print(f"\n{name}, seeds: {seeds}")
            print_table(tables[name], tables[name][list(group.variants).index(group.baseline)])
    if arguments.json:
        document = {
            table: {
                row.name: [
                    {key: value for key, value in run.items() if key != "resamples"}
                    for run in row.runs
                ]
                for row in rows
            }
            for table, rows in tables.items()
        }
        arguments.json.write_text(json.dumps(document, indent=2))


def rows_of(bench: Bench, group: Group, seeds: int) -> list[Row]:
    """A table with so many seeds."""
    rows = []
    for name, variant in group.variants.items():
        settings, weight = {**LIGHT, **variant.settings}, None
        if variant.weights:
            weight = settings["cs_weight"] = best_weight(bench, variant)
        shown = name if weight is None else f"{name}, lambda {weight:g}"
        rows.append(bench.tested(settings, seeds, shown))
    return rows


def best_weight(bench: Bench, variant: Variant) -> float:
    """Of the weights with about the best recall on validation, the one with the least gap."""
    scores = {
        weight: bench.validated(
            {**LIGHT, **variant.settings, **TRIAL, "cs_weight": weight}, SEARCH_SEED
        )["validation"]
        for weight in variant.weights
    }
    enough = max(score["mean_recall"] for score in scores.values()) - NEARLY_AS_GOOD
    good = [weight for weight, score in scores.items() if score["mean_recall"] >= enough]
    return min(good, key=lambda weight: scores[weight]["centroid_distance"])


if __name__ == "__main__":
    main()
