"""Read the tokens of any rows in bounded memory: row groups, decoded when needed, cached."""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from csalign.core.arrays import Array, Indices, Mask
from csalign.core.errors import DataError, SchemaError
from csalign.features import schema
from csalign.features.reader import FeatureTable, flat_tokens


class PaddedTokens(NamedTuple):
    """Tokens of some rows."""

    values: Array  # (n, t, d) in the stored dtype, 0 in the padding; t >= 1 is the largest count
    mask: Mask  # (n, t), true for tokens, false for padding


_Block = tuple[Array, Array]  # a decoded row group: tokens (k, d), and each row's start, (n + 1,)


@dataclass
class TokenCache:
    """The decoded row groups used last, as many as fit; one larger than the budget is not kept."""

    budget: int  # bytes
    bytes: int = 0  # held now
    reads: int = 0  # row groups decoded so far
    _kept: "OrderedDict[tuple[TokenRows, int], _Block]" = field(default_factory=OrderedDict)

    def holds(self, source: "TokenRows", group: int) -> bool:
        """Return True if a row group need not be decoded."""
        return (source, group) in self._kept

    def block(self, source: "TokenRows", group: int) -> _Block:
        """Return a row group, decoded if it is not held."""
        key = (source, group)
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        self._evict(source.groups[group].bytes)  # before memory is allocated for it
        block = source.decode(group)
        self.reads += 1
        size = _bytes(block)
        if size <= self.budget:
            self._evict(size)
            self._kept[key] = block
            self.bytes += size
        return block

    def _evict(self, size: int) -> None:
        while self._kept and self.bytes + size > self.budget:
            self.bytes -= _bytes(self._kept.popitem(last=False)[1])


def _bytes(block: _Block) -> int:
    return sum(array.nbytes for array in block)


class TokenRows:
    """The tokens of one side of a feature set, by row.

    Raises:
        DataError: the table stores no tokens.
        SchemaError: a shard is damaged.
    """

    def __init__(self, table: FeatureTable, cache: TokenCache) -> None:
        if table.encoder.token_width is None:
            raise DataError(f"{table.folder}: stores no {table.modality} tokens")
        self.table = table
        self.cache = cache
        self.groups = table.row_groups()
        self._firsts = np.array([group.first for group in self.groups], np.int64)

    def group_of(self, rows: Indices) -> Indices:
        """Return the row group of each row."""
        return np.searchsorted(self._firsts, rows, side="right") - 1

    def take(self, rows: Indices, draws: Array | None = None) -> PaddedTokens:
        """Read the tokens of some rows; see `Wanted` and `take_together`."""
        return take_together([Wanted(self, rows, draws)])[0]

    def decode(self, group: int) -> _Block:
        """Read a row group."""
        described = self.groups[group]
        rows = np.arange(described.first, described.first + described.rows)
        for _, batch in self.table.read(schema.TOKENS, rows=rows):
            if len(batch) == described.rows:
                tokens, starts = flat_tokens(batch)
                # Copies, since Arrow keeps the memory it frees and NumPy returns it.
                return tokens[starts[0] : starts[-1]].copy(), starts - starts[0]
        raise SchemaError(f"{self.table.folder}: {described.shard.path} changed while it was read")


class Wanted(NamedTuple):
    """Rows (n,), n >= 1, in any order, to be taken of one side; they may repeat.

    `draws` (n, s) in [0, 1) select s tokens of each row that has more, without replacement; None
    takes all.
    """

    source: TokenRows
    rows: Indices
    draws: Array | None = None


def take_together(wanted: Sequence[Wanted]) -> list[PaddedTokens]:
    """Take rows of several tables; row groups in the cache are used before others replace them.

    Raises:
        DataError: a token is not finite.
        SchemaError: a shard is damaged.
    """
    taken: list[list[Array]] = [[np.empty(0)] * len(one.rows) for one in wanted]
    groups = [one.source.group_of(one.rows) for one in wanted]
    parts = [
        (not one.source.cache.holds(one.source, group), number, group)
        for number, one in enumerate(wanted)
        for group in np.unique(groups[number]).tolist()
    ]
    for _, number, group in sorted(parts):
        source, rows, draws = wanted[number]
        tokens, starts = source.cache.block(source, group)
        for position in np.flatnonzero(groups[number] == group).tolist():
            place = rows[position] - source.groups[group].first
            own = tokens[starts[place] : starts[place + 1]]
            drawn = _draw(len(own), None if draws is None else draws[position])
            taken[number][position] = own[drawn].copy()  # a view would keep the whole block
    found = list(map(pad_tokens, taken))
    for (source, rows, _), padded in zip(wanted, found, strict=True):
        if len(bad := np.flatnonzero(~np.isfinite(padded.values).all((1, 2)))):
            raise DataError(
                f"{source.table.folder}: the tokens of {source.table.modality} row {rows[bad[0]]} "
                "are not finite; create the feature set again"
            )
    return found


def _draw(count: int, draws: Array | None) -> list[int] | slice:
    """Select tokens of a row: the first steps of a Fisher-Yates shuffle."""
    if draws is None or count <= len(draws):
        return slice(None)
    pool = list(range(count))
    for step, draw in enumerate(draws.tolist()):
        other = step + int(draw * (count - step))
        pool[step], pool[other] = pool[other], pool[step]
    return pool[: len(draws)]


def pad_tokens(rows: Sequence[Array]) -> PaddedTokens:
    """Pad n >= 1 arrays of tokens, (t_i, d) of one dtype with t_i >= 0, to one array."""
    counts = np.array([len(tokens) for tokens in rows], np.int64)
    mask = np.arange(max(1, int(counts.max()))) < counts[:, None]
    values = np.zeros((*mask.shape, rows[0].shape[1]), rows[0].dtype)
    if counts.any():
        values[mask] = np.concatenate(rows)
    return PaddedTokens(values, mask)
