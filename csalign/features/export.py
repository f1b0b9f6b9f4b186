"""Write embeddings as other tools read them: .npy with .csv, or the folders of clip-retrieval."""

import csv
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from csalign.core import __version__, atomic
from csalign.core.arrays import Array
from csalign.core.enums import AnySide, Modality, side_of
from csalign.core.errors import CsalignError, DataError, SchemaError, ShapeError
from csalign.core.records import read_object
from csalign.features import schema
from csalign.features.reader import AGAIN
from csalign.features.schema import ALIGNED, UNKNOWN, EncoderInfo
from csalign.features.writer import FeatureWriter, Rows

PART_ROWS = 1_000_000  # per file of clip-retrieval
NOTE = "aligned.json"
FOLDERS: dict[AnySide, str] = {Modality.IMAGE: "img_emb", Modality.TEXT: "text_emb"}

Shapes = Mapping[AnySide, tuple[int, int]]


def export_entries(sides: Iterable[AnySide]) -> set[str]:
    """Return the names in the folders of both forms."""
    files = {f"{side.plural}{suffix}" for side in sides for suffix in (".npy", ".csv")}
    return {NOTE, "config.toml", *FOLDERS.values(), "metadata", *files}


def recorded_encoder(file: Path) -> EncoderInfo | None:
    """Return the encoder of rows that csalign wrote: in a feature set, or by ``csalign apply``.

    It is in ``manifest.json`` or ``aligned.json``, beside or above the file; None if there is none.
    """
    for folder in list(file.parents)[:3]:
        name = file.relative_to(folder).as_posix()
        with suppress(CsalignError, OSError, LookupError, TypeError, ValueError):  # none of ours
            if (folder / schema.MANIFEST).is_file():
                found = schema.read_manifest(folder)
                paths = {own.path: side for side in Modality for own in found.shards.side(side)}
                further = {s.path: own for own in found.sides.values() for s in own.shards}
                return (
                    further[name].encoder if name in further else found.encoders.side(paths[name])
                )
            note = read_object(folder / NOTE, AGAIN)
            files = {f"{side_of(side).plural}.npy": side for side in note["widths"]}
            side = (files | {own: side for side, own in FOLDERS.items()})[name.split("/")[0]]
            spec, run = (note.get("encoders") or {side: UNKNOWN})[side], Path(note["adapter"]).name
            return EncoderInfo(
                spec=f"{spec}{ALIGNED}{run}",
                width=note["widths"][side],
                preprocessing={"adapter_sha256": note["adapter_sha256"]},
            )
    return None


class NpyExport:
    """Write ``images.npy``, ``texts.npy``, ``audio.npy``, each with a .csv of its strings.

    A context manager: leaving the block without an exception writes ``aligned.json``, with `note`.
    With `items` images and texts have a column of items.
    """

    layout = "npy"

    def __init__(
        self,
        folder: Path,
        shapes: Shapes,
        dtype: str,
        note: Mapping[str, Any],
        *,
        items: bool = False,
    ) -> None:
        self._columns = {side: schema.string_columns(side, items=items) for side in shapes}
        self._folder = folder
        self._shapes = dict(shapes)
        self._dtype = dtype
        self._note = dict(note)
        self._stack = ExitStack()
        self._written = dict.fromkeys(shapes, 0)
        self._files: dict[AnySide, tuple[IO[bytes], Any]] = {}
        self._start()

    def write(self, side: str, rows: Rows) -> None:
        """Append rows to one side, images before texts; raises DataError if one is unusable."""
        modality = side_of(side)
        stored = rows.stored(modality, self._dtype)
        self._written[modality] += len(stored)
        self._write(modality, rows, stored)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._stack.close()
        if error is not None:
            return
        for side, (rows, _) in self._shapes.items():
            if self._written[side] != rows:  # as the headers promise
                raise ShapeError(f"{self._written[side]} of {rows} {side.plural} were written")
        counts = self._counts()
        for path in self._folder.rglob("*"):
            if path.is_file():
                atomic.fsync_path(path)
        note = {
            "format": "csalign-aligned",
            "format_version": 1,
            "csalign_version": __version__,
            "layout": self.layout,
            "dtype": self._dtype,
            "widths": {side.value: width for side, (_, width) in self._shapes.items()},
            "rows": counts,
            **self._note,
        }
        atomic.write_json(self._folder / NOTE, note)

    def _open_npy(self, path: Path, side: AnySide, rows: int) -> IO[bytes]:
        """Open an .npy file of a known shape, to which rows are appended."""
        path.parent.mkdir(exist_ok=True)
        file = self._stack.enter_context(path.open("wb"))
        descr = np.lib.format.dtype_to_descr(schema.DTYPES[self._dtype])
        header = {"descr": descr, "fortran_order": False, "shape": (rows, self._shapes[side][1])}
        np.lib.format.write_array_header_1_0(file, header)
        return file

    def _start(self) -> None:
        for side, (rows, _) in self._shapes.items():
            path = self._folder / f"{side.plural}.npy"
            text = path.with_suffix(".csv").open("w", encoding="utf-8", newline="")
            table = csv.writer(self._stack.enter_context(text), lineterminator="\n")
            table.writerow(self._columns[side])
            self._files[side] = (self._open_npy(path, side, rows), table)

    def _write(self, modality: AnySide, rows: Rows, stored: Array) -> None:
        file, table = self._files[modality]
        file.write(stored.data)
        columns = map(rows.strings, self._columns[modality])
        table.writerows(zip(*columns, strict=True))

    def _counts(self) -> dict[str, int]:
        return {side.plural: count for side, count in self._written.items()}


