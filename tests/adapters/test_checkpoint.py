import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from csalign.adapters.checkpoint import AdapterInfo, load_adapter, save_adapter
from csalign.adapters.model import Adapter, SideShape
from csalign.enums import Modality
from csalign.errors import DataError, ShapeError

ROWS = np.random.default_rng(0).normal(size=(9, 6)).astype(np.float16)


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, Adapter]:
    shapes = {
        Modality.IMAGE: SideShape("mlp", 6, 3, hidden=8),
        Modality.TEXT: SideShape("linear", 5, 3, signed_sqrt=True),
    }
    adapter = Adapter(shapes).eval()
    info = AdapterInfo(
        adapters=shapes,
        encoders={Modality.IMAGE: "eye", Modality.TEXT: "ear"},
        start="random",
        step=3,
        logit_scale=7.0,
        bandwidth=0.5,
        data_fingerprint="f" * 64,
        train_split="train",
    )
    folder = tmp_path / "run"
    folder.mkdir()
    save_adapter(folder, adapter, info)
    return folder, adapter


def test_a_reloaded_adapter_gives_the_same_bytes(saved: tuple[Path, Adapter]) -> None:
    folder, adapter = saved
    again = load_adapter(folder)

    assert again.embed(Modality.IMAGE, ROWS).tobytes() == (
        adapter.embed(Modality.IMAGE, ROWS).tobytes()
    )
    assert again.text.shape.signed_sqrt
    assert again.parameter_counts() == {"image": 6 * 8 + 8 + 8 * 3 + 3 + 6 * 3 + 3, "text": 18}


def test_embeddings_are_unit_rows_whatever_the_batch(saved: tuple[Path, Adapter]) -> None:
    _, adapter = saved
    whole = adapter.embed(Modality.IMAGE, ROWS)

    np.testing.assert_allclose(np.linalg.norm(whole, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(adapter.embed(Modality.IMAGE, ROWS, batch_size=2), whole, atol=1e-6)


def test_a_wrong_width_is_refused_with_both_widths(saved: tuple[Path, Adapter]) -> None:
    with pytest.raises(ShapeError, match=r"shape \(9, 6\), the adapter takes width 5"):
        saved[1].embed(Modality.TEXT, ROWS)


def change_json(folder: Path, **values: Any) -> None:
    path = folder / "adapter.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def change_shape(folder: Path, **values: Any) -> None:
    shapes = json.loads((folder / "adapter.json").read_text())["adapters"]
    shapes["image"].update(values)
    change_json(folder, adapters=shapes)


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / "adapter.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter.safetensors")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "adapter.json").unlink(), "holds no trained adapter"),
        (lambda f: (f / "adapter.json").write_text("{"), r"adapter\.json: is damaged"),
        (lambda f: change_json(f, format_version=2), "format_version"),
        (lambda f: change_json(f, surprise=1), "surprise"),
        (lambda f: change_shape(f, hidden=-5), "no adapter has this shape"),
        (
            lambda f: change_json(f, encoders={"image": "eye"}),
            "an image and a text side are needed",
        ),
        (lambda f: (f / "adapter.safetensors").unlink(), r"adapter\.safetensors: cannot be read"),
        (
            lambda f: (f / "adapter.safetensors").write_bytes(b"x" * 40),
            r"adapter\.safetensors: cannot be read",
        ),
        (lambda f: change_weights(f, lambda t: t.pop("image.mean")), "agree with .* image.mean"),
        (
            lambda f: change_weights(f, lambda t: t["text.mean"].neg_().add_(1)),
            r"adapter\.safetensors: the content does not agree with the checksum",
        ),
    ],
)
def test_a_damaged_run_is_refused_by_file(
    saved: tuple[Path, Adapter], damage: Callable[[Path], Any], message: str
) -> None:
    folder, _ = saved
    damage(folder)

    with pytest.raises(DataError, match=message):
        load_adapter(folder)


def test_a_run_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such run"):
        load_adapter(tmp_path / "nowhere")
