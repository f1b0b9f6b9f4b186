"""csalign's untuned default against other methods' recipes, each tuned on validation.

Usage::

    python tests/benchmarks/openclipart/peers.py --work DIR [--trials 12] [--seeds 3] [--json FILE]

DIR is the folder of ``prepare.py``. Every peer gets the same number of trials: the first is the
published setting scaled to this size, the others are drawn at random, by a fixed seed, from a
space around it. A trial is scored by the mean recall on the split val, which also picks the best
step of a run, as it does for csalign. The best trial is then trained with other seeds than the
search's and measured on the test split, which nothing else reads. Trials take 120 steps (ten
epochs), all other runs csalign's 40 epochs, stopped after 10 of 20 validations without a better
one. AdamW, batches of 512, gradients clipped to norm 1 and a cosine are common to all that are
trained, and all train on the splits train and val2. Training makes its matrix products in bfloat16
where the processor can; a last row shows csalign's default in float32.

The facts of the recipes are from papers and public code; the code here is ours.

* InfoNCE MLP on both sides: what a CLIP recipe trains on two frozen encoders, csalign's own MLP
  from a random start, with a learned scale; its first trial is the baseline of ``run.py``.
* InfoNCE MLP on texts: ShareLock (Ruthardt et al. 2024, arXiv 2410.07173; ``configs`` and
  ``models/projection.py`` of its repository). Images stay as they are; the texts' head is 3 x
  [linear 4096, batch norm, ReLU, dropout 0.2], linear; CLIP's loss at the fixed scale 14.29; Adam
  1e-3, weight decay 1e-4, batches of 1,024, 3 % warm-up. Here it is 1,024 wide.
* SAIL (Zhang et al. 2024, arXiv 2412.04616; ``model/linear.py``, ``model/loss.py`` of
  github.com/lezhang7/SAIL). W3 (ReLU6(W1 h) * W2 h) with h the layer norm, 8 times as wide, to
  1,024; sigmoid loss from scale 20 and bias -10, both learned; a second caption as further
  positives; Lion 1e-5, weight decay 1e-4, batches of 32,768. Here 1,024 hidden, to 512; 1e-3, since
  AdamW's rates are some ten times Lion's and the steps are few. The loss is divided by rows, not
  by pairs, a factor that AdamW does not see.
* FuseMix (Vouitsis et al. 2024, arXiv 2312.10144; ``fusion_models`` of its repository). Residual
  blocks [layer norm, linear x 4, GELU, dropout 0.6, linear], 4 of them, layer norm and linear to
  512 on both sides; pairs mixed by one w ~ Beta(1, 1) a batch; InfoNCE from the temperature 0.07,
  learned; AdamW 1e-3, weight decay 0.1. Here 2 blocks, 512 hidden, and each pair is mixed with a
  random other, not with one of the other half of the batch.
* CSA (Li et al. 2024, arXiv 2410.07610): canonical variates, cut to s directions and made unit,
  their products weighted by the canonical correlations; s 25 to 700 by data set, hardly any ridge.
  "CCA" is the same without the weights (Hotelling 1936).
* Procrustes: principal components, as many of both sides, then the best rotation (Schoenemann
  1966; for embeddings Conneau et al. 2017, arXiv 1710.04087).
* Ridge regression of one side on the other, either way (Shigeto et al. 2015, arXiv 1507.00825, who
  show that the direction matters).

Finished runs are kept in DIR/runs.jsonl, from which an interrupted run goes on; delete it after
changing csalign's code.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from closed import Fit, Fitted, fit_cca, fit_csa, fit_procrustes, fit_ridge, moments_of
from measuring import TRAIN_SPLIT, Bench, Ledger, Row, print_table

from csalign.features.join import load_rows
from csalign.features.reader import FeatureSet

SEARCH_SEED = 1_000
TRIAL = {"steps": 120, "validations": 8}
Draw = Callable[[np.random.Generator], Any]
Space = Mapping[str, Draw]


def between(low: float, high: float) -> Draw:
    """Log-uniform, in two digits."""
    return lambda rng: float(f"{np.exp(rng.uniform(np.log(low), np.log(high))):.2g}")


def whole(low: int, high: int) -> Draw:
    """Log-uniform whole numbers."""
    return lambda rng: round(float(np.exp(rng.uniform(np.log(low), np.log(high)))))


def one_of(*values: Any) -> Draw:
    """Any of the values, alike."""
    return lambda rng: values[int(rng.integers(len(values)))]


@dataclass(frozen=True)
class Peer:
    """A method and what its search may change.

    Attributes:
        published: the first trial.
        space: draws the others.
        fixed: settings of `csalign.train` that stay.
        fit: makes a closed form; None where it is trained.
    """

    published: Mapping[str, Any]
    space: Space
    fixed: Mapping[str, Any] = field(default_factory=dict)
    fit: Fit | None = None

    def trials(self, count: int) -> list[dict[str, Any]]:
        """Settings to try, the published first."""
        rng = np.random.default_rng(SEARCH_SEED)
        drawn = [{key: draw(rng) for key, draw in self.space.items()} for _ in range(count - 1)]
        return [dict(self.published), *drawn]


# A random start, and none of csalign's own devices.
PLAIN = {
    "adapter": "mlp",  # where a peer names none
    "init": "random",
    "cs_weight": 0.0,
    "noise": 0.0,
    "caption_weights": False,
    "other_captions": 0.0,
}
CAPTIONS = one_of("first", "sample")
RATE = between(3e-4, 3e-3)
RIDGE = between(1e-4, 10.0)
PEERS = {
    "CCA": Peer(
        {"captions": "sample", "ridge": 1e-4, "width": 200},
        {"captions": CAPTIONS, "ridge": RIDGE, "width": whole(25, 384)},
        fit=fit_cca,
    ),
    "CSA": Peer(
        {"captions": "sample", "ridge": 1e-4, "width": 200},
        {"captions": CAPTIONS, "ridge": RIDGE, "width": whole(25, 384)},
        fit=fit_csa,
    ),
    "Procrustes": Peer(
        {"captions": "sample", "width": 384},
        {"captions": CAPTIONS, "width": whole(25, 384)},
        fit=fit_procrustes,
    ),
    "ridge regression": Peer(
        {"captions": "sample", "ridge": 1.0, "to": "image", "centre": True},
        {
            "captions": CAPTIONS,
            "ridge": between(1e-2, 100.0),
            "to": one_of("image", "text"),
            "centre": one_of(True, False),
        },
        fit=fit_ridge,
    ),
    "InfoNCE MLP on both sides": Peer(
        {
            "captions": "sample",
            "hidden": 1024,
            "width": 256,
            "dropout": 0.3,
            "logit_scale": 14.29,
            "learning_rate": 2e-3,
            "weight_decay": 0.01,
        },
        {
            "captions": CAPTIONS,
            "hidden": one_of(512, 1024),
            "width": one_of(128, 256, 512),
            "dropout": one_of(0.0, 0.2, 0.4, 0.6),
            "logit_scale": between(5, 40),
            "learning_rate": RATE,
            "weight_decay": one_of(1e-4, 1e-2, 1e-1),
        },
        {**PLAIN, "adapter": "mlp", "learn_scale": True},
    ),
    "InfoNCE MLP on texts (ShareLock)": Peer(
        {
            "captions": "sample",
            "layers": 3,
            "hidden": 1024,
            "dropout": 0.2,
            "logit_scale": 14.29,
            "learning_rate": 1e-3,
            "weight_decay": 1e-4,
        },
        {
            "captions": CAPTIONS,
            "layers": one_of(1, 2, 3),
            "hidden": one_of(512, 1024),
            "dropout": one_of(0.0, 0.2, 0.4, 0.6),
            "logit_scale": between(5, 40),
            "learning_rate": RATE,
            "weight_decay": one_of(1e-4, 1e-2, 1e-1),
        },
        {**PLAIN, "image_adapter": "identity", "text_adapter": "heads:ShareLock", "warmup": 0.03},
    ),
    "sigmoid + GLU (SAIL)": Peer(
        {
            "captions": "sample",
            "other_captions": 1.0,
            "hidden": 1024,
            "width": 512,
            "dropout": 0.0,
            "logit_scale": 20.0,
            "learning_rate": 1e-3,
            "weight_decay": 1e-4,
        },
        {
            "captions": CAPTIONS,
            "other_captions": one_of(0.0, 0.3, 1.0),
            "hidden": one_of(512, 1024),
            "width": one_of(256, 512, 1024),
            "dropout": one_of(0.0, 0.3, 0.6),
            "logit_scale": between(5, 40),
            "learning_rate": RATE,
            "weight_decay": one_of(1e-4, 1e-2, 1e-1),
        },
        {**PLAIN, "adapter": "heads:Sail", "pairwise": "sigmoid", "learn_scale": True},
    ),
    "InfoNCE + mixing (FuseMix)": Peer(
        {
            "captions": "sample",
            "mixing": 1.0,
            "layers": 2,
            "hidden": 512,
            "width": 512,
            "dropout": 0.6,
            "logit_scale": 14.29,
            "learning_rate": 1e-3,
            "weight_decay": 0.1,
        },
        {
            "captions": CAPTIONS,
            "mixing": one_of(0.2, 0.5, 1.0, 2.0),
            "layers": one_of(1, 2),
            "hidden": one_of(512, 1024),
            "width": one_of(256, 512),
            "dropout": one_of(0.0, 0.2, 0.4, 0.6),
            "logit_scale": between(5, 40),
            "learning_rate": RATE,
            "weight_decay": one_of(1e-4, 1e-2, 1e-1),
        },
        {**PLAIN, "adapter": "heads:FuseMix", "learn_scale": True},
    ),
}
DEFAULT = "csalign train (the default, untuned)"
TUNED = "csalign train, tuned likewise"
EXACT = "csalign train (the default), in float32"
OWN = Peer(
    {},
    {
        "learning_rate": RATE,
        "logit_scale": between(4, 20),
        "dropout": one_of(0.0, 0.2, 0.3, 0.5),
        "noise": one_of(0.0, 0.25, 0.5, 0.75),
        "other_captions": one_of(0.0, 0.3, 0.6, 1.0),
        "cs_weight": one_of(0.0, 0.1, 0.3, 1.0),
        "width": one_of(128, 256, 384),
        "hidden": one_of(512, 1024, 2048),
    },
)


def main() -> None:
    """Search, train, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--trials", type=int, default=12)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also write all figures here")
    arguments = parser.parse_args()
    bench = Bench(arguments.work / "features", Ledger(arguments.work / "runs.jsonl"))
    chosen: dict[str, Any] = {}
    rows = {DEFAULT: bench.tested({}, arguments.seeds, DEFAULT)}
    for name, peer in (*PEERS.items(), (TUNED, OWN)):
        chosen[name] = best_trial(bench, peer, arguments.trials)
        rows[name] = tested(bench, name, peer, chosen[name]["trial"], arguments.seeds)
        print_table(list(rows.values()), rows[DEFAULT])
    rows[EXACT] = replace(bench, exact=True).tested({}, arguments.seeds, EXACT)
    print_table(list(rows.values()), rows[DEFAULT])
    for name, found in chosen.items():
        print(f"* {name}: {found}")
    if arguments.json:
        document = {
            name: {"chosen": chosen.get(name), "runs": [_plain(run) for run in row.runs]}
            for name, row in rows.items()
        }
        arguments.json.write_text(json.dumps(document, indent=2))