class ClipRetrievalExport(NpyExport):
    """Write ``img_emb/``, ``text_emb/`` and ``metadata/`` as clip-retrieval does.

    Row r of each is one pair: a text, its image (again for each of its texts), and their strings.
    Texts and images without a partner are omitted; of a set of one side every row is written.

    Arguments are those of `NpyExport` and the number of pairs, unused for a set of one side; raises
    DataError if there are no pairs to write.
    """

    layout = "clip-retrieval"

    def __init__(
        self, folder: Path, shapes: Shapes, dtype: str, note: Mapping[str, Any], pairs: int
    ) -> None:
        self._paired = len(shapes) == len(Modality)
        self._total = pairs if self._paired else sum(rows for rows, _ in shapes.values())
        if not self._total:
            raise DataError("no text has an image, and each row is to be a pair; use --format npy")
        self._done = 0
        self._arrays: dict[AnySide, IO[bytes]] = {}
        self._metadata: pq.ParquetWriter | None = None
        self._images: dict[str, tuple[int, dict[str, str | None]]] = {}  # row and strings, by id
        self._used: set[str] = set()
        super().__init__(folder, shapes, dtype, note)

    def _start(self) -> None:
        # Images are kept, not written, until a text needs them. The file has no name.
        self._kept = self._stack.enter_context(TemporaryFile(dir=self._folder))  # noqa: SIM115

    @property
    def omitted(self) -> dict[AnySide, int]:
        """Rows of each side that have no partner."""
        if not self._paired:
            return dict.fromkeys(self._shapes, 0)
        return {
            Modality.IMAGE: len(self._images) - len(self._used),
            Modality.TEXT: self._written[Modality.TEXT] - self._done,
        }

    def _write(self, modality: AnySide, rows: Rows, stored: Array) -> None:
        columns = zip(*map(rows.strings, self._columns[modality]), strict=True)
        if modality is Modality.IMAGE:
            images = [
                {"image_path": source or name, "image_id": name, "split": split}
                for name, source, split in columns
            ]
            if not self._paired:
                self._append({modality: stored}, images)
                return
            self._kept.write(stored.data)
            for image in images:
                self._images[str(image["image_id"])] = (len(self._images), image)
            return
        records, kept, chosen = [], [], []
        for row, (name, owner, caption, split) in enumerate(columns):
            record = {"caption": caption, "text_id": name, "split": split}
            if self._paired:
                if owner is None:
                    continue
                if owner not in self._images:
                    raise SchemaError(
                        f"text {name!r} belongs to image {owner!r}, which is missing; {AGAIN}"
                    )
                place, image = self._images[owner]
                self._used.add(owner)
                record = image | record
                chosen.append(place)
            records.append(record)
            kept.append(row)
        vectors: dict[AnySide, Array] = {Modality.TEXT: stored[kept]}
        if self._paired:
            self._kept.flush()
            shape = self._shapes[Modality.IMAGE]
            mapped = np.memmap(self._kept, stored.dtype, mode="r", shape=shape)
            vectors[Modality.IMAGE] = np.array(mapped[chosen])
        self._append(vectors, records)

    def _append(
        self, vectors: Mapping[AnySide, Array], records: Sequence[Mapping[str, str | None]]
    ) -> None:
        start = 0
        while start < len(records):
            if self._done % PART_ROWS == 0:
                self._open_part(list(records[start]))
            stop = min(len(records), start + PART_ROWS - self._done % PART_ROWS)
            for side, file in self._arrays.items():
                file.write(np.ascontiguousarray(vectors[side][start:stop]).data)
            assert self._metadata is not None
            table = pa.Table.from_pylist(records[start:stop], schema=self._metadata.schema)
            self._metadata.write_table(table)
            self._done += stop - start
            start = stop

    def _open_part(self, names: list[str]) -> None:
        for file in (*self._arrays.values(), self._metadata):
            if file is not None:
                file.close()
        # clip-retrieval's rule, so that names sort as their numbers do.
        number = str(self._done // PART_ROWS).zfill(len(str(-(-self._total // PART_ROWS))))
        rows = min(PART_ROWS, self._total - self._done)
        for side in self._shapes:
            name = FOLDERS[side]
            path = self._folder / name / f"{name}_{number}.npy"
            self._arrays[side] = self._open_npy(path, side, rows)
        path = self._folder / "metadata" / f"metadata_{number}.parquet"
        path.parent.mkdir(exist_ok=True)
        columns = pa.schema([(name, pa.string()) for name in names])
        self._metadata = self._stack.enter_context(pq.ParquetWriter(path, columns))

    def _counts(self) -> dict[str, int]:
        if self._done != self._total:
            raise SchemaError(
                f"{self._done} texts have an image, the manifest counts {self._total}; {AGAIN}"
            )
        return {"pairs" if self._paired else min(self._shapes).plural: self._done}


RowWriter = FeatureWriter | NpyExport
