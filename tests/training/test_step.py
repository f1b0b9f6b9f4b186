"""Steps that do not wait for the device."""

import gc
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from csalign.adapters.model import Adapter
from csalign.adapters.side import SideShape
from csalign.core.enums import Modality
from csalign.core.errors import DataError, TrainingError
from csalign.features.join import Pairs
from csalign.ingest.config import ImportConfig
from csalign.ingest.import_arrays import import_arrays
from csalign.objective.products import product
from csalign.objective.tiles import Tiles
from csalign.training.config import DataOptions, TrainConfig
from csalign.training.data import Part, Unpaired, load_data
from csalign.training.network.batch_loss import LEAST_SCALE
from csalign.training.network.device_rows import DeviceRows, PlannedBatch
from csalign.training.network.loop import Trainer
from csalign.training.network.sampler import BatchLoader, PairSampler
from csalign.training.network.validation import MOST_SCALE, logit_scale
from csalign.training.train import train
from csalign.training.work import Work, find_tokens

READS = {"_local_scalar_dense", "is_nonzero", "equal", "nonzero", "masked_select", "_unique2"}


class Reads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations that need a value on the host."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func._schema.name.removeprefix("aten::")
        chosen = args[1] if name.startswith("index") and len(args) > 1 else ()
        masks = [own for own in chosen if own is not None] if isinstance(chosen, list) else []
        if name in READS or any(own.dtype == torch.bool for own in masks):
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """700 images with up to two captions, and texts without an image."""
    folder = tmp_path_factory.mktemp("several")
    rng = np.random.default_rng(0)
    owners = np.append(np.repeat(np.arange(600), 1 + np.arange(600) % 2), np.full(40, 650))
    latent = rng.normal(size=(700, 6))
    for name, values, width in (("i", latent, 12), ("t", latent[owners], 8)):
        made = values @ rng.normal(size=(6, width)) + 0.3 * rng.normal(size=(len(values), width))
        np.save(folder / f"{name}.npy", made.astype(np.float16))
    lines = [f"{row},{own if own < 600 else ''},No {row}" for row, own in enumerate(owners)]
    (folder / "t.csv").write_text("\n".join(["id,image_id,caption", *lines]))
    paths = {"images": folder / "i.npy", "texts": folder / "t.npy", "text_table": folder / "t.csv"}
    import_arrays(ImportConfig(**paths, out=folder / "features"))
    return folder / "features"


def make_trainer(features: Path, **values: Any) -> Trainer:
    settings = {"steps": 40, "validations": 1, "batch_size": 64, "hidden": 16, **values}
    config = TrainConfig(features=features, out=features.parent / "run", init="random", **settings)
    data = load_data(config.group(DataOptions), out=config.out, seed=0)
    work = Work(config, data, find_tokens(config))
    return work.trainer(work.initialize().adapter)


def count_reads(trainer: Trainer, steps: int = 12) -> Counter[str]:
    product(torch.ones(2, 2), torch.ones(2, 2))  # tries oneDNN, once in a process
    reads = Reads()
    with reads:
        for _ in range(steps):  # of which the first and the eleventh refresh the bandwidth
            trainer._train_step(next(trainer._loader))
    return reads.found


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"batch_size": 300},
        {"learn_scale": True, "average": 0.9},
        {"learn_scale": True, "bandwidth": "tied"},
        {"bandwidth": (0.5, 1.0)},
        {"captions": "sample", "mixing": 0.5},
        {"captions": "all", "label_smoothing": 0.1},
        {"pairwise": "sigmoid"},
        {"pairwise": "align-uniform"},
        {"cs_captions": "all", "unpaired_negatives": True},
        *(
            {"divergence": name}
            for name in ("holder", "mmd", "gaussian-kl", "sinkhorn", "pairs-mse", "none")
        ),
    ],
    ids=str,
)
def test_steps_read_nothing_on_the_host(several: Path, values: dict[str, Any]) -> None:
    trainer = make_trainer(several, **values)

    assert count_reads(trainer) == {}
    with Reads() as reads:
        float(torch.ones(3).sum())
    assert reads.found == {"_local_scalar_dense": 1}


def test_the_token_term_counts_nothing_but_the_tokens_of_a_cpu(
    write_tokens: Callable[..., Path],
) -> None:
    found = count_reads(make_trainer(write_tokens(), token_weight=0.1, token_pairs=16))

    assert found.keys() <= {"index", "index_put_"}  # padding is mapped too on a GPU


def test_rows_of_further_sets_are_drawn_without_a_read(several: Path, features: Path) -> None:
    assert count_reads(make_trainer(features, unpaired=(features,)), 3) == {}


# The first steps of the warm-up are harmless, then the weights overflow.
EXPLODES = {"learning_rate": 1e7, "clip_norm": 1e30, "warmup": 1.0, "patience": 99, "steps": 40}


def test_the_first_step_at_fault_is_named_however_seldom_the_log_is_written(
    features: Path, tmp_path: Path
) -> None:
    found = {}
    for every in (1, 7, 50):
        out = tmp_path / str(every)
        values = {**EXPLODES, "validations": 1, "log_every": every, "batch_size": 64, "hidden": 16}
        with pytest.raises(TrainingError, match=r"step \d+: [a-z ]+ is (nan|inf)") as caught:
            train(TrainConfig(features=features, out=out, save_every=3, **values))
        lines = (tmp_path / f"{every}.partial/metrics.jsonl").read_text().splitlines()
        found[every] = str(caught.value).split(";")[0], lines[1:]
        assert not list(tmp_path.glob(f"{every}.partial/resume/*"))

    assert found[1] == found[7] == found[50]


