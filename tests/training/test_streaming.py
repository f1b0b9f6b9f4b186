"""Training on embeddings that are not in memory."""

import json
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pytest
import s3fs
import torch
from hypothesis import given
from hypothesis import strategies as st

from csalign.core.enums import Modality
from csalign.core.errors import OutputError
from csalign.features import writer
from csalign.features.join import PairedRows, join_pairs
from csalign.features.reader import FeatureSet
from csalign.features.streaming import MappedRows, MemoryBudget, load_training
from csalign.ingest.config import ImportConfig
from csalign.ingest.import_arrays import import_arrays
from csalign.training.config import TrainConfig
from csalign.training.data import Unpaired
from csalign.training.network.sampler import (
    BatchLoader,
    BlockOrder,
    PairSampler,
    order_for,
    uniform,
)
from csalign.training.train import train

ROWS = 400
SMALL: dict[str, Any] = {"steps": 8, "batch_size": 32, "hidden": 16, "validations": 2}


@pytest.fixture
def scattered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """400 images and 900 texts in another order: several, one or no captions, texts of none."""
    monkeypatch.setattr(writer, "ROW_GROUP_ROWS", 64)
    rng = np.random.default_rng(0)
    owners = rng.integers(-60, ROWS - 60, 900)
    latent = rng.normal(size=(ROWS, 6))
    own = np.where(owners[:, None] >= 0, latent[owners], rng.normal(size=(900, 6)))
    for name, values, width in (("images", latent, 12), ("texts", own, 10)):
        mixed = values @ rng.normal(size=(6, width)) + 0.3 * rng.normal(size=(len(values), width))
        np.save(tmp_path / f"{name}.npy", mixed.astype(np.float16))
    lines = [
        f"{row},{owner if owner >= 0 else ''},No {row % 700}" for row, owner in enumerate(owners)
    ]
    (tmp_path / "texts.csv").write_text("\n".join(["id,image_id,caption", *lines]))
    out = tmp_path / "scattered"
    import_arrays(
        ImportConfig(
            images=tmp_path / "images.npy",
            texts=tmp_path / "texts.npy",
            text_table=tmp_path / "texts.csv",
            out=out,
        )
    )
    return out


def weights_and_losses(features: Path, out: Path, **settings: Any) -> tuple[bytes, list[Any]]:
    train(TrainConfig(features=features, out=out, **{**SMALL, **settings}))
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return (out / "adapter.safetensors").read_bytes(), lines


def test_a_run_from_a_mapped_file_has_the_bytes_of_one_from_memory(
    scattered: Path, tmp_path: Path
) -> None:
    here = weights_and_losses(scattered, tmp_path / "here", memory=64, captions="sample")
    away = weights_and_losses(scattered, tmp_path / "away", memory=0, captions="sample")

    assert here == away
    assert sum("loss" in line for line in here[1]) == SMALL["steps"]


@pytest.mark.parametrize("captions", ["first", "sample", "all"])
def test_windows_of_a_mapped_file_give_the_rows_of_memory(scattered: Path, captions: str) -> None:
    found = []
    for memory in (1 << 20, 0):
        budget = MemoryBudget(memory, scattered.parent)
        features = FeatureSet.open(scattered)
        joined = join_pairs(features, "all")
        rows, _ = load_training(features, joined, None, budget, with_keys=True)
        assert isinstance(rows.images, MappedRows) is not bool(memory)
        order = order_for(rows, window_bytes=4_000, block_bytes=400)
        assert order is not uniform
        sampler = PairSampler(rows, captions, other_weight=0.3, once=True, order=order)
        pool = Unpaired({Modality.IMAGE: [], Modality.TEXT: []})
        loader = BatchLoader(rows, sampler, 32, 0, torch.device("cpu"), pool)
        batches = [next(loader) for _ in range(40)]
        found.append(
            [torch.cat([own.images.rows.flatten(), own.texts.rows.flatten()]) for own in batches]
        )

    assert all(torch.equal(here, away) for here, away in zip(*found, strict=True))


