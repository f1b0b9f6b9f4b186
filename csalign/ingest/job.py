"""Documents of a feature set that is built part by part, and who builds which part."""

import hashlib
import logging
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from pydantic import Base64Bytes, Field

from csalign.core.distributed import number_from, world_from_environment
from csalign.core.errors import ConfigError, SchemaError
from csalign.core.records import Record, read_record
from csalign.features.schema import Encoders, Shard, SplitSettings

logger = logging.getLogger(__name__)

R = TypeVar("R", bound=Record)
DIGEST_BYTES = 16  # of what images are recognised by


@dataclass(frozen=True)
class WorkShard:
    """One of `count` processes that share the work; `index` counts from 0."""

    index: int
    count: int
    origin: str = field(default="--shard", compare=False)  # the variables that say so

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
    splits: SplitSettings | None = None  # to be made of the finished set

    def fingerprint(self) -> str:
        """Return the SHA-256 of what determines parts besides their records."""
        return self.digest("location", "source", "splits")

    def digest(self, *excluded: str) -> str:
        """Return the SHA-256 of all fields but some."""
        content = self.model_dump_json(exclude={*excluded})
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
    source_root: str | None = None  # folder that relative sources of its images start from
    is_unreadable: bool = False  # stands for a source file that could not be read at all
    records: int = 0
    failed_records: int = 0  # skipped as a whole
    failed_texts: int = 0  # skipped although their record was not
    texts_seen: int = 0  # of the records that were not skipped
    cut_texts: int = 0  # longer than the context of their encoder
    longest_text: int = 0  # tokens of the longest of those
    pairs: int = 0  # texts that belong to an image
    images: Shard | None = None
    texts: Shard | None = None
    failures: list[Failure] = Field(default_factory=list)
    digests: Base64Bytes = b""  # of what makes each image row equal to others, see `ImageInput`
    is_named: bool = False  # equal images stay apart
    joined: int = 0  # images without a row, as they equal an earlier one of the part


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


def parse_shard(shard: str, environment: Mapping[str, str] = os.environ) -> WorkShard:
    """Parse ``--shard``: "I/N" with I from 0, or "auto".

    "auto" multiplies the tasks of a SLURM array and the processes within each that torchrun, srun
    or mpirun started, if there are any.

    Raises:
        ConfigError: it is neither, or the index is not below the count.
        ProcessesError: the variables of a launcher are not numbers, or contradict each other.
    """
    if shard == "auto":
        array, world = _array_task(environment), world_from_environment(environment)
        origin = " and ".join(filter(None, (array.origin, world.origin)))
        index, count = array.index * world.size + world.rank, array.count * world.size
        return WorkShard(index, count, origin)
    if not (match := re.fullmatch(r"(\d+)/(\d+)", shard)):
        raise ConfigError(f"--shard: must be I/N or auto (got {shard!r})")
    found = WorkShard(int(match[1]), int(match[2]))
    if found.index >= found.count:
        raise ConfigError(
            f"--shard: {found}: does not exist; shards are numbered from 0 to {found.count - 1}"
        )
    return found


def check_array(
    shard: WorkShard,
    option: str,
    known: Collection[int],
    environment: Mapping[str, str] = os.environ,
) -> None:
    """Refuse a SLURM array that is smaller than the one that began the work.

    Raises:
        ConfigError: `shard`, which is not an explicit `option`, is one of fewer than some of the
            `known` counts, as in an array of the failed tasks.
    """
    if option != "auto" or number_from(environment, "SLURM_ARRAY_TASK_ID") is None:
        return
    if known and shard.count < max(known):
        raise ConfigError(
            f"--shard: the work began with {max(known)} shards, and this SLURM array has "
            f"{shard.count}; pass --shard I/{max(known)} for a missing one, where I is "
            f"$SLURM_ARRAY_TASK_ID if the first array began at 0, or --shard {shard} to divide the "
            "rest again"
        )


def _array_task(environment: Mapping[str, str]) -> WorkShard:
    # SLURM_ARRAY_TASK_COUNT is the number of tasks, whatever their first index and their step.
    names = [f"SLURM_ARRAY_TASK_{name}" for name in ("ID", "MIN", "MAX", "STEP", "COUNT")]
    task, first, last, step, count = (number_from(environment, name) for name in names)
    if task is None:
        return WorkShard(0, 1, "")
    if count is None:
        raise ConfigError(f"--shard: {names[0]} is set, {names[-1]} is not; pass --shard I/N")
    first, step = 1 if first is None else first, step or 1
    last = first + (count - 1) * step if last is None else last
    index, rest = divmod(task - first, step)
    # A few tasks of a larger array, resubmitted, would each take a share of too few.
    is_part = first > 1 or (count == 1 and task > 0) or (last - first) // step + 1 != count
    if is_part or rest or not 0 <= index < count:
        raise ConfigError(
            f"--shard: this looks like part of a larger SLURM array, resubmitted (task {task} of "
            f"{count} from {first} to {last}); pass --shard $SLURM_ARRAY_TASK_ID/N, where N is the "
            "size of the first array, less 1 if that began at 1 (0/1 does everything)"
        )
    return WorkShard(index, count, f"{names[0]} {task} of {first} to {last}")


def assigned_parts(shard: WorkShard, files: int, file: int, parts: int) -> range:
    """Return which of the parts of a source file belong to a shard.

    With at least as many files as shards each file goes to one shard; fewer files are divided
    part by part.
    """
    if files >= shard.count:
        return range(parts if file % shard.count == shard.index else 0)
    return range((shard.index - file) % shard.count, parts, shard.count)
