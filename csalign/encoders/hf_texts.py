"""Frozen transformers models as text encoders."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qsl

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from csalign.core.enums import Modality
from csalign.core.errors import ConfigError, EncoderError
from csalign.core.paths import likely_meant, stand_in
from csalign.core.records import parse_json
from csalign.encoders import running
from csalign.encoders.base import Embedded, EncoderOptions
from csalign.features.schema import EncoderInfo

logger = logging.getLogger(__name__)

Ids = list[list[int]]
Pooling = Literal["mean", "cls", "last", "eos"]

_SAMPLE = ("a", "two people on bicycles wait at a crossing in the rain")
_DEFAULT_MAX_LENGTH = 512
# Tokenizers without a limit report an astronomical one.
_SANE_MAX_LENGTH = 1_000_000
# Names of the poolings in sentence-transformers, as flags in its older files.
_POOLINGS: dict[str, Pooling] = {
    "mean": "mean",
    "cls": "cls",
    "lasttoken": "last",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_lasttoken": "last",
}
# Modules of sentence-transformers that are followed, or that do nothing to directions.
_FOLLOWED = ("Transformer", "Pooling", "Normalize", "Dropout")


class Settings(BaseModel):
    """Options after the question mark of a spec.

    Attributes:
        pooling: "mean" over all tokens, "cls" the first, "last" the last, "eos" the end-of-text
            token, appended if the tokenizer does not. Default: that of the
            sentence-transformers files with the model, else "last" for causal models and
            "mean" for the others.
        layer: which of the hidden states, as an index; -1 is the output after the last norm.
        prefix: put before each text.
        max_length: most tokens per text. Default: that of the model's files, else 512.
        trust_remote_code: whether code that comes with the model may run.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    pooling: Pooling | None = None
    layer: int = -1
    prefix: str = ""
    max_length: int | None = Field(default=None, ge=2)
    trust_remote_code: bool = False


def load_hf(name: str, options: EncoderOptions) -> "HfTexts":
    """Load a frozen transformers model; of an encoder-decoder only the encoder.

    Args:
        name: folder or hub name of the model, optionally with ?OPTION=VALUE&..., see `Settings`.
            Values are URL-decoded.
        options: how to run it. Without a projection the tokens of both spaces are the same.
            Precision "auto" off the CPU is bfloat16 for a model stored in it.

    Raises:
        ConfigError: an option is unknown or has a wrong value.
        EncoderError: transformers is not installed; or the model cannot be loaded, lacks weights,
            does not encode texts, or cannot be run.
    """
    model, _, query = name.partition("?")
    settings = _parse(name, query)
    _require_transformers(name)
    _check_folder(model)
    network = _load_network(model, settings)
    tokenizer = _load_tokenizer(model, settings)
    if options.precision == "auto" and options.device.type != "cpu":
        # float32 weights would take twice the memory, and float16 may overflow.
        stored = {values.dtype for values in network.parameters()}
        options = replace(options, precision="bfloat16" if torch.bfloat16 in stored else "auto")
    with running.first_run(f"hf:{name}"):
        return HfTexts(network, tokenizer, model, settings, f"hf:{name}", options)


