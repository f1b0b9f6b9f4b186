"""Random numbers of training: of a step's rows, whichever process or sub-batch those are in.

Every layer that draws does so for runs of rows, from a generator that is seeded by the step, the
layer and the run's place. So one process and each of several draw the same for a row.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

# Rows a run. On a GPU each takes the start of a kernel, on a CPU a microsecond or few.
_GRAINS = {"cpu": 32}
_OTHER_GRAIN = 256
_SEEDS = 2**63
_LEVELS = 2**16

Fill = Callable[[Tensor, torch.Generator], object]


class Draws:
    """What the layers of an adapter draw for some rows that lie together, layer by layer.

    Args:
        seed: numbers that tell this call of the adapter from all others.
        first: the place of the first of its rows among all rows of that call.
    """

    def __init__(self, seed: Sequence[int], first: int) -> None:
        self._seed, self._first, self._layer = tuple(seed), first, 0

    def fill(self, x: Tensor, dtype: torch.dtype, draw: Fill) -> Tensor:
        """Random numbers of a layer, in the shape of its rows.

        Args:
            x: (n, ...), the rows.
            dtype: of the numbers.
            draw: fills a contiguous tensor in place by a generator.
        """
        words = np.random.SeedSequence([*self._seed, self._layer]).generate_state(1, np.uint64)
        self._layer += 1
        generator = torch.Generator(x.device)
        grain = _GRAINS.get(x.device.type, _OTHER_GRAIN)
        runs = range(self._first // grain, -(-(self._first + len(x)) // grain))
        # Whole runs, since the first numbers of one may depend on how many there are.
        out = torch.empty(len(runs) * grain, *x.shape[1:], dtype=dtype, device=x.device)
        for number, part in zip(runs, torch.split(out, grain), strict=True):
            generator.manual_seed((int(words[0]) + number) % _SEEDS)
            draw(part, generator)
        start = self._first - runs.start * grain
        return out[start : start + len(x)]


_current: ContextVar[Draws | None] = ContextVar("draws", default=None)


@contextmanager
def drawing(seed: Sequence[int], first: int) -> Iterator[None]:
    """Let `normal_like` and `Dropout` draw by `Draws` of these arguments."""
    token = _current.set(Draws(seed, first))
    try:
        yield
    finally:
        _current.reset(token)


@cache
def keep_from_compiling() -> None:
    """Let torch.compile, which cannot follow what draws, go around it, from here on."""
    disable: Callable[[Any], Any] = torch.compiler.disable
    # No decorators, whose import takes seconds.
    globals()["normal_like"] = disable(normal_like)
    Dropout.forward = disable(Dropout.forward)  # type: ignore[method-assign]


def normal_like(x: Tensor) -> Tensor:
    """Standard normal numbers for rows (n, ...); by torch's generator outside of `drawing`."""
    draws = _current.get()
    if draws is None:
        return torch.randn_like(x)
    return draws.fill(x, x.dtype, lambda out, generator: out.normal_(generator=generator))


class Dropout(nn.Dropout):
    """Dropout of rows (n, ...) that draws as `normal_like` does.

    What is kept is told by 16 random bits, which takes half of the time that torch's own takes on
    a CPU; the share that is dropped is p up to 1 / 131,072.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Drop values while training."""
        draws = _current.get()
        if draws is None or not self.training or not self.p:
            return super().forward(x)
        kept = min(_LEVELS - 1, max(1, round((1 - self.p) * _LEVELS)))
        bits = draws.fill(x, torch.int16, _fill_bits)
        return x * (bits < kept - _LEVELS // 2).to(x.dtype).mul_(_LEVELS / kept)


def _fill_bits(out: Tensor, generator: torch.Generator) -> None:
    out.view(-1).view(torch.int64).random_(-(2**63), None, generator=generator)
