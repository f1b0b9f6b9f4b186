"""The training loop: optimizer steps, validations, the best weights so far.

A step never waits for the device: its figures stay there until a flush reads those of many steps
at once, checks them, and logs them. Nothing is validated or saved before.

Several processes take the same steps: each has the gradient of the rows that it embedded, and one
all-reduce of a flat tensor sums them. The buckets of DistributedDataParallel would gain nothing
with adapters this small.
"""

import copy
import logging
import math
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import nn

from csalign.adapters.model import Adapter
from csalign.core import distributed, signals
from csalign.core.errors import ConfigError, Stopped, TrainingError
from csalign.core.progress import show_figures, tick
from csalign.training.config import OptimizerOptions
from csalign.training.loggers import Line, StepFigures
from csalign.training.network.batch_loss import BatchLoss
from csalign.training.network.schedule import PATIENCE, Schedule, Timer
from csalign.training.network.step import Stepper
from csalign.training.network.validation import ENOUGH_IMAGES, Score

log = logging.getLogger(__name__)


Log = Callable[[Sequence[Line]], None]


class Phase(NamedTuple):
    """Training of one network. The first is validated, further ones repeat its best steps.

    Attributes:
        number: from 0; it is added to the seed.
        what: what is shown of it.
        steps: of the learning rate's schedule; None for those of the options.
        last: the step to stop at; None for all.
        weights: of the distribution term by the step from which on they count, as an automatic
            weight was adapted by the validations of the first phase.
        batch_size, scale: those of the first phase, if they were found automatically.
    """

    number: int = 0
    what: str = "training"
    steps: int | None = None
    last: int | None = None
    weights: Mapping[int, float] = {}
    batch_size: int | None = None
    scale: float | None = None


FIRST = Phase()


class Loader(Protocol):
    """Endless iterator over batches, which resumes from any place."""

    def __next__(self) -> Any: ...
    def reading_ahead(self) -> AbstractContextManager[None]:
        """Keep the rows on the device in this block, or read them ahead."""

    def state_dict(self) -> dict[str, int]:
        """Return the place of the next batch."""

    def load_state_dict(self, state: Mapping[str, int], /) -> None:
        """Continue from the place that `state_dict` returned."""


class Validation(NamedTuple):
    """How an adapter is measured while it is trained, and on how many held-out items."""

    measure: Callable[[Adapter], Score]
    items: int


