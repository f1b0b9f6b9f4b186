"""The processes of one job, as torchrun, srun or mpirun start them, and their collectives.

Outside of `process_group`, and in a single process, every collective is the identity and
torch.distributed is not imported.
"""

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from csalign.core.errors import ElsewhereError, ProcessesError, reason_of

if TYPE_CHECKING:  # these take up to seconds, and --help should not
    import numpy.typing as npt
    from torch import Tensor

T = TypeVar("T")

PATIENCE = timedelta(minutes=30)  # to meet
WORK = timedelta(days=1)  # for what one process does while the others wait, such as a search
_FAILED, _LEFT = "csalign/failed", "csalign/left"
_SECONDS_TO_READ = 30.0  # for the others to read why one failed, where it keeps what they read
# Numbers of a process and of all, and the number on its machine. The first pair that is set counts:
# torchrun may be started by any of the others, and mpirun starts its own helpers with srun.
_LAUNCHERS = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
    ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
)


@dataclass(frozen=True)
class World:
    """Number of this process and of all processes of the job."""

    rank: int = 0  # its number, from 0
    size: int = 1  # how many there are
    local_rank: int = 0  # its number among those on this machine
    local_size: int = 1  # how many those are
    origin: str = field(default="", compare=False)  # the variables that say so


_world = World()
_store: Any = None  # what the processes can read without waiting for each other


def world() -> World:
    """Return which process this is; the only one outside of `process_group`."""
    return _world


def is_main_process() -> bool:
    """Return whether this process is the one that writes and prints."""
    return _world.rank == 0


def number_from(environment: Mapping[str, str], name: str) -> int | None:
    """Return a variable as a number, None if it is not set or blank.

    Raises:
        ProcessesError: it is not a number from 0.
    """
    text = environment.get(name, "").strip()
    if text and not text.isdecimal():
        raise ProcessesError(f"{name} is {text!r} in the environment, not a number; unset it")
    return int(text) if text else None


def world_from_environment(environment: Mapping[str, str] = os.environ) -> World:
    """Read the world from the variables of torchrun, mpirun or a step of srun, joined or not.

    Raises:
        ProcessesError: the variables are not numbers, or contradict each other.
    """
    for names in _LAUNCHERS:
        if not all(environment.get(name, "").strip() for name in names[:2]):
            continue
        rank, size, local_rank = (number_from(environment, name) or 0 for name in names)
        is_step = rank or environment.get("SLURM_STEP_ID") or environment.get("SLURM_STEPID")
        if names[1] == "SLURM_NTASKS" and not is_step:
            continue  # the script or shell of an allocation, one process for all its tasks
        origin = f"{names[0]} {rank} of {names[1]} {size}"
        if rank >= size:
            raise ProcessesError(
                f"the environment has {origin}, but processes count from 0; unset both variables"
            )
        local_size = number_from(environment, "LOCAL_WORLD_SIZE") or 1
        return World(rank, size, local_rank, local_size, origin) if size > 1 else World()
    return World()


@contextmanager
def process_group() -> Iterator[None]:
    """Join the process group of the job, if there are others, and leave it after the block.

    No process leaves before all are done. An exception in one of them ends them all: the first to
    fail raises its own, the others `ElsewhereError` at their next collective. Nested calls do
    nothing.

    Raises:
        ProcessesError: the others cannot be reached, one of them was killed, or it was not torchrun
            that started them.
        ElsewhereError: another process failed.
    """
    global _world, _store
    found = world_from_environment()
    if _world.size > 1 or found.size == 1:
        yield
        return
    is_torchrun = found.origin.startswith("RANK") and os.environ.get("MASTER_ADDR")
    if not is_torchrun or found.local_rank >= found.local_size:
        raise ProcessesError(
            f"this is one of {found.size} processes ({found.origin}) that cannot find each other; "
            "start a single one, or all with torchrun --no-python csalign ..., which sets "
            "MASTER_ADDR, LOCAL_RANK and LOCAL_WORLD_SIZE"
        )
    import torch
    import torch.distributed.nn  # imported later, it would keep the group open after its end
    from torch import distributed
    from torch.distributed.rendezvous import rendezvous

    try:
        store, rank, size = next(rendezvous("env://", timeout=PATIENCE))
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
            store=store,
            rank=rank,
            world_size=size,
            timeout=WORK,
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise ProcessesError(
            f"the {found.size} processes of the job cannot meet ({reason_of(error)}); check "
            "torchrun's addresses and ports"
        ) from error
    _world, _store = found, store
    try:
        yield
        barrier()
    except BaseException as error:
        raised = _first_failure(error)
        distributed.destroy_process_group()
        _leave()
        if raised is error:
            raise
        raise raised from error
    else:
        distributed.destroy_process_group()
    finally:
        _world, _store = World(), None


