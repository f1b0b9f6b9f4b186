import sys
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from csalign.core.enums import Modality
from csalign.core.errors import ConfigError, DataError, ShapeError
from csalign.sources.arrays.base import Vectors
from csalign.sources.arrays.opening import read_both, read_side


def numbers(*shape: int, dtype: Any = np.float32) -> Any:
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(dtype)


def whole(vectors: Vectors) -> Any:
    return np.concatenate([chunk for chunk, _ in vectors.chunks()])


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", ">f4"])
def test_datasets_are_read_by_name_in_groups_too(tmp_path: Path, dtype: str) -> None:
    x, y = numbers(10_000, 3, dtype=dtype), numbers(20, 5, 2)
    path = tmp_path / "x.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("images", data=x, chunks=(100, 3), compression="gzip")
        file["texts"] = y
        file["deep/er"] = x + 1
    sides = read_both(path, {Modality.IMAGE: None, Modality.TEXT: "texts"})

    np.testing.assert_array_equal(whole(sides[Modality.IMAGE]), x)
    np.testing.assert_array_equal(whole(sides[Modality.TEXT]), y.reshape(-1, 2))
    deep = read_side(Path(f"{path}:deep/er"), Modality.IMAGE)
    np.testing.assert_array_equal(whole(deep), x + 1)
    assert next(deep.chunks())[1](3) == f"{path}:deep/er, row 3"


def test_numbered_datasets_are_joined_in_natural_order(tmp_path: Path) -> None:
    parts = [numbers(3, 4, dtype=np.float16) + i for i in range(11)]
    with h5py.File(tmp_path / "x.hdf5", "w") as file:
        for i, part in enumerate(parts):
            file[f"tensor_{i}"] = part
    vectors = read_side(tmp_path / "x.hdf5", Modality.TEXT)
    where = [name(0) for _, name in vectors.chunks()]

    np.testing.assert_array_equal(whole(vectors), np.concatenate(parts))
    assert where[10].endswith("x.hdf5:tensor_10, row 0")


def test_a_gap_in_the_numbers_is_no_array(tmp_path: Path) -> None:
    with h5py.File(tmp_path / "x.h5", "w") as file:
        for i in (0, 2):
            file[f"tensor_{i}"] = numbers(3, 4)

    with pytest.raises(DataError, match=r"arrays: tensor_0, tensor_2\); name it"):
        read_side(tmp_path / "x.h5", Modality.TEXT)


def test_what_cannot_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.h5"
    with h5py.File(path, "w") as file:
        file.create_dataset("images", (10**9, 3), "f4")
        file["texts"] = np.ones((3, 4), np.int8)
    with pytest.raises(DataError, match=r"x\.h5:images: contains no data"):
        read_side(path, Modality.IMAGE)
    with h5py.File(path, "a") as file:
        del file["images"]
    with pytest.raises(ShapeError, match=r"x\.h5:texts: has dtype int8"):
        read_side(path, Modality.TEXT)
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(DataError, match=r"x\.h5: is not a readable HDF5 file"):
        read_side(path, Modality.TEXT)
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ConfigError, match=r"pip install 'csalign\[hdf5\]'"):
        read_side(path, Modality.TEXT)
