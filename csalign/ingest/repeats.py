"""Join the images that a set contains several times, once all of its parts are there.

Parts that change are written beside the old ones, so a process that is killed can be repeated.
"""

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from csalign.core.arrays import Ints, Mask
from csalign.core.enums import Modality
from csalign.core.figures import counted
from csalign.features import schema
from csalign.features.join import find_images, first_alike
from csalign.features.writer import ShardWriter
from csalign.ingest.job import DIGEST_BYTES, Job, PartRecord

log = logging.getLogger(__name__)

_HELD_OUT = {"test": 0, "val": 1, "train": 3, "": 4}  # others are between val and train


def join_repeats(
    folder: Path, job: Job, records: Sequence[PartRecord]
) -> tuple[list[PartRecord], int]:
    """Join equal images: by their bytes, or by the column that says which are one.

    The first of them has a row. The captions of all belong to it, each once, in its split: of
    several splits the one that is not for training. Named images, and those of a source without
    captions, stay apart and are reported.

    Returns:
        The records of the parts as they are now, and how many images were joined.
    """
    parts = [record for record in records if record.images is not None]
    joined = sum(record.joined for record in records)
    first = _first_equal(parts)
    copies = np.flatnonzero(first != np.arange(len(first)))
    if not joined and not len(copies):
        return list(records), 0
    shards = [record.images for record in parts if record.images is not None]
    columns = read_columns(folder, Modality.IMAGE, shards, schema.ID, schema.SPLIT)
    ids = columns[schema.ID].cast(pa.large_string()).combine_chunks()
    splits, disputed = _held_out(columns[schema.SPLIT], first)
    has_texts = any(record.texts for record in records)
    if len(copies) and (not has_texts or any(record.is_named for record in parts)):
        log.log(
            logging.WARNING if has_texts else logging.INFO,
            "%s with the bytes of another one, such as %r and %r, kept by their own ids%s%s",
            counted(len(copies), "image"),
            *(ids[int(row)].as_py() for row in (first[copies[0]], copies[0])),
            f" ({counted(len(disputed), 'picture')} in several splits)" if len(disputed) else "",
            "; evaluation counts one as a wrong answer for the other, so list each picture once, "
            "with all its captions"
            if has_texts
            else "",
        )
        return list(records), joined
    if len(disputed):
        log.warning(
            "%s in several splits, such as %r: held out of training, here in %r, with all captions",
            counted(len(disputed), "image"),
            *(column[int(disputed[0])].as_py() for column in (ids, splits)),
        )
    changed: dict[str, PartRecord] = {}
    seen: set[int] = set()  # hashes of images with captions
    repeated = stop = 0
    for part, shard in zip(parts, shards, strict=True):
        start, stop = stop, stop + shard.rows
        own = slice(start, stop)
        updates: dict[str, Any] = {}
        has_copies = np.isin(first[own], first[copies]).any()
        keep = first[own] == np.arange(start, stop)
        if not keep.all() or (has_copies and len(disputed)):
            new = {schema.SPLIT: splits[own]}
            updates["images"] = _rewrite(folder, job, part, Modality.IMAGE, keep, new)
        if part.texts is not None and (has_copies or part.joined):
            names = (schema.IMAGE_ID, schema.CAPTION, schema.SPLIT)
            texts = read_columns(folder, Modality.TEXT, [part.texts], *names)
            rows, _ = find_images(texts[schema.IMAGE_ID], pa.chunked_array([ids[own]]))
            owners = pa.array(first[own][rows], mask=rows < 0)
            keep = np.ones(len(texts), bool)
            captions = texts[schema.CAPTION].to_pylist()
            for row, (owner, caption) in enumerate(zip(owners.to_pylist(), captions, strict=True)):
                key = hash((owner, caption))
                keep[row] = owner is None or key not in seen
                seen.add(key)
            split = pc.coalesce(splits.take(owners), texts[schema.SPLIT])  # of unpaired texts
            new = {schema.IMAGE_ID: ids.take(owners), schema.SPLIT: split}
            if updates or not keep.all():
                updates["texts"] = _rewrite(folder, job, part, Modality.TEXT, keep, new)
            updates["pairs"] = part.pairs - (dropped := int((~keep).sum()))
            repeated += dropped
        changed[part.name] = part.model_copy(update=updates)
    found, joined = [changed.get(own.name, own) for own in records], joined + len(copies)
    images = len(first) - len(copies)
    log.info(
        "%s samples are %s: repeated images, by equal bytes or --id-column, were joined%s",
        *(f"{images + joined:,}", counted(images, "image")),
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
    digests = b"".join(  # those of a part of an earlier version are unknown
        record.digests or os.urandom(DIGEST_BYTES * record.images.rows)
        for record in parts
        if record.images is not None
    )
    values = np.frombuffer(digests, [("a", "<u8"), ("b", "<u8")])
    halves = np.sort(values["a"])  # nearly all differ there already
    again = np.flatnonzero(np.isin(values["a"], halves[1:][halves[1:] == halves[:-1]]))
    found = np.arange(len(values))
    found[again] = again[first_alike(values[again])]
    return found


def _held_out(splits: pa.ChunkedArray, first: Ints) -> tuple[pa.Array, Ints]:
    """Return the split of each image (n,) with its copies, and the first rows that have several."""
    coded = pc.fill_null(splits, "").combine_chunks().dictionary_encode()
    names = coded.dictionary.to_pylist()
    order = sorted(names, key=lambda name: (_HELD_OUT.get(name, 2), name))
    ranks = np.array([order.index(name) for name in names])[coded.indices.to_numpy()]
    np.minimum.at(best := ranks.copy(), first, ranks)
    found = pa.array([name or None for name in order], pa.string()).take(pa.array(best[first]))
    return found, np.unique(first[ranks != best[first]])


def _rewrite(
    folder: Path,
    job: Job,
    part: PartRecord,
    side: Modality,
    keep: Mask,
    columns: Mapping[str, pa.Array],
) -> schema.Shard | None:
    """Write the rows of a part to keep, (n,), with new columns; None if there are none."""
    shard, info = getattr(part, side.plural), job.encoders.side(side)
    assert info is not None
    writer = ShardWriter(folder, f"{part.name}-joined", side, info, job.dtype)
    try:
        with (folder / shard.path).open("rb") as file:
            parquet, stop = pq.ParquetFile(file), 0
            for group in range(parquet.num_row_groups):
                table = parquet.read_row_group(group)
                start, stop = stop, stop + len(table)
                for name, values in columns.items():
                    place, new = table.column_names.index(name), values[start:stop]
                    table = table.set_column(place, table.field(name), new.cast(pa.string()))
                for batch in table.filter(pa.array(keep[start:stop])).to_batches():
                    writer.append(batch)
        return writer.close()
    except BaseException as error:
        writer.abort(error)
        raise
