"""Which share of a source is this process's, among several that work on it at once."""

import os
import re
from collections.abc import Iterator, Mapping

from csalign.errors import ConfigError
from csalign.store.documents import Turn


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


def _array_task(environment: Mapping[str, str]) -> Turn:
    # SLURM_ARRAY_TASK_COUNT is the number of tasks, whatever their first index and their step.
    names = ("ID", "MIN", "STEP", "COUNT")
    values = [environment.get(f"SLURM_ARRAY_TASK_{name}") for name in names]
    if values[0] is None or values[3] is None:
        return Turn(0, 1)
    task, first, step, count = (int(value) if value else 1 for value in values)
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
