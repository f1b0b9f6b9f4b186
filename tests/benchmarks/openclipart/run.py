"""Train every row of a table on the Open Clip Art set, hand-made baselines first, and print it.

Usage::

    python tests/benchmarks/openclipart/run.py --work DIR [--seeds 3] [--json FILE]

DIR is the folder of ``prepare.py``. Every choice was made on the validation splits "val" and
"val2"; the test split is only measured here. `±` is the standard deviation over seeds (start,
order, captions, dropout); in brackets the bootstrap standard error over test images. Differences
are to the first row, on the same images. Finished runs are kept in DIR/runs.jsonl; delete it after
changing csalign's code. ``peers.py`` tunes the baselines instead, ``ablation.py`` takes the method
apart.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from closed import Fitted, moments_of
from measuring import TRAIN_SPLIT, Bench, Ledger, Row, print_table

from csalign.evaluation.measure import Evaluation
from csalign.features.join import load_rows
from csalign.features.reader import FeatureSet
from csalign.training.closed_forms.settings import POWERS, ridge_at

# An MLP as a CLIP recipe would train it: random start, a caption drawn anew each epoch, a learned
# scale. The learning rate was chosen on validation among 5e-4, 1e-3 and 2e-3.
INFONCE: dict[str, Any] = {
    "adapter": "mlp",
    "init": "random",
    "learn_scale": True,
    "noise": 0.0,
    "caption_weights": False,
    "captions": "sample",
    "other_captions": 0.0,
    "learning_rate": 2e-3,
    "cs_weight": 0.0,
}
# CLIP's scale. Longer and faster training narrows the gap by itself, to 0.21 after 40 epochs at
# 2e-3, where CS still takes it to 0.05.
SCALE_100 = {"logit_scale": 100.0, "steps": 225, "learning_rate": 1e-3}
CS = {"cs_weight": 1.0, "bandwidth": 0.5}
ROWS: dict[str, dict[str, Any]] = {
    "InfoNCE MLP, scale 14.3": {**INFONCE, "logit_scale": 14.3},
    "+ CS (lambda 1, sigma 0.5)": {**INFONCE, "logit_scale": 14.3, **CS},
    "the same on titles alone": {**INFONCE, "logit_scale": 14.3, "captions": "first"},
    "InfoNCE MLP, scale 100, 20 epochs": {**INFONCE, **SCALE_100},
    "+ CS (lambda 1, sigma 0.5) ": {**INFONCE, **SCALE_100, **CS},
    "csalign train --steps 0 (closed form)": {"steps": 0},
    "csalign train --cs-weight 0": {"cs_weight": 0.0},
    "csalign train (the default)": {},
}
CCA_WIDTH = 256


def main() -> None:
    """Train, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also write all figures here")
    arguments = parser.parse_args()
    bench = Bench(arguments.work / "features", Ledger(arguments.work / "runs.jsonl"), exact=True)
    table = [bench.tested(settings, arguments.seeds, name) for name, settings in ROWS.items()]
    table.append(plain_cca(bench))
    print_table(table, table[0])
    if arguments.json:
        documents = {
            row.name: [
                {key: value for key, value in run.items() if key != "resamples"} for run in row.runs
            ]
            for row in table
        }
        arguments.json.write_text(json.dumps(documents, indent=2))


def plain_cca(bench: Bench) -> Row:
    """CCA on titles without weights or square roots, on the grid of ``csalign train``."""

    def make() -> Evaluation:
        val = load_rows(FeatureSet.open(bench.features), "val")
        moments = moments_of(bench.features, TRAIN_SPLIT, "first")
        fitted = [
            Fitted(form)
            for ridge in map(ridge_at, range(-4, 4))
            for form in moments.cca(ridge=ridge, powers=POWERS, width=CCA_WIDTH)
        ]
        best = max(fitted, key=lambda form: tuple(form.score(val).values()))
        return best.measure(bench.features, "test")

    return bench.known("plain CCA", {"width": CCA_WIDTH}, make)


if __name__ == "__main__":
    main()
