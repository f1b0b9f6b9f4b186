"""A training step runs on a GPU without making the host wait."""

from pathlib import Path
from typing import Any

import pytest
import torch

from csalign.training.config import OptimizerOptions
from csalign.training.network.loop import Trainer
from csalign.training.network.step import WARM_UP, Stepper
from tests.cuda.pretend import pretended
from tests.cuda.runs import trainer_of, write_features

STEPS = 2  # a median bandwidth is computed in the first and kept in the second
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "tied": {"bandwidth": "tied", "learn_scale": True, "average": 0.9},
    "several": {"bandwidth": (0.5, 1.0), "other_captions": 0.5, "captions": "first"},
    "all captions": {"captions": "all", "divergence": "gaussian-kl"},
    "sigmoid": {"pairwise": "sigmoid", "divergence": "sinkhorn", "adapter": "mlp"},
    "uniform": {"pairwise": "align-uniform", "divergence": "mmd", "adapter": "low-rank"},
    "mixed": {"mixing": 0.5, "captions": "first", "cs_weight": "auto"},
    "rounded": {"precision": "bfloat16"},
    "sub-batches": {"sub_batch": 16, "unpaired_negatives": True},
    "tokens": {"token_weight": 0.1},
    "transformer": {"token_weight": 0.1, "adapter": "transformer", "layers": 1},
}


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_features(tmp_path_factory.mktemp("features"))


def steps(trainer: Trainer, count: int = STEPS) -> None:
    for _ in range(count):
        trainer._train_step(next(trainer._loader))


@pytest.mark.parametrize("name", OPTIONS)
def test_a_step_reads_nothing(features: Path, name: str) -> None:
    with pretended() as reads:
        trainer = trainer_of(features, device="cuda", **OPTIONS[name])
        reads.clear()
        steps(trainer)

    assert {p.device.type for p in trainer.adapter.parameters()} == {"cuda"}
    assert not reads.lines
    assert not reads.uploads


@pytest.mark.skipif(torch.cuda.is_available(), reason="steps can be recorded here")
def test_a_step_to_be_recorded_reads_nothing_and_is_taken_where_it_cannot(
    features: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pretended() as reads:
        trainer = trainer_of(features, device="cuda", learn_scale=True, bandwidth="tied")
        options = OptimizerOptions(compile=True)  # but not of the adapters
        trainer._stepper = Stepper(trainer.adapter, trainer.loss, options, trainer.device)
        reads.clear()
        steps(trainer, WARM_UP + 1)  # the first measures the kernel's diagonal
        assert not caplog.records
        steps(trainer, 2)

    assert "cannot be recorded as CUDA graphs" in caplog.text
    assert not reads.lines
    assert not reads.uploads
