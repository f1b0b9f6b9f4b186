"""The processes of one job, as torchrun starts them: who they are, and what they tell each other.

Outside of `joined`, and in a process by itself, all of this is the identity, and torch.distributed
is not even imported. What is told is plain JSON, bytes or tensors: nothing is pickled.
"""

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from csalign.core.errors import ElsewhereError, ProcessesError

if TYPE_CHECKING:  # these take up to seconds, and --help should not
    import numpy.typing as npt
    from torch import Tensor

PATIENCE = timedelta(minutes=30)  # for what one process does while the others wait
_FAILED, _LEFT = "csalign/failed", "csalign/left"
_SECONDS_TO_READ = 30.0  # for the others to read why one failed, where it keeps what they read


@dataclass(frozen=True)
class World:
    """Which process of how many this is.

    Attributes:
        rank: its number, from 0.
        size: how many there are.
        local_rank: its number among those on this machine.
        local_size: how many those are.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1


_world = World()
_store: Any = None  # what the processes can read without waiting for each other


def world() -> World:
    """Which process this is; the only one outside of `joined`."""
    return _world


def is_first() -> bool:
    """Whether this process is the one that writes and prints."""
    return _world.rank == 0


def of_environment(environment: Mapping[str, str] = os.environ) -> World:
    """What torchrun's variables say, whether the processes have joined or not."""
    if "MASTER_ADDR" not in environment or int(environment.get("WORLD_SIZE", "1")) < 2:
        return World()
    rank, size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    local_rank = int(environment.get("LOCAL_RANK", "0"))
    return World(rank, size, local_rank, int(environment.get("LOCAL_WORLD_SIZE", "1")))


