"""A GPU gives what the CPU gives; ``pytest -m cuda`` where there is one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from csalign.adapters.model import Adapter, build_side
from csalign.core.enums import DivergenceName, Modality, PairwiseName
from csalign.encoders.base import EncoderOptions, load_encoders
from csalign.metrics.retrieval import rank_both_ways
from csalign.objective.loss import Objective, TokenBatch
from csalign.training.config import OptimizerOptions
from csalign.training.network.loop import Trainer
from csalign.training.network.step import Stepper
from tests.cuda.pretend import HostReads
from tests.cuda.runs import trainer_of, write_features
from tests.cuda.test_adapters import SHAPES, WIDTH

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]
CLOSE: dict[str, Any] = {"rtol": 1e-3, "atol": 1e-5}
STEPS = 10


@pytest.fixture(autouse=True)
def exact_products() -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_features(tmp_path_factory.mktemp("features"))


def on_both(compute: Callable[[str], list[Any]]) -> None:
    """Compare what is computed on the CPU and on the GPU, from the same random numbers."""
    own, found = (compute(device) for device in ("cpu", "cuda"))
    for a, b in zip(own, found, strict=True):
        torch.testing.assert_close(torch.as_tensor(b).cpu(), torch.as_tensor(a), **CLOSE)


@pytest.mark.parametrize("count", [40, 300, 5_000])
@pytest.mark.parametrize("divergence", DivergenceName)
@pytest.mark.parametrize("pairwise", PairwiseName)
def test_the_objective(pairwise: PairwiseName, divergence: DivergenceName, count: int) -> None:
    if count > 300 and divergence is DivergenceName.SINKHORN:
        pytest.skip("takes half a minute on a CPU")
    objective = Objective(pairwise=pairwise, divergence=divergence, weight=0.1, token_weight=0.1)

    def compute(device: str) -> list[Any]:
        rng = torch.Generator().manual_seed(0)
        x, y = (torch.randn(count, 32, generator=rng).to(device).requires_grad_() for _ in range(2))
        tokens = [torch.randn(9, 6, 32, generator=rng).to(device) for _ in range(2)]
        masks = [(torch.rand(9, 6, generator=rng) > 0.4).to(device) for _ in range(2)]
        scale = torch.tensor(3.0, device=device, requires_grad=True)
        parts = objective(
            x,
            y,
            logit_scale=scale.exp(),
            sigma=torch.tensor(0.6, device=device),
            tokens=TokenBatch(*tokens, *masks),
        )
        parts.total.backward()
        assert x.grad is not None
        assert y.grad is not None
        return [*parts[:4], count * x.grad, count * y.grad, torch.as_tensor(scale.grad or 0.0)]

    on_both(compute)


@pytest.mark.parametrize("name", SHAPES)
def test_adapters(name: str) -> None:
    torch.manual_seed(0)
    adapter = Adapter.of_sides({side: build_side(SHAPES[name]) for side in Modality})
    rows = np.random.default_rng(0).normal(size=(70, WIDTH)).astype(np.float16)

    def compute(device: str) -> list[Any]:
        side = adapter.to(device).image
        side.zero_grad()
        found = side(torch.from_numpy(rows).to(device))
        if found.requires_grad:
            found.square().sum().backward()
        gradients = [p.grad.clone() for p in side.parameters() if p.grad is not None]
        return [adapter.embed("image", rows), *gradients]

    on_both(compute)


@pytest.mark.parametrize("options", [{}, {"bandwidth": "tied", "learn_scale": True}])
def test_training_steps(features: Path, options: dict[str, Any]) -> None:
    def compute(device: str) -> list[Any]:
        torch.manual_seed(0)
        trainer = trainer_of(features, device=device, dropout=0.0, noise=0.0, **options)
        for _ in range(STEPS):
            trainer._train_step(next(trainer._loader))
        return [*trainer.adapter.state_dict().values()]

    on_both(compute)


@pytest.mark.parametrize("options", [{}, {"bandwidth": "tied", "learn_scale": True}])
@pytest.mark.parametrize("compiles", [False, True])
def test_recorded_steps(features: Path, options: dict[str, Any], compiles: bool) -> None:
    """With noise and dropout, whose random numbers are others in a compiled adapter."""
    options = options | ({"dropout": 0.0, "noise": 0.0} if compiles else {})
    found = []
    for records in (False, True):
        torch.manual_seed(0)
        values = options | {"device": "cuda", "compile": records and compiles}
        trainer = trainer_of(features, **values)
        if records and not compiles:
            recorded = OptimizerOptions(compile=True)
            trainer._stepper = Stepper(trainer.adapter, trainer.loss, recorded, trainer.device)
        for _ in range(2 * STEPS + 5):
            trainer._train_step(next(trainer._loader))
        lines, fault = trainer._figures.read({"step": 0, "all": torch.zeros((), device="cuda")})
        assert not fault
        found.append([line["loss"] for line in lines])
    recorder = trainer._stepper._recorder

    assert recorder is not None
    assert recorder._recorded
    assert not recorder._failed
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert found[1] == pytest.approx(found[0], rel=1e-2)


def test_the_host_reads_nothing_between_logs(features: Path) -> None:
    trainer: Trainer = trainer_of(features, device="cuda")
    trainer._train_step(next(trainer._loader))
    with HostReads(device="cuda") as reads:
        for _ in range(STEPS):
            trainer._train_step(next(trainer._loader))

    assert not reads.lines
    assert not reads.uploads


def test_ranks() -> None:
    rng = np.random.default_rng(0)
    images, texts = (rng.normal(size=(n, 16)).astype(np.float32) for n in (700, 1_500))
    owners = rng.integers(-1, 700, 1_500)
    own, found = (
        rank_both_ways(images, texts, owners, torch.device(name)) for name in ("cpu", "cuda")
    )

    for mine, theirs in zip(own, found, strict=True):
        assert np.mean(mine.first != theirs.first) < 0.01  # scores that nearly tie
        np.testing.assert_allclose(theirs.summary()["mrr"], mine.summary()["mrr"], rtol=1e-4)


def test_embeddings(tiny_clip: tuple[Path, Path]) -> None:
    spec = f"open_clip:{tiny_clip[0]}+{tiny_clip[1]}"
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))

    def compute(device: str) -> list[Any]:
        options = EncoderOptions(torch.device(device), precision="float32")
        encoders = load_encoders(spec, spec, options)
        assert encoders.image is not None
        assert encoders.text is not None
        texts = encoders.text.embed(["a dog", "a photo of a dog"])
        return [encoders.image.embed(pixels).embeddings, texts.embeddings]

    on_both(compute)
