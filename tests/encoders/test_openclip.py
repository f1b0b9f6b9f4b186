import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import huggingface_hub
import numpy as np
import open_clip
import pytest
import safetensors.torch
import tokenizers
import torch
import transformers
from PIL import Image

from csalign.core.enums import Modality
from csalign.core.errors import ConfigError, EncoderError
from csalign.encoders.base import EncoderOptions, load_encoders
from csalign.encoders.openclip import OpenClipTexts
from csalign.encoders.running import TowerImages

CPU = torch.device("cpu")
BOTH = tuple(Modality)
CAPTIONS = [
    "a dog",
    "two people on bicycles wait at a crossing in the rain",
    "",
    "!!! wow !!!",
    "word " * 40,  # longer than the context
]
MakeConfig = Callable[..., Path]
Space = Literal["hidden", "projected"]


@pytest.fixture
def make_config(tiny_clip: tuple[Path, Path], tmp_path: Path) -> MakeConfig:
    """A function that writes the tiny model's config with other settings in it."""

    def make(name: str = "other", **changes: Any) -> Path:
        config = json.loads(tiny_clip[0].read_text())
        for key, value in changes.items():
            config[key] = config[key] | value if isinstance(value, dict) else value
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(config))
        return path

    return make


@pytest.fixture
def images() -> list[Image.Image]:
    rng = np.random.default_rng(3)
    sizes = [(40, 36), (36, 50), (100, 32)]
    return [Image.fromarray(rng.integers(0, 256, (h, w, 3), np.uint8)) for w, h in sizes]


@pytest.fixture(scope="module")
def direct(tiny_clip: tuple[Path, Path]) -> Iterator[Any]:
    """The tiny model as open_clip itself loads it, and its transform and tokenizer."""
    model, weights = tiny_clip
    open_clip.add_model_config(model)
    network, _, transform = open_clip.create_model_and_transforms(model.stem, str(weights))
    with torch.inference_mode():
        yield network.eval(), transform, open_clip.get_tokenizer(model.stem)


def load_spec(spec: str, **options: Any) -> tuple[TowerImages, OpenClipTexts]:
    image, text = load_encoders(spec, spec, EncoderOptions(CPU, **options))
    assert isinstance(image, TowerImages)
    assert isinstance(text, OpenClipTexts)
    return image, text


def load(
    tiny_clip: tuple[str | Path, str | Path], **options: Any
) -> tuple[TowerImages, OpenClipTexts]:
    model, weights = tiny_clip
    return load_spec(f"open_clip:{model}+{weights}", **options)


def embed_images(encoder: TowerImages, images: list[Image.Image]) -> Any:
    return encoder.embed(torch.stack([encoder.preprocess(image) for image in images]))


def assert_close(actual: Any, expected: Any, tolerance: float = 1e-5) -> None:
    np.testing.assert_allclose(actual, np.asarray(expected), rtol=0, atol=tolerance)


def test_embeddings_are_those_of_open_clip(
    tiny_clip: tuple[Path, Path], direct: Any, images: list[Image.Image]
) -> None:
    network, transform, tokenizer = direct
    image, text = load(tiny_clip)

    pixels = torch.stack([transform(image) for image in images])
    image_side, text_side = embed_images(image, images), text.embed(CAPTIONS)

    assert image_side.embeddings.dtype == text_side.embeddings.dtype == np.float32
    assert_close(image_side.embeddings, network.encode_image(pixels))
    assert_close(text_side.embeddings, network.encode_text(tokenizer(CAPTIONS)))
    assert image_side.tokens is text_side.tokens is None


def test_image_tokens_are_the_patches_after_the_last_norm(
    tiny_clip: tuple[Path, Path], direct: Any, images: list[Image.Image]
) -> None:
    network, transform, _ = direct
    visual = network.visual
    pixels = torch.stack([transform(image) for image in images])
    seen = visual.transformer(visual._embeds(pixels))
    hidden = visual.ln_post(seen)[:, 1:]

    spaces: dict[Space, Any] = {"hidden": hidden, "projected": hidden @ visual.proj}
    for space, expected in spaces.items():
        encoder, _ = load(tiny_clip, tokens=BOTH, token_space=space)
        actual = embed_images(encoder, images)

        assert_close(actual.tokens, expected)
        assert_close(actual.embeddings, network.encode_image(pixels))
        assert encoder.info.token_width == expected.shape[-1]
        assert encoder.info.token_space == space


