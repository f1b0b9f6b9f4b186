"""Which share of a source is this process's, among several that work on it at once."""

import os
import re
from collections.abc import Collection, Iterator, Mapping

from csalign.core.errors import ConfigError
from csalign.ingest.job import Turn


def turn_of(shard: str, environment: Mapping[str, str] = os.environ) -> Turn:
    """Read ``--shard``: "I/N" with I from 0, or "auto".

    Auto multiplies what is set: the tasks of a SLURM array (``SLURM_ARRAY_TASK_ID`` and its
    bounds) and the ranks of torchrun (``RANK``, ``WORLD_SIZE``) within each.

    Raises:
        ConfigError: it is neither, or the index is not below the count.
    """
    if shard == "auto":
        array, rank = _array_task(environment), _rank(environment)
        turn = Turn(array.index * rank.count + rank.index, array.count * rank.count)
        if not 0 <= turn.index < turn.count:
            raise ConfigError(
                f"shard: the variables of SLURM or torchrun give {turn}, as in an array that is a "
                "list; give --shard I/N"
            )
        return turn
    match = re.fullmatch(r"(\d+)/(\d+)", shard)
    if match is None:
        raise ConfigError(f"shard: must be I/N or auto (got {shard!r})")
    turn = Turn(int(match[1]), int(match[2]))
    if turn.index >= turn.count:
        raise ConfigError(
            f"shard: {shard} does not exist; the {turn.count} shards are counted from 0, "
            f"0/{turn.count} to {turn.count - 1}/{turn.count}"
        )
    return turn


def check_array(
    turn: Turn, shard: str, known: Collection[int], environment: Mapping[str, str] = os.environ
) -> None:
    """Refuse a SLURM array whose number of tasks is not the one that the work was begun with.

    Args:
        turn: what `turn_of` made of it.
        shard: ``--shard``; one that is spelled out is taken as it is.
        known: numbers of shares in which others did the work.
        environment: where SLURM's variables are.

    Raises:
        ConfigError: it is smaller, as in an array of the tasks that failed.
    """
    if shard != "auto" or "SLURM_ARRAY_TASK_ID" not in environment:
        return
    if known and turn.count < max(known):
        raise ConfigError(
            f"shard: the work was begun in {max(known)} shares, and this SLURM array is one of "
            f"{turn.count}; give --shard I/{max(known)} for one that is missing, or spell out "
            f"--shard {turn} to share the rest out anew"
        )


def _array_task(environment: Mapping[str, str]) -> Turn:
    # SLURM_ARRAY_TASK_COUNT is the number of tasks, whatever their first index and their step.
    names = ("ID", "MIN", "STEP", "COUNT")
    values = [environment.get(f"SLURM_ARRAY_TASK_{name}") for name in names]
    if values[0] is None or values[3] is None:
        return Turn(0, 1)
    task, first, step, count = (int(value) if value else 1 for value in values)
    last = int(environment.get("SLURM_ARRAY_TASK_MAX") or first + (count - 1) * step)
    # Some tasks of a larger array, submitted again, would each take a share of too few.
    if first > 1 or (count == 1 and task > 0) or (last - first) // step + 1 != count:
        raise ConfigError(
            f"shard: task {task} of a SLURM array of {count} from {first} to {last}, which may be "
            "some of a larger one, submitted again; give --shard I/N, with the number of the task "
            "from 0 and that of all in the first array (0/1 does the whole)"
        )
    return Turn((task - first) // step, count)


def _rank(environment: Mapping[str, str]) -> Turn:
    if "RANK" not in environment or "WORLD_SIZE" not in environment:
        return Turn(0, 1)
    return Turn(int(environment["RANK"]), int(environment["WORLD_SIZE"]))


def device_of(device: str, environment: Mapping[str, str] = os.environ) -> str:
    """``--device auto`` under torchrun: the CUDA device of this rank."""
    if device != "auto" or "LOCAL_RANK" not in environment:
        return device
    import torch

    count = torch.cuda.device_count()
    return f"cuda:{int(environment['LOCAL_RANK']) % count}" if count else device


def owns(turn: Turn, volumes: int, volume: int, part: int = 0) -> bool:
    """Whether a part is this process's.

    Where there are enough volumes for all, each goes to one process as a whole; fewer are shared
    out part by part.
    """
    if volumes >= turn.count:
        return volume % turn.count == turn.index
    return (volume + part) % turn.count == turn.index


def own_volumes(turn: Turn, volumes: int) -> Iterator[int]:
    """The volumes that hold, or may hold, parts of this process."""
    for volume in range(volumes):
        if volumes < turn.count or owns(turn, volumes, volume):
            yield volume
