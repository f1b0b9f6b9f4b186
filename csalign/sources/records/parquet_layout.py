"""What the columns of image-text files hold, and the values of their rows."""

from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from csalign.core.errors import DataError
from csalign.sources.arrow import Broken, Shelf, column_values, guarded
from csalign.sources.records.tables import (
    SourceOptions,
    TableColumns,
    is_base64,
    is_base64_name,
    json_captions,
)

PLAIN_ROWS = 8_192  # a batch of columns without images


class Layout(NamedTuple):
    """What the columns of a file hold; `kind` of its images: bytes, struct, base64 or path."""

    found: TableColumns
    kind: str | None
    names: tuple[str, ...]

    def __str__(self) -> str:
        return ", ".join(self.names)

    @property
    def wanted(self) -> list[str]:
        """The columns to read."""
        return list(dict.fromkeys(name for name in self.found if name is not None))


def layout_of(path: Path, shelf: Shelf, columns: SourceOptions) -> Layout:
    """What an open file's columns hold.

    Raises:
        DataError: the image or the caption column is missing or holds something else.
    """
    names = tuple(shelf.schema.names)
    found = columns.find(names, path)
    kind = None
    if found.image is not None:
        kind = _image_kind(path, shelf, found.image)
    if found.caption is not None and not _is_caption(shelf.schema.field(found.caption).type):
        held = shelf.schema.field(found.caption).type
        raise DataError(
            f"{path}: column {found.caption!r} holds {held}, not text or lists of text; name "
            "another with --caption-column"
        )
    return Layout(found, kind, names)


def _image_kind(path: Path, shelf: Shelf, name: str) -> str:
    held = shelf.schema.field(name).type
    if pa.types.is_dictionary(held):
        held = held.value_type
    if _is_any(held, "binary", "large_binary", "fixed_size_binary", "binary_view"):
        return "bytes"
    if pa.types.is_struct(held) and {"bytes", "path"} & {field.name for field in held}:
        return "struct"
    if _is_any(held, "string", "large_string", "string_view"):
        if is_base64_name(name) or _starts_with_base64(path, shelf, name):
            return "base64"
        return "path"
    raise DataError(
        f"{path}: column {name!r:.200} holds {held}, not images or paths; name another with "
        "--image-column"
    )


def _starts_with_base64(path: Path, shelf: Shelf, name: str) -> bool:
    for _, batch in islice(guarded(path, shelf.batches(0, [name], 1)), 10):
        for value in column_values(batch.column(0)):
            if isinstance(value, str) and value:
                return is_base64(value)
    return False


def _is_caption(held: pa.DataType) -> bool:
    if _is_any(held, "list", "large_list", "fixed_size_list", "list_view", "large_list_view"):
        return _is_caption(held.value_type)
    if pa.types.is_dictionary(held):
        return _is_caption(held.value_type)
    return _is_any(held, "string", "large_string", "string_view", "null")


def _is_any(held: pa.DataType, *kinds: str) -> bool:
    return any(getattr(pa.types, f"is_{kind}")(held) for kind in kinds)


def rows_of(
    path: Path, shelf: Shelf, layout: Layout, start: int, size: int
) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Rows from one on, with their 0-based numbers."""
    for first, batch in guarded(path, shelf.batches(start, layout.wanted, size)):
        skipped = max(0, start - first)
        columns = {name: column_values(batch.column(name)[skipped:]) for name in layout.wanted}
        for position in range(len(batch) - skipped):
            values = {name: column[position] for name, column in columns.items()}
            yield first + skipped + position, values


def text_of(values: Mapping[str, Any], name: str | None) -> str | None:
    """A row's text in a column, stripped; None where there is none.

    Raises:
        ValueError: it is not text, or not UTF-8.
    """
    value = None if name is None else values[name]
    if value is None:
        return None
    if isinstance(value, Broken):
        raise ValueError(str(value))
    if not isinstance(value, str):
        raise ValueError(f"{name} must be text, not {value!r:.40}")
    return value.strip() or None


def captions_of(values: Mapping[str, Any], found: TableColumns) -> tuple[str, ...]:
    """A row's captions.

    Raises:
        ValueError: they are not text, or not UTF-8.
    """
    value = None if found.caption is None else values[found.caption]
    if isinstance(value, Broken):
        raise ValueError(str(value))
    return json_captions(value, str(found.caption))


def id_of(values: Mapping[str, Any], found: TableColumns) -> str | None:
    """A row's id, None where there is none.

    Raises:
        ValueError: it is neither a number nor text.
    """
    value = None if found.id is None else values[found.id]
    return str(value) if isinstance(value, int) else text_of(values, found.id)
