"""A file among several of a source that cannot be read at all."""

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

from csalign.core.errors import DataError
from csalign.sources.records import Record

logger = logging.getLogger(__name__)


class UnreadableFile:
    """An unreadable file as a `SourceFile` of one record, whose error is the reason."""

    def __init__(self, name: str, reason: str) -> None:
        self.name = name
        self._reason = reason.removeprefix(f"{name}: ")

    def __len__(self) -> int:
        return 1

    def records(self, start: int, stop: int) -> Iterator[Record]:
        """See `SourceFile`."""
        if start < 1 <= stop:
            yield Record(None, error=self._reason)


def warn_of_unreadable(root: Path, lost: Mapping[int, str], count: int) -> None:
    """Warn of unreadable files.

    Args:
        root: folder of the files.
        lost: reason per unreadable file, by position.
        count: of all files.

    Raises:
        DataError: no file can be read.
    """
    if not lost:
        return
    first = lost[min(lost)]
    if len(lost) == count:
        raise DataError(first if count == 1 else f"none of {count} files can be read: {first}")
    logger.warning("%s: %d of %d files cannot be read (%s)", root, len(lost), count, first)
