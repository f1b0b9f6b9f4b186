"""Read the tokens of any rows in bounded memory: row groups, decoded when needed, the last kept."""

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from csalign.core.errors import DataError, SchemaError
from csalign.features import schema
from csalign.features.reader import FeatureTable, RowGroup, flat_tokens

Array = npt.NDArray[Any]
Mask = npt.NDArray[np.bool_]
Ints = npt.NDArray[np.int64]

_PIECE_BYTES = 2 << 20


class PaddedTokens(NamedTuple):
    """Tokens of some rows.

    Attributes:
        values: (n, t, d) in the stored dtype, 0 where there is no token; t >= 1 is the count of
            the row that has most.
        mask: (n, t), true where there is a token.
    """

    values: Array
    mask: Mask


class _Block:
    """A decoded row group, in pieces of some rows: their tokens, and where each row's begin."""

    def __init__(self) -> None:
        self.rows = self.bytes = 0
        self._pieces: list[tuple[Array, Array]] = []
        self._firsts: list[int] = []

    def append(self, tokens: Array, starts: Array) -> None:
        """Add rows: tokens (k, d), copied, and starts (n + 1,)."""
        # A copy, since Arrow keeps what it frees, where numpy gives such pieces back.
        tokens, starts = tokens[starts[0] : starts[-1]].copy(), starts - starts[0]
        self._pieces.append((tokens, starts))
        self._firsts.append(self.rows)
        self.rows += len(starts) - 1
        self.bytes += tokens.nbytes + starts.nbytes

    def row(self, place: int) -> Array:
        """The tokens (t, d) of one row, a view."""
        piece = bisect_right(self._firsts, place) - 1
        tokens, starts = self._pieces[piece]
        own = place - self._firsts[piece]
        return tokens[starts[own] : starts[own + 1]]


@dataclass
class TokenCache:
    """Decoded row groups, those that were used last, never more than fit.

    A row group larger than the whole budget is decoded for each use and not kept.

    Attributes:
        budget: bytes.
        bytes: of what is kept.
        reads: row groups decoded so far.
    """

    budget: int
    bytes: int = 0
    reads: int = 0
    _kept: "OrderedDict[tuple[TokenRows, int], _Block]" = field(default_factory=OrderedDict)

    def holds(self, source: "TokenRows", group: int) -> bool:
        """Whether a row group need not be decoded."""
        return (source, group) in self._kept

    def block(self, source: "TokenRows", group: int) -> _Block:
        """A row group, decoded if it is not there."""
        key = (source, group)
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        self._make_room(source.groups[group].bytes)  # before the memory for it is taken
        block = source.decode(group)
        self.reads += 1
        if block.bytes <= self.budget:
            self._make_room(block.bytes)
            self._kept[key] = block
            self.bytes += block.bytes
        return block

    def _make_room(self, size: int) -> None:
        while self._kept and self.bytes + size > self.budget:
            self.bytes -= self._kept.popitem(last=False)[1].bytes


