"""Numbers in place of strings and rows, equal where those are, without a loop over them.

A key is a 64-bit hash: a sum over the bytes of a random-looking number for each byte and place.
Two of ten million different strings share one with a probability of three in a million.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

Array = npt.NDArray[Any]
Keys = npt.NDArray[np.uint64]
Ints = npt.NDArray[np.int64]

_PIECE_BYTES = 4 << 20  # hashed at a time; it takes some 30 times the memory
_OF_ROWS = 1 << 63  # salt, so that a caption's key is none of an embedding


def string_keys(strings: pa.Array, salt: int = 0) -> Keys:
    """A key for each string (n,); that of a null means nothing.

    Args:
        strings: n strings.
        salt: another one gives other keys.
    """
    strings = strings.cast(pa.large_string())
    _, offsets_buffer, data_buffer = strings.buffers()
    count = len(strings)
    if not count:
        return np.empty(0, np.uint64)
    offsets = np.frombuffer(offsets_buffer, np.int64)[strings.offset :][: count + 1]
    size = int(offsets[-1] - offsets[0])
    if size > _PIECE_BYTES and count > 1:
        half = count // 2
        return np.concatenate(
            [string_keys(part, salt) for part in (strings[:half], strings[half:])]
        )
    data = np.empty(0, np.uint8)
    if size:
        data = np.frombuffer(data_buffer, np.uint8)[offsets[0] : offsets[-1]]
    ends = offsets - offsets[0]
    places = np.arange(size, dtype=np.int64) - np.repeat(ends[:-1], np.diff(ends))
    mixed = _mixed((places.astype(np.uint64) << np.uint64(8)) + data + _spread(salt))
    sums = np.zeros(size + 1, np.uint64)
    np.cumsum(mixed, out=sums[1:])  # wraps around, and so do the differences
    lengths = np.diff(ends).astype(np.uint64) + _spread(salt)
    return _mixed(sums[ends[1:]] - sums[ends[:-1]] + lengths)


def row_keys(rows: Array) -> Keys:
    """A key for each row (n, d), by its bytes."""
    size = rows.shape[1] * rows.dtype.itemsize
    word = next(width for width in (8, 4, 2, 1) if size % width == 0)
    words = np.ascontiguousarray(rows).view(f"u{word}").astype(np.uint64)
    places = _mixed(np.arange(words.shape[1], dtype=np.uint64) + _spread(_OF_ROWS))
    sums: Keys = _mixed(words ^ places).sum(axis=1, dtype=np.uint64)
    return _mixed(sums)


def text_keys(captions: pa.Array, embeddings: Array) -> Keys:
    """A key for each text (n,), equal where captions are but for case and outer space.

    Args:
        captions: n of them; null where unknown.
        embeddings: (n, e); a text without a caption is told by its bytes.
    """
    keys = string_keys(pc.utf8_lower(pc.utf8_trim_whitespace(captions)))
    unknown = np.flatnonzero(captions.is_null().to_numpy(zero_copy_only=False))
    if len(unknown):
        keys[unknown] = row_keys(embeddings[unknown])
    return keys


def first_alike(keys: Keys) -> npt.NDArray[Any]:
    """For each key (n,) the position of the first that is equal."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    is_new = np.ones(len(keys), np.bool_)
    np.not_equal(ordered[1:], ordered[:-1], out=is_new[1:])
    del ordered
    first = compact(order[is_new])[np.cumsum(is_new) - 1]
    found = np.empty(len(keys), first.dtype)
    found[order] = first
    return found


def compact(positions: Array) -> Array:
    """Positions in 32 bits, where they are so few that they fit: ten millions are no trifle."""
    fits = not len(positions) or int(positions.max()) <= np.iinfo(np.int32).max
    return positions.astype(np.int32 if fits else np.int64, copy=False)


def _mixed(values: Keys) -> Keys:
    """A number that looks random for each number, another for another (SplitMix64)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def _spread(salt: int) -> np.uint64:
    """Far from that of another salt, so that keys with two salts have nothing to do."""
    return np.uint64((salt + 1) * 0x9E3779B97F4A7C15 % (1 << 64))
