"""Write aligned embeddings in forms that other tools read: .npy with .csv, and clip-retrieval's."""

import csv
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile
from types import TracebackType
from typing import IO, Any, NamedTuple, Protocol, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from csalign.core import atomic
from csalign.core.enums import Modality
from csalign.core.errors import DataError, SchemaError, ShapeError
from csalign.core.version import __version__
from csalign.features import schema
from csalign.features.shard import Array, Rows, first_unusable

NOTE = "aligned.json"
PART_ROWS = 1_000_000  # clip-retrieval's own

_FOLDERS = {Modality.IMAGE: "img_emb", Modality.TEXT: "text_emb"}
_METADATA = {
    Modality.IMAGE: ("image_path", "image_id", "split"),
    Modality.TEXT: ("caption", "text_id", "split"),
}


class RowWriter(Protocol):
    """Takes the rows of a feature set in order, images before texts; a context manager.

    Leaving the block without an exception completes the output.
    """

    def write(self, modality: Modality, rows: Rows) -> None:
        """Append rows to one side."""

    def __enter__(self) -> Self:
        """Begin."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Finish."""


@dataclass(frozen=True)
class Side:
    """What is to come of one side: rows, and width of an embedding."""

    rows: int
    width: int


class _Export:
    """What both forms share: open files, the check of each row, the note at the end."""

    layout: str

    def __init__(
        self, folder: Path, sides: Mapping[Modality, Side], dtype: str, note: Mapping[str, Any]
    ) -> None:
        self._folder = folder
        self._sides = dict(sides)
        self._dtype = schema.DTYPES[dtype]
        self._note = dict(note)
        self._open = ExitStack()
        self._written = dict.fromkeys(sides, 0)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._open.close()
        if kind is not None:
            return
        self._check_whole()
        for path in self._folder.rglob("*"):
            if path.is_file():
                atomic.fsync_path(path)
        note = {
            "format": "csalign-aligned",
            "format_version": 1,
            "csalign_version": __version__,
            "layout": self.layout,
            "dtype": str(self._dtype),
            "widths": {side.value: known.width for side, known in self._sides.items()},
            "rows": self._rows(),
            **self._note,
        }
        atomic.write_json(self._folder / NOTE, note)

    def _check_whole(self) -> None:
        """Compare what came with what was to come, which the headers say."""
        for side, known in self._sides.items():
            if self._written[side] != known.rows:
                raise ShapeError(
                    f"{self._written[side]} of {known.rows} {side.plural} were written"
                )

    def _rows(self) -> dict[str, int]:
        return {side.plural: count for side, count in self._written.items()}

    def _stored(self, modality: Modality, rows: Rows) -> Array:
        bad = first_unusable(rows.embeddings, str(self._dtype))
        if bad is not None:
            name = rows.columns[schema.ID][bad[0]]
            raise DataError(f"{modality} {name!r}: {bad[1]}; leave the row out or encode it again")
        self._written[modality] += len(rows.embeddings)
        return np.ascontiguousarray(rows.embeddings, self._dtype)

    def _start_npy(self, path: Path, rows: int, width: int) -> IO[bytes]:
        """An .npy of a known shape, to which the rows are appended."""
        path.parent.mkdir(exist_ok=True)
        file = self._open.enter_context(path.open("wb"))
        descr = np.lib.format.dtype_to_descr(self._dtype)
        header = {"descr": descr, "fortran_order": False, "shape": (rows, width)}
        np.lib.format.write_array_header_1_0(file, header)
        return file


class NpyExport(_Export):
    """``images.npy`` and ``texts.npy``, with a .csv each that has a line a row.

    Args:
        folder: an empty folder.
        sides: what is to come.
        dtype: "float16" or "float32".
        note: what ``aligned.json`` is to say beside widths, rows and dtype.
    """

    layout = "npy"

    def __init__(
        self, folder: Path, sides: Mapping[Modality, Side], dtype: str, note: Mapping[str, Any]
    ) -> None:
        super().__init__(folder, sides, dtype, note)
        self._arrays: dict[Modality, IO[bytes]] = {}
        self._tables: dict[Modality, Any] = {}
        for side, known in sides.items():
            path = folder / f"{side.plural}.npy"
            self._arrays[side] = self._start_npy(path, known.rows, known.width)
            file = path.with_suffix(".csv").open("w", encoding="utf-8", newline="")
            self._tables[side] = csv.writer(self._open.enter_context(file), lineterminator="\n")
            self._tables[side].writerow(schema.STRING_COLUMNS[side])

    def write(self, modality: Modality, rows: Rows) -> None:
        """Append rows to one side.

        Raises:
            DataError: a row is not finite or has norm 0 as it would be stored.
        """
        self._arrays[modality].write(self._stored(modality, rows).data)
        names = schema.STRING_COLUMNS[modality]
        columns = [rows.columns.get(name, [None] * len(rows.embeddings)) for name in names]
        self._tables[modality].writerows(zip(*columns, strict=True))