class Trainer:
    """Trains adapters and keeps the weights that do best on validation.

    Args:
        adapter: of any sides, trained in place.
        loader: of the batches.
        loss: of a batch.
        options: of the optimization.
        schedule: of the steps.
        device: where the adapter and the loss are.
        seed: of noise and dropout.
        batch_size: pairs per step, at most.
        rows: pairs per step if there are fewer.
        scale: of the logits, if it was found automatically.
        phase: of the training.
        timer: of the steps.
        validation: None without one, and outside of the main process.

    Attributes:
        loss, batch_size, scale: as given.
        schedule: its steps, when to validate, and when to stop.
        step: optimizer steps made; after `fit`, those of the weights that were kept.
        steps_made: optimizer steps made in total.
        start_score: validation of the initialization, None without validation.
        best_score: validation of the best weights, likewise.
        weights: see `Phase`; those of the first phase are found in it.
        can_be_saved: whether steps were made, and none is half done.
    """

    def __init__(
        self,
        adapter: Adapter,
        loader: Loader,
        loss: BatchLoss,
        options: OptimizerOptions,
        schedule: Schedule,
        *,
        device: torch.device,
        seed: int,
        batch_size: int,
        rows: int,
        scale: float | None = None,
        phase: Phase = FIRST,
        timer: Timer | None = None,
        validation: Validation | None = None,
    ) -> None:
        self.adapter, self.loss, self.schedule, self.device = adapter, loss, schedule, device
        self.batch_size, self.scale = batch_size, scale
        self._loader, self._options, self._seed = loader, options, seed
        self._rows, self._timer = rows, timer or Timer(announces=False)
        self._what = f"{phase.what}: step"
        self.step = self.steps_made = 0
        self.start_score: Score | None = None
        self.best_score: Score | None = None
        self.weights = dict(phase.weights)
        self.can_be_saved = False
        self._validation = validation
        self._held_out = distributed.broadcast(lambda: validation.items if validation else 0)
        self._validated: int | None = None
        self._score: Score | None = None  # of the latest validation
        self._figures = StepFigures()  # of the steps since the last flush
        self._latest: dict[str, float] = {}  # terms of the loss at the last flush
        self._log_lines: Log = lambda lines: None
        self._stale = 0
        self._best: dict[str, Any] | None = None
        self._stopped_by: int | None = None
        if options.compile:
            for side in adapter.children():
                side.compile()
        self._stepper = Stepper(self.adapter, self.loss, options, self.device)

    def fit(self, log_lines: Log) -> Generator[bool, None, None]:
        """Train, and leave the best weights in the adapter.

        Yields:
            Before each step and at the end, when the state may be saved: whether the weights were
            just validated.

        Raises:
            TrainingError: see `flush`.
            ConfigError: a step does not fit into the memory of the device.
            Stopped: one of several processes got a signal; all have made the same steps.
        """
        self._log_lines = log_lines
        tick(self._what, self.step, self.last)
        self._timer.begin(self.schedule, self.step, self.device, self._rows)
        with ExitStack() as stack:
            devices = [self.device] if self.device.type == "cuda" else []
            stack.enter_context(torch.random.fork_rng(devices))
            stack.enter_context(self._loader.reading_ahead())
            if self._options.compile:  # train uncompiled if there is no compiler
                stack.enter_context(torch._dynamo.config.patch(suppress_errors=True))
            while True:
                self.schedule = self._timer.follow(self.schedule, self.step)
                is_due = self.step % self.schedule.every == 0 or self.step == self.last
                validates = is_due and self.step != self._validated and self._held_out > 0
                if is_due or self.step % self._options.log_every == 0:
                    self.flush()
                if validates:
                    self._run_validation()
                self.can_be_saved = self.step > 0
                tick(self._what, self.step, self.last)
                show_figures(self._shown_figures(), notable=validates)
                yield validates
                if self.step == self.last or self._stops_early():
                    break
                with self._consistent():
                    self.loss.weight = self.weights.get(self.step, self.loss.weight)
                    self._train_step(next(self._loader))
                if self._stopped_by is not None:
                    raise Stopped(self._stopped_by)
            self.flush()
        self.steps_made = self.step
        self.can_be_saved = False  # what follows cannot be resumed from
        if self._best is not None:
            self.adapter.load_state_dict(self._best["adapter"])
            self.loss.load_state_dict(self._best["loss"])
            self.step = self._best["step"]
        else:
            self.adapter.load_state_dict(self._evaluated_adapter().state_dict())

    def state_dict(self) -> dict[str, Any]:
        """Return all that further training depends on, except the adapter's weights.

        Returns:
            Plain values, and tensors that later steps may change in place.

        Raises:
            TrainingError: see `flush`.
        """
        self.flush()
        return {
            "step": self.step,
            "batch_size": self.batch_size,
            "scale": self.scale,
            "validated": self._validated,
            "stale": self._stale,
            "weights": self.weights,
            "scores": [self.start_score, self.best_score],
            "best": self._best,
            **self._stepper.state_dict(),
            "length": self.schedule,
            "loss": self.loss.state_dict(),
            "loader": self._loader.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned, possibly after a round trip through JSON.

        The adapter has the weights of that step already.
        """
        self.step, self._validated = state["step"], state["validated"]
        self._stale, self._best = state["stale"], state["best"]
        self.weights = {int(step): weight for step, weight in state["weights"].items()}
        self.start_score, self.best_score = (own and Score(*own) for own in state["scores"])
        self._stepper.load_state_dict(state)
        self.schedule = Schedule(*state["length"])
        self.loss.load_state_dict(state["loss"])
        self._loader.load_state_dict(state["loader"])

    @property
    def last(self) -> int:
        """Optimizer steps to make."""
        return self.schedule.last

    def flush(self) -> None:
        """Read the figures of all steps since the last flush from the device, and log them.

        Raises:
            TrainingError: a term of the loss, the gradient or a weight is not finite; names the
                first step at fault.
        """
        if not self._figures:
            return
        with signals.delayed():
            largest = nn.utils.get_total_norm(self.adapter.parameters(), math.inf)
            lines, fault = self._figures.read({"step": self.step, "largest_weight": largest})
            for line in lines:
                self.loss.warn_if_narrow(line["bandwidth"], line.pop("diagonal_share"))
            if lines and distributed.is_main_process():
                self._log_lines(lines)
            if fault:  # before a signal, on which the state would be saved
                raise TrainingError(
                    f"{fault}; lower --learning-rate, --logit-scale, --cs-weight or "
                    "--token-weight, or leave --bandwidth at median"
                )
        shown = ("loss", "pairwise", "pairwise_others", "divergence", "token")
        self._latest = {name: lines[-1][name] for name in shown if lines[-1][name] is not None}

    @contextmanager
    def _consistent(self) -> Iterator[None]:
        """Delay signals while the state changes, and mark it as half done if the block fails."""
        self.can_be_saved = False
        with signals.delayed():
            yield
            self.can_be_saved = self.step > 0

    def _stops_early(self) -> bool:
        best, schedule = self.best_score, self.schedule
        if best is None:
            return False
        # An automatic weight narrows the gap for as long as recall holds.
        may_stop = schedule.patience is None and self.loss.options.cs_weight != "auto"
        if best.is_perfect and may_stop and self._held_out >= ENOUGH_IMAGES:
            log.info(
                "validation recall is 100 %% %s, so no step can improve it: stopping (gap %.4f). "
                "To train on for a smaller gap pass --patience %d; to compare by recall, validate "
                "on more rows with --val-split",
                *(self._best_place, best.centroid_distance, PATIENCE),
            )
            return True
        if self._stale * schedule.every < schedule.patient_steps:
            return False
        log.info(
            "early stopping: no improvement in %d validations (best %.1f %% %s)",
            *(self._stale, 100 * best.mean_recall, self._best_place),
        )
        return True

    @property
    def _best_place(self) -> str:
        step = self._best["step"] if self._best else 0
        return f"at step {step}" if step else "at the start"

    def _shown_figures(self) -> dict[str, str]:
        """Return the terms of the latest loss, and the latest and best validation, for people."""
        shown = {}
        if self._latest:
            terms = {name: f"{v:.{2 if v >= 0.1 else 4}f}" for name, v in self._latest.items()}
            total = terms.pop("loss")
            parts = ", ".join(f"{name} {value}" for name, value in terms.items())
            shown["loss"] = f"{total} ({parts})" if parts else total
        score, best = self._score, self.best_score
        if score is not None and best is not None:
            record = f"best {100 * best.mean_recall:.1f} % {self._best_place}"
            shown["val R"] = f"{100 * score.mean_recall:.1f} % ({record})"
            shown["gap"] = f"{score.centroid_distance:.2f}"
        return shown

    def _rate_factor(self, step: int) -> float:
        """Return the factor of the learning rate: linear warm-up, then cosine decay."""
        total = max(1, self.schedule.steps)
        warmup = max(1, round(self._options.warmup * total))
        cosine = (1 + math.cos(math.pi * min(1.0, step / total))) / 2
        return min(1.0, (step + 1) / warmup) * cosine

    def _train_step(self, batch: Any) -> None:
        """Make a step; nothing in it reads the device on the host."""
        self.adapter.train()
        self.step += 1
        # Noise and dropout follow from the seed, so that a resumed run draws the same again.
        place = [self._seed, 2, self.step, distributed.world().rank]
        torch.manual_seed(int(np.random.SeedSequence(place).generate_state(1, np.uint64)[0]))
        weight, token_weight = self.loss.weight, self.loss.options.token_weight
        rate = self._options.learning_rate * self._rate_factor(self.step - 1)
        if distributed.world().size > 1:
            self._stopped_by = distributed.largest(signals.pending() or 0) or None
        try:
            parts, norm = self._stepper.take(batch, self.step, rate)
        except torch.OutOfMemoryError:
            # Not a TrainingError, which no rerun could get past.
            raise ConfigError(
                f"--batch-size: step {self.step} of {self.batch_size} pairs needs more memory "
                f"than {self.device} has; lower it, or --sub-batch"
            ) from None
        self._figures.add(
            {
                "step": self.step,
                "loss": parts.total,
                "pairwise": parts.pairwise,
                "pairwise_others": parts.others,
                "divergence": parts.divergence if weight else None,
                "cs_weight": weight,
                "token": parts.token if token_weight else None,
                "logit_scale": self.loss.log_scale.exp(),
                "bandwidth": self.loss.sigma,
                "gradient_norm": norm,
                "learning_rate": rate,
                "diagonal_share": self.loss.diagonal_share,
            }
        )

    def _run_validation(self) -> None:
        """Measure, log, and keep the weights if they are the best so far."""
        adapter = self._evaluated_adapter()
        with self._timer.apart():
            score = distributed.broadcast(lambda: self._measure(adapter))
        with self._consistent():
            self._validated, self._score = self.step, score
            if distributed.is_main_process():
                self._log_lines([{"step": self.step, "validation": score._asdict()}])
            if self.best_score is not None:
                holds = score.mean_recall >= self.best_score.mean_recall
                self.loss.adapt_weight(recall_holds=holds)
                self.weights[self.step] = self.loss.weight
            if self.step == 0:
                self.start_score = score
            if not score.better_than(self.best_score):
                self._stale += 1
                return
            self._stale, self.best_score = 0, score
            self._best = {
                "step": self.step,
                "adapter": copy.deepcopy(adapter.state_dict()),
                "loss": copy.deepcopy(self.loss.state_dict()),
            }

    def _measure(self, adapter: Adapter) -> Score:
        assert self._validation is not None
        try:
            return self._validation.measure(adapter)
        except TrainingError as error:
            raise TrainingError(f"step {self.step}: {error}") from None

    def _evaluated_adapter(self) -> Adapter:
        """Return the weights to evaluate and keep: the running average, if there is one."""
        return self._stepper.average or self.adapter