class HfTexts(running.RunningEncoder):
    """A transformers model; see `base.TextEncoder` for its methods."""

    def __init__(
        self,
        network: Any,
        tokenizer: Any,
        model: str,
        settings: Settings,
        spec: str,
        options: EncoderOptions,
    ) -> None:
        self._options = options
        self._tokenizer = tokenizer
        self._settings = settings
        self._with_tokens = Modality.TEXT in options.tokens
        self._max_length = _max_length(model, network, tokenizer, settings, spec)
        weights = running.fingerprint(network)
        network.eval()
        self._pooling = (
            settings.pooling or _stored_pooling(model, spec) or _default_pooling(network)
        )
        _check_modules(model, settings, self._pooling, spec)
        self._eos = tokenizer.eos_token_id if self._pooling == "eos" else None
        if self._pooling == "eos" and self._eos is None:
            raise ConfigError(
                f"{spec}: its tokenizer has no end-of-text token; choose another pooling"
            )
        # Masked, so any id would do, except that some models number positions by theirs.
        marks = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
        self._padding = next(mark for mark in marks if mark is not None)
        # The token of an empty text, if the tokenizer adds none.
        marks = (tokenizer.bos_token_id, tokenizer.eos_token_id, self._padding)
        self._nothing = next(mark for mark in marks if mark is not None)
        self._network = running.ready(network, options)
        self._info = self._probe(spec, weights)

    def embed(self, texts: Sequence[str]) -> Embedded:
        """Embed one or more texts, in their order.

        Texts of similar length share a batch, which is as long as the longest of them.
        """
        ids, special = self._tokenize(texts)

        def embed_batch(rows: list[int]) -> Embedded:
            return self._embed_ids([ids[row] for row in rows], [special[row] for row in rows])

        embedded = running.embed_by_length([len(own) for own in ids], self.batch_size, embed_batch)
        # Only those that fill the context are tokenised again.
        full = [text for text, own in zip(texts, ids, strict=True) if len(own) >= self._max_length]
        lengths = [len(own) for own in self._tokenize(full, truncation=False)[0]] if full else []
        self.cut += [length for length in lengths if length > self._max_length]
        return embedded

    def _tokenize(self, texts: Sequence[str], *, truncation: bool = True) -> tuple[Ids, Ids]:
        """Return the ids of each text, and a mask that is 1 for special tokens."""
        encoded = self._tokenizer(
            [self._settings.prefix + text for text in texts],
            truncation=truncation,
            max_length=self._max_length - (self._eos is not None) if truncation else None,
            verbose=False,
            padding=False,
            return_attention_mask=False,
            return_special_tokens_mask=True,
        )
        ids = [list(own) for own in encoded["input_ids"]]
        special = [list(own) for own in encoded["special_tokens_mask"]]
        for own, marks in zip(ids, special, strict=True):
            if self._eos is not None and own[-1:] != [self._eos]:
                own.append(self._eos)
                marks.append(1)
            elif not own:
                own.append(self._nothing)
                marks.append(1)
        return ids, special

    def _embed_ids(self, ids: Ids, special: Ids) -> Embedded:
        """Embed texts in one batch, padded on the right whatever side the tokenizer pads.

        Under the mask this is the same for encoders, and keeps the positions of a causal model.
        """
        lengths = torch.tensor([len(own) for own in ids])
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        padded = torch.full(mask.shape, self._padding)
        padded[mask] = torch.tensor([mark for own in ids for mark in own])
        with running.inference(self._options):
            hidden = self._run(padded, mask)
            pooled = running.to_numpy(self._pool(hidden, lengths.to(hidden.device)))
            if not self._with_tokens:
                return Embedded(pooled, None)
            rows = running.to_numpy(hidden)
        tokens = [
            own[: len(marks)][np.array(marks) == 0]
            for own, marks in zip(rows, special, strict=True)
        ]
        return Embedded(
            pooled, running.limit_tokens(tokens, Modality.TEXT, self._options.max_tokens)
        )

    def _run(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Run the network on ids and mask (n, t): hidden states of the chosen layer (n, t, d)."""
        layer = self._settings.layer
        output = self._network(
            input_ids=running.to_device(ids, self._options),
            attention_mask=running.to_device(mask.long(), self._options),
            output_hidden_states=layer != -1,
            return_dict=True,
        )
        last: torch.Tensor = output.last_hidden_state
        states: Sequence[torch.Tensor] = output.hidden_states or (last,)
        if not -len(states) <= layer < len(states):
            raise EncoderError(
                f"hf: layer={layer} does not exist; the model has layers 0 (its input) to "
                f"{len(states) - 1}, or -{len(states)} to -1"
            )
        return last if layer == -1 else states[layer]

    def _pool(self, hidden: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Pool hidden states (n, t, d) of texts of these lengths (n,) to (n, d)."""
        if self._pooling == "cls":
            return hidden[:, 0]
        if self._pooling == "mean":
            mask = torch.arange(hidden.shape[1], device=hidden.device) < lengths[:, None]
            return (hidden.float() * mask[:, :, None]).sum(dim=1) / lengths[:, None]
        return hidden[torch.arange(len(hidden), device=hidden.device), lengths - 1]

    def _probe(self, spec: str, weights: str) -> EncoderInfo:
        """Embed some texts, so that what cannot run fails before the work."""
        sample = [*_SAMPLE]
        if self._settings.max_length is not None:
            # More positions than the model has would only fail at the first long text.
            sample.append("word " * self._max_length)
        return running.describe(
            self.embed(sample),
            self._options,
            spec=spec,
            fingerprint=weights,
            preprocessing={
                "tokenizer": str(self._tokenizer.name_or_path),
                "pooling": self._pooling,
                "layer": self._settings.layer,
                "prefix": self._settings.prefix,
                "max_length": self._max_length,
            },
        )


def _parse(name: str, query: str) -> Settings:
    try:
        pairs = parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query))
        return Settings.model_validate(dict(pairs))
    except ValidationError as error:
        first = error.errors()[0]
        option, problem = first["loc"][0], first["msg"]
    except ValueError as error:
        option, problem = query, str(error)
    raise ConfigError(
        f"hf:{name}: {option}: {problem}; the options are {', '.join(Settings.model_fields)}"
    )


