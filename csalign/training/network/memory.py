"""The memory of a step, found from the sizes of its tensors alone, and the batch that fits."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

LEAST_BATCH = 512  # pairs, which are not doubted to fit
LEAST_STEPS = 16  # of an epoch


def step_bytes(prepare: Callable[[], Callable[[], Any]]) -> tuple[int, int]:
    """Find how many bytes of tensors a training step has at the same time, at most.

    It computes sizes alone, so nothing in the step may depend on the value of a tensor.

    Args:
        prepare: makes everything that the step uses, and returns the step: forward, backward and
            the optimizer's update. The step is taken twice, since the first one makes what the
            optimizer keeps.

    Returns:
        Bytes before the second step, and the most during it. What an operation uses within itself
        is not counted.
    """
    with FakeTensorMode(), LiveBytes() as live:
        step = prepare()
        step()
        before = live.peak = live.now
        step()
    return before, live.peak


def largest_batch(
    prepare: Callable[[int], Callable[[], Any]], *, pairs: int, memory: int
) -> tuple[int, int]:
    """Find the largest batch, 512 times a power of two, whose step fits into a memory.

    It is at most a 16th of the pairs, so that an epoch has steps enough to learn from.

    Args:
        prepare: makes a step of so many pairs; see `step_bytes`.
        pairs: to train on.
        memory: bytes.

    Returns:
        The batch, at least 512, and the bytes of its step.
    """
    found, needed = LEAST_BATCH, step_bytes(lambda: prepare(LEAST_BATCH))[1]
    while 2 * LEAST_STEPS * found <= pairs:
        more = step_bytes(lambda: prepare(2 * found))[1]  # noqa: B023 - called at once
        if more > memory:
            break
        found, needed = 2 * found, more
    return found, needed


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that exist of those that operations in its block return.

    Attributes:
        now: bytes that exist.
        peak: the most so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Call the operation, and count the storages of its results that are new."""
        found = func(*args, **(kwargs or {}))
        for own in tree_leaves(found):
            if isinstance(own, Tensor) and own.layout is torch.strided:
                self._add(own.untyped_storage())
        return found

    def _add(self, storage: Any) -> None:
        if storage._cdata not in self._known:
            self._known.add(storage._cdata)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._remove, storage._cdata, storage.nbytes())

    def _remove(self, number: int, size: int) -> None:
        self._known.discard(number)
        self.now -= size