class ClipRetrievalExport(_Export):
    """``img_emb/``, ``text_emb/`` and ``metadata/`` as clip-retrieval writes them.

    Row r of each is one pair: a text, its image (again for each of its texts), and what is known
    of them. Texts and images without a partner are left out; a side alone is written whole.

    Args:
        folder: an empty folder.
        sides: what is to come.
        dtype: "float16" or "float32".
        note: what ``aligned.json`` is to say beside widths, rows and dtype.
        pairs: texts that have an image; of no meaning where there is one side.

    Raises:
        DataError: there are no pairs to write.
        SchemaError: on the way, a text names an image that did not come.
    """

    layout = "clip-retrieval"

    def __init__(
        self,
        folder: Path,
        sides: Mapping[Modality, Side],
        dtype: str,
        note: Mapping[str, Any],
        pairs: int,
    ) -> None:
        super().__init__(folder, sides, dtype, note)
        self._paired = len(sides) == len(Modality)
        self._total = pairs if self._paired else sum(side.rows for side in sides.values())
        if not self._total:
            raise DataError("no text has an image, and each row is to be a pair; use --format npy")
        self._done = 0
        self._part = -1
        self._arrays: dict[Modality, IO[bytes]] = {}
        self._metadata: pq.ParquetWriter | None = None
        # Images are kept, not written, until a text asks for them. The file has no name.
        self._images = self._open.enter_context(TemporaryFile(dir=folder))  # noqa: SIM115
        self._labels: dict[str, _Image] = {}
        self._used: set[str] = set()

    @property
    def left_out(self) -> dict[Modality, int]:
        """Rows of each side that have no partner."""
        if not self._paired:
            return dict.fromkeys(self._sides, 0)
        return {
            Modality.IMAGE: len(self._labels) - len(self._used),
            Modality.TEXT: self._written[Modality.TEXT] - self._done,
        }

    def write(self, modality: Modality, rows: Rows) -> None:
        """Append rows to one side, all images before the first text.

        Raises:
            DataError: a row is not finite or has norm 0 as it would be stored.
        """
        stored = self._stored(modality, rows)
        columns = {
            name: rows.columns.get(name, [None] * len(stored))
            for name in schema.STRING_COLUMNS[modality]
        }
        if modality is Modality.TEXT:
            self._write_texts(stored, columns)
            return
        images = [
            _Image(len(self._labels) + row, str(name), source, split)
            for row, (name, source, split) in enumerate(zip(*columns.values(), strict=True))
        ]
        if self._paired:
            self._images.write(stored.data)
            self._labels |= {image.id: image for image in images}
        else:
            self._append({modality: stored}, [image.metadata() for image in images])

    def _write_texts(self, stored: Array, columns: Mapping[str, Sequence[str | None]]) -> None:
        records = []
        images: list[_Image] = []
        kept: list[int] = []
        for row, (name, owner, caption, split) in enumerate(zip(*columns.values(), strict=True)):
            record = {"caption": caption, "text_id": name, "split": split}
            if self._paired and owner is not None:
                if owner not in self._labels:
                    raise SchemaError(
                        f"text {name!r} belongs to image {owner!r}, which is not there; make the "
                        "feature set again"
                    )
                images.append(self._labels[owner])
                record = {**images[-1].metadata(), **record}
            elif self._paired:
                continue
            records.append(record)
            kept.append(row)
        vectors = {Modality.TEXT: stored[kept]}
        if self._paired:
            self._used.update(image.id for image in images)
            vectors[Modality.IMAGE] = self._kept_images([image.row for image in images])
        self._append(vectors, records)

    def _kept_images(self, rows: Sequence[int]) -> Array:
        self._images.flush()
        side = self._sides[Modality.IMAGE]
        shape = (side.rows, side.width)
        return np.array(np.memmap(self._images, self._dtype, mode="r", shape=shape)[rows])

    def _append(
        self, vectors: Mapping[Modality, Array], records: Sequence[Mapping[str, str | None]]
    ) -> None:
        start = 0
        while start < len(records):
            if self._done % PART_ROWS == 0:
                self._next_part()
            stop = min(len(records), start + PART_ROWS - self._done % PART_ROWS)
            for side, file in self._arrays.items():
                file.write(np.ascontiguousarray(vectors[side][start:stop]).data)
            assert self._metadata is not None
            table = pa.Table.from_pylist(records[start:stop], schema=self._metadata.schema)
            self._metadata.write_table(table)
            self._done += stop - start
            start = stop

    def _next_part(self) -> None:
        for file in (*self._arrays.values(), self._metadata):
            if file is not None:
                file.close()
        self._part += 1
        # clip-retrieval's rule, so that names sort as their numbers do.
        number = str(self._part).zfill(len(str(-(-self._total // PART_ROWS))))
        rows = min(PART_ROWS, self._total - self._part * PART_ROWS)
        for side, folder in _FOLDERS.items():
            if side in self._sides:
                path = self._folder / folder / f"{folder}_{number}.npy"
                self._arrays[side] = self._start_npy(path, rows, self._sides[side].width)
        path = self._folder / "metadata" / f"metadata_{number}.parquet"
        path.parent.mkdir(exist_ok=True)
        names = [name for side in self._sides for name in _METADATA[side]]
        columns = pa.schema([(name, pa.string()) for name in dict.fromkeys(names)])
        self._metadata = self._open.enter_context(pq.ParquetWriter(path, columns))

    def _check_whole(self) -> None:
        super()._check_whole()
        if self._done != self._total:
            raise SchemaError(
                f"{self._done} texts have an image, the manifest counts {self._total}; make the "
                "feature set again"
            )

    def _rows(self) -> dict[str, int]:
        return {"pairs" if self._paired else min(self._sides).plural: self._done}


class _Image(NamedTuple):
    row: int
    id: str
    source: str | None
    split: str | None

    def metadata(self) -> dict[str, str | None]:
        return {"image_path": self.source or self.id, "image_id": self.id, "split": self.split}
