"""``index.json`` and ``items.arrow``: the content of an index beside its vectors."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final, Literal

import pyarrow as pa
from pydantic import Field

from csalign.core import __version__, atomic
from csalign.core.enums import AnySide, Modality, SideName, side_of
from csalign.core.errors import SchemaError
from csalign.core.paths import DOCUMENTS, Kind, require_kind
from csalign.core.records import Record, read_record, write_record
from csalign.features.schema import EncoderInfo

DESCRIPTION = DOCUMENTS[Kind.INDEX]
VECTORS = "vectors.faiss"
ITEMS = "items.arrow"
ADAPTER = "adapter"
ENTRIES = frozenset(
    {DESCRIPTION, VECTORS, ITEMS, ADAPTER, "config.toml"}
    | {"vectors.npy", "probes.npy"}  # of 0.1.0
)
"""Names in the folder of an index."""
FORMAT_VERSION: Final = 2
CHECKED_BYTES = 64 << 20  # larger files are read completely by inspect only
ROWS_PER_BATCH = 65_536
REMEDY = "build the index again"

_COLUMNS = ("id", "image_id", "caption", "source")
_SIDED = ("side", "item")  # also, of features with sides beside images and texts
Correction = Literal["csls", "inverted-softmax", "centre"]


class Recall(Record):
    """Recall@10 in [0, 1] versus exact search, on so many queries "of" a side, and its target."""

    value: float = Field(ge=0, le=1)
    queries: int
    of: str
    target: float


class IndexManifest(Record):
    """Content of ``index.json``; written last, so a folder without one is unfinished."""

    format: Literal["csalign-index"] = "csalign-index"
    format_version: Literal[2] = FORMAT_VERSION
    csalign_version: str = __version__
    side: str  # or several, comma-separated
    names: dict[Modality, str] | None = None
    factory: str
    rows: int = Field(ge=1)
    width: int = Field(ge=1)  # with what a correction adds
    effort: dict[str, int]  # {"nprobe": n}, {"efSearch": n} or {}
    recall: Recall | None  # None for exact search
    correct: Correction | None
    encoders: dict[SideName, EncoderInfo | None]
    adapter_sha256: str | None
    features: str
    source_root: str | None = None  # folder that relative sources of the items start from
    fingerprint: str  # of the features
    split: str
    files: dict[str, str]  # SHA-256 of all other files, by path

    @property
    def sides(self) -> tuple[AnySide, ...]:
        """The sides that can be found."""
        return tuple(map(side_of, self.side.split(",")))

    @property
    def is_sided(self) -> bool:
        """Whether the features have sides beside images and texts."""
        return not {*self.encoders} <= {*Modality}

    @property
    def plural(self) -> str:
        """What can be found, in words."""
        return ", ".join(side.plural for side in self.sides)


def read_index_manifest(folder: Path, *, whole: bool = False) -> IndexManifest:
    """Read ``index.json`` and compare the files with their checksums; large ones if `whole`.

    Raises:
        DataError: there is no index at `folder`.
        SchemaError: it is damaged or of an unsupported format; the file is named.
    """
    path = folder / DESCRIPTION
    require_kind(folder, Kind.INDEX)
    manifest = read_record(path, IndexManifest, REMEDY)
    for name, checksum in manifest.files.items():
        file = folder / name
        if not file.resolve().is_relative_to(folder.resolve()):
            raise SchemaError(f"{path}: names {name!r}, outside of the index; {REMEDY}")
        if not file.is_file():
            raise SchemaError(f"{file}: is missing; {REMEDY}")
        is_checked = whole or file.stat().st_size <= CHECKED_BYTES
        if is_checked and atomic.sha256_file(file) != checksum:
            raise SchemaError(
                f"{file}: the content does not match the checksum in {DESCRIPTION}: it was "
                f"changed or damaged; {REMEDY}"
            )
    return manifest


def write_index_manifest(folder: Path, manifest: IndexManifest) -> IndexManifest:
    """Write ``index.json`` with the checksums of all files that are there, flushed to disk."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.name.startswith("."):
            atomic.fsync_path(path)
            files[path.relative_to(folder).as_posix()] = atomic.sha256_file(path)
    manifest = manifest.model_copy(update={"files": files})
    write_record(folder / DESCRIPTION, manifest)
    return manifest


def describe_index(folder: Path, manifest: IndexManifest) -> dict[str, Any]:
    """Describe an index as plain JSON values: its manifest without the list of files."""
    hidden = {"format", "files", "source_root", "csalign_version"}
    document = manifest.model_dump(mode="json", exclude=hidden)
    if document["names"] is None:
        del document["names"]
    size = sum((folder / name).stat().st_size for name in manifest.files)
    document = {"kind": "index", "path": str(folder), **document}
    return document | {"written_by": manifest.csalign_version, "bytes": size}


def items_table(columns: Mapping[str, pa.Array]) -> pa.Table:
    """Make the table of the items, in the order of the vectors, in batches of bounded size."""
    table = pa.table(dict(columns))
    own, batches = _schema(table.column_names), table.to_batches(max_chunksize=ROWS_PER_BATCH)
    return pa.concat_tables([pa.Table.from_batches([batch]).cast(own) for batch in batches])


def _schema(names: Iterable[str]) -> pa.Schema:
    return pa.schema([pa.field(name, pa.string()) for name in names])


def write_items(folder: Path, items: pa.Table) -> None:
    """Write the items as an uncompressed Arrow file, which can be memory-mapped."""
    with (
        pa.OSFile(str(folder / ITEMS), "wb") as sink,
        pa.ipc.new_file(sink, items.schema) as writer,
    ):
        writer.write_table(items)


def read_items(folder: Path, rows: int, *, sided: bool = False) -> pa.Table:
    """Memory-map the items of an index; SchemaError if they are damaged or not so many."""
    names = (*_COLUMNS, *(_SIDED if sided else ()))
    path = folder / ITEMS
    try:
        table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    except (pa.ArrowException, OSError) as error:
        raise SchemaError(f"{path}: is damaged ({error}); {REMEDY}") from None
    if table.schema != _schema(names) or len(table) != rows:
        raise SchemaError(f"{path}: has {len(table)} items, {DESCRIPTION} says {rows}; {REMEDY}")
    return table


def take_item(items: pa.Table, row: int) -> dict[str, Any]:
    """Look up the strings of an item; SchemaError if they are damaged."""
    try:
        found: dict[str, Any] = items.slice(row, 1).to_pylist()[0]
        return found
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise SchemaError(f"{ITEMS}: is damaged ({error}); {REMEDY}") from None