def _first_failure(error: BaseException) -> BaseException:
    """Return the error itself in the first process that fails, `ElsewhereError` in the others."""
    code = 130 if isinstance(error, KeyboardInterrupt) else getattr(error, "exit_code", 1)
    own = {"rank": _world.rank, "code": code}
    try:
        found = json.loads(_store.compare_set(_FAILED, "", json.dumps(own)))
    except (RuntimeError, ValueError):
        return error  # the process that kept the store is gone
    return error if found["rank"] == own["rank"] else ElsewhereError(found["code"])


def _leave() -> None:
    """Keep the store until the others have read why this process failed."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return
    until = time.monotonic() + _SECONDS_TO_READ
    try:
        left = _store.add(_LEFT, 1)
        while is_main_process() and left < _world.size and time.monotonic() < until:
            time.sleep(0.05)
            left = _store.add(_LEFT, 0)
    except RuntimeError:
        return  # the process that keeps it is gone


@contextmanager
def _collectives() -> Iterator[Any]:
    """Yield torch.distributed; a collective that fails because a peer ended becomes our error."""
    from torch import distributed

    try:
        yield distributed
    except RuntimeError as error:
        raise ProcessesError(
            "another process of the job has ended; run the same command again"
        ) from error


def barrier() -> None:
    """Wait until all processes are here."""
    if _world.size > 1:
        with _collectives() as distributed:
            distributed.barrier()


def share_of(count: int, rank: int | None = None) -> slice:
    """Return the contiguous share of `count` rows of a process (default: this one)."""
    rank = _world.rank if rank is None else rank
    return slice(count * rank // _world.size, count * (rank + 1) // _world.size)


def wait_for_failure() -> None:
    """Wait until the process that is about to end the job has recorded why.

    Raises:
        ElsewhereError: it has.
        ProcessesError: it no longer can.
    """
    with _collectives():
        _store.wait([_FAILED], PATIENCE)
        raise ElsewhereError(json.loads(_store.get(_FAILED))["code"])


def all_reduce_sum(values: "Tensor") -> None:
    """Replace the values by their sum over all processes, with the same bits in each process."""
    if _world.size > 1:
        with _collectives() as distributed:
            distributed.all_reduce(values)


def largest(value: int) -> int:
    """Return the largest value of all processes, in all of them, without waiting for a device."""
    if _world.size == 1:
        return value
    import numpy as np
    import torch

    found = np.array([value])
    with _collectives() as distributed:
        distributed.all_reduce(torch.from_numpy(found), op=distributed.ReduceOp.MAX)
    return int(found[0])


def broadcast_tensor(make: "Callable[[], Tensor]", like: "Tensor") -> "Tensor":
    """Return in every process the tensor that `make` returns in the main one, shaped as `like`."""
    if _world.size == 1:
        return make()
    values = make() if is_main_process() else like.new_empty(like.shape)
    with _collectives() as distributed:
        distributed.broadcast(values, 0)
    return values


def all_reduce_log_sum_exp(values: "Tensor") -> None:
    """Replace the values by their log-sum-exp over all processes; one of each must be finite."""
    if _world.size > 1:
        largest = values.clone()
        with _collectives() as distributed:
            distributed.all_reduce(largest, op=distributed.ReduceOp.MAX)
        values.sub_(largest).exp_()
        all_reduce_sum(values)
        values.log_().add_(largest)


def all_gather_rows(rows: "Tensor", counts: Sequence[int]) -> "list[Tensor]":
    """Gather the rows of all processes in all of them, one (n, d) per process."""
    if _world.size == 1:
        return [rows]
    padded = rows.new_zeros(max(counts), *rows.shape[1:])
    padded[: len(rows)] = rows
    found = [padded.new_empty(padded.shape) for _ in counts]
    with _collectives() as distributed:
        distributed.all_gather(found, padded)
    return [own[:count] for own, count in zip(found, counts, strict=True)]


def broadcast(make: Callable[[], T]) -> T:
    """Return in every process what `make` returns in the main one, where alone it is called."""
    if _world.size == 1:
        return make()
    import torch

    values = [make() if is_main_process() else None]
    with _collectives() as distributed:
        distributed.broadcast_object_list(values, device=torch.device("cpu"))
    return values[0]  # type: ignore[return-value]  # None only before the broadcast


def receive() -> Any:
    """Return what the main process passes to `broadcast`, in another process."""
    value: Any = broadcast(lambda: None)
    return value


def broadcast_array(values: "npt.NDArray[Any]") -> None:
    """Overwrite the values by those of the main process; shape and dtype must be equal."""
    if _world.size > 1 and values.size:
        import numpy as np
        import torch

        with _collectives() as distributed:
            distributed.broadcast(torch.from_numpy(values.view(np.uint8)), 0)


def all_gather(value: T) -> list[T]:
    """Return one value per process, in all of them."""
    if _world.size == 1:
        return [value]
    found: list[Any] = [None] * _world.size
    with _collectives() as distributed:
        distributed.all_gather_object(found, value)
    return found


def gather(value: T) -> list[T]:
    """Return one value per process in the main one, and an empty list in the others."""
    if _world.size == 1:
        return [value]
    found: list[Any] | None = [None] * _world.size if is_main_process() else None
    with _collectives() as distributed:
        distributed.gather_object(value, found)
    return found or []
