import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.special import erf

from csalign.adapters.checkpoint import AdapterInfo, load_adapter, read_info, save_adapter
from csalign.adapters.model import KINDS, Adapter
from csalign.adapters.side import SideShape
from csalign.core.enums import Modality
from csalign.core.errors import DataError, ShapeError

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


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("token_width", [None, 6])
def test_every_kind_gives_the_same_bytes_again(
    saved: tuple[Path, Adapter], tmp_path: Path, kind: str, token_width: int | None
) -> None:
    shapes = {
        Modality.IMAGE: SideShape(kind, 6, 6, hidden=8, token_width=token_width, rank=2, layers=1),
        Modality.TEXT: SideShape("linear", 5, 6, scaled=True),
    }
    adapter = Adapter(shapes)
    adapter.text.set_scale(torch.tensor([1.0, 0.1, 1.0, 1.0, 0.5]))
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.normal_()
    adapter.image.mean.fill_(0.1)
    save_adapter(tmp_path, adapter, read_info(saved[0]).model_copy(update={"adapters": shapes}))
    before = torch.random.get_rng_state()
    again = load_adapter(tmp_path)
    mask = np.arange(3) < np.arange(9)[:, None]
    tokens = np.random.default_rng(1).normal(size=(9, 3, 6))

    assert torch.equal(torch.random.get_rng_state(), before)
    assert again.image.shape == shapes[Modality.IMAGE]
    assert again.embed(Modality.IMAGE, ROWS).tobytes() == (
        adapter.embed(Modality.IMAGE, ROWS).tobytes()
    )
    assert again.text.scale is not None
    assert again.text.scale.tolist() == pytest.approx([1, 0.1, 1, 1, 0.5])
    if token_width:
        for found, expected in zip(
            again.embed_tokens(Modality.IMAGE, ROWS, tokens, mask),
            adapter.embed_tokens(Modality.IMAGE, ROWS, tokens, mask),
            strict=True,
        ):
            assert found.tobytes() == expected.tobytes()


def test_a_run_written_before_there_were_more_kinds_still_loads(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    shapes = {
        "image.mean": (2,),
        "image.projection.weight": (3, 2),
        "image.projection.bias": (3,),
        "image.residual.0.weight": (5, 2),
        "image.residual.0.bias": (5,),
        "image.residual.3.weight": (3, 5),
        "image.residual.3.bias": (3,),
        "text.mean": (4,),
        "text.projection.weight": (3, 4),
        "text.projection.bias": (3,),
    }
    tensors = {
        name: torch.from_numpy(rng.normal(size=shape).astype(np.float32))
        for name, shape in shapes.items()
    }
    save_file(tensors, tmp_path / "adapter.safetensors")
    digest = hashlib.sha256((tmp_path / "adapter.safetensors").read_bytes()).hexdigest()
    (tmp_path / "adapter.json").write_text(
        """{"format": "csalign-adapter", "format_version": 1, "csalign_version": "0.1.0",
        "adapters": {
          "image": {"kind": "mlp", "input_width": 2, "width": 3, "hidden": 5, "dropout": 0.3,
                    "signed_sqrt": false},
          "text": {"kind": "linear", "input_width": 4, "width": 3, "hidden": 5, "dropout": 0.3,
                   "signed_sqrt": true}},
        "encoders": {"image": "eye", "text": "ear"}, "start": "CCA (ridge 1, power 1)", "step": 7,
        "logit_scale": 7.0, "bandwidth": 0.6, "data_fingerprint": "ab", "train_split": "train",
        "weights_sha256": "DIGEST"}""".replace("DIGEST", digest)
    )
    adapter = load_adapter(tmp_path)
    x, y = rng.normal(size=(5, 2)), rng.normal(size=(5, 4))
    t = {name: value.double().numpy() for name, value in tensors.items()}
    u = x / np.linalg.norm(x, axis=1, keepdims=True) - t["image.mean"]
    inner = np.sqrt(2) * u @ t["image.residual.0.weight"].T + t["image.residual.0.bias"]
    inner *= (1 + erf(inner / np.sqrt(2))) / 2
    image = u @ t["image.projection.weight"].T + t["image.projection.bias"]
    image += inner @ t["image.residual.3.weight"].T + t["image.residual.3.bias"]
    v = np.sign(y) * np.sqrt(np.abs(y))
    v = v / np.linalg.norm(v, axis=1, keepdims=True) - t["text.mean"]
    text = v @ t["text.projection.weight"].T + t["text.projection.bias"]

    for side, rows, expected in ((Modality.IMAGE, x, image), (Modality.TEXT, y, text)):
        unit = expected / np.linalg.norm(expected, axis=1, keepdims=True)
        np.testing.assert_allclose(adapter.embed(side, rows), unit, atol=1e-5)


def test_whoever_may_read_the_folder_may_read_the_weights(
    saved: tuple[Path, Adapter], tmp_path: Path
) -> None:
    (tmp_path / "other").touch()
    weights = saved[0] / "adapter.safetensors"

    assert weights.stat().st_mode == (tmp_path / "other").stat().st_mode


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
    document = json.loads(path.read_text())
    path.write_text(json.dumps(document | values))


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
        (lambda f: (f / "adapter.json").unlink(), "is not a run"),
        (lambda f: (f / "adapter.json").write_text("{"), r"adapter\.json: is damaged"),
        (lambda f: change_json(f, format_version=2), "format version 2, .* upgrade csalign"),
        (lambda f: change_json(f, surprise=1), "surprise"),
        (lambda f: change_shape(f, hidden=-5), "no adapter has this shape"),
        (lambda f: change_shape(f, kind="surprise"), r"adapter\.json: surprise: no such kind"),
        (lambda f: change_shape(f, kind="os:Class"), r"adapter\.json: os:Class: .* allow"),
        (lambda f: change_shape(f, kind="identity"), r"adapter\.json: identity: keeps"),
        (lambda f: change_shape(f, width=4), r"adapter\.json: the image side maps to width 4"),
        (lambda f: change_shape(f, token_width=7), r"adapter\.json: mlp: takes tokens as wide"),
        (lambda f: change_shape(f, hidden=2**20, input_width=2**20), "match .* image.mean"),
        (
            lambda f: change_json(f, encoders={"image": "eye"}),
            "encoders: .* at least 2 items",
        ),
        (lambda f: (f / "adapter.safetensors").unlink(), r"adapter\.safetensors: cannot be read"),
        (
            lambda f: (f / "adapter.safetensors").write_bytes(b"x" * 40),
            r"adapter\.safetensors: cannot be read",
        ),
        (lambda f: change_weights(f, lambda t: t.pop("image.mean")), "match .* image.mean"),
        (
            lambda f: change_weights(f, lambda t: t["text.mean"].neg_().add_(1)),
            r"adapter\.safetensors: the content does not match the checksum",
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