def test_text_tokens_leave_out_special_tokens_and_padding(
    tiny_clip: tuple[Path, Path], direct: Any
) -> None:
    network, _, tokenizer = direct
    ids = tokenizer(CAPTIONS)
    seen = network.token_embedding(ids) + network.positional_embedding
    hidden = network.ln_final(network.transformer(seen, attn_mask=network.attn_mask))
    ends = ids.argmax(dim=1).tolist()
    assert ends == [3, 12, 1, 4, 19]

    spaces: dict[Space, Any] = {"hidden": hidden, "projected": hidden @ network.text_projection}
    for space, expected in spaces.items():
        _, encoder = load(tiny_clip, tokens=[Modality.TEXT], token_space=space, batch_size=2)
        actual = encoder.embed(CAPTIONS)

        assert actual.tokens is not None
        for row, end in enumerate(ends):
            assert_close(actual.tokens[row], expected[row, 1:end], 1e-5)
        assert actual.tokens[2].shape == (0, expected.shape[-1])
        assert_close(actual.embeddings, network.encode_text(ids), 1e-5)


@pytest.mark.parametrize(
    ("changes", "crops"),
    [
        ({}, True),
        ({"custom_text": True}, True),
        ({"custom_text": True, "text_cfg": {"no_causal_mask": True}}, False),
        ({"custom_text": True, "text_cfg": {"pool_type": "last"}}, False),
        ({"custom_text": True, "text_cfg": {"embed_cls": True}}, False),
        ({"custom_text": True, "text_cfg": {"proj_bias": True}}, True),
    ],
)
def test_texts_are_cropped_only_where_that_changes_nothing(
    make_config: MakeConfig, changes: dict[str, Any], crops: bool
) -> None:
    _, encoder = load((make_config(**changes), "none"), batch_size=2)
    ids = encoder._tokenizer(CAPTIONS)
    lengths = []
    encoder._side.register_forward_pre_hook(lambda _, ids: lengths.append(ids[0].shape[1]))

    actual = encoder.embed(CAPTIONS).embeddings
    with torch.inference_mode():
        tower = encoder._side.tower
        expected = tower.encode_text(ids) if isinstance(tower, open_clip.CLIP) else tower(ids)

    assert lengths == ([4, 13, 20] if crops else [20, 20, 20])
    assert_close(actual, expected, 1e-5)


@pytest.mark.parametrize("proj_type", ["linear", "none"])
@pytest.mark.parametrize("proj_bias", [False, True])
def test_projected_tokens_live_where_the_embedding_does(
    make_config: MakeConfig, proj_type: str, proj_bias: bool
) -> None:
    changes = {"custom_text": True, "text_cfg": {"proj_type": proj_type, "proj_bias": proj_bias}}
    _, encoder = load((make_config(**changes), "none"), tokens=[Modality.TEXT])
    ids = encoder._tokenizer(CAPTIONS[:1])
    with torch.inference_mode():
        pooled, projected = encoder._side(ids)

    actual = encoder.embed(CAPTIONS[:1])

    assert actual.tokens is not None
    assert actual.tokens[0].shape == (2, 16)
    assert_close(actual.tokens[0], projected[0, 1:3])
    assert_close(projected[0, 3], pooled[0])


def test_padding_of_another_tokenizer_is_dropped_too(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    vocabulary = {"<pad>": 0, "<eos>": 1, "a": 2, "dog": 3, "<unk>": 4}
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    plain.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", 1)]
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", eos_token="<eos>"
    ).save_pretrained(tmp_path / "words")
    changes = {"hf_tokenizer_name": str(tmp_path / "words"), "no_causal_mask": True}
    model = make_config(custom_text=True, text_cfg={**changes, "pool_type": "last"})

    _, encoder = load((model, "none"), tokens=[Modality.TEXT], token_space="hidden")
    tokens = encoder.embed(["a dog", "dog", ""]).tokens

    assert tokens is not None
    assert [len(own) for own in tokens] == [2, 1, 0]
    encoder._side.tower.output_tokens = True
    with torch.inference_mode():
        _, hidden = encoder._side.tower(encoder._tokenizer(["a dog"]))
    assert_close(tokens[0], hidden[0, :2])


def test_info_records_all_that_decides_the_numbers(tiny_clip: tuple[Path, Path]) -> None:
    image, text = (encoder.info for encoder in load(tiny_clip))

    assert image.spec == text.spec == f"open_clip:{tiny_clip[0]}+{tiny_clip[1]}"
    assert image.fingerprint == text.fingerprint
    assert (image.width, image.token_width, image.token_space) == (16, None, None)
    assert image.preprocessing == {
        "image_size": [32, 32],
        "mean": list(open_clip.OPENAI_DATASET_MEAN),
        "std": list(open_clip.OPENAI_DATASET_STD),
        "interpolation": "bicubic",
        "resize_mode": "shortest",
        "precision": "float32",
        "activation": "gelu",
    }
    assert text.preprocessing == {
        "tokenizer": "SimpleTokenizer",
        "context_length": 20,
        "precision": "float32",
        "activation": "gelu",
    }


