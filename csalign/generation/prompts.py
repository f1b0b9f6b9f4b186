"""Texts of a file or a feature set, as a run's text adapter maps them into the space of images."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from csalign.adapters.checkpoint import AdapterInfo
from csalign.adapters.model import Adapter
from csalign.core.enums import Modality
from csalign.core.errors import ConfigError, DataError, ShapeError
from csalign.encoders.base import EncoderOptions
from csalign.encoders.spec import is_trusted, load_encoders
from csalign.features.join import check_directions, load_side
from csalign.features.reader import FeatureSet
from csalign.runs.load import embed_rows
from csalign.sources.records.open import SourceOptions, open_source

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Prompts:
    """Texts in an order, and where they lie among images.

    Attributes:
        ids: n ids, unique.
        texts: n texts; "" where an embedding has none.
        embeddings: (n, d) float32, unit rows.
        fingerprint: of what they were made of.
    """

    ids: Sequence[str]
    texts: Sequence[str]
    embeddings: Array
    fingerprint: str


def read_prompts(file: Path) -> tuple[list[str], list[str]]:
    """Ids and texts of a file, all of them.

    Args:
        file: a text file with a prompt a line, or a table with a column of captions.

    Raises:
        DataError: it cannot be read, holds no text, or a row cannot be used.
    """
    source = open_source(str(file), SourceOptions(kind="captions"))
    ids: list[str] = []
    texts: list[str] = []
    for position in range(len(source.files)):
        with source.open(position) as volume:
            for record in volume.records(0, len(volume)):
                if record.error is not None:
                    where = "" if record.row is None else f", row {record.row}"
                    raise DataError(f"{volume.name}{where}: {record.error}; mend or remove it")
                ids += [text.id for text in record.texts]
                texts += [text.caption for text in record.texts]
    if not texts:
        raise DataError(f"{file}: holds no prompt")
    return ids, texts


def embed_prompts(
    file: Path, encoder: str | None, run: Path, loaded: tuple[Adapter, AdapterInfo], device: Any
) -> Prompts:
    """Embed the texts of a file by an encoder, and map them by a run's text adapter.

    Args:
        file: see `read_prompts`.
        encoder: spec of the text encoder; None for the one that the run names.
        run: for messages.
        loaded: its adapter.
        device: to compute on.

    Raises:
        ConfigError: the run names no encoder, or one whose code has to be asked for.
        DataError: see `read_prompts`; or a text has an embedding of norm 0.
        EncoderError: the encoder cannot be had or run.
        ShapeError: it gives embeddings of another width than the adapter takes.
    """
    adapter, info = loaded
    if adapter.side(Modality.TEXT).embeds_with_tokens:
        raise ConfigError(
            f"{run}: embeds texts with their tokens; make features of the prompts with csalign "
            "extract --tokens text, and give those by --features"
        )
    spec = encoder or _recorded(info.encoders[Modality.TEXT], run)
    ids, texts = read_prompts(file)
    text = load_encoders(None, spec, EncoderOptions(device=device)).text
    assert text is not None
    takes = info.adapters[Modality.TEXT].input_width
    if text.info.width != takes:
        raise ShapeError(
            f"{spec}: gives embeddings of width {text.info.width}, the adapter {run} takes "
            f"{takes}; name the encoder that it was trained on by --text-encoder"
        )
    size = 16 * text.batch_size
    parts = [
        text.embed(texts[start : start + size]).embeddings for start in range(0, len(texts), size)
    ]
    raw = np.concatenate(parts)
    bad = np.flatnonzero(~(np.isfinite(raw).all(1) & raw.any(1)))
    if len(bad):
        raise DataError(f"{file}: prompt {texts[bad[0]]!r:.200} has no embedding with a direction")
    told = json.dumps([spec, ids, texts]).encode()
    return Prompts(ids, texts, adapter.embed(Modality.TEXT, raw), hashlib.sha256(told).hexdigest())


def stored_prompts(features: FeatureSet, split: str, adapter: Adapter) -> Prompts:
    """The texts of a feature set, mapped by a run's text adapter, which fits it.

    Raises:
        DataError: there is no text in the split, or one without a direction.
        SchemaError: the features are damaged.
    """
    rows = load_side(features, split, Modality.TEXT)
    if not len(rows.texts):
        raise DataError(f"{rows.name}: holds no texts; name another --split")
    check_directions(rows.texts, rows.text_ids, f"{rows.name}: texts")
    return Prompts(
        rows.text_ids.to_pylist(),
        [caption or "" for caption in rows.captions.to_pylist()],
        embed_rows(adapter, Modality.TEXT, rows, features),
        f"{features.manifest.fingerprint()} {split}",
    )


def _recorded(spec: str, run: Path) -> str:
    """The encoder that a run names, if loading it runs no code but csalign's and the libraries'."""
    if is_trusted(spec):
        return spec
    if ":" in spec:
        raise ConfigError(
            f"{run}: was trained on texts of {spec}, which runs code from outside csalign; allow "
            "it by --text-encoder if you trust it"
        )
    raise ConfigError(
        f"{run}: does not name the encoder of its texts ({spec}); give --text-encoder, or "
        "--features in place of prompts"
    )