def test_a_fault_is_found_before_the_state_is_returned_or_validated(several: Path) -> None:
    trainer = make_trainer(several, log_every=5)
    logged: list[Any] = []
    steps = trainer.fit(logged.extend)
    for _ in range(7):
        next(steps)
    with torch.no_grad():
        next(trainer.adapter.parameters()).fill_(torch.nan)
    next(steps)  # step 7, of which nothing was read

    assert [line["step"] for line in logged if "loss" in line] == [1, 2, 3, 4, 5]
    with pytest.raises(TrainingError, match="step 7: pairwise is nan"):
        trainer.state_dict()
    assert [line["step"] for line in logged if "loss" in line] == [1, 2, 3, 4, 5, 6]
    steps.close()


def test_weights_that_overflow_in_the_last_step_are_not_returned(several: Path) -> None:
    trainer = make_trainer(several)
    steps = trainer.fit(lambda lines: None)
    for _ in range(3):
        next(steps)
    with torch.no_grad():
        next(trainer.adapter.parameters()).fill_(torch.inf)
    with pytest.raises(TrainingError, match="step 2: largest weight is inf"):
        trainer.state_dict()
    steps.close()


def test_no_figure_keeps_the_graph_of_its_step(several: Path) -> None:
    def tiles() -> int:
        return sum(type(own) is Tiles for own in gc.get_objects())

    trainer, before = make_trainer(several, batch_size=300, other_captions=0.5), tiles()
    steps = trainer.fit(lambda lines: None)
    for _ in range(4):
        next(steps)

    assert tiles() == before
    steps.close()


def test_the_log_is_the_same_however_often_it_is_written(features: Path, tmp_path: Path) -> None:
    logs = []
    for every in (1, 50):
        config = TrainConfig(
            features=features,
            out=tmp_path / str(every),
            log_every=every,
            **{"steps": 12, "batch_size": 64, "hidden": 16, "validations": 4, "init": "random"},
            refit=False,
        )
        logs.append((train(config).run / "metrics.jsonl").read_text())

    assert logs[0] == logs[1]
    assert sum("loss" in json.loads(line) for line in logs[0].splitlines()) == 12


def make_loader(rows: Pairs, **values: Any) -> BatchLoader:
    sampler = PairSampler(rows, "sample", other_weight=0.3, once=True)
    pool = {side: [Part(rows.embeddings(side)[::2], np.arange(9))] for side in Modality}
    options = {"unpaired_rows": 3, "mixing": 0.5, **values}
    return BatchLoader(rows, sampler, 40, 0, torch.device("cpu"), Unpaired(pool), **options)


def mapped(values: Any, path: Path) -> Any:
    found = np.memmap(path, values.dtype, "w+", shape=values.shape)
    found[:] = values
    return found


@pytest.mark.parametrize("mixing", [0.0, 0.5])
def test_blocks_that_are_read_ahead_have_the_rows_of_memory(
    several: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mixing: float
) -> None:
    rows = load_data(DataOptions(features=several), out=tmp_path / "run", seed=0).rows
    files = {name: mapped(getattr(rows, name), tmp_path / name) for name in ("images", "texts")}
    here = make_loader(rows, mixing=mixing)
    away = make_loader(replace(rows, **files), mixing=mixing)
    before = [next(away).images.rows for _ in range(2)]
    assert all(torch.equal(own, next(here).images.rows) for own in before)
    with away.reading_ahead():
        for _ in range(25):
            one, two = next(here), next(away)
            assert torch.equal(one.images.rows, two.images.rows)
            assert torch.equal(one.texts.rows, two.texts.rows)
        assert here.state_dict() == away.state_dict()
        assert any(thread.name == "csalign-rows" for thread in threading.enumerate())
    assert not any(thread.name == "csalign-rows" for thread in threading.enumerate())
    assert torch.equal(next(here).texts.rows, next(away).texts.rows)


def test_what_fails_while_reading_ahead_is_raised(tmp_path: Path) -> None:
    def plans() -> Iterator[PlannedBatch]:
        yield from ()
        raise DataError("row 3 is damaged")

    file = mapped(np.zeros((4, 2), np.float32), tmp_path / "rows")
    source = DeviceRows({side: [file] for side in Modality}, torch.device("cpu"))
    with pytest.raises(DataError, match="row 3"):
        next(source.read_ahead(plans()))


def test_the_logit_scale_follows_from_how_well_the_start_finds_held_out_pairs() -> None:
    def found(images: int, noise: float) -> float:
        rng = np.random.default_rng(0)
        x = rng.normal(size=(images, 64)).astype(np.float32)
        y = x + noise * rng.normal(size=x.shape).astype(np.float32)
        adapter = Adapter({side: SideShape("identity", 64, 64) for side in Modality})
        rows = Pairs(name="set", images=x, texts=y, text_image=np.arange(images))
        return logit_scale(adapter, rows, None)

    assert found(200, 10.0) == LEAST_SCALE
    assert LEAST_SCALE < found(200, 4.0) < found(200, 2.0) <= MOST_SCALE
    assert found(99, 2.0) == LEAST_SCALE  # too few to say