@contextmanager
def joined() -> Iterator[None]:
    """Meet the other processes of the job, if there are any, and leave them after the block.

    No process leaves before all are done. What one of them raises ends them all: the first to fail
    raises what it raised, the others `ElsewhereError`, as soon as they wait for it. Where they have
    joined already, this does nothing.

    Raises:
        ProcessesError: they cannot be reached, or one of them ended without a word.
        ElsewhereError: another process failed.
    """
    global _world, _store
    found = of_environment()
    if _world.size > 1 or found.size == 1:
        yield
        return
    import torch
    from torch import distributed
    from torch.distributed.rendezvous import rendezvous

    try:
        store, rank, size = next(rendezvous("env://", timeout=PATIENCE))
        distributed.init_process_group(
            "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
            store=store,
            rank=rank,
            world_size=size,
            timeout=PATIENCE,
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise ProcessesError(
            f"the {found.size} processes of the job cannot meet ({_line(error)}); check torchrun's "
            "addresses and ports"
        ) from error
    _world, _store = found, store
    try:
        yield
        wait()
    except BaseException as error:
        told = _told(error)
        distributed.destroy_process_group()
        _leave()
        if told is error:
            raise
        raise told from error
    else:
        distributed.destroy_process_group()
    finally:
        _world, _store = World(), None


def _told(error: BaseException) -> BaseException:
    """The error itself in the first process that fails, and that it was another in the others."""
    code = 130 if isinstance(error, KeyboardInterrupt) else getattr(error, "exit_code", 1)
    own = {"rank": _world.rank, "code": code}
    try:
        found = json.loads(_store.compare_set(_FAILED, "", json.dumps(own)))
    except (RuntimeError, ValueError):
        return error  # who kept the store is gone
    return error if found["rank"] == own["rank"] else ElsewhereError(found["code"])


def _leave() -> None:
    """Let the others read why this process failed; torchrun keeps the store itself."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        return
    until = time.monotonic() + _SECONDS_TO_READ
    try:
        left = _store.add(_LEFT, 1)
        while is_first() and left < _world.size and time.monotonic() < until:
            time.sleep(0.05)
            left = _store.add(_LEFT, 0)
    except RuntimeError:
        return  # the process that keeps it is gone


def _line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


@contextmanager
def _together() -> Iterator[Any]:
    """Around what all processes do at once; gives torch.distributed."""
    from torch import distributed

    try:
        yield distributed
    except RuntimeError as error:
        raise ProcessesError(
            "another process of the job has ended; run the same command again"
        ) from error


def wait() -> None:
    """Wait until all processes are here."""
    if _world.size > 1:
        import torch

        sum_(torch.zeros(1))


def part(count: int, rank: int | None = None) -> slice:
    """The share of so many rows of one process, by default of this one; all are of like size."""
    rank = _world.rank if rank is None else rank
    return slice(count * rank // _world.size, count * (rank + 1) // _world.size)


def wait_for_failure() -> None:
    """Wait until a process that is about to end the job has said so, as the first does with more.

    Raises:
        ElsewhereError: it has.
        ProcessesError: it cannot any more.
    """
    with _together():
        _store.wait([_FAILED], PATIENCE)
        raise ElsewhereError(json.loads(_store.get(_FAILED))["code"])


def sum_(values: "Tensor") -> None:
    """Put the sum over all processes in place of the values, the same bits in each process."""
    if _world.size > 1:
        with _together() as distributed:
            distributed.all_reduce(values)


def log_sum_exp_(values: "Tensor") -> None:
    """Put the log-sum-exp over all processes in place of the values; one of each is finite."""
    if _world.size > 1:
        largest = values.clone()
        with _together() as distributed:
            distributed.all_reduce(largest, op=distributed.ReduceOp.MAX)
        values.sub_(largest).exp_()
        sum_(values)
        values.log_().add_(largest)


def gather(rows: "Tensor", counts: Sequence[int]) -> "list[Tensor]":
    """The rows of all processes.

    Args:
        rows: (n, d), those of this process.
        counts: how many each process has.

    Returns:
        One (n, d) for each process.
    """
    if _world.size == 1:
        return [rows]
    padded = rows.new_zeros(max(counts), *rows.shape[1:])
    padded[: len(rows)] = rows
    found = [padded.new_empty(padded.shape) for _ in counts]
    with _together() as distributed:
        distributed.all_gather(found, padded)
    return [own[:count] for own, count in zip(found, counts, strict=True)]


def tell(make: Callable[[], Any]) -> Any:
    """What the first process makes, in all of them.

    Args:
        make: called in the first process alone; gives JSON.
    """
    if _world.size == 1:
        return make()
    if is_first():
        value = make()
        tell_bytes(json.dumps(value).encode())
        return value
    return json.loads(tell_bytes(b""))


def tell_bytes(data: bytes) -> bytes:
    """The bytes that the first process has, in all of them."""
    if _world.size == 1:
        return data
    import numpy as np

    size = np.array([len(data)])
    tell_array(size)
    found = np.frombuffer(bytearray(data) if is_first() else bytearray(int(size[0])), np.uint8)
    tell_array(found)
    return data if is_first() else found.tobytes()


def tell_array(values: "npt.NDArray[Any]") -> None:
    """Put the values of the first process in place of those here; of one shape and dtype."""
    if _world.size > 1 and values.size:
        import numpy as np
        import torch

        with _together() as distributed:
            distributed.broadcast(torch.from_numpy(values.view(np.uint8)), 0)


def all_tell(value: Any) -> list[Any]:
    """What each process has to tell, JSON, in all of them."""
    if _world.size == 1:
        return [value]
    import torch

    data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
    return [json.loads(found.numpy().tobytes()) for found in gather(data, _sizes(len(data)))]


def tell_first(data: bytes) -> list[bytes]:
    """What each process has to tell, in the first of them; nothing in the others."""
    if _world.size == 1:
        return [data]
    import torch

    sizes = _sizes(len(data))
    own = torch.zeros(max(sizes), dtype=torch.uint8)
    own[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    found = [torch.empty_like(own) for _ in sizes] if is_first() else None
    with _together() as distributed:
        distributed.gather(own, found)
    return [one[:size].numpy().tobytes() for one, size in zip(found or (), sizes, strict=False)]


def _sizes(own: int) -> list[int]:
    import torch

    return [int(one) for one in gather(torch.tensor([own]), [1] * _world.size)]