def test_a_hub_config_brings_its_preprocessing(
    tiny_clip: tuple[Path, Path], tmp_path: Path
) -> None:
    config = {
        "model_cfg": json.loads(tiny_clip[0].read_text()) | {"quick_gelu": True},
        "preprocess_cfg": {"mean": [0.5] * 3, "size": 99, "resize_mode": "squash"},
    }
    path = tmp_path / "open_clip_config.json"
    path.write_text(json.dumps(config))

    preprocessing = load((path, tiny_clip[1]))[0].info.preprocessing

    assert preprocessing["mean"] == [0.5] * 3
    assert preprocessing["image_size"] == [32, 32]
    assert preprocessing["resize_mode"] == "squash"
    assert preprocessing["activation"] == "quick_gelu"


def test_the_fingerprint_is_of_the_weights_not_of_their_file(
    tiny_clip: tuple[Path, Path], tmp_path: Path
) -> None:
    state = safetensors.torch.load_file(tiny_clip[1])
    torch.save({"state_dict": state}, tmp_path / "same.pt")
    torch.save(state | {"logit_scale": torch.tensor(1.0)}, tmp_path / "other.pt")

    first, same, other = (
        load((tiny_clip[0], path))[0].info.fingerprint
        for path in (tiny_clip[1], tmp_path / "same.pt", tmp_path / "other.pt")
    )

    assert first == same != other


def test_random_weights_are_the_same_each_time_and_told(
    tiny_clip: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    handlers = list(logging.getLogger().handlers)

    prints = {load((tiny_clip[0], "none"))[1].info.fingerprint for _ in range(2)}

    assert len(prints) == 1
    assert torch.rand(1) == expected
    assert logging.getLogger().handlers == handlers
    assert [record.getMessage() for record in caplog.records] == [
        f"{tiny_clip[0]}: random weights; the embeddings are meaningless"
    ] * 2


def cosines(first: Any, other: Any) -> Any:
    norms = np.linalg.norm(first, axis=1) * np.linalg.norm(other, axis=1)
    return (first * other).sum(axis=1) / norms


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_lower_precision_stays_near(
    tiny_clip: tuple[Path, Path], images: list[Image.Image], precision: str
) -> None:
    image, text = load(tiny_clip)
    low_image, low_text = load(tiny_clip, precision=precision, tokens=BOTH, batch_size=2)
    pairs = (
        (embed_images(image, images), embed_images(low_image, images)),
        (text.embed(CAPTIONS), low_text.embed(CAPTIONS)),
    )

    for full, low in pairs:
        assert low.tokens is not None
        assert low.embeddings.dtype == low.tokens[0].dtype == np.float32
        assert 0 < np.abs(low.embeddings - full.embeddings).max() < 0.05
        assert cosines(low.embeddings, full.embeddings).min() > 0.99
    assert low_image.info.preprocessing["precision"] == precision
    assert low_image.info.fingerprint == image.info.fingerprint
    assert low_text._crops


def test_weights_named_after_openai_need_quick_gelu(
    tiny_clip: tuple[Path, Path],
    make_config: MakeConfig,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    weights = tmp_path / "vit_openai.safetensors"
    weights.write_bytes(tiny_clip[1].read_bytes())

    load((make_config(quick_gelu=True), weights))
    assert not caplog.records

    load((tiny_clip[0], weights))
    assert "these weights look trained with QuickGELU" in caplog.text


def error_of(model: str | Path, pretrained: str | Path, **options: Any) -> str:
    with pytest.raises(EncoderError) as caught:
        load((model, pretrained), **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_unknown_names_bring_near_ones(tiny_clip: tuple[Path, Path]) -> None:
    message = error_of("ViT-B32", "none")
    assert message.startswith("open_clip has no architecture 'ViT-B32'; the closest are ViT-")

    message = error_of("ViT-B-32", "laion2b_s34b_b79")
    assert "ViT-B-32 has no tag 'laion2b_s34b_b79'; the closest are laion2b_s34b_b79k" in message

    assert "has no tag 'zzz'; there are openai" in error_of("ViT-B-32", "zzz")
    assert "no tag 'zzz'; none is known for it" in error_of(tiny_clip[0], "zzz")
    assert error_of(tiny_clip[0], "gone.pt") == "gone.pt: no such checkpoint"


def test_a_hub_that_cannot_be_reached_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))

    message = error_of("ViT-B-32", "laion2b_s34b_b79k")

    assert message.startswith("'laion2b_s34b_b79k' of ViT-B-32 could not be downloaded")
    assert message.endswith("pass the path of a local checkpoint instead")
    assert error_of_spec("open_clip:hf-hub:some/model").startswith(
        "open_clip:hf-hub:some/model could not be downloaded"
    )
    for model in ("ViT-B-16-SigLIP", "roberta-ViT-B-32"):
        message = error_of(model, "none")
        assert message.startswith(f"the tokenizer of {model} comes from the Hugging Face hub")
        assert message.endswith("connect once, or fill the hub's cache")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("{", "is not an open_clip model config"),
        ("[]", "is not an open_clip model config"),
        ('{"embed_dim": 8}', "lacks 'vision_cfg'"),
        ('{"embed_dim": 8, "vision_cfg": {"wdth": 3}, "text_cfg": {}}', "cannot be built"),
    ],
)
def test_a_config_that_is_none_is_told(tmp_path: Path, content: str, expected: str) -> None:
    path = tmp_path / "model.json"
    path.write_text(content)

    assert error_of(path, "none").startswith(f"{path}")
    assert expected in error_of(path, "none")
    assert "No such file" in error_of(tmp_path / "gone.json", "none")


