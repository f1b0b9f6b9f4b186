"""Random numbers of training: of a step's rows, whichever process or sub-batch those are in.

Every layer that draws does so for runs of rows, from a generator that is seeded by the step, the
layer and the run's place. So one process and each of several draw the same for a row.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import numpy as np
import torch
from torch import Tensor, nn

# Rows a run. On a GPU each takes the start of a kernel, on a CPU a microsecond or few.
_GRAINS = {"cpu": 32}
_OTHER_GRAIN = 256
_SEEDS = 2**63

Fill = Callable[[Tensor, torch.Generator], object]


class Draws:
    """What the layers of an adapter draw for some rows that lie together, layer by layer.

    Args:
        seed: numbers that tell this call of the adapter from all others.
        first: the place of the first of its rows among all rows of that call.
    """

    def __init__(self, seed: Sequence[int], first: int) -> None:
        self._seed, self._first, self._layer = tuple(seed), first, 0

    def fill(self, x: Tensor, draw: Fill) -> Tensor:
        """Random numbers of a layer, in the shape of its rows.

        Args:
            x: (n, ...), the rows.
            draw: fills a tensor in place by a generator.
        """
        words = np.random.SeedSequence([*self._seed, self._layer]).generate_state(1, np.uint64)
        self._layer += 1
        generator = torch.Generator(x.device)
        grain = _GRAINS.get(x.device.type, _OTHER_GRAIN)
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        stop = self._first + len(x)
        for number in range(self._first // grain, -(-stop // grain)):
            generator.manual_seed((int(words[0]) + number) % _SEEDS)
            start, end = number * grain - self._first, (number + 1) * grain - self._first
            if start >= 0 and end <= len(x):
                draw(out[start:end], generator)
                continue
            # The numbers of a part are not always those of the whole.
            whole = out.new_empty(grain, *out.shape[1:])
            draw(whole, generator)
            first, last = max(start, 0), min(end, len(x))
            out[first:last] = whole[first - start : last - start]
        return out


_current: ContextVar[Draws | None] = ContextVar("draws", default=None)


@contextmanager
def drawing(seed: Sequence[int], first: int) -> Iterator[None]:
    """Let `normal_like` and `Dropout` draw by `Draws` of these arguments."""
    token = _current.set(Draws(seed, first))
    try:
        yield
    finally:
        _current.reset(token)


def normal_like(x: Tensor) -> Tensor:
    """Standard normal numbers for rows (n, ...); by torch's generator outside of `drawing`."""
    draws = _current.get()
    if draws is None:
        return torch.randn_like(x)
    return draws.fill(x, lambda out, generator: out.normal_(generator=generator))


class Dropout(nn.Dropout):
    """Dropout of rows (n, ...) that draws as `normal_like` does."""

    def forward(self, x: Tensor) -> Tensor:
        """Drop values while training."""
        draws = _current.get()
        if draws is None or not self.training or not self.p:
            return super().forward(x)
        keep = 1 - self.p
        mask = draws.fill(x, lambda out, generator: out.bernoulli_(keep, generator=generator))
        return x * mask.div_(keep)
