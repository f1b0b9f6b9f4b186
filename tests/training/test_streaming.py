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
from hypothesis import given
from hypothesis import strategies as st

from csalign.core.errors import OutputError
from csalign.features import writer
from csalign.features.join import PairedRows
from csalign.ingest.config import ImportConfig
from csalign.ingest.import_arrays import import_arrays
from csalign.training import sampler
from csalign.training.config import TrainConfig
from csalign.training.sampler import BlockOrder, PairSampler, order_of, uniform
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


def in_windows(monkeypatch: pytest.MonkeyPatch, block: int = 400, window: int = 4_000) -> None:
    monkeypatch.setattr(sampler, "BLOCK_BYTES", block)
    monkeypatch.setattr(sampler, "WINDOW_BYTES", window)


@pytest.mark.parametrize("settings", [{}, {"captions": "all"}, {"captions": "sample", "noise": 0}])
@pytest.mark.parametrize("is_large", [False, True])
def test_a_run_from_a_mapped_file_has_the_bytes_of_one_from_memory(
    scattered: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
    is_large: bool,
) -> None:
    if is_large:
        in_windows(monkeypatch)
    here = weights_and_losses(scattered, tmp_path / "here", memory=64, **settings)
    away = weights_and_losses(scattered, tmp_path / "away", memory=0, **settings)

    assert here == away
    assert sum("loss" in line for line in here[1]) == SMALL["steps"]


def test_further_sets_are_read_the_same_way(scattered: Path, tmp_path: Path) -> None:
    settings = {"unpaired": str(scattered)}
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


def test_sets_of_one_window_are_shuffled_as_a_whole_and_larger_ones_in_windows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = rows_of([1] * 100, 0)  # 16 bytes an image with its caption

    assert order_of(rows) is uniform
    in_windows(monkeypatch, 64, 1_599)
    assert order_of(rows) == BlockOrder(4, 96)