class TokenRows:
    """The tokens of one side of a feature set, by row.

    Args:
        table: of a side that stores tokens.
        cache: may be shared with other tables, which then share its budget.

    Attributes:
        table: as given.
        cache: as given.
        groups: the table's row groups, with the bytes of their tokens.

    Raises:
        DataError: the table stores no tokens.
        SchemaError: a shard is damaged.
    """

    def __init__(self, table: FeatureTable, cache: TokenCache) -> None:
        if table.encoder.token_width is None:
            raise DataError(f"{table.folder}: stores no {table.modality} tokens")
        self.table = table
        self.cache = cache
        self.groups: list[RowGroup] = table.row_groups(schema.TOKENS)
        self._ends = np.cumsum([group.rows for group in self.groups], dtype=np.int64)

    def group_of(self, rows: Ints) -> Ints:
        """The row group of each row."""
        return np.searchsorted(self._ends, rows, side="right")

    def take(self, rows: Ints, draws: Array | None = None) -> PaddedTokens:
        """The tokens of some rows; see `Wanted` and `take_together`."""
        return take_together([Wanted(self, rows, draws)])[0]

    def parts(self, rows: Ints) -> Iterator[tuple[int, Ints, Ints]]:
        """The row groups that rows are in: number, positions in `rows`, and places in the group."""
        groups = self.group_of(rows)
        for group in np.unique(groups).tolist():
            positions = np.flatnonzero(groups == group)
            first = self._ends[group] - self.groups[group].rows
            yield group, positions, rows[positions] - first

    def decode(self, group: int) -> _Block:
        """Read a row group.

        Raises:
            SchemaError: the shard is damaged.
        """
        described = self.groups[group]
        rows = max(1, described.rows * _PIECE_BYTES // max(1, described.bytes))
        block = _Block()
        for batch in self.table.read_group(described, [schema.TOKENS], rows):
            block.append(*flat_tokens(batch))
        if block.rows != described.rows:
            raise SchemaError(
                f"{self.table.folder}: {described.shard.path} changed while it was read"
            )
        return block


class Wanted(NamedTuple):
    """Rows to take, and how many of their tokens.

    Attributes:
        source: of one side.
        rows: (n,), n >= 1, int64, in any order; may repeat.
        draws: (n, s) in [0, 1), which decide the s tokens that are taken, without replacement,
            where a row has more; None takes all.
    """

    source: TokenRows
    rows: Ints
    draws: Array | None = None


def take_together(wanted: Sequence[Wanted]) -> list[PaddedTokens]:
    """Take rows of several tables, each row group decoded at most once.

    What is there already is used before anything is decoded, which may take its place.

    Raises:
        DataError: a token is not finite.
        SchemaError: a shard is damaged.
    """
    found: list[list[Array]] = [[np.empty(0)] * len(one.rows) for one in wanted]
    parts = [
        (number, *part) for number, one in enumerate(wanted) for part in one.source.parts(one.rows)
    ]

    def is_to_decode(part: tuple[int, int, Ints, Ints]) -> bool:
        source = wanted[part[0]].source
        return not source.cache.holds(source, part[1])

    for number, group, positions, places in sorted(parts, key=is_to_decode):
        source, _, draws = wanted[number]
        block = source.cache.block(source, group)
        for position, place in zip(positions.tolist(), places.tolist(), strict=True):
            own = block.row(place)
            drawn = _drawn(len(own), None if draws is None else draws[position])
            found[number][position] = own[drawn].copy()  # a view would keep the whole block
    return [_padded(one, rows) for one, rows in zip(wanted, found, strict=True)]


def _drawn(count: int, draws: Array | None) -> list[int] | slice:
    """Which of a row's tokens to take: the first steps of a Fisher-Yates shuffle."""
    if draws is None or count <= len(draws):
        return slice(None)
    pool = list(range(count))
    for step, draw in enumerate(draws.tolist()):
        other = step + int(draw * (count - step))
        pool[step], pool[other] = pool[other], pool[step]
    return pool[: len(draws)]


def pad_tokens(rows: Sequence[Array]) -> PaddedTokens:
    """Rows of tokens as one array.

    Args:
        rows: n >= 1 arrays (t_i, d) of one dtype; t_i may be 0.
    """
    counts = np.array([len(tokens) for tokens in rows], np.int64)
    longest = max(1, int(counts.max(initial=0)))
    mask = np.arange(longest) < counts[:, None]
    values = np.zeros((len(rows), longest, rows[0].shape[1]), rows[0].dtype)
    if counts.any():
        values[mask] = np.concatenate(rows)
    return PaddedTokens(values, mask)


def _padded(wanted: Wanted, rows: Sequence[Array]) -> PaddedTokens:
    source = wanted.source
    padded = pad_tokens(rows)
    bad = np.flatnonzero(~np.isfinite(padded.values).all((1, 2)))
    if len(bad):
        raise DataError(
            f"{source.table.folder}: the tokens of {source.table.modality} row "
            f"{wanted.rows[bad[0]]} are not finite; make the feature set again"
        )
    return padded
