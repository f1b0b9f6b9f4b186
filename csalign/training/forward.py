"""Rows of a step through the adapters: each process its part of them, and then all have all."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from csalign.adapters.model import Adapter
from csalign.core import distributed
from csalign.core.enums import Modality, Precision
from csalign.objective.distributed_autograd import all_gather_rows
from csalign.training.config import TrainConfig

SUB_BATCH = 8_192  # rows that go through an adapter at a time, unless told otherwise
# What a step embeds of a side; each has random numbers of its own.
ROLES = ("pairs", "others", "further", "lone", "tokens")


@dataclass(frozen=True)
class Inputs:
    """Rows that are to go through an adapter.

    Attributes:
        count: how many, at least 1.
        take: gives some of them, (k, input_width) float32, on the device.
    """

    count: int
    take: Callable[[slice], Tensor]


class Embedder:
    """Embeds rows with noise and dropout that follow from the seed, the step and the row's place.

    So it makes no difference how many processes there are, nor in what sub-batches rows go.

    Args:
        adapter: both sides.
        config: noise, sub-batches and seed.
    """

    def __init__(self, adapter: Adapter, config: TrainConfig) -> None:
        self._adapter, self._config = adapter, config

    def __call__(
        self, side: Modality, inputs: Mapping[str, Inputs], step: int
    ) -> dict[str, Tensor]:
        """Embed rows of one side; every process has to ask for the same.

        Args:
            side: theirs.
            inputs: by role.
            step: number of the step.

        Returns:
            By role (count, width), not normalised; of each process's own rows with a gradient.
        """
        if not inputs:
            return {}
        own = {role: self._own(side, role, rows, step) for role, rows in inputs.items()}
        size = distributed.world().size
        if size == 1:
            return own
        # All roles at once: what counts is how often processes wait for each other.
        shares = [
            [_length(distributed.share_of(rows.count, rank)) for rows in inputs.values()]
            for rank in range(size)
        ]
        rows = all_gather_rows(torch.cat(list(own.values())), [sum(counts) for counts in shares])
        parts = torch.split(rows, [count for counts in shares for count in counts])
        return {role: torch.cat(parts[k :: len(own)]) for k, role in enumerate(own)}

    def _own(self, side: Modality, role: str, inputs: Inputs, step: int) -> Tensor:
        """This process's part; of many rows only the embeddings are kept until the backward pass.

        Then each sub-batch goes through the adapter again, with the same noise and dropout, so
        that memory does not grow with what an adapter keeps of a row.
        """
        part = distributed.share_of(inputs.count)
        if not _length(part):
            # Adapters need not take no rows, and yet each process has to have a graph.
            return self._through(side, role, inputs.take(slice(0, 1)), step, 0)[:0]
        rows, first = inputs.take(part), part.start
        most = self._config.sub_batch or SUB_BATCH
        if len(rows) <= most:
            return self._through(side, role, rows, step, first)
        found = []
        for piece in torch.split(rows, most):
            own = (side, role, piece, step, first)
            found.append(checkpoint(self._through, *own, use_reentrant=False))
            first += len(piece)
        return torch.cat(found)

    def _through(self, side: Modality, role: str, rows: Tensor, step: int, first: int) -> Tensor:
        with forward_pass(self._config, rows.device, side, role, step, first):
            found: Tensor = self._adapter.side(side)(rows, self._config.noise)
        return found.float()


@contextmanager
def forward_pass(
    config: TrainConfig,
    device: torch.device,
    side: Modality,
    role: str,
    step: int,
    first: int = 0,
) -> Iterator[None]:
    """What rows of a step go through an adapter under: its random numbers and its precision.

    Args:
        config: seed and precision.
        device: where the rows are.
        side: theirs.
        role: what they are, of `ROLES`.
        step: number of the step.
        first: the place of the first of them among all of that role.
    """
    is_rounded = config.precision is Precision.BFLOAT16
    with torch.autocast(device.type, torch.bfloat16, enabled=is_rounded):
        yield


def _length(part: slice) -> int:
    length: int = part.stop - part.start
    return length