def _require_transformers(name: str) -> None:
    try:
        import transformers  # noqa: F401
    except ImportError:
        raise EncoderError(
            f"hf:{name} needs transformers; install it with: pip install 'csalign[hf]'"
        ) from None


def _check_folder(model: str) -> None:
    """Refuse a folder whose model is elsewhere, or is not all that is needed."""
    from transformers.utils import is_peft_available

    if not Path(model).is_dir():
        return
    if (adapter := _beside(model, "adapter_config.json")) and not is_peft_available():
        raise EncoderError(
            f"hf:{model}: is a PEFT adapter of {adapter.get('base_model_name_or_path')}; pip "
            "install peft, or save model.merge_and_unload()"
        )
    modules = _beside(model, "modules.json")
    if modules and not _beside(model, "config.json"):
        inner = Path(model, str(modules[0].get("path")))
        raise EncoderError(
            f"hf:{model}: its transformer is in {inner.name}; pass hf:{inner}?pooling=POOLING"
        )


def _load_network(model: str, settings: Settings) -> Any:
    from transformers import AutoModel

    try:
        with _without_bars():
            network, report = AutoModel.from_pretrained(
                model,
                dtype="auto",  # as it is stored; `ready` converts it
                trust_remote_code=settings.trust_remote_code,
                output_loading_info=True,
            )
    except Exception as error:  # damaged files and downloads fail in many ways
        raise _not_loaded(model, error) from error
    if hasattr(network.config, "vision_config"):
        raise EncoderError(f"hf:{model} is not a text-only model; use open_clip: for CLIP models")
    if network.config.is_encoder_decoder:
        network = network.get_encoder()
    names = set(network.state_dict())
    # The pooler that some models have after the last layer is not used.
    missing = sorted(
        key
        for key in report["missing_keys"]
        if "pooler." not in key and (key in names or key.removeprefix("encoder.") in names)
    )
    if missing:
        raise EncoderError(
            f"hf:{model} lacks weights ({missing[0]}{' and others' if missing[1:] else ''}), which "
            "would be random; choose a complete checkpoint"
        )
    network.config.use_cache = False  # keys and values that nothing reads
    return network


def _load_tokenizer(model: str, settings: Settings) -> Any:
    from transformers import AutoTokenizer

    try:
        with running.quiet():
            tokenizer = AutoTokenizer.from_pretrained(
                model, trust_remote_code=settings.trust_remote_code
            )
            known = set(tokenizer(_SAMPLE[1])["input_ids"]) - {*tokenizer.all_special_ids}
    except Exception as error:  # damaged files and downloads fail in many ways
        raise _not_loaded(model, error) from error
    if not known:  # transformers makes an empty one where there is none
        raise EncoderError(
            f"hf:{model}: has no tokenizer, or one that knows no word; save that of its base model "
            "there: AutoTokenizer.from_pretrained(BASE).save_pretrained(FOLDER)"
        )
    return tokenizer


