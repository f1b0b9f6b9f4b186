"""The manifest of a feature set: what is in the folder, and how to tell that it is whole."""

import hashlib
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import Field

from csalign.core import atomic
from csalign.core.enums import Modality
from csalign.core.errors import CsalignError, DataError
from csalign.core.paths import is_store_error
from csalign.core.records import Record, read_record

MANIFEST = "manifest.json"
FAILURES = "failures.jsonl"
FORMAT_VERSION: Final = 1


class EncoderInfo(Record):
    """What made the embeddings of one side.

    Attributes:
        spec: the encoder as the user named it.
        fingerprint: SHA-256 of its weights, None where they are not known.
        width: of its embeddings.
        token_width: of its tokens, None where none are stored.
        token_space: "hidden" or "projected", None where no tokens are stored.
        preprocessing: whatever else decides the numbers: image size, mean, tokenizer, precision.
    """

    spec: str
    fingerprint: str | None = None
    width: int = Field(ge=1)
    token_width: int | None = None
    token_space: Literal["hidden", "projected"] | None = None
    preprocessing: dict[str, Any] = Field(default_factory=dict)


class Shard(Record):
    """One Parquet file: path relative to the feature set, and what identifies its content."""

    path: str
    rows: int = Field(ge=0)
    bytes: int = Field(ge=0)
    sha256: str


class Counts(Record):
    """Rows on each side, texts that have an image, and inputs that were left out."""

    images: int
    texts: int
    pairs: int
    failures: int


class Shards(Record):
    """The files of each side, in row order."""

    images: list[Shard]
    texts: list[Shard]

    def side(self, modality: Modality) -> list[Shard]:
        """The files of one side."""
        return self.images if modality is Modality.IMAGE else self.texts


class Encoders(Record):
    """What made each side; None for a side that is not there."""

    image: EncoderInfo | None
    text: EncoderInfo | None

    def side(self, modality: Modality) -> EncoderInfo | None:
        """What made one side, None if it is not there."""
        return self.image if modality is Modality.IMAGE else self.text


class Manifest(Record):
    """Content of ``manifest.json``; written last, so a folder without one is unfinished.

    "names" is what the sides are called where they are no images and texts.
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
        """SHA-256 over the shards' checksums: equal for equal content, whatever the folder."""
        sums = "\n".join(shard.sha256 for shard in (*self.shards.images, *self.shards.texts))
        return hashlib.sha256(sums.encode()).hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """Read and check the manifest of a feature set.

    Raises:
        DataError: no such folder, or it holds no feature set.
        SchemaError: the manifest is damaged or of another format version.
    """
    try:
        return _read(folder)
    except CsalignError:
        raise
    except Exception as error:
        if not isinstance(error, OSError) and not is_store_error(error):
            raise
        raise DataError(atomic.os_error(error, folder / MANIFEST)) from None


def _read(folder: Path) -> Manifest:
    path = folder / MANIFEST
    if not folder.exists():
        raise DataError(f"{folder}: no such feature set; make one with csalign extract or import")
    if not path.is_file():
        raise DataError(f"{folder}: is no feature set (no {MANIFEST} in it)")
    return read_record(path, Manifest, "make the feature set again")


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest, which completes the feature set."""
    document = manifest.model_dump(mode="json")
    if manifest.names is None:
        del document["names"]
    atomic.write_json(folder / MANIFEST, document)