def test_a_network_that_builds_and_does_not_run_is_told(make_config: MakeConfig) -> None:
    model = make_config(vision_cfg={"layers": [1, 1, 1, 1], "width": 8})

    assert error_of(model, "none") == (
        f"{model} cannot be run (embed_dim 256 not divisible by num_heads 21)"
    )


def test_weights_of_another_model_do_not_fit(
    tiny_clip: tuple[Path, Path], make_config: MakeConfig
) -> None:
    wider = make_config(embed_dim=24)

    message = error_of(wider, tiny_clip[1])

    assert message.startswith(
        f"{tiny_clip[1]} does not fit {wider} (text_projection has shape (16, 16), "
    )


def test_half_weights_with_other_positions_do_not_fit(
    tiny_clip: tuple[Path, Path], tmp_path: Path
) -> None:
    state = safetensors.torch.load_file(tiny_clip[1])
    state["visual.positional_embedding"] = torch.randn(37, 24)
    half = {name: values.half() for name, values in state.items()}
    safetensors.torch.save_file(half, tmp_path / "half.safetensors")

    assert error_of(tiny_clip[0], tmp_path / "half.safetensors") == (
        f"{tmp_path}/half.safetensors does not fit {tiny_clip[0]} (its position embeddings "
        "have another size); choose the architecture that it was trained with"
    )