def test_further_sets_are_read_the_same_way(scattered: Path, tmp_path: Path) -> None:
    settings = {"unpaired": (scattered,)}
    here, away = (
        weights_and_losses(scattered, tmp_path / f"run-{memory}", memory=memory, **settings)
        for memory in (64, 0)
    )

    assert here == away


def test_a_set_in_an_object_store_is_read_once(
    scattered: Path, bucket: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = bucket / "scattered"
    s3fs.S3FileSystem().put(str(scattered), there.path, recursive=True)  # type: ignore[attr-defined]
    settings = {"steps": 2, "val_split": None}
    here = weights_and_losses(scattered, tmp_path / "here", **settings)

    assert weights_and_losses(there, tmp_path / "there", memory=0, **settings) == here


def test_a_disk_that_is_too_small_is_refused_before_training(
    scattered: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1 << 20))
    monkeypatch.setenv("TMPDIR", str(tmp_path))

    with pytest.raises(OutputError, match=f"{tmp_path}: no room .* raise --memory"):
        weights_and_losses(scattered, tmp_path / "run", memory=0)
    assert not (tmp_path / "run").exists()
    weights_and_losses(scattered, tmp_path / "run", memory=64)


def rows_of(counts: list[int], lone_texts: int, width: int = 2) -> PairedRows:
    """Image i has counts[i] captions, all different."""
    owners = np.concatenate([np.repeat(np.arange(len(counts)), counts), np.full(lone_texts, -1)])
    names = pa.array([f"t{row}" for row in range(len(owners))])
    return PairedRows(
        name="rows",
        images=np.zeros((len(counts), width), np.float32),
        texts=np.zeros((len(owners), width), np.float32),
        image_ids=pa.array([str(row) for row in range(len(counts))]),
        text_ids=names,
        captions=names,
        text_image=owners.astype(np.int64),
    )


@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=60).filter(any),
    st.integers(0, 5),
    st.integers(1, 9),
    st.integers(1, 5),
    st.integers(1, 20),
    st.sampled_from(["first", "sample", "all"]),
)
def test_each_image_comes_exactly_once_an_epoch_whatever_the_sizes(
    counts: list[int],
    lone_texts: int,
    block: int,
    blocks: int,
    batch_size: int,
    captions: Literal["first", "sample", "all"],
) -> None:
    rows = rows_of(counts, lone_texts)
    order = BlockOrder(block, block * blocks)
    sampler = PairSampler(rows, captions, other_weight=0.3, once=True, order=order)
    one, two = (list(sampler.epoch(batch_size, np.random.default_rng(5))) for _ in range(2))
    shown = np.concatenate([batch.images for batch in one])

    assert Counter(shown.tolist()) == Counter(np.flatnonzero(counts).tolist())
    assert [batch.texts.tolist() for batch in one] == [batch.texts.tolist() for batch in two]
    if captions == "all":
        texts = np.concatenate([batch.texts for batch in one])
        assert sorted(texts.tolist()) == list(range(sum(counts)))


def test_a_window_is_of_few_blocks_and_epochs_differ() -> None:
    rng = np.random.default_rng(0)
    order = BlockOrder(10, 50)
    one, two = order(np.arange(995), rng), order(np.arange(995), rng)
    blocks = [set((one[start : start + 50] // 10).tolist()) for start in range(0, 1_000, 50)]

    assert one.tolist() != two.tolist()
    assert sum(map(len, blocks)) <= 100 + 20  # but for the block that is not full
    assert any(max(own) - min(own) > 50 for own in blocks)
    assert (np.diff(one) != 1).mean() > 0.8


def test_sets_of_one_window_are_shuffled_as_a_whole_and_larger_ones_in_windows() -> None:
    rows = rows_of([1] * 100, 0)  # 16 bytes per image with its caption

    assert order_for(rows) is uniform
    assert order_for(rows, window_bytes=1_599, block_bytes=64) == BlockOrder(4, 96)
