"""What a table or the feature set itself tells of its rows: groups, labels, classes."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from csalign.core.errors import DataError
from csalign.core.paths import parse_location
from csalign.features import schema
from csalign.features.join import PairedRows
from csalign.features.reader import FeatureSet, FeatureTable
from csalign.sources.records.tables import SUFFIXES, Table, read_table

log = logging.getLogger(__name__)

Values = list[str | None]

IMAGE_KEYS = ("image_id", "id")
CLASS_COLUMNS = ("class", "label")


@dataclass(frozen=True)
class ImageColumns:
    """Columns by image: of the feature set, of a table, or of a table that a name brings along.

    Attributes:
        features: whose images.
        ids: of the images that are asked about.
        table: of ``--groups``, or None.
    """

    features: FeatureSet
    ids: Sequence[str]
    table: Table | None

    def values(self, name: str) -> Values:
        """What a column says of each image, None where it says nothing.

        Args:
            name: COLUMN of the table, else of the feature set; or TABLE.csv:COLUMN.

        Raises:
            DataError: there is no such table or column, it knows none of the images, or it
                contradicts itself.
        """
        table, column = _named(name, self.table)
        if table is not None and column in table.columns:
            return self._joined(table, column)
        stored = [n for n in schema.STRING_COLUMNS[self.features.images.modality] if n != schema.ID]
        if table is self.table and column in stored:
            return _of_ids(self.features.images, column, self.ids)
        there = "" if table is None else f"{table.path} has {', '.join(table.columns)}; "
        raise DataError(
            f"{self.features.path}: nothing tells the column {column!r} of images; {there}the "
            f"features have {', '.join(stored)}; name one of them, or give a table"
        )

    def _joined(self, table: Table, column: str) -> Values:
        told = _by_key(table, IMAGE_KEYS, column)
        found = [told.get(key) for key in self.ids]
        known = sum(value is not None for value in found)
        if not known:
            raise DataError(
                f"{table.path}: tells {column!r} of none of the images of {self.features.path}, "
                f"whose ids are such as {self.ids[0]!r}; put them into its column {IMAGE_KEYS[0]!r}"
            )
        if known < len(found):
            log.warning("%s: tells %r of %d of %d images", table.path, column, known, len(found))
        return found


def prompt_classes(prompts: PairedRows, class_of: str | None) -> list[str]:
    """The class of each prompt.

    Args:
        prompts: whose texts they are.
        class_of: TABLE.csv or TABLE.csv:COLUMN, with the text's `id` or its `caption` and the
            class (default column: class or label). Without it, what is before the last slash of
            a text's id, as in ``cat/3``.

    Raises:
        DataError: a prompt has no class, or the table is of no use.
    """
    ids = prompts.text_ids.to_pylist()
    if class_of is None:
        for key in ids:
            if "/" not in key:
                raise DataError(
                    f"{prompts.name}: text {key!r} names no class: let ids be such as cat/0, or "
                    "give a table with the columns caption and class by --class-of"
                )
        return [key.rpartition("/")[0] for key in ids]
    table, column = _named(class_of, None)
    if table is None:
        table = read_table(parse_location(class_of))
        column = next((name for name in CLASS_COLUMNS if name in table.columns), "class")
    by_id = schema.ID in table.columns
    keys = ids if by_id else [text or "" for text in prompts.captions.to_pylist()]
    told = _by_key(table, (schema.ID,) if by_id else (schema.CAPTION,), column)
    for key, text in zip(keys, ids, strict=True):
        if told.get(key) is None:
            raise DataError(
                f"{table.path}: tells no {column!r} of the text {text!r} ({key!r}) of "
                f"{prompts.name}; add it"
            )
    return [told[key] or "" for key in keys]


def _named(name: str, table: Table | None) -> tuple[Table | None, str]:
    """The table and the column of TABLE.csv:COLUMN, or the given table and COLUMN."""
    path, colon, column = name.rpartition(":")
    if colon and path.lower().endswith(SUFFIXES):
        return read_table(parse_location(path)), column
    return table, name


def _by_key(table: Table, keys: Sequence[str], column: str) -> Mapping[str, str | None]:
    """What a column says of each key; a key may stand in several rows that agree.

    Raises:
        DataError: the table has no such columns, or rows disagree.
    """
    told: dict[str, str | None] = {}
    pairs = zip(table.require(keys), table.require([column]), strict=True)
    for row, (key, value) in enumerate(pairs):
        if key is None or value is None:
            continue
        if told.setdefault(key, value) != value:
            raise DataError(
                f"{table.where(row)}: says {value!r} of {key!r}, an earlier row {told[key]!r}; "
                "keep one of them"
            )
    return told


def _of_ids(table: FeatureTable, column: str, ids: Sequence[str]) -> Values:
    """A stored column at some ids."""
    stored = zip(table.column(schema.ID).to_pylist(), table.column(column).to_pylist(), strict=True)
    told = dict(stored)
    return [told[key] for key in ids]
