"""How the tests of sources look at one: all of its records, whole and one by one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from csalign.sources.records import Record
from csalign.sources.records.open import SourceOptions, open_source


def _plain(record: Record) -> tuple[object, ...]:
    image = record.image and (record.image.id, record.image.source)
    return (image, record.texts, record.split, record.row, record.error)


def _records(source: Path | str, **options: Any) -> list[Record]:
    opened = open_source(source, SourceOptions(**options))
    found: list[Record] = []
    for position, name in enumerate(opened.files):
        with opened.open(position) as volume:
            assert volume.name == name
            whole = list(volume.records(0, len(volume)))
            backwards = reversed(range(len(volume)))
            single = [record for row in backwards for record in volume.records(row, row + 1)]
            assert [_plain(record) for record in single[::-1]] == [_plain(r) for r in whole]
        found += whole
    ids = [record.image.id for record in found if record.image]
    text_ids = [text.id for record in found for text in record.texts]
    assert len(set(ids)) == len(ids)
    assert len(set(text_ids)) == len(text_ids)
    assert opened.total in (None, len(found))
    assert opened.fingerprint == open_source(source, SourceOptions(**options)).fingerprint
    return found


@pytest.fixture
def records() -> Callable[..., list[Record]]:
    """All records of a source, after checks that hold for every source."""
    return _records


@pytest.fixture
def outline() -> Callable[..., list[tuple[str | None, list[str], str | None]]]:
    """Image id, captions and split of each record; the split of a flawed one is its flaw."""

    def outline(source: Path | str, **options: Any) -> list[tuple[Any, ...]]:
        return [
            (r.image and r.image.id, [text.caption for text in r.texts], r.error or r.split)
            for r in _records(source, **options)
        ]

    return outline


@pytest.fixture
def flaws() -> Callable[..., list[tuple[int | None, str]]]:
    """Row and flaw of each flawed record."""

    def flaws(source: Path | str, **options: Any) -> list[tuple[int | None, str]]:
        return [(r.row, r.error) for r in _records(source, **options) if r.error]

    return flaws
