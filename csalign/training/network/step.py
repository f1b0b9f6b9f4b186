"""An optimizer step: loss, gradient, update. On a GPU it can be recorded once and replayed."""

import copy
import logging
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from csalign.adapters.model import Adapter
from csalign.adapters.side import SideShape
from csalign.core import distributed
from csalign.core.enums import Modality
from csalign.core.errors import reason_of
from csalign.objective.loss import LossParts
from csalign.training.config import ObjectiveOptions, OptimizerOptions
from csalign.training.network.batch_loss import BatchLoss, uses_unpaired
from csalign.training.network.sampler import Batch, SideBatch

log = logging.getLogger(__name__)

WARM_UP = 3  # steps of a kind before it is recorded
MOST_RECORDED = 8  # kinds of steps; each keeps the memory of its tensors


class Taken(NamedTuple):
    """What a step found: the terms of the loss, and the norm of the gradient, () tensor.

    They keep no graph of the step, and a recorded step may overwrite them the next time.
    """

    parts: LossParts
    norm: Tensor


class Stepper:
    """Takes the steps of one network, and keeps the state of the optimizer.

    Args:
        adapter: both sides, trained in place.
        loss: of a batch.
        options: of the optimization.
        device: where both are.

    Attributes:
        average: running average of the weights, None without one.
    """

    def __init__(
        self, adapter: Adapter, loss: BatchLoss, options: OptimizerOptions, device: torch.device
    ) -> None:
        self._adapter, self._loss, self._options = adapter, loss, options
        self.average = copy.deepcopy(adapter) if options.average else None
        parameters = [p for p in adapter.parameters() if p.requires_grad]
        groups: list[dict[str, Any]] = [
            {"params": [p for p in parameters if p.ndim > 1]},
            # Neither a bias nor the temperature should be drawn to zero.
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
            {"params": list(loss.parameters()), "weight_decay": 0.0},
        ]
        records = options.compile and device.type == "cuda" and distributed.world().size == 1
        self._recorder = Recorder(device) if records else None
        self._optimizer = torch.optim.AdamW(
            groups,
            weight_decay=options.weight_decay,
            fused=True,  # four times as fast as one operation after another
            capturable=records,
        )
        if records:  # such a step reads the learning rate from the device
            for group in self._optimizer.param_groups:
                group["lr"] = torch.zeros((), device=device)
            # Else torch warns of the steps before.
            self._optimizer._warned_capturable_if_run_uncaptured = True

    def take(self, batch: Batch, number: int, rate: float) -> Taken:
        """Take step `number`, from 1, at a learning rate; nothing in it waits for the device."""
        for group in self._optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        compute = partial(self._compute, number=number)
        # Every few steps measure a bandwidth besides, which is not recorded.
        if self._recorder is None or self._loss.measures(number):
            return compute(batch)
        return self._recorder.run(compute, batch, self._loss.weight)

    def _compute(self, batch: Batch, number: int) -> Taken:
        parts = self._loss(self._adapter, batch, number)
        self._optimizer.zero_grad(set_to_none=True)
        parts.total.backward()
        _sum_over_processes(self._adapter)
        norm = nn.utils.clip_grad_norm_(self._adapter.parameters(), self._options.clip_norm)
        self._optimizer.step()
        self._loss.clamp()
        if self.average is not None:
            self._update_average(self.average, first=number == 1)
        # Else it would keep the memory of this step, and its stream, on which none can be recorded.
        return Taken(tree_map_only(Tensor, Tensor.detach, parts), norm)

    @torch.no_grad()
    def _update_average(self, average: Adapter, *, first: bool) -> None:
        """Move the running average towards the weights; it begins with those of the first step."""
        share = 1.0 if first else 1 - self._options.average
        torch._foreach_lerp_([*average.parameters()], [*self._adapter.parameters()], share)
        for own, current in zip(average.buffers(), self._adapter.buffers(), strict=True):
            own.copy_(current)

    def state_dict(self) -> dict[str, Any]:
        """Return the optimizer's moments and the running average."""
        average = None if self.average is None else self.average.state_dict()
        return {"optimizer": self._optimizer.state_dict()["state"], "average": average}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned, possibly after a round trip through JSON."""
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        moments = {int(number): moment for number, moment in state["optimizer"].items()}
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": moments, "param_groups": groups})


def prepare_step(
    shapes: Mapping[Any, SideShape],
    objective: ObjectiveOptions,
    options: OptimizerOptions,
    device: torch.device,
    texts: float,
    pairs: int,
    *,
    captions: str = "first",
) -> Callable[[], Any]:
    """Make a step of some pairs on embeddings of no meaning, to find what memory it takes.

    Args:
        shapes: of both adapters.
        objective: terms of the loss.
        options: of the optimization.
        device: to compute on.
        texts: captions per image.
        pairs: of the batch.
        captions: as in ``--captions``; with "all" each image is paired with all its texts.
    """
    with device:
        adapter = Adapter(shapes, allow={shape.kind for shape in shapes.values()})
        loss = BatchLoss(objective, precision=options.precision, sub_batch=options.sub_batch)
    plain = options.model_copy(update={"compile": False})
    stepper = Stepper(adapter, loss, plain, device)
    unpaired = round(pairs * objective.unpaired_ratio * uses_unpaired(objective))
    every = max(pairs, round(pairs * texts))
    owner = torch.arange(every, device=device) % pairs if captions == "all" else None
    paired = pairs if owner is None else every
    counts = {
        Modality.IMAGE: [pairs, 0, 0, unpaired],
        Modality.TEXT: [paired, 0, every - paired, unpaired],
    }
    sides = {
        side: SideBatch(torch.ones(sum(own), shapes[side].input_width, device=device), own, None)
        for side, own in counts.items()
    }
    none = torch.zeros(0, dtype=torch.int64, device=device)
    batch = Batch(sides[Modality.IMAGE], sides[Modality.TEXT], owner, none, (none, none))
    return lambda: stepper.take(batch, 1, 0.0)


class Recorder:
    """Records steps as CUDA graphs, one per shape of a batch, and replays them.

    A replayed step is launched at once, without the time that Python takes for its hundreds of
    operations. What cannot be recorded is computed as it is.

    Args:
        device: of CUDA.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seen: dict[Any, int] = {}
        self._recorded: dict[Any, tuple[Any, Batch, Taken]] = {}
        self._stream: Any = None
        self._pool: Any = None
        self._failed = False

    def run(self, compute: Callable[[Batch], Taken], batch: Batch, constant: float) -> Taken:
        """Take a step; `constant` is what it depends on beside the values in the batch."""
        leaves = tree_leaves(batch)
        key = constant, *(own.shape if isinstance(own, Tensor) else own for own in leaves)
        if key not in self._recorded:
            seen = self._seen[key] = self._seen.get(key, 0) + 1
            if self._failed or len(self._recorded) == MOST_RECORDED or seen <= WARM_UP:
                return compute(batch)
            try:
                self._recorded[key] = self._record(compute, batch)
            except RuntimeError as error:
                self._failed = True
                log.warning(
                    "--compile: steps cannot be recorded as CUDA graphs (%s); training without",
                    reason_of(error),
                )
                return compute(batch)
        graph, held, found = self._recorded[key]
        for own, new in zip(tree_leaves(held), leaves, strict=True):
            if isinstance(own, Tensor):
                own.copy_(new)
        graph.replay()
        return found

    def _record(self, compute: Callable[[Batch], Taken], batch: Batch) -> tuple[Any, Batch, Taken]:
        held: Batch = tree_map_only(Tensor, Tensor.clone, batch)
        graph = torch.cuda.CUDAGraph()
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        # Only this thread may not do what cannot be recorded: another one sends rows meanwhile.
        recording = torch.cuda.graph(graph, self._pool, self._stream, "thread_local")
        # The first block makes the device the current one, and leaves the stream after a failure.
        with torch.cuda.stream(self._stream), recording:
            found = compute(held)
        self._pool = graph.pool()
        return graph, held, found


def _sum_over_processes(adapter: Adapter) -> None:
    """Sum the adapters' gradients over all processes.

    The loss's own parameters have the whole gradient in each process already.
    """
    if distributed.world().size == 1:
        return
    gradients = [p.grad for p in adapter.parameters() if p.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    distributed.all_reduce_sum(flat)
    summed = torch.split(flat, [gradient.numel() for gradient in gradients])
    for gradient, whole in zip(gradients, summed, strict=True):
        gradient.copy_(whole.view_as(gradient))
