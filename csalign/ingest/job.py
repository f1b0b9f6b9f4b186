"""Documents of a feature set that is built part by part, and who builds which part."""

import hashlib
import logging
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from pydantic import Field

from csalign.core.errors import ConfigError, SchemaError
from csalign.core.records import Record, read_record
from csalign.features.schema import Encoders, Shard, SplitSettings

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
    splits: SplitSettings | None = None  # to be made of the finished set

    def fingerprint(self) -> str:
        """Return the SHA-256 of what determines parts besides their records."""
        content = self.model_dump_json(exclude={"location", "source", "splits"})
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
    records: int
    failed_records: int = 0  # skipped as a whole
    failed_texts: int = 0  # skipped although their record was not
    texts_seen: int = 0  # of the records that were not skipped
    cut_texts: int = 0  # longer than the context of their encoder
    longest_text: int = 0  # tokens of the longest of those
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


def parse_shard(shard: str, environment: Mapping[str, str] = os.environ) -> WorkShard:
    """Parse ``--shard``: "I/N" with I from 0, or "auto".

    "auto" multiplies the tasks of a SLURM array and torchrun's ranks within each, if there are any.

    Raises:
        ConfigError: it is neither, or the index is not below the count.
    """
    if shard == "auto":
        array, rank = _array_task(environment), _rank(environment)
        found = WorkShard(array.index * rank.count + rank.index, array.count * rank.count)
        problem = "the variables of SLURM or torchrun do not number the shards; pass --shard I/N"
    elif match := re.fullmatch(r"(\d+)/(\d+)", shard):
        found = WorkShard(int(match[1]), int(match[2]))
        problem = f"does not exist; shards are numbered from 0 to {found.count - 1}"
    else:
        raise ConfigError(f"--shard: must be I/N or auto (got {shard!r})")
    if not 0 <= found.index < found.count:
        raise ConfigError(f"--shard: {found}: {problem}")
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
    if option != "auto" or "SLURM_ARRAY_TASK_ID" not in environment:
        return
    if known and shard.count < max(known):
        raise ConfigError(
            f"--shard: the work began with {max(known)} shards, and this SLURM array has "
            f"{shard.count}; pass --shard I/{max(known)} for a missing one, or --shard {shard} to "
            "divide the rest again"
        )


def _array_task(environment: Mapping[str, str]) -> WorkShard:
    # SLURM_ARRAY_TASK_COUNT is the number of tasks, whatever their first index and their step.
    names = ("ID", "MIN", "STEP", "COUNT")
    values = [environment.get(f"SLURM_ARRAY_TASK_{name}") for name in names]
    if values[0] is None or values[3] is None:
        return WorkShard(0, 1)
    task, first, step, count = (int(value) if value else 1 for value in values)
    last = int(environment.get("SLURM_ARRAY_TASK_MAX") or first + (count - 1) * step)
    # A few tasks of a larger array, resubmitted, would each take a share of too few.
    if first > 1 or (count == 1 and task > 0) or (last - first) // step + 1 != count:
        raise ConfigError(
            f"--shard: this looks like part of a larger SLURM array, resubmitted (task {task} of "
            f"{count} from {first} to {last}); pass --shard I/N, where I counts from 0 and N is "
            "the size of the first array (0/1 does everything)"
        )
    return WorkShard((task - first) // step, count)


def _rank(environment: Mapping[str, str]) -> WorkShard:
    if "RANK" not in environment or "WORLD_SIZE" not in environment:
        return WorkShard(0, 1)
    return WorkShard(int(environment["RANK"]), int(environment["WORLD_SIZE"]))


def device_of_rank(device: str, environment: Mapping[str, str] = os.environ) -> str:
    """Resolve ``--device auto`` under torchrun to the CUDA device of this rank."""
    if device != "auto" or "LOCAL_RANK" not in environment:
        return device
    import torch

    count = torch.cuda.device_count()
    return f"cuda:{int(environment['LOCAL_RANK']) % count}" if count else device


def assigned_parts(shard: WorkShard, files: int, file: int, parts: int) -> range:
    """Return which of the parts of a source file belong to a shard.

    With at least as many files as shards each file goes to one shard; fewer files are divided
    part by part.
    """
    if files >= shard.count:
        return range(parts if file % shard.count == shard.index else 0)
    return range((shard.index - file) % shard.count, parts, shard.count)
