"""Join the images that a set contains several times, once all of its parts are there.

Parts that change are written beside the old ones, so a process that is killed can be repeated.
"""

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from csalign.core.enums import Modality
from csalign.core.figures import counted
from csalign.features import schema
from csalign.features.duplicates import Links
from csalign.features.join import find_images, first_alike
from csalign.features.writer import ShardWriter
from csalign.ingest.job import DIGEST_BYTES, Job, PartRecord

log = logging.getLogger(__name__)

_HELD_OUT = {"test": 0, "val": 1, "train": 3, "": 4}  # others are between val and train

Ints = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]


class _Images(NamedTuple):
    """Image rows of all parts, (n,) each."""

    ids: pa.Array
    first: Ints  # of the equal images
    is_copy: Mask
    splits: pa.Array  # with the copies
    is_moved: Mask  # to another split than that of its row


def join_repeats(
    folder: Path, job: Job, records: Sequence[PartRecord]
) -> tuple[list[PartRecord], int]:
    """Join images that are equal by their bytes, or by the key that the source gives them.

    The first of equal images has a row. The captions of all belong to it, each once, and are in its
    split: of several splits the one that is not for training. Images with names of their own, and
    those of a source without captions, stay as they are and are reported.

    Returns:
        The records of the parts as they are now, and how many images were joined.
    """
    found, parts = list(records), [record for record in records if record.images is not None]
    first = _first_equal(parts)
    is_copy = first != np.arange(len(first))
    joined = sum(record.joined for record in records)
    repeated = sum(record.repeated_captions for record in records)
    if is_copy.any():
        shards = [record.images for record in parts if record.images is not None]
        columns = read_columns(folder, Modality.IMAGE, shards, schema.ID, schema.SPLIT)
        ids = columns[schema.ID].cast(pa.large_string()).combine_chunks()
        splits, is_moved = _held_out(columns[schema.SPLIT], first)
        disputed = np.unique(first[is_moved])
        has_texts = any(record.texts for record in records)
        if not has_texts or any(record.has_names for record in parts):
            _report_copies(ids, first, is_copy, len(disputed), has_texts=has_texts)
            return found, joined
        if len(disputed):
            name, split = (values[int(disputed[0])].as_py() for values in (ids, splits))
            log.warning(
                "%s in several splits, such as %r: with all captions in the one that is not for "
                "training (here %r)",
                *(counted(len(disputed), "image"), name, split),
            )
        images = _Images(ids, first, is_copy, splits, is_moved)
        changed, dropped = _write(folder, job, parts, images)
        found = [changed.get(record.name, record) for record in records]
        joined, repeated = joined + int(is_copy.sum()), repeated + dropped
    if joined:
        rows = sum(record.images.rows for record in found if record.images is not None)
        log.info(
            "%s samples are %s: repeated images, by equal bytes%s, were joined%s",
            *(f"{rows + joined:,}", counted(rows, "image")),
            " or --id-column" if any(record.keys for record in records) else "",
            f", and {counted(repeated, 'repeated caption')} kept once" if repeated else "",
        )
    return found, joined


def read_columns(
    folder: Path, side: Modality, shards: Sequence[schema.Shard], *names: str
) -> pa.Table:
    """Read string columns of some files of one side."""
    kinds = [(name, pa.string()) for name in schema.STRING_COLUMNS[side] if name in names]
    tables = [pa.schema(kinds).empty_table()]
    for shard in shards:
        with (folder / shard.path).open("rb") as file:
            tables.append(pq.read_table(file, columns=list(names)).cast(tables[0].schema))
    return pa.concat_tables(tables)


def _first_equal(parts: Sequence[PartRecord]) -> Ints:
    """Return the first equal image of each image row, (n,)."""
    rows = [record.images.rows for record in parts if record.images is not None]
    links = Links(sum(rows))
    for name in ("digests", "keys"):
        if not any(getattr(record, name) for record in parts):
            continue
        digests = b"".join(  # those of a part of an earlier version are unknown
            getattr(record, name) or record.digests or os.urandom(DIGEST_BYTES * count)
            for record, count in zip(parts, rows, strict=True)
        )
        values = np.frombuffer(digests, [("a", "<u8"), ("b", "<u8")])
        halves = np.sort(values["a"])  # nearly all differ there already
        again = np.flatnonzero(np.isin(values["a"], halves[1:][halves[1:] == halves[:-1]]))
        links.add(again, again[first_alike(values[again])])
    return links.groups()


def _held_out(splits: pa.ChunkedArray, first: Ints) -> tuple[pa.Array, Mask]:
    """Return the split of each image (n,) with its copies, and whether it had another."""
    coded = pc.fill_null(splits, "").combine_chunks().dictionary_encode()
    names = coded.dictionary.to_pylist()
    order = sorted(names, key=lambda name: (_HELD_OUT.get(name, 2), name))
    ranks = np.array([order.index(name) for name in names])[coded.indices.to_numpy()]
    np.minimum.at(best := ranks.copy(), first, ranks)
    found = pa.array([name or None for name in order], pa.string()).take(pa.array(best[first]))
    return found, ranks != best[first]


