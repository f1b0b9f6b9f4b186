"""Documents of a feature set that is built part by part, as JSON beside the parts."""

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from pydantic import Field

from csalign.core.errors import SchemaError
from csalign.core.records import Record, read_record
from csalign.features.schema import Encoders, Shard

logger = logging.getLogger(__name__)

R = TypeVar("R", bound=Record)


@dataclass(frozen=True)
class WorkShard:
    """One of `count` processes that share the work; `index` counts from 0."""

    index: int
    count: int

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


class Job(Record):
    """Everything that determines the result, except the order in which parts are written."""

    FORMAT: ClassVar[str] = "csalign-extraction"

    format: str = FORMAT
    location: str  # path or URL of the source
    source: str  # fingerprint of the source
    part_rows: int  # records per part
    dtype: str
    encoders: Encoders

    def fingerprint(self) -> str:
        """SHA-256 of what determines the content of parts, beside their records."""
        content = self.model_dump_json(exclude={"location", "source"})
        return hashlib.sha256(content.encode()).hexdigest()


class Failure(Record):
    """An input that was skipped; `row` counts from 1 and is None if a whole file was skipped."""

    source: str
    row: int | None
    reason: str


class PartRecord(Record):
    """A finished part, with the files of the sides that it has."""

    name: str
    job: str = ""  # `Job.fingerprint` of its job
    fingerprint: str = ""  # of its records; see `sources.records.Source`
    file_records: int  # in its source file, over all parts of the file
    is_unreadable: bool = False  # stands for a source file that could not be read at all
    records: int
    failed_records: int = 0  # skipped as a whole
    failed_texts: int = 0  # skipped although their record was not
    texts_seen: int = 0  # of the records that were not skipped
    pairs: int = 0  # texts that belong to an image
    images: Shard | None = None
    texts: Shard | None = None
    failures: list[Failure] = Field(default_factory=list)


class Finished(Record):
    """Says that a process finished its parts of the source as it was then."""

    index: int
    count: int
    source: str
    parts: list[str]


def is_same_but_source(found: Job, job: Job) -> bool:
    """Return whether two jobs differ at most in the content of their source."""
    return found.model_copy(update={"source": job.source}) == job


def describe_conflict(folder: Path, found: Job, job: Job) -> str:
    """Word the error of a folder that contains another job."""
    if is_same_but_source(found, job):
        return (
            f"{folder}: the source has changed since this extraction began; resume with "
            "--retry-failures, which reprocesses what changed, or start again with --overwrite"
        )
    old, new = (_flat(either.model_dump(exclude={"source"})) for either in (found, job))
    name = next(name for name in new | old if old.get(name) != new.get(name))
    change = f"{name} {old.get(name)}, not {new.get(name)}"
    if name in ("encoders.image.fingerprint", "encoders.text.fingerprint"):
        change = f"another {name}"
    return (
        f"{folder}: this extraction began with {change}; resume with the same options and source, "
        "or start again with --overwrite"
    )


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {name.removeprefix("."): value}
    return {k: v for key, own in value.items() for k, v in _flat(own, f"{name}.{key}").items()}


def read_or_rebuild(path: Path, kind: type[R]) -> R | None:
    """Read the document of finished work; None, with a warning, if it is damaged."""
    try:
        return read_record(path, kind, "its part is processed again")
    except SchemaError as error:
        logger.warning("%s", error)
        return None
