"""Prompts, embedded by a text encoder and mapped into the space of images by a run's adapter."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from csalign.adapters.checkpoint import AdapterInfo, load_adapter_with_info
from csalign.adapters.model import Adapter
from csalign.core.devices import pick_device
from csalign.core.enums import Modality
from csalign.core.errors import ConfigError, DataError, ShapeError
from csalign.encoders.base import EncoderOptions
from csalign.encoders.spec import is_trusted, load_encoders
from csalign.features.join import check_directions, load_side
from csalign.features.reader import FeatureSet
from csalign.generation.config import PromptOptions
from csalign.runs.load import embed_rows, load_adapter_for
from csalign.sources.records.open import SourceOptions, open_source

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Prompts:
    """Texts in the space of images.

    Attributes:
        ids: n unique ids.
        texts: n texts; "" where an embedding has none.
        embeddings: (n, d) float32, unit rows.
        fingerprint: of the texts and of the encoder that embedded them.
    """

    ids: Sequence[str]
    texts: Sequence[str]
    embeddings: Array
    fingerprint: str


def load_prompts(options: PromptOptions, device: str) -> tuple[Prompts, AdapterInfo]:
    """Load the texts, and the description of the run that maps them.

    Raises:
        ConfigError: options do not go together; the run maps images too; or it names no encoder,
            or one whose code must be allowed.
        DataError: no such run, prompts or features, or a text that cannot be used.
        EncoderError: the text encoder cannot be loaded or run.
        SchemaError: the features or the run are damaged.
        ShapeError: the adapter takes embeddings of another width.
    """
    if (options.prompts is None) == (options.features is None):
        raise ConfigError("prompts, features: give one of them")
    run = options.adapter
    if options.features is not None:
        if options.text_encoder is not None:
            raise ConfigError("text-encoder: is for --prompts; features are embedded already")
        features = FeatureSet.open(options.features)
        adapter, info = load_adapter_for(features, run, device, options.allow_adapter)
        _check_identity(run, info)
        return _stored_prompts(features, options.split, adapter), info
    allow = () if options.allow_adapter is None else (options.allow_adapter,)
    adapter, info = load_adapter_with_info(run, allow=allow)
    _check_identity(run, info)
    if adapter.side(Modality.TEXT).embeds_with_tokens:
        raise ConfigError(
            f"{run}: embeds texts with their tokens; extract features of the prompts with "
            "csalign extract --tokens text, and give them with --features"
        )
    return _embed_prompts(options, adapter, info, device), info


def _check_identity(run: Path, info: AdapterInfo) -> None:
    kind = info.adapters[Modality.IMAGE].kind
    if kind != "identity":
        raise ConfigError(
            f"{run}: maps images too (with {kind}), into a space that no decoder knows; train with "
            "--image-adapter identity, or with --recipe text-to-image"
        )


def _read_prompts(file: Path) -> tuple[list[str], list[str]]:
    source = open_source(str(file), SourceOptions(kind="captions"))
    ids: list[str] = []
    texts: list[str] = []
    for position in range(len(source.volumes)):
        with source.open(position) as volume:
            for record in volume.records(0, len(volume)):
                if record.flaw is not None:
                    where = "" if record.row is None else f", row {record.row}"
                    raise DataError(f"{volume.name}{where}: {record.flaw}; correct or remove it")
                ids += [text.id for text in record.texts]
                texts += [text.caption for text in record.texts]
    if not texts:
        raise DataError(f"{file}: has no prompts; write one per line")
    return ids, texts


def _embed_prompts(
    options: PromptOptions, adapter: Adapter, info: AdapterInfo, device: str
) -> Prompts:
    assert options.prompts is not None
    run = options.adapter
    spec = options.text_encoder or _recorded_encoder(info.encoders[Modality.TEXT], run)
    ids, texts = _read_prompts(options.prompts)
    encoder = load_encoders(None, spec, EncoderOptions(device=pick_device(device))).text
    assert encoder is not None
    width = info.adapters[Modality.TEXT].input_width
    if encoder.info.width != width:
        raise ShapeError(
            f"{spec}: gives embeddings of width {encoder.info.width}, the adapter {run} takes "
            f"{width}; name the encoder that it was trained on with --text-encoder"
        )
    raw = encoder.embed(texts).embeddings
    bad = np.flatnonzero(~(np.isfinite(raw).all(1) & raw.any(1)))
    if len(bad):
        raise DataError(
            f"{options.prompts}: the embedding of prompt {texts[bad[0]]!r:.200} has no direction "
            "(it is 0 or not finite); rephrase or remove it"
        )
    embeddings = adapter.to(pick_device(device)).embed(Modality.TEXT, raw)
    content = json.dumps([encoder.info.model_dump(mode="json"), ids, texts])
    return Prompts(ids, texts, embeddings, hashlib.sha256(content.encode()).hexdigest())


def _stored_prompts(features: FeatureSet, split: str, adapter: Adapter) -> Prompts:
    rows = load_side(features, split, Modality.TEXT)
    if not len(rows.texts):
        raise DataError(f"{rows.name}: has no texts; name another --split")
    check_directions(rows.texts, rows.text_ids, f"{rows.name}: texts")
    return Prompts(
        rows.text_ids.to_pylist(),
        [caption or "" for caption in rows.captions.to_pylist()],
        embed_rows(adapter, Modality.TEXT, rows, features),
        f"{features.manifest.fingerprint()} {split}",
    )


def _recorded_encoder(spec: str, run: Path) -> str:
    """Return the encoder that a run names, if loading it runs no code of others."""
    if is_trusted(spec):
        return spec
    if ":" in spec:
        raise ConfigError(
            f"{run}: was trained on texts of {spec}, which runs code from outside csalign; allow "
            "it with --text-encoder if you trust it"
        )
    raise ConfigError(
        f"{run}: does not name the encoder of its texts ({spec}); give --text-encoder, or "
        "--features instead of prompts"
    )