class Bomb:
    """Unpickling it makes a file, as a malicious checkpoint would."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("suffix", [".pt", ".bin"])
def test_a_checkpoint_never_runs_code(
    tiny_clip: tuple[Path, Path], tmp_path: Path, suffix: str
) -> None:
    weights = tmp_path / f"weights{suffix}"
    torch.save({"state_dict": {"a": torch.zeros(1)}, "bomb": Bomb(tmp_path / "ran")}, weights)

    message = error_of(tiny_clip[0], weights)

    assert message.startswith(f"{weights} cannot be read as plain weights")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["x.pt", "x.safetensors"])
def test_damaged_weights_are_told(tiny_clip: tuple[Path, Path], tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(tiny_clip[1].read_bytes()[:500])

    assert error_of(tiny_clip[0], tmp_path / name).startswith(f"{tmp_path / name} ")


@pytest.mark.parametrize(
    ("changes", "side", "tower"),
    [
        ({"vision_cfg": {"layers": [1, 1, 1, 1], "width": 8, "head_width": 16}}, 0, "Modified"),
        ({"vision_cfg": {"attentional_pool": True, "attn_pooler_heads": 2}}, 0, "VisionTransfo"),
        ({"custom_text": True, "text_cfg": {"embed_cls": True}}, 1, "TextTransformer"),
    ],
)
def test_a_tower_without_tokens_says_so(
    make_config: MakeConfig, changes: dict[str, Any], side: int, tower: str
) -> None:
    model = make_config(**changes)

    message = error_of(model, "none", tokens=[BOTH[side]])

    assert message.startswith(f"tokens: the {BOTH[side]} tower ({tower}")
    load((model, "none"), tokens=[BOTH[1 - side]])


def test_a_side_that_is_not_asked_for_is_not_kept(tiny_clip: tuple[Path, Path]) -> None:
    spec = f"open_clip:{tiny_clip[0]}+{tiny_clip[1]}"
    options = EncoderOptions(CPU)
    both = load_encoders(spec, spec, options)
    assert both.image is not None
    assert both.text is not None

    image, no_text = load_encoders(spec, None, options)
    assert isinstance(image, TowerImages)
    assert no_text is None
    assert image.info == both.image.info
    assert isinstance(image._tower, torch.nn.Module)
    assert not any("token_embedding" in name for name in image._tower.state_dict())

    no_image, text = load_encoders(None, spec, options)
    assert isinstance(text, OpenClipTexts)
    assert no_image is None
    assert text.info == both.text.info
    assert not any("visual" in name for name in text._side.state_dict())


def test_a_folder_holds_config_weights_and_tokenizer(
    tiny_clip: tuple[Path, Path], tmp_path: Path, images: list[Image.Image]
) -> None:
    config = {"model_cfg": json.loads(tiny_clip[0].read_text()), "preprocess_cfg": {}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    spec = f"open_clip:local-dir:{tmp_path}"
    with pytest.raises(
        EncoderError, match=r"contains no weights, looked for open_clip_model\.safet"
    ):
        load_spec(spec)
    (tmp_path / "open_clip_model.safetensors").write_bytes(tiny_clip[1].read_bytes())

    image, text = load_spec(spec)
    expected = load(tiny_clip)

    assert image.info.spec == spec
    assert_close(
        embed_images(image, images).embeddings, embed_images(expected[0], images).embeddings
    )
    assert_close(text.embed(CAPTIONS).embeddings, expected[1].embed(CAPTIONS).embeddings)
    with pytest.raises(EncoderError, match=r"open_clip_config\.json: cannot be read"):
        load_spec(f"{spec}/nowhere")


def test_a_folder_in_place_of_a_name_says_how_to_name_its_model(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"is a folder; .*{tmp_path}/CONFIG.json\+.*/WEIGHTS"):
        load_spec(f"open_clip:{tmp_path}")
    (tmp_path / "open_clip_config.json").touch()
    with pytest.raises(ConfigError, match=f"is a folder; write open_clip:local-dir:{tmp_path}"):
        load_spec(f"open_clip:{tmp_path}")


def test_a_name_without_weights_shows_the_forms() -> None:
    for name, bare in [
        ("ViT-B-32", "ViT-B-32"),
        ("ViT-B/32", "ViT-B/32"),
        ("ViT-B/32/", "ViT-B/32"),
        ("a/model.json", "a/model.json"),
    ]:
        with pytest.raises(ConfigError) as caught:
            load_spec(f"open_clip:{name}")
        assert str(caught.value).startswith(
            f"open_clip:{name} names no weights; use open_clip:{bare}/TAG"
        )
        assert str(caught.value).endswith(
            f"open_clip:{bare}+FILE or, for random ones, open_clip:{bare}/none"
        )


def test_architectures_may_have_a_slash() -> None:
    assert "ViT-B/32 has no tag 'zzz'" in error_of_spec("open_clip:ViT-B/32/zzz")
    assert error_of_spec("open_clip:ViT-B/32+a+b.pt") == "a+b.pt: no such checkpoint"


def error_of_spec(spec: str) -> str:
    with pytest.raises(EncoderError) as caught:
        load_spec(spec)
    return str(caught.value)


def test_tokens_beyond_the_limit_are_pooled_or_cut(
    tiny_clip: tuple[Path, Path], images: list[Image.Image]
) -> None:
    image, text = load(tiny_clip, tokens=BOTH)
    few_image, few_text = load(tiny_clip, tokens=BOTH, max_tokens=5)
    all_tokens, few = embed_images(image, images), embed_images(few_image, images)

    quarter = all_tokens.tokens[0].reshape(2, 2, 2, 2, 16).mean(axis=(1, 3)).reshape(4, 16)
    assert_close(few.tokens[0], quarter)
    assert_close(few.embeddings, all_tokens.embeddings)
    whole, cut = text.embed(CAPTIONS).tokens, few_text.embed(CAPTIONS).tokens
    assert whole is not None
    assert cut is not None
    assert [len(own) for own in cut] == [2, 5, 0, 3, 5]
    assert_close(cut[1], whole[1][:5])
    assert few_image.info.preprocessing["max_tokens"] == 5
    assert few_text.info.preprocessing["max_tokens"] == 5
    assert "max_tokens" not in image.info.preprocessing
