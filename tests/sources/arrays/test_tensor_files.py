import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from csalign.core.enums import Modality
from csalign.core.errors import DataError, ShapeError
from csalign.sources.arrays.base import CHUNK_ROWS, Vectors
from csalign.sources.arrays.opening import read_both, read_side


def tensor(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype)


def whole(vectors: Vectors) -> Any:
    return np.concatenate([chunk for chunk, _ in vectors.chunks()])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth", ".dpt"])
def test_every_float_tensor_is_read_exactly(
    tmp_path: Path, dtype: torch.dtype, suffix: str
) -> None:
    saved = tensor(10_000, 4, dtype=dtype)
    path = tmp_path / f"x{suffix}"
    if suffix == ".safetensors":
        safetensors.torch.save_file({"embeddings": saved, "scale": torch.ones(1)}, path)
    else:
        torch.save(saved, path)
    vectors = read_side(path, Modality.IMAGE)

    assert (len(vectors), vectors.width) == (10_000, 4)
    assert vectors.is_half is (dtype is torch.float16)
    assert max(len(chunk) for chunk, _ in vectors.chunks()) <= CHUNK_ROWS
    np.testing.assert_array_equal(whole(vectors), saved.double().numpy())


def test_views_and_parameters_are_read_as_they_are_seen(tmp_path: Path) -> None:
    base = tensor(8, 30)
    for name, saved in (("t", base.T), ("s", base[2:, ::3]), ("p", torch.nn.Parameter(base))):
        torch.save(saved, tmp_path / f"{name}.pt")
        vectors = read_side(tmp_path / f"{name}.pt", Modality.TEXT)
        np.testing.assert_array_equal(whole(vectors), saved.detach().numpy())


def test_a_dict_holds_both_sides_by_name(tmp_path: Path) -> None:
    x, y = tensor(4, 3), tensor(4, 5, 2)
    torch.save({"img_feats": x, "txt_feats": y, "epoch": 3}, tmp_path / "both.pth")
    safetensors.torch.save_file({"images": x, "texts": y}, tmp_path / "both.safetensors")
    for name in ("both.pth", "both.safetensors"):
        sides = read_both(tmp_path / name, {Modality.IMAGE: None, Modality.TEXT: None})
        np.testing.assert_array_equal(whole(sides[Modality.IMAGE]), x.numpy())
        np.testing.assert_array_equal(whole(sides[Modality.TEXT]), y.numpy().reshape(-1, 2))


def test_numbered_tensors_are_one_array_in_natural_order(tmp_path: Path) -> None:
    parts = {f"tensor_{i}": tensor(2, 3) + i for i in range(12)}
    safetensors.torch.save_file(parts, tmp_path / "x.safetensors")

    expected = torch.cat([parts[f"tensor_{i}"] for i in range(12)]).numpy()
    np.testing.assert_array_equal(
        whole(read_side(tmp_path / "x.safetensors", Modality.IMAGE)), expected
    )


def test_fusemix_vectors_by_index_keep_their_keys_and_their_images(tmp_path: Path) -> None:
    # Ranks are merged in no order, so the keys say which row is which.
    order = [10, 2, 0, 1]
    vectors = {str(i): tensor(4) + i for i in order}
    torch.save(vectors, tmp_path / "images.dpt")
    retrieval = {"txt2img": {0: 2, 1: 2, 2: 10, 10: 0}, "img2txt": {2: [0, 1]}, **vectors}
    torch.save(retrieval, tmp_path / "texts.dpt")
    images = read_side(tmp_path / "images.dpt", Modality.IMAGE)
    texts = read_side(tmp_path / "texts.dpt", Modality.TEXT)

    assert images.labels is not None
    assert texts.labels is not None
    assert images.labels.column("id").to_pylist() == ["0", "1", "2", "10"]
    assert texts.labels.column("image_id").to_pylist() == ["2", "2", "10", "0"]
    expected = torch.stack([vectors[str(i)] for i in sorted(order)]).numpy()
    np.testing.assert_array_equal(whole(images), expected)
    assert next(images.chunks())[1](3).endswith("images.dpt, row 3 (10)")


def test_a_ragged_vector_is_named_by_its_key(tmp_path: Path) -> None:
    torch.save({"0": tensor(4), "1": tensor(3)}, tmp_path / "x.dpt")

    with pytest.raises(DataError, match=r"x\.dpt, row 1 \(1\): is 3 wide and 0 is 4"):
        read_side(tmp_path / "x.dpt", Modality.IMAGE)


class Bomb:
    """Creates a file when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("suffix", [".pt", ".pkl"])
def test_a_pickle_is_refused_and_never_runs(tmp_path: Path, zipped: bool, suffix: str) -> None:
    path, target = tmp_path / f"x{suffix}", tmp_path / "owned"
    content = {"embeddings": tensor(2, 2), "extra": Bomb(target)}
    if zipped:
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))

    with pytest.raises(DataError, match=r"never (unpickled|loaded)|plain pickle"):
        read_side(path, Modality.IMAGE)
    assert not target.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (torch.ones(4, 3, dtype=torch.int8), r"x\.pt: has dtype int8, .* by their scale"),
        (torch.ones(4), r"x\.pt: has shape \(4,\)"),
        (torch.ones(0, 3), r"x\.pt: has shape \(0, 3\): is empty"),
        (torch.ones(1, 3).expand(4, 3), "expanded tensor; save tensor.contiguous"),
        (torch.eye(3).to_sparse(), "does not contain a plain tensor"),
        ([1.0, 2.0], "contains a list; save a tensor"),
        (
            {"a": torch.ones(2, 2), "b": torch.ones(2, 2)},
            r"arrays: a, b\); name it with --image-column",
        ),
        (np.ones((2, 2)), "other than tensors, which are never unpickled"),
    ],
)
def test_what_is_no_tensor_of_embeddings_is_refused(
    tmp_path: Path, content: Any, message: str
) -> None:
    torch.save(content, tmp_path / "x.pt")

    with pytest.raises((DataError, ShapeError), match=message):
        read_side(tmp_path / "x.pt", Modality.IMAGE)


def test_old_and_damaged_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save(tensor(50, 8), path, _use_new_zipfile_serialization=False)
    with pytest.raises(DataError, match=r"before torch 1\.6; save the tensor again"):
        read_side(path, Modality.IMAGE)
    torch.save(tensor(50, 8), path)
    good = path.read_bytes()
    for damaged in (b"", good[:100], good[: len(good) // 2], b"<html>" + good[6:]):
        path.write_bytes(damaged)
        with pytest.raises(
            DataError, match=r"x\.pt: is (not a readable torch file|empty|a web page)"
        ):
            read_side(path, Modality.IMAGE)
    st = tmp_path / "x.safetensors"
    safetensors.torch.save_file({"images": tensor(50, 8)}, st)
    st.write_bytes(st.read_bytes()[:-10])
    with pytest.raises(DataError, match=r"x\.safetensors: is not a readable safetensors file"):
        read_side(st, Modality.IMAGE)


def test_a_quantised_safetensors_is_refused(tmp_path: Path) -> None:
    safetensors.torch.save_file(
        {"images": torch.ones(4, 3, dtype=torch.int8)}, tmp_path / "x.safetensors"
    )

    with pytest.raises(ShapeError, match=r"x\.safetensors:images: has dtype I8"):
        read_side(tmp_path / "x.safetensors", Modality.IMAGE)
