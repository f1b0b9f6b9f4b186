"""``index.json``: what an index holds, and how to tell that it is whole."""

from pathlib import Path
from typing import Any, Final, Literal

from pydantic import Field

from csalign.core import atomic
from csalign.core.enums import Modality
from csalign.core.errors import DataError, SchemaError
from csalign.core.records import Record, read_record, write_record
from csalign.core.version import __version__
from csalign.features.schema import EncoderInfo
from csalign.search.items import ITEMS
from csalign.search.plan import IndexKind
from csalign.search.vectors import VECTORS, Effort

DESCRIPTION = "index.json"
ADAPTER = "adapter"
FORMAT_VERSION: Final = 1
CHECKED_BYTES = 64 << 20  # larger files are read whole by inspect alone

Correction = Literal["csls", "inverted-softmax", "centre"]


class Taken(Record):
    """Rows that went into an index: of which feature set, of which splits, how many."""

    features: str
    fingerprint: str
    split: str
    rows: int = Field(ge=0)


class Recall(Record):
    """How well the index finds what is truly nearest.

    Attributes:
        value: share of a query's ten nearest items that are among the first ten, in [0, 1].
        queries: how many queries were asked.
        of: what they are, as "texts".
        target: what the search was set for.
    """

    value: float = Field(ge=0, le=1)
    queries: int
    of: str
    target: float


class FileInfo(Record):
    """A file of the index."""

    bytes: int = Field(ge=0)
    sha256: str


class IndexManifest(Record):
    """Content of ``index.json``; written last, so a folder without one is unfinished.

    Attributes:
        side: what the items are.
        names: what the sides are called, None where that is image and text.
        kind: of the index.
        rows: items.
        width: of a vector, with what a correction adds.
        effort: how far a search goes; see `csalign.search.vectors.Effort`.
        recall: as measured, None where nothing could be asked.
        correct: the correction for hubs that is built in, if any.
        encoders: what made the embeddings of each side.
        adapter_sha256: of the weights in ``adapter/``, None where there are none.
        taken: where the rows come from, in their order.
        probes: captions whose embeddings are in ``probes.npy``, to know the encoder by.
        files: all other files by path.
    """

    format: Literal["csalign-index"] = "csalign-index"
    format_version: Literal[1] = FORMAT_VERSION
    csalign_version: str = __version__
    side: Modality
    names: dict[Modality, str] | None = None
    kind: IndexKind
    rows: int = Field(ge=1)
    width: int = Field(ge=1)
    effort: dict[str, int]
    recall: Recall | None
    correct: Correction | None
    encoders: dict[Modality, EncoderInfo | None]
    adapter_sha256: str | None
    taken: list[Taken]
    probes: list[str]
    files: dict[str, FileInfo]

    def search_effort(self) -> Effort:
        """How far a search goes."""
        return Effort(**self.effort)


def read_index_manifest(folder: Path, *, whole: bool = False) -> IndexManifest:
    """Read ``index.json`` and compare the files with it.

    Args:
        folder: of the index.
        whole: compare the content of large files too, not their sizes alone.

    Raises:
        DataError: there is no index at `folder`.
        SchemaError: it is damaged or of another format version; the file is named.
    """
    path = folder / DESCRIPTION
    if not path.is_file():
        kind = f"is no index (no {DESCRIPTION} in it)" if folder.exists() else "no such index"
        raise DataError(f"{folder}: {kind}; build one with csalign index")
    manifest = read_record(path, IndexManifest, "build the index again")
    try:
        manifest.search_effort()
    except (ValueError, TypeError) as error:
        raise SchemaError(f"{path}: is damaged ({error}); build the index again") from None
    for needed in (VECTORS, ITEMS):
        if needed not in manifest.files:
            raise SchemaError(f"{path}: names no {needed}; build the index again")
    for name, info in manifest.files.items():
        _check(folder, name, info, whole=whole)
    return manifest


def _check(folder: Path, name: str, info: FileInfo, *, whole: bool) -> None:
    path = folder / name
    if ".." in Path(name).parts or Path(name).is_absolute():
        raise SchemaError(f"{folder}: {DESCRIPTION} names {name!r}, outside of it")
    if not path.is_file():
        raise SchemaError(f"{path}: is missing; build the index again")
    size = path.stat().st_size
    if size != info.bytes:
        raise SchemaError(
            f"{path}: has {size} bytes, {DESCRIPTION} says {info.bytes}: it was cut short or "
            "changed; build the index again"
        )
    if (whole or size <= CHECKED_BYTES) and atomic.sha256_file(path) != info.sha256:
        raise SchemaError(
            f"{path}: the content does not agree with the checksum in {DESCRIPTION}: it was "
            "changed or is damaged; build the index again"
        )


def list_files(folder: Path) -> dict[str, FileInfo]:
    """The files of a folder by path, forced to the disk; all but hidden ones."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.name.startswith("."):
            atomic.fsync_path(path)
            name = path.relative_to(folder).as_posix()
            found[name] = FileInfo(bytes=path.stat().st_size, sha256=atomic.sha256_file(path))
    return found


def write_index_manifest(folder: Path, manifest: IndexManifest) -> None:
    """Write ``index.json``, which completes the index."""
    write_record(folder / DESCRIPTION, manifest)


def describe_index(folder: Path, manifest: IndexManifest) -> dict[str, Any]:
    """What is told of an index: its manifest, without what only the program needs."""
    document = manifest.model_dump(mode="json", exclude={"format", "files", "probes"})
    if document["names"] is None:
        del document["names"]
    size = sum(info.bytes for info in manifest.files.values())
    return (
        {"kind": "index", "path": str(folder), "search": document.pop("kind")}
        | document
        | {"bytes": size}
    )
