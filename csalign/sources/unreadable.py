"""A file among several of a source that cannot be read at all."""

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

from csalign.core.errors import DataError
from csalign.sources.records import Record

logger = logging.getLogger(__name__)


class LostVolume:
    """Stands for the file as a `SourceFile`: one record, whose flaw is the reason."""

    def __init__(self, name: str, reason: str) -> None:
        self.name = name
        self._reason = reason.removeprefix(f"{name}: ")

    def __len__(self) -> int:
        return 1

    def records(self, start: int, stop: int) -> Iterator[Record]:
        """See `SourceFile`."""
        if start < 1 <= stop:
            yield Record(None, error=self._reason)


def tell_of_lost(root: Path, lost: Mapping[int, str], count: int) -> None:
    """Warn of files that are left out as a whole.

    Args:
        root: folder that the files are below.
        lost: why each cannot be read, by position.
        count: of all files.

    Raises:
        DataError: there is no other.
    """
    if not lost:
        return
    first = lost[min(lost)]
    if len(lost) == count:
        raise DataError(first if count == 1 else f"none of {count} files can be read: {first}")
    logger.warning(
        "%s: %d of %d files cannot be read and are left out (%s)", root, len(lost), count, first
    )
