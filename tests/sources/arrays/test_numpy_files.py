from pathlib import Path
from typing import Any

import numpy as np
import pytest

from csalign.core.enums import Modality
from csalign.core.errors import DataError, ShapeError
from csalign.sources.arrays.base import CHUNK_ROWS, Vectors
from csalign.sources.arrays.opening import read_both, read_side


def numbers(*shape: int, dtype: Any = np.float32) -> Any:
    return np.random.default_rng(sum(shape)).normal(size=shape).astype(dtype)


def whole(vectors: Vectors) -> Any:
    return np.concatenate([chunk for chunk, _ in vectors.chunks()])


@pytest.mark.parametrize("dtype", ["<f2", "<f4", "<f8", ">f2", ">f4"])
@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("form", ["npy", "stored", "deflated"])
def test_every_float_array_is_read_as_what_it_is(
    tmp_path: Path, dtype: str, order: Any, form: str
) -> None:
    array = np.asarray(numbers(20_000, 3, dtype=dtype), order=order)
    path = tmp_path / ("x.npy" if form == "npy" else "x.npz")
    if form == "npy":
        np.save(path, array)
    elif form == "stored":
        np.savez(path, images=array)
    else:
        np.savez_compressed(path, images=array)
    vectors = read_side(path, Modality.IMAGE)
    chunks = [chunk for chunk, _ in vectors.chunks()]

    assert (len(vectors), vectors.width) == array.shape
    assert vectors.is_half is (dtype[1:] == "f2")
    assert max(map(len, chunks)) <= CHUNK_ROWS
    np.testing.assert_array_equal(np.concatenate(chunks), array)


@pytest.mark.parametrize("order", ["C", "F"])
def test_captions_of_an_image_follow_each_other_in_a_3d_array(tmp_path: Path, order: Any) -> None:
    array = numbers(5_000, 5, 4)
    np.save(tmp_path / "y.npy", np.asarray(array, order=order))
    vectors = read_side(tmp_path / "y.npy", Modality.TEXT)
    chunks = list(vectors.chunks())

    assert vectors.captions_each == 5
    np.testing.assert_array_equal(whole(vectors), array.reshape(-1, 4))
    assert chunks[1][1](7).endswith("y.npy, row 1639, caption 2")


def test_a_strided_view_is_saved_and_read_whole(tmp_path: Path) -> None:
    array = numbers(50, 8)[::2, ::-2]
    np.save(tmp_path / "x.npy", array)

    np.testing.assert_array_equal(whole(read_side(tmp_path / "x.npy", Modality.IMAGE)), array)


def test_one_npz_may_hold_both_sides_under_any_usual_name(tmp_path: Path) -> None:
    x, y = numbers(4, 3), numbers(4, 2)
    np.savez(tmp_path / "both.npz", img_emb=x, text_embeddings=y)
    sides = read_both(tmp_path / "both.npz", {Modality.IMAGE: None, Modality.TEXT: None})

    np.testing.assert_array_equal(whole(sides[Modality.IMAGE]), x)
    np.testing.assert_array_equal(whole(sides[Modality.TEXT]), y)


def test_the_only_array_is_never_taken_for_both_sides(tmp_path: Path) -> None:
    np.savez(tmp_path / "one.npz", embeddings=numbers(4, 3))

    with pytest.raises(
        DataError,
        match=r"no array looks like the image or the text embeddings \(arrays: embeddings\)",
    ):
        read_both(tmp_path / "one.npz", {Modality.IMAGE: None, Modality.TEXT: None})
    assert len(read_side(tmp_path / "one.npz", Modality.IMAGE)) == 4


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.bool_, np.complex64, np.longdouble])
def test_numbers_that_are_no_plain_floats_are_refused(tmp_path: Path, dtype: Any) -> None:
    np.save(tmp_path / "x.npy", np.ones((4, 3), dtype))

    with pytest.raises(ShapeError, match=r"x\.npy: has dtype .*save them as float32"):
        read_side(tmp_path / "x.npy", Modality.IMAGE)


def test_damaged_files_are_refused_by_name(tmp_path: Path) -> None:
    whole_npy, whole_npz = tmp_path / "x.npy", tmp_path / "x.npz"
    np.save(whole_npy, numbers(100, 8))
    np.savez_compressed(whole_npz, images=numbers(100, 8))
    for path in (whole_npy, whole_npz):
        good = path.read_bytes()
        for cut in (0, 3, 60, len(good) // 2, len(good) - 1):
            path.write_bytes(good[:cut])
            with pytest.raises(
                DataError, match=rf"{path.name}: is (not a readable NumPy file|empty)"
            ):
                read_side(path, Modality.IMAGE)


def test_damage_inside_of_an_npz_is_found_while_reading(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    np.savez(path, images=numbers(100, 8))
    damaged = bytearray(path.read_bytes())
    damaged[1_000] ^= 1
    path.write_bytes(damaged)

    with pytest.raises(DataError, match=r"x\.npz: is not a readable NumPy file \(Bad CRC"):
        whole(read_side(path, Modality.IMAGE))


def test_python_objects_in_an_npz_are_never_unpickled(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", images=np.array([{"a": 1}] * 2))

    with pytest.raises(ShapeError, match=r"x\.npz:images: has shape|dtype object"):
        read_side(tmp_path / "x.npz", Modality.IMAGE)