def best_trial(bench: Bench, peer: Peer, count: int) -> dict[str, Any]:
    """The trial of the best mean recall on validation, then MRR; and the scores of all."""
    scores = [_score(bench, peer, trial) for trial in peer.trials(count)]
    best = max(range(count), key=lambda i: (scores[i]["mean_recall"], scores[i]["mrr"]))
    return {
        "trial": peer.trials(count)[best],
        "number": best,
        "validation": [round(score["mean_recall"], 4) for score in scores],
    }


def tested(bench: Bench, name: str, peer: Peer, trial: dict[str, Any], seeds: int) -> Row:
    """A trial's settings on the test split."""
    if peer.fit is None:
        return bench.tested({**peer.fixed, **trial}, seeds, name)
    return bench.known(
        name, trial, lambda: _fit(bench, peer, trial).measure(bench.features, "test")
    )


def _score(bench: Bench, peer: Peer, trial: dict[str, Any]) -> dict[str, float]:
    if peer.fit is not None:
        return _fit(bench, peer, trial).score(load_rows(FeatureSet.open(bench.features), "val"))
    settings = {**peer.fixed, **trial, **TRIAL}
    score: dict[str, float] = bench.validated(settings, SEARCH_SEED)["validation"]
    return score


def _fit(bench: Bench, peer: Peer, trial: dict[str, Any]) -> Fitted:
    assert peer.fit is not None
    return peer.fit(moments_of(bench.features, TRAIN_SPLIT, trial["captions"]), trial)


def _plain(run: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in run.items() if key != "resamples"}


if __name__ == "__main__":
    main()
