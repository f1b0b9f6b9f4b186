"""Which shard of the work is this process's, among several that share a source."""

import os
import re
from collections.abc import Collection, Iterator, Mapping

from csalign.core.errors import ConfigError
from csalign.ingest.job import WorkShard


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
        raise ConfigError(f"shard: must be I/N or auto (got {shard!r})")
    if not 0 <= found.index < found.count:
        raise ConfigError(f"shard: {found}: {problem}")
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
            f"shard: the work began with {max(known)} shards, and this SLURM array has "
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
            f"shard: this looks like part of a larger SLURM array, resubmitted (task {task} of "
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


def assigned_to(shard: WorkShard, files: int, file: int, part: int = 0) -> bool:
    """Return whether a part of a source file belongs to a shard.

    With at least as many files as shards each file goes to one shard; fewer files are divided
    part by part.
    """
    if files >= shard.count:
        return file % shard.count == shard.index
    return (file + part) % shard.count == shard.index


def assigned_files(shard: WorkShard, files: int) -> Iterator[int]:
    """Yield the files that contain, or may contain, parts of a shard."""
    for file in range(files):
        if files < shard.count or assigned_to(shard, files, file):
            yield file
