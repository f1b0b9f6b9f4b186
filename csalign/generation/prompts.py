"""Prompts, embedded by a text encoder and mapped into the space of images by a run's adapter."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from csalign.adapters.checkpoint import AdapterInfo, load_adapter, read_info
from csalign.core.devices import pick_device
from csalign.core.enums import Modality
from csalign.core.errors import ConfigError, DataError, ShapeError
from csalign.encoders.base import EncoderOptions
from csalign.encoders.spec import is_trusted, load_encoders
from csalign.features.checks import check_directions
from csalign.features.join import load_side
from csalign.features.reader import FeatureSet
from csalign.generation.config import PromptOptions
from csalign.runs.load import embed_rows, load_adapter_for
from csalign.sources.records.open import SourceOptions, open_source


@dataclass(frozen=True)
class Prompts:
    """Texts in the space of images."""

    ids: Sequence[str]
    texts: Sequence[str]  # "" where an embedding has none
    embeddings: npt.NDArray[Any]  # (n, d) float32, unit rows
    fingerprint: str  # of the texts and of the encoder that embedded them


def load_prompts(options: PromptOptions, device: str) -> tuple[Prompts, AdapterInfo]:
    """Load the texts, and the description of the run that maps them.

    Raises:
        ConfigError: options do not go together, or the run maps images too or names no encoder.
        DataError: no such run, prompts or features, or a text that cannot be used.
        EncoderError: the text encoder cannot be loaded or run.
    """
    if (options.prompts is None) == (options.features is None):
        raise ConfigError("prompts, features: give one of them")
    run, info = options.adapter, read_info(options.adapter)
    kind = info.adapters[Modality.IMAGE].kind
    if kind != "identity":
        raise ConfigError(
            f"{run}: maps images too (with {kind}), into a space that no decoder knows; train with "
            "--image-adapter identity, or with --recipe text-to-image"
        )
    if options.prompts is not None:
        return _embed_prompts(options, options.prompts, info, device), info
    assert options.features is not None
    if options.text_encoder is not None:
        raise ConfigError("text-encoder: is for --prompts; features are embedded already")
    features = FeatureSet.open(options.features)
    adapter, _ = load_adapter_for(features, run, device, options.allow_adapter)
    rows = load_side(features, options.split, Modality.TEXT)
    if not len(rows.texts):
        raise DataError(f"{rows.name}: has no texts; name another --split")
    check_directions(rows.texts, rows.text_ids, f"{rows.name}: texts")
    texts = [caption or "" for caption in rows.captions.to_pylist()]
    embeddings = embed_rows(adapter, Modality.TEXT, rows, features)
    fingerprint = f"{features.manifest.fingerprint()} {options.split}"
    return Prompts(rows.text_ids.to_pylist(), texts, embeddings, fingerprint), info


def _embed_prompts(options: PromptOptions, file: Path, info: AdapterInfo, device: str) -> Prompts:
    run, shape = options.adapter, info.adapters[Modality.TEXT]
    allow = () if options.allow_adapter is None else (options.allow_adapter,)
    adapter = load_adapter(run, allow=allow).to(pick_device(device))
    if adapter.side(Modality.TEXT).embeds_with_tokens:
        raise ConfigError(
            f"{run}: embeds texts with their tokens; extract features of the prompts with "
            "csalign extract --tokens text, and give them with --features"
        )
    spec = options.text_encoder or info.encoders[Modality.TEXT]
    if options.text_encoder is None and not is_trusted(spec):
        raise ConfigError(
            f"{run}: was trained on texts of {spec}, which is unknown or runs code from outside "
            "csalign; allow it with --text-encoder if you trust it, or give --features"
        )
    ids, texts = _read_prompts(file)
    encoder: Any = load_encoders(None, spec, EncoderOptions(device=pick_device(device))).text
    if encoder.info.width != shape.input_width:
        raise ShapeError(
            f"{spec}: gives embeddings of width {encoder.info.width}, the adapter {run} takes "
            f"{shape.input_width}; name the encoder that it was trained on with --text-encoder"
        )
    raw = encoder.embed(texts).embeddings
    bad = np.flatnonzero(~(np.isfinite(raw).all(1) & raw.any(1)))
    if len(bad):
        raise DataError(
            f"{file}: the embedding of prompt {texts[bad[0]]!r:.200} has no direction (it is 0 or "
            "not finite); rephrase or remove it"
        )
    content = json.dumps([encoder.info.model_dump(mode="json"), ids, texts])
    fingerprint = hashlib.sha256(content.encode()).hexdigest()
    return Prompts(ids, texts, adapter.embed(Modality.TEXT, raw), fingerprint)


def _read_prompts(file: Path) -> tuple[list[str], list[str]]:
    source = open_source(str(file), SourceOptions(kind="captions"))
    ids: list[str] = []
    texts: list[str] = []
    for position in range(len(source.files)):
        with source.open(position) as opened:
            for record in opened.records(0, len(opened)):
                if record.error is not None:
                    where = "" if record.row is None else f", row {record.row}"
                    raise DataError(f"{opened.name}{where}: {record.error}; correct or remove it")
                ids += [text.id for text in record.texts]
                texts += [text.caption for text in record.texts]
    if not texts:
        raise DataError(f"{file}: has no prompts; write one per line")
    return ids, texts