def _not_loaded(model: str, error: Exception) -> EncoderError:
    if "trust_remote_code" in str(error):
        return EncoderError(
            f"hf:{model} runs code that comes with it; add trust_remote_code=true if you trust it"
        )
    folder, remedy = Path(model), "pass the folder of a saved model"
    if not folder.exists() and not model.startswith(("/", ".", "~")):
        remedy = f"connect once, or {remedy}"
    elif not folder.is_dir():
        return EncoderError(f"hf:{model}: no such folder{likely_meant(folder) or f'; {remedy}'}")
    for file in sorted(folder.glob("*.*")):
        if file.suffix in (".safetensors", ".bin", ".json", ".model") and (said := stand_in(file)):
            return EncoderError(f"{file}: {said}")
    return EncoderError(f"hf:{model} could not be loaded ({running.first_line(error)}); {remedy}")


@contextmanager
def _without_bars() -> Iterator[None]:
    """Hide transformers' own progress bar."""
    from transformers.utils import logging as transformers_logging

    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        with running.quiet():
            yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _beside(model: str, file: str) -> Any:
    """Read a JSON file beside a model, on disk or on the hub; {} if there is none."""
    path = Path(model, file)
    if not Path(model).is_dir():
        import huggingface_hub
        from huggingface_hub.errors import EntryNotFoundError

        try:
            with running.quiet():
                path = Path(huggingface_hub.hf_hub_download(model, file))
        except EntryNotFoundError:  # also if the hub cannot be reached and its cache lacks it
            return {}
    if not path.is_file():
        return {}
    try:
        return parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EncoderError(
            f"{path}: cannot be read as JSON ({running.first_line(error)})"
        ) from error


def _stored_pooling(model: str, spec: str) -> Pooling | None:
    """Return the pooling of a model's sentence-transformers files, None if there are none."""
    stored = _beside(model, "1_Pooling/config.json")
    if not stored:
        return None
    named = stored.get("pooling_mode")
    chosen = [named] if isinstance(named, str) else list(named or ())
    chosen += [key for key, on in stored.items() if key.startswith("pooling_mode_") and on is True]
    if len(chosen) == 1 and chosen[0] in _POOLINGS:
        return _POOLINGS[chosen[0]]
    raise EncoderError(
        f"{spec}: its 1_Pooling/config.json asks for {', '.join(chosen) or 'no pooling'}, which is "
        "not supported; choose one with pooling=mean, cls, last or eos"
    )


def _check_modules(model: str, settings: Settings, pooling: Pooling, spec: str) -> None:
    """Refuse or report what sentence-transformers would do and csalign does not."""
    stored = _beside(model, "1_Pooling/config.json")
    if settings.prefix and pooling == "mean" and stored.get("include_prompt") is False:
        raise EncoderError(
            f"{spec}: its 1_Pooling/config.json excludes prompts from the mean, which is not "
            "supported; omit prefix"
        )
    for module in _beside(model, "modules.json") or ():
        path, kind = module.get("path"), str(module.get("type"))
        if kind.rpartition(".")[2] in _FOLLOWED:
            continue
        if settings.pooling is None:
            raise EncoderError(
                f"{spec}: its modules.json has {path} ({kind}), which is not supported; take the "
                f"embeddings without it with pooling={pooling}"
            )
        logger.warning("%s: embeddings are taken without its %s", spec, path)


def _default_pooling(network: Any) -> Pooling:
    """Return "last" for a causal model, whose tokens do not see what follows, else "mean"."""
    vocabulary = network.get_input_embeddings().num_embeddings
    ids = torch.tensor([[[3, 5, 7]], [[3, 5, 9]]]) % vocabulary
    with torch.inference_mode():
        # One by one, so that both get the same arithmetic.
        first, other = (
            network(input_ids=own, attention_mask=torch.ones_like(own))[0][0, 0].float()
            for own in ids
        )
    return "last" if torch.allclose(first, other, rtol=0, atol=1e-6) else "mean"


def _max_length(model: str, network: Any, tokenizer: Any, settings: Settings, spec: str) -> int:
    positions = getattr(network.config, "max_position_embeddings", None)
    if not isinstance(positions, int) or positions < 1:
        positions = _SANE_MAX_LENGTH
    if settings.max_length is not None:
        if settings.max_length > positions:
            raise ConfigError(f"{spec}: max_length: the model has {positions} positions")
        return settings.max_length
    stored = _beside(model, "sentence_bert_config.json").get("max_seq_length")
    known = stored if isinstance(stored, int) else tokenizer.model_max_length
    return min(known if known < _SANE_MAX_LENGTH else _DEFAULT_MAX_LENGTH, positions)
