from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image

from csalign.core.enums import Modality
from csalign.core.errors import EncoderError
from csalign.encoders.base import EncoderOptions, load_encoders
from csalign.encoders.running import TowerImages

CPU = torch.device("cpu")
TOKENS = {"tokens": [Modality.IMAGE]}


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    rng = np.random.default_rng(3)
    sizes = [(200, 170), (160, 160), (300, 100)]
    return [Image.fromarray(rng.integers(0, 256, (h, w, 3), np.uint8)) for w, h in sizes]


def load(name: str, **options: Any) -> TowerImages:
    encoder = load_encoders(f"timm:{name}", None, EncoderOptions(CPU, **options)).image
    assert isinstance(encoder, TowerImages)
    return encoder


def embed(encoder: TowerImages, images: list[Image.Image]) -> Any:
    return encoder.embed(torch.stack([encoder.preprocess(image) for image in images]))


def direct(name: str, images: list[Image.Image]) -> tuple[Any, torch.Tensor]:
    """A model with the same random weights, and the pixels, from timm itself."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = timm.create_model(name, pretrained=False, num_classes=0).eval()
    config = timm.data.resolve_model_data_config(network)
    transform = timm.data.create_transform(**config, is_training=False)
    return network, torch.stack([transform(image) for image in images])


def assert_close(actual: Any, expected: torch.Tensor) -> None:
    np.testing.assert_allclose(actual, expected.detach().numpy(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "test_convnext"])
def test_embeddings_are_those_of_timm(name: str, images: list[Image.Image]) -> None:
    network, pixels = direct(name, images)

    actual = embed(load(f"{name}+none"), images)

    assert actual.embeddings.dtype == np.float32
    assert actual.tokens is None
    assert_close(actual.embeddings, network(pixels))


@pytest.mark.parametrize("space", ["hidden", "projected"])
def test_tokens_of_a_vit_leave_out_what_is_no_patch(images: list[Image.Image], space: str) -> None:
    network, pixels = direct("test_vit", images)
    assert network.num_prefix_tokens == 1
    features = network.forward_features(pixels)

    encoder = load("test_vit+none", **TOKENS, token_space=space)
    actual = embed(encoder, images)

    assert_close(actual.tokens, features[:, 1:])
    assert_close(actual.embeddings, features[:, 0])
    assert (encoder.info.token_width, encoder.info.token_space) == (64, space)


def test_tokens_of_an_averaging_vit_have_its_last_norm(images: list[Image.Image]) -> None:
    network, pixels = direct("test_vit4", images)
    encoder = load("test_vit4+none", **TOKENS)
    tokens = embed(encoder, images).tokens

    assert_close(tokens, network.fc_norm(network.norm(network.forward_features(pixels)))[:, 1:])


def test_a_feature_map_gives_tokens_where_the_embedding_is_their_mean(
    images: list[Image.Image],
) -> None:
    network, pixels = direct("test_resnet", images)
    features = network.forward_features(pixels)

    actual = embed(load("test_resnet+none", **TOKENS), images)
    few = embed(load("test_resnet+none", **TOKENS, max_tokens=4), images)

    assert_close(actual.tokens, features.flatten(2).transpose(1, 2))
    np.testing.assert_allclose(np.mean(actual.tokens, axis=1), actual.embeddings, atol=1e-5)
    assert_close(few.tokens, torch.nn.functional.adaptive_avg_pool2d(features, 2).flatten(2).mT)


@pytest.mark.parametrize("name", ["test_convnext", "test_vit3"])
def test_a_model_whose_tokens_live_elsewhere_says_so(name: str) -> None:
    load(f"{name}+none")
    assert "has no tokens that share a space" in error_of(f"{name}+none", **TOKENS)


def test_info_records_all_that_decides_the_numbers() -> None:
    info = load("test_vit+none").info

    assert info.spec == "timm:test_vit+none"
    assert (info.width, info.token_width, info.token_space) == (64, None, None)
    assert info.preprocessing == {
        "input_size": [3, 160, 160],
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "interpolation": "bicubic",
        "crop_pct": 0.95,
        "crop_mode": "center",
        "precision": "float32",
    }


def test_a_checkpoint_is_loaded_without_its_classifier(
    tmp_path: Path, images: list[Image.Image]
) -> None:
    network = timm.create_model("test_vit", pretrained=False, num_classes=7).eval()
    path = tmp_path / "w+1.safetensors"
    safetensors.torch.save_file(network.state_dict(), path)
    network.reset_classifier(0)
    _, pixels = direct("test_vit", images)

    encoder = load(f"test_vit+{path}")

    assert_close(embed(encoder, images).embeddings, network(pixels))
    assert encoder.info.fingerprint != load("test_vit+none").info.fingerprint
    low = load(f"test_vit+{path}", precision="bfloat16")
    assert low.info.fingerprint == encoder.info.fingerprint
    full, rough = embed(encoder, images).embeddings, embed(low, images).embeddings
    norms = np.linalg.norm(full, axis=1) * np.linalg.norm(rough, axis=1)
    assert ((full * rough).sum(axis=1) / norms).min() > 0.99
    assert not np.array_equal(full, rough)


def error_of(name: str, **options: Any) -> str:
    with pytest.raises(EncoderError) as caught:
        load(name, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


class Bomb:
    """Unpickling it makes a file, as a malicious checkpoint would."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


def test_weights_that_cannot_be_used_are_told(tmp_path: Path) -> None:
    state = timm.create_model("test_resnet", pretrained=False).state_dict()
    torch.save(state, tmp_path / "other.pt")
    (tmp_path / "damaged.safetensors").write_bytes(b"nothing")
    torch.save({"state_dict": state, "bomb": Bomb(tmp_path / "ran")}, tmp_path / "bomb.pt")

    assert error_of(f"test_vit+{tmp_path}/gone.pt") == f"{tmp_path}/gone.pt: no such checkpoint"
    for file, problem in [
        ("other.pt", "does not fit test_vit (it lacks 78 of 78 tensors, such as cls_token)"),
        ("damaged.safetensors", "cannot be read as plain weights"),
        ("bomb.pt", "cannot be read as plain weights"),
    ]:
        assert error_of(f"test_vit+{tmp_path / file}").startswith(f"{tmp_path / file} {problem}")
    assert not (tmp_path / "ran").exists()


def test_a_checkpoint_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    state = timm.create_model("test_vit", pretrained=False).state_dict()
    del state["norm.weight"]
    torch.save(state, tmp_path / "part.pt")

    assert "norm.weight" in error_of(f"test_vit+{tmp_path / 'part.pt'}")


def test_names_and_hubs_that_fail_are_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))

    assert error_of("resnet51").startswith("timm has no model 'resnet51'; the closest are resnet")
    message = error_of("test_vit")
    assert message.startswith("timm:test_vit could not be loaded (")
    assert message.endswith("connect once, or use timm:test_vit+FILE with a local checkpoint")