def _report_copies(
    ids: pa.Array, first: Ints, is_copy: Mask, disputed: int, *, has_texts: bool
) -> None:
    copy = int(np.flatnonzero(is_copy)[0])
    count = int(is_copy.sum())
    advice = (
        ", which evaluation counts as a wrong answer for the other: keep one of each, with all "
        "captions"
    )
    log.log(
        logging.WARNING if has_texts else logging.INFO,
        "%s the bytes of another one, such as %r and %r; each stays an image of its own%s%s",
        counted(count, "image") + (" has" if count == 1 else " have"),
        *(ids[row].as_py() for row in (int(first[copy]), copy)),
        advice if has_texts else "",
        f" ({counted(disputed, 'such picture')} in several splits)" if disputed else "",
    )


def _write(
    folder: Path, job: Job, parts: Sequence[PartRecord], images: _Images
) -> tuple[dict[str, PartRecord], int]:
    """Write the parts that change; return them by name, and how many captions were repeated."""
    first = images.first
    has_copies = (np.bincount(first, minlength=len(first)) > 1)[first]
    # Of the texts of each part: rows of their images, -1 for none; which are of repeated images;
    # and their splits.
    texts: dict[str, tuple[Ints, Mask, pa.ChunkedArray]] = {}
    captions = [np.empty((0, 2), np.int64)]
    stop = 0
    for part in parts:
        assert part.images is not None
        start, stop = stop, stop + part.images.rows
        if part.texts is None or not has_copies[start:stop].any():
            continue
        names = (schema.IMAGE_ID, schema.CAPTION, schema.SPLIT)
        table = read_columns(folder, Modality.TEXT, [part.texts], *names)
        rows, _ = find_images(table[schema.IMAGE_ID], pa.chunked_array([images.ids[start:stop]]))
        rows = np.where(rows < 0, -1, rows + start)
        of_copies = (rows >= 0) & has_copies[rows]
        own = table[schema.CAPTION].filter(pa.array(of_copies)).to_pylist()
        hashes = np.fromiter(map(hash, own), np.int64, len(own))
        captions.append(np.stack([first[rows[of_copies]], hashes], axis=1))
        texts[part.name] = rows, of_copies, table[schema.SPLIT]
    pairs = np.concatenate(captions)
    is_new = np.zeros(len(pairs), bool)
    is_new[np.unique(pairs, axis=0, return_index=True)[1]] = True
    changed, changes, stop, seen = {}, images.is_copy | images.is_moved, 0, 0
    for part in parts:
        assert part.images is not None
        start, stop = stop, stop + part.images.rows
        updates: dict[str, object] = {}
        if changes[start:stop].any():
            columns = {schema.SPLIT: images.splits[start:stop]}
            keep = ~images.is_copy[start:stop]
            updates["images"] = _rewrite(folder, job, part, Modality.IMAGE, keep, columns)
        if part.name in texts:
            rows, of_copies, splits = texts[part.name]
            keep = np.ones(len(rows), bool)
            keep[of_copies] = is_new[seen : seen + of_copies.sum()]
            seen += of_copies.sum()
            if not keep.all() or changes[rows[of_copies]].any():
                is_paired = pa.array(rows >= 0)
                owners = pa.array(first[rows], mask=rows < 0)
                own = images.splits.take(pa.array(rows, mask=rows < 0))
                columns = {
                    schema.IMAGE_ID: images.ids.take(owners),
                    schema.SPLIT: pc.if_else(is_paired, own, splits.combine_chunks()),
                }
                updates["texts"] = _rewrite(folder, job, part, Modality.TEXT, keep, columns)
                updates["pairs"] = part.pairs - int((~keep).sum())
        if updates:
            changed[part.name] = part.model_copy(update=updates)
    return changed, int((~is_new).sum())


def _rewrite(
    folder: Path,
    job: Job,
    part: PartRecord,
    side: Modality,
    keep: Mask,
    columns: Mapping[str, pa.Array],
) -> schema.Shard | None:
    """Write the rows of a part to keep (n,) with new columns; None if there are none."""
    shard: schema.Shard = getattr(part, side.plural)
    info = job.encoders.side(side)
    assert info is not None
    writer = ShardWriter(folder, f"{part.name}-joined", side, info, job.dtype)
    try:
        with (folder / shard.path).open("rb") as file:
            parquet, stop = pq.ParquetFile(file), 0
            for group in range(parquet.num_row_groups):
                table = parquet.read_row_group(group)
                start, stop = stop, stop + len(table)
                for name, values in columns.items():
                    place = table.schema.get_field_index(name)
                    new = values[start:stop].cast(pa.string())
                    table = table.set_column(place, table.schema.field(name), new)
                for batch in table.filter(pa.array(keep[start:stop])).to_batches():
                    writer.append(batch)
        return writer.close()
    except BaseException as error:
        writer.abort(error)
        raise
