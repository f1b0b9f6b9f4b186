"""Documents of a feature set that is built part by part, as JSON beside the parts."""

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from pydantic import Field

from csalign.core.enums import Modality
from csalign.core.errors import SchemaError
from csalign.core.records import Record, read_record
from csalign.features.manifest import Encoders, Shard

log = logging.getLogger(__name__)

R = TypeVar("R", bound=Record)


class Job(Record):
    """Everything that determines the result, except the order in which parts are written.

    Attributes:
        location: path or URL of the source.
        source: fingerprint of the source.
        part_rows: records per part.
        dtype: "float16" or "float32".
        encoders: of each side.
    """

    FORMAT: ClassVar[str] = "csalign-extraction"

    format: str = FORMAT
    location: str
    source: str
    part_rows: int
    dtype: str
    encoders: Encoders

    def fingerprint(self) -> str:
        """SHA-256 of what determines the content of parts, beside their records."""
        content = self.model_dump_json(exclude={"location", "source"})
        return hashlib.sha256(content.encode()).hexdigest()


class Failure(Record):
    """An input that was skipped.

    Attributes:
        source: file that it came from.
        row: 1-based row in that file, None if the whole file was skipped.
        reason: in a few words.
    """

    source: str
    row: int | None
    reason: str


class PartRecord(Record):
    """A finished part.

    Attributes:
        name: of the part.
        job: `Job.fingerprint` of its job; set when the part is completed.
        fingerprint: of its records; see `sources.records.base.Source`.
        file_records: records in its source file, over all its parts.
        is_unreadable: whether it stands for a source file that could not be read at all.
        records: in this part.
        failed_records: of these, skipped as a whole.
        failed_texts: texts skipped although their record was not.
        texts_seen: texts of the records that were not skipped.
        pairs: texts that belong to an image.
        images: its file of images, None if it has none.
        texts: its file of texts, None if it has none.
        failures: what was skipped.
    """

    name: str
    job: str = ""
    fingerprint: str = ""
    file_records: int
    is_unreadable: bool = False
    records: int
    failed_records: int = 0
    failed_texts: int = 0
    texts_seen: int = 0
    pairs: int = 0
    images: Shard | None = None
    texts: Shard | None = None
    failures: list[Failure] = Field(default_factory=list)

    def side(self, modality: Modality) -> Shard | None:
        """Return its file of one side."""
        return self.images if modality is Modality.IMAGE else self.texts


@dataclass(frozen=True)
class WorkShard:
    """One of several processes that share the work.

    Attributes:
        index: of this process, from 0.
        count: of all processes.
    """

    index: int
    count: int

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


class Finished(Record):
    """Says that a process finished its parts of the source as it was then."""

    index: int
    count: int
    source: str
    parts: list[str]


def describe_conflict(folder: Path, found: Job, job: Job) -> str:
    """Word the error of a folder that contains another job."""
    if is_same_but_source(found, job):
        return (
            f"{folder}: the source has changed since this extraction began; resume with "
            "--retry-failures, which reprocesses what changed, or start again with --overwrite"
        )
    old, new = _flat(found.model_dump()), _flat(job.model_dump())
    names = [name for name in [*new, *old] if name != "source"]
    name = next(name for name in names if old.get(name) != new.get(name))
    change = f"{name} {old.get(name)}, not {new.get(name)}"
    if name in ("encoders.image.fingerprint", "encoders.text.fingerprint"):
        change = f"another {name}"
    return (
        f"{folder}: this extraction began with {change}; resume with the same options and source, "
        "or start again with --overwrite"
    )


def is_same_but_source(found: Job, job: Job) -> bool:
    """Return whether two jobs differ at most in the content of their source."""
    return found.model_copy(update={"source": job.source}) == job


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= (
            _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
        )
    return flat


def read_or_rebuild(path: Path, kind: type[R]) -> R | None:
    """Read the document of finished work; None, with a warning, if it is damaged."""
    try:
        return read_record(path, kind, "its part is processed again")
    except SchemaError as error:
        log.warning("%s", error)
        return None
