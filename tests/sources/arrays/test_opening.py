import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import h5py
import numpy as np
import pandas as pd
import pytest
import safetensors.numpy
import torch
from upath import UPath

from csalign.core.enums import Modality
from csalign.core.errors import ConfigError, DataError, ShapeError
from csalign.sources.arrays.base import Vectors
from csalign.sources.arrays.opening import read_both, read_side, split_spec

SAVERS: dict[str, Callable[[Path, Any], object]] = {
    ".npy": np.save,
    ".npz": lambda path, array: np.savez(path, array),
    ".pt": lambda path, array: torch.save(torch.from_numpy(array), path),
    ".safetensors": lambda path, array: safetensors.numpy.save_file({"x": array}, path),
    ".parquet": lambda path, array: pd.DataFrame({"vector": list(array)}).to_parquet(path),
    ".h5": lambda path, array: h5py.File(path, "w").create_dataset("x", data=array).file.close(),
}


def numbers(*shape: int) -> Any:
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(np.float32)


def whole(vectors: Vectors) -> Any:
    return np.concatenate([chunk for chunk, _ in vectors.chunks()])


@pytest.mark.parametrize("suffix", SAVERS)
def test_the_files_of_a_folder_are_one_array_in_natural_order(tmp_path: Path, suffix: str) -> None:
    parts = {i: numbers(3, 4) + i for i in range(12)}
    for i in sorted(parts, key=str):
        SAVERS[suffix](tmp_path / f"emb_{i}{suffix}", parts[i])
    (tmp_path / f"._emb_0{suffix}").write_bytes(b"what macOS leaves")
    (tmp_path / "done.json").write_text("{}")
    vectors = read_side(tmp_path, Modality.IMAGE)
    last = [where(2) for _, where in vectors.chunks()][-1]

    np.testing.assert_array_equal(whole(vectors), np.concatenate([parts[i] for i in range(12)]))
    assert f"emb_11{suffix}" in last
    assert last.endswith(", row 2")


@pytest.mark.parametrize("suffix", SAVERS)
def test_a_url_does_as_well_as_a_path(tmp_path: Path, suffix: str) -> None:
    SAVERS[suffix](tmp_path / f"x{suffix}", numbers(30, 4))
    folder = cast(Path, UPath("memory://") / f"vectors{suffix}")
    folder.mkdir(parents=True, exist_ok=True)
    remote = folder / f"x{suffix}"
    remote.write_bytes((tmp_path / f"x{suffix}").read_bytes())

    np.testing.assert_array_equal(whole(read_side(remote, Modality.IMAGE)), numbers(30, 4))
    np.testing.assert_array_equal(whole(read_side(folder, Modality.IMAGE)), numbers(30, 4))
    if suffix == ".npz":
        named = remote.with_name("x.npz:arr_0")
        assert split_spec(named) == (remote, "arr_0")
        np.testing.assert_array_equal(whole(read_side(named, Modality.TEXT)), numbers(30, 4))


def test_a_source_of_both_sides_cannot_be_one_array(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", one=numbers(3, 2), two=numbers(3, 2))
    columns: dict[Modality, str | None] = dict.fromkeys(Modality)
    with pytest.raises(ConfigError, match=r"x\.npz:one: is one array, .* --images .*x\.npz:NAME"):
        read_both(tmp_path / "x.npz:one", columns)
    with pytest.raises(DataError, match=r"one, two\); name them, such as with --image-column one"):
        read_both(tmp_path / "x.npz", columns)
    named = read_both(tmp_path / "x.npz", {Modality.IMAGE: "one", Modality.TEXT: "two"})

    assert {side: len(vectors) for side, vectors in named.items()} == dict.fromkeys(Modality, 3)


def test_a_lost_shard_is_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for i in (0, 1, 3):
        np.save(tmp_path / f"emb_{i}.npy", numbers(2, 3))
    with caplog.at_level(logging.WARNING, "csalign"):
        read_side(tmp_path, Modality.IMAGE)

    assert "emb_1.npy is followed by emb_3.npy" in caplog.text


def test_shards_with_keys_keep_them(tmp_path: Path) -> None:
    for rank, keys in enumerate((("0", "2"), ("1", "3"))):
        torch.save({key: torch.ones(2) * int(key) for key in keys}, tmp_path / f"rank{rank}.dpt")
    vectors = read_side(tmp_path, Modality.TEXT)

    assert vectors.labels is not None
    assert vectors.labels.column("id").to_pylist() == ["0", "2", "1", "3"]
    assert vectors.labels.where(2).endswith("rank1.dpt, row 0 (1)")


def test_shards_that_are_no_one_array_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a_0.npy", numbers(2, 3))
    np.save(tmp_path / "a_1.npy", numbers(2, 4))
    with pytest.raises(ShapeError, match=r"a_1\.npy: has shape \(2, 4\) and .*a_0\.npy has"):
        read_side(tmp_path, Modality.IMAGE)
    torch.save(torch.ones(2, 3), tmp_path / "a_1.pt")
    with pytest.raises(DataError, match=r"contains \.npy and \.pt files"):
        read_side(tmp_path, Modality.IMAGE)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("x.csv", "embeddings are one of .npy"),
        ("x.pkl", "is a pickle, which is never loaded"),
        ("nowhere.npy", "nowhere.npy: no such file"),
        ("empty", "has no file of embeddings"),
        ("x.npz:surprise", r"has no array 'surprise' \(arrays: images\)"),
        ("x.npy:images", "contains one array, which has no name"),
        ("x.pt:images", "contains one array, which has no name"),
    ],
)
def test_what_is_no_embeddings_file_is_refused(tmp_path: Path, name: str, message: str) -> None:
    for other in ("x.csv", "x.pkl"):
        (tmp_path / other).write_text("text")
    (tmp_path / "empty").mkdir()
    np.save(tmp_path / "x.npy", numbers(2, 3))
    np.savez(tmp_path / "x.npz", images=numbers(2, 3))
    torch.save(torch.ones(2, 3), tmp_path / "x.pt")

    with pytest.raises(DataError, match=message):
        read_side(tmp_path / name, Modality.IMAGE)


def test_a_source_must_say_which_side_is_which(tmp_path: Path) -> None:
    neither: dict[Modality, str | None] = {Modality.IMAGE: None, Modality.TEXT: None}
    np.save(tmp_path / "x.npy", numbers(2, 3))
    torch.save(torch.ones(2, 3), tmp_path / "x.pt")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "manifest.json").write_text("{}")
    for name, message in (
        ("x.npy", "no side; pass both files: csalign import"),
        ("x.pt", "which has no name"),
        ("set", "is a feature set already"),
        ("nowhere", "no such file or folder"),
    ):
        with pytest.raises((ConfigError, DataError), match=message):
            read_both(tmp_path / name, neither)
