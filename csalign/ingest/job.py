"""What a feature set that is built part by part keeps beside its parts, as JSON documents."""

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from pydantic import Field

from csalign.core.enums import Modality
from csalign.core.errors import SchemaError
from csalign.core.records import Record, read_record
from csalign.features.schema import Encoders, Shard

log = logging.getLogger(__name__)

R = TypeVar("R", bound=Record)


class Job(Record):
    """What decides every byte of the result, but for the order in which parts are made.

    Attributes:
        location: where the source lies.
        source: its fingerprint.
        part_rows: records a part.
        dtype: "float16" or "float32".
        encoders: what makes each side.
    """

    FORMAT: ClassVar[str] = "csalign-job"

    format: str = FORMAT
    location: str
    source: str
    part_rows: int
    dtype: str
    encoders: Encoders

    def fingerprint(self) -> str:
        """SHA-256 of what decides the content of parts, beside the records that they are of."""
        content = self.model_dump_json(exclude={"location", "source"})
        return hashlib.sha256(content.encode()).hexdigest()


class Failure(Record):
    """An input that was left out.

    Attributes:
        source: file that it came from.
        row: 1-based row of it, None if the file as a whole.
        reason: why, in a few words.
    """

    source: str
    row: int | None
    reason: str


class Receipt(Record):
    """A finished part.

    Attributes:
        name: of the part.
        job: `Job.fingerprint` of the job that it was made for; set when it is sealed.
        stamp: of the records that it was made of; see `sources.base.Source`.
        volume_records: records of the volume that it belongs to, all parts together.
        is_lost: whether it stands for a file that could not be read at all.
        records: that went into it.
        failed_records: of these, left out as a whole.
        failed_texts: texts left out although their record was not.
        texts_seen: texts of the records that were not left out.
        pairs: texts that belong to an image.
        images: its file of images, None if it has none.
        texts: its file of texts, None if it has none.
        failures: what was left out.
    """

    name: str
    job: str = ""
    stamp: str = ""
    volume_records: int
    is_lost: bool = False
    records: int
    failed_records: int = 0
    failed_texts: int = 0
    texts_seen: int = 0
    pairs: int = 0
    images: Shard | None = None
    texts: Shard | None = None
    failures: list[Failure] = Field(default_factory=list)

    def side(self, modality: Modality) -> Shard | None:
        """Its file of one side."""
        return self.images if modality is Modality.IMAGE else self.texts


@dataclass(frozen=True)
class Turn:
    """Which of how many processes this is; the first is 0."""

    index: int
    count: int

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


class Finished(Record):
    """What a process says that is done with its parts, as the source was then."""

    index: int
    count: int
    source: str
    parts: list[str]


def other_job(folder: Path, found: Job, job: Job) -> str:
    """What to say of a folder that holds another job."""
    if is_same_but_source(found, job):
        return (
            f"{folder}: was begun when the source held something else; go on with "
            "--retry-failures, which makes what changed anew and keeps the rest, or start anew "
            "with --overwrite"
        )
    old, new = _flat(found.model_dump()), _flat(job.model_dump())
    names = [name for name in [*new, *old] if name != "source"]
    name = next(name for name in names if old.get(name) != new.get(name))
    change = f"{name} {old.get(name)}, not {new.get(name)}"
    if name in ("encoders.image.fingerprint", "encoders.text.fingerprint"):
        change = f"another {name}"
    return (
        f"{folder}: was begun with {change}; go on with the same options and source, or start "
        "anew with --overwrite"
    )


def is_same_but_source(found: Job, job: Job) -> bool:
    """Whether two jobs are one, but for what the source held when each was begun."""
    return found.model_copy(update={"source": job.source}) == job


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= (
            _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
        )
    return flat


def read_finished(path: Path, kind: type[R]) -> R | None:
    """What was finished; None, with a warning, if its document is damaged: it is made again."""
    try:
        return read_record(path, kind, "it is made again")
    except SchemaError as error:
        log.warning("%s", error)
        return None
