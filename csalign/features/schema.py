"""Every column, dtype and manifest key of a feature set: the only place that spells them."""

import hashlib
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from csalign.core import atomic
from csalign.core.enums import Modality
from csalign.core.errors import CsalignError, DataError
from csalign.core.paths import DOCUMENTS, Kind, is_store_error, require_kind
from csalign.core.records import Record, read_record

MANIFEST = DOCUMENTS[Kind.FEATURES]
FAILURES = "failures.jsonl"
ENTRIES = frozenset({MANIFEST, FAILURES, "images", "texts", "config.toml"})
"""Names in the folder of a feature set."""
FORMAT_VERSION: Final = 1

ID = "id"
IMAGE_ID = "image_id"
CAPTION = "caption"
SOURCE = "source"
SPLIT = "split"
EMBEDDING = "embedding"
TOKENS = "tokens"

STRING_COLUMNS = {
    Modality.IMAGE: (ID, SOURCE, SPLIT),
    Modality.TEXT: (ID, IMAGE_ID, CAPTION, SPLIT),
}
DTYPES: dict[str, np.dtype[Any]] = {
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
}

# Outside of these norms the squares overflow or vanish in float32, and with them the direction.
LEAST_NORM, MOST_NORM = 1e-10, 1e18
RESCALE = "scale the embeddings to norms about 1, which changes no result"


def table_schema(
    modality: Modality, dtype: str, width: int, token_width: int | None = None
) -> pa.Schema:
    """Build the Arrow schema of one side's Parquet files; no `token_width` means no tokens."""
    number = pa.from_numpy_dtype(DTYPES[dtype])
    fields = [pa.field(ID, pa.string(), nullable=False)]
    fields += [pa.field(name, pa.string()) for name in STRING_COLUMNS[modality] if name != ID]
    fields.append(pa.field(EMBEDDING, _vector(number, width), nullable=False))
    if token_width is not None:
        fields.append(pa.field(TOKENS, pa.list_(_vector(number, token_width)), nullable=False))
    return pa.schema(fields)


def _vector(number: pa.DataType, width: int) -> pa.DataType:
    # Elements that cannot be null let a reader take the values as one plain array.
    return pa.list_(pa.field("element", number, nullable=False), width)


class EncoderInfo(Record):
    """The encoder of one side."""

    spec: str  # as the user named it
    fingerprint: str | None = None  # SHA-256 of its weights, if known
    width: int = Field(ge=1)
    token_width: int | None = None  # None, as the space, if no tokens are stored
    token_space: Literal["hidden", "projected"] | None = None
    # Everything else that affects the numbers: image size, tokenizer, precision.
    preprocessing: dict[str, Any] = Field(default_factory=dict)


class Shard(Record):
    """One Parquet file: its path relative to the feature set, size and SHA-256."""

    path: str
    rows: int = Field(ge=0)
    bytes: int = Field(ge=0)
    sha256: str


class Counts(Record):
    """Rows of each side, texts that have an image, and inputs that could not be used."""

    images: int
    texts: int
    pairs: int
    failures: int


class Shards(Record):
    """The files of each side, in row order."""

    images: list[Shard]
    texts: list[Shard]

    def side(self, modality: Modality) -> list[Shard]:
        """Return the files of one side."""
        return self.images if Modality.of(modality) is Modality.IMAGE else self.texts


class Encoders(Record):
    """The encoder of each side; None for a side that is not stored."""

    image: EncoderInfo | None
    text: EncoderInfo | None

    def side(self, modality: Modality) -> EncoderInfo | None:
        """Return the encoder of one side; None if the side is not stored."""
        return self.image if Modality.of(modality) is Modality.IMAGE else self.text


class Manifest(Record):
    """Content of ``manifest.json``; written last, so a folder without one is unfinished.

    "names" are the names of the sides if they are not images and texts.
    """

    format: Literal["csalign-features"] = "csalign-features"
    format_version: Literal[1] = FORMAT_VERSION
    csalign_version: str
    names: dict[Modality, str] | None = None
    dtype: Literal["float16", "float32"]
    encoders: Encoders
    counts: Counts
    shards: Shards

    def fingerprint(self) -> str:
        """Return the SHA-256 of the shards' checksums, which identifies the files of this set.

        Copies of a set have the same one. Rows written again may not, as the bytes of a Parquet
        file depend on the version of pyarrow that wrote it.
        """
        sums = "\n".join(shard.sha256 for shard in (*self.shards.images, *self.shards.texts))
        return hashlib.sha256(sums.encode()).hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """Read and check the manifest of a feature set.

    Raises:
        DataError: the folder does not exist, or is not a feature set.
        SchemaError: the manifest is damaged or of a newer format version.
    """
    path = folder / MANIFEST
    try:
        require_kind(folder, Kind.FEATURES)
        return read_record(path, Manifest, "create the feature set again")
    except CsalignError:
        raise
    except Exception as error:
        if not isinstance(error, OSError) and not is_store_error(error):
            raise
        raise DataError(atomic.os_error(error, path)) from None


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest, which completes the feature set."""
    document = manifest.model_dump(mode="json")
    if manifest.names is None:
        del document["names"]
    atomic.write_json(folder / MANIFEST, document)
