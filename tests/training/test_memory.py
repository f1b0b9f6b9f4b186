"""The memory of a step, from sizes alone, is what a step takes."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from csalign.adapters.model import Adapter
from csalign.adapters.side import SideShape
from csalign.core.enums import Modality
from csalign.training.config import ObjectiveOptions, OptimizerOptions, TrainConfig
from csalign.training.network.batch_loss import BatchLoss
from csalign.training.network.memory import largest_batch, step_bytes
from csalign.training.network.sampler import Batch, SideBatch
from csalign.training.network.step import prepare_step
from csalign.training.train import train

WIDTH = 64


def default_step(rows: int) -> Callable[[], Callable[[], None]]:
    """Return what prepares a step of the default, on embeddings of a small width."""

    def prepare() -> Callable[[], None]:
        adapter = Adapter({side: SideShape("glu", WIDTH, 256) for side in Modality})
        loss = BatchLoss(ObjectiveOptions())
        weights = [*adapter.parameters()]
        optimizer = torch.optim.AdamW(weights, fused=True)
        sides = [SideBatch(torch.randn(rows, WIDTH), [rows, 0, 0, 0], None) for _ in Modality]
        none = torch.zeros(0, dtype=torch.int64)
        batch = Batch(sides[0], sides[1], None, none, (none, none))
        loss(adapter, batch, 1)  # finds a bandwidth, which is kept for some steps

        def step() -> None:
            total = loss(adapter, batch, 2).total
            optimizer.zero_grad(set_to_none=True)
            total.backward()
            torch.nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()

        return step

    return prepare


def allocated(step: Callable[[], None]) -> int:
    """Measure the most bytes that torch allocates during a step, beyond those before it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        step()
    now = peak = 0
    events = [own for own in found.profiler.kineto_results.events() if own.name() == "[memory]"]
    for event in sorted(events, key=lambda own: own.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@pytest.mark.parametrize("rows", [512, 4_096])
def test_sizes_alone_give_the_memory_of_a_step(rows: int) -> None:
    before, peak = step_bytes(default_step(rows))
    step = default_step(rows)()
    step()
    measured = allocated(step)

    assert peak - before == pytest.approx(measured, rel=0.15)


def steps_of(rows: int) -> Callable[[], object]:
    """Make a step of the trainer of so many pairs, with two captions each."""
    shapes = {side: SideShape("glu", WIDTH, 32, hidden=64) for side in Modality}
    options = OptimizerOptions()
    return prepare_step(shapes, ObjectiveOptions(), options, torch.device("cpu"), 2.0, rows)


def test_the_largest_batch_is_the_last_that_fits() -> None:
    _, of_2048 = step_bytes(lambda: steps_of(2_048))
    _, of_4096 = step_bytes(lambda: steps_of(4_096))

    assert of_2048 < of_4096
    assert largest_batch(steps_of, pairs=10**6, memory=of_4096 - 1) == (2_048, of_2048)
    assert largest_batch(steps_of, pairs=10**6, memory=1)[0] == 512
    assert largest_batch(steps_of, pairs=20_000, memory=2**40)[0] == 1_024
    assert largest_batch(steps_of, pairs=300, memory=2**40)[0] == 512


def test_an_adapter_whose_step_depends_on_values_takes_the_least_batch(
    features: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (tmp_path / "reads.py").write_text(
        "from csalign.adapters.builtin import Linear\n"
        "class Reads(Linear):\n"
        "    def forward(self, x, noise=0.0):\n"
        "        return super().forward(x / float(x.norm(dim=1).max()), noise)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    values = {"batch_size": "auto", "text_adapter": "reads:Reads", "steps": 1}
    result = train(TrainConfig(features=features, out=tmp_path / "run", **values))

    assert result.steps == 1
    assert "--batch-size auto: the memory of a step cannot be found (reads:Reads" in caplog.text
    assert "using 512 pairs" in caplog.text


def test_all_captions_at_once_take_more_memory() -> None:
    shapes = {side: SideShape("glu", WIDTH, 32, hidden=64) for side in Modality}
    options = ObjectiveOptions(), OptimizerOptions(), torch.device("cpu")
    first, every = (
        step_bytes(partial(prepare_step, shapes, *options, 4.0, 512, captions=own))[1]
        for own in ("first", "all")
    )

    assert every > 2 * first  # a table of all images and texts, which is not computed in tiles
