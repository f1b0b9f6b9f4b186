"""The training loop: steps, validations, the best weights so far.

Several processes take the same steps: each has the gradient of the rows that it embedded, and one
sum of a single flat tensor makes it that of the batch, along with whether a signal arrived
anywhere. DistributedDataParallel would do so in buckets while the backward pass runs, which gains
nothing with adapters this small, but wants a forward pass of its own a step, where here one side
may go through several times and another not at all.
"""

import copy
import json
import logging
import math
import signal
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from csalign.adapters.model import Adapter
from csalign.core import atomic, distributed, signals
from csalign.core.enums import Modality
from csalign.core.errors import Stopped, TrainingError
from csalign.core.progress import Progress, show_figures
from csalign.features.join import PairedRows, Pairs
from csalign.objective.kernels import Sigma
from csalign.objective.loss import LossParts
from csalign.runs.metadata import LINES
from csalign.training.batch_loss import BatchLoss, as_sigma
from csalign.training.config import TrainConfig
from csalign.training.loggers import Log, figures_of
from csalign.training.sampler import Batch, Batches, PairSampler
from csalign.training.token_data import StoredTokens
from csalign.training.unpaired import Unpaired
from csalign.training.validation import Score, validate

log = logging.getLogger(__name__)

DEFAULT_EPOCHS = 40
MIN_DEFAULT_STEPS = 200  # a small set fills few batches, and too few steps learn nothing
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass(frozen=True)
class _Kept:
    """Weights, and what belongs to them."""

    step: int
    weights: dict[str, Any]
    loss: dict[str, Any]
    sigma: Sigma | None


@dataclass
class Trainer:
    """Trains adapters on pairs and keeps the best weights on validation.

    Attributes:
        adapter: both sides, at their start; trained in place.
        rows: training rows.
        sampler: draws pairs of them.
        unpaired: rows that the distribution term sees besides.
        val: held-out rows, or None: then the last weights are kept. Of several processes the first
            has them, and tells the others what it measured.
        config: everything else.
        folder: where ``metrics.jsonl`` goes.
        device: where to compute.
        tokens: of the rows, None where no side trains with any.
        logs: where the figures go besides ``metrics.jsonl``.
        between_steps: called before each step but the first, when `state` may be asked for.
        step: optimiser steps made; after `fit`, those of the weights that were kept.
        steps_made: optimiser steps made in all.
        start_score: validation of the start, None without validation rows.
        best_score: validation of the weights that were kept.
        loss: the objective, with its temperature and bandwidth.
    """

    adapter: Adapter
    rows: Pairs
    sampler: PairSampler
    unpaired: Unpaired
    val: PairedRows | None
    config: TrainConfig
    folder: Path
    device: torch.device
    tokens: StoredTokens | None = None
    logs: Sequence[Log] = ()
    between_steps: Callable[[], None] | None = None
    step: int = 0
    steps_made: int = 0
    best_score: Score | None = None
    start_score: Score | None = None
    loss: BatchLoss = field(init=False)
    _validated: int | None = None
    _stale: int = 0
    _best: "_Kept | None" = None
    _average: AveragedModel | None = None
    _is_whole: bool = False
    _validates: bool = False
    _stopped_by: int | None = None
    _progress: Progress | None = None

    def __post_init__(self) -> None:
        self.adapter.to(self.device)
        if self.config.compile:
            torch._dynamo.config.suppress_errors = True  # without a compiler, go on as without this
            for side in Modality:
                self.adapter.side(side).compile()
        if self.config.average:
            decay = get_ema_multi_avg_fn(self.config.average)  # type: ignore[no-untyped-call]
            self._average = AveragedModel(self.adapter, multi_avg_fn=decay)
        self.loss = BatchLoss(
            self.adapter, self.rows, self.unpaired, self.config, self.device, self.tokens
        )
        self._batches = Batches(self.sampler, self.config.batch_size, self.config.seed)
        # Leaves the batches what they are.
        self._rng = np.random.default_rng([self.config.seed, 1])
        self._optimiser = self._make_optimiser()
        self._schedule = self._make_schedule()

    def total_steps(self) -> int:
        """Steps asked for, or as many as 40 epochs fill, but at least 200."""
        if self.config.steps is not None:
            return self.config.steps
        epochs = math.ceil(DEFAULT_EPOCHS * len(self.sampler) / self.config.batch_size)
        return max(MIN_DEFAULT_STEPS, epochs)

    def fit(self, progress: Progress) -> Generator[int, None, None]:
        """Train; yields the step after each validation, when it is a good time to save.

        Leaves the best weights in `adapter`: the start's own where nothing trained beat it.

        Raises:
            TrainingError: a term of the loss, or a gradient, is not finite.
            Stopped: of several processes one got a signal; all have made the same steps.
        """
        self._progress = progress
        total = self.total_steps()
        every = max(1, round(total / self.config.validations))
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            self._is_whole = True
            self._validates = distributed.broadcast(lambda: self.val is not None)
            while True:
                is_due = self.step % every == 0 or self.step == total
                if is_due and self.step != self._validated:
                    self._validate()
                    if self.step:
                        yield self.step
                if self.step == total or self._is_stale():
                    break
                if self.step and self.between_steps is not None:
                    self.between_steps()
                with self._whole():
                    self._train_step(next(self._batches))
                progress("training steps", self.step, total)
                if self._stopped_by is not None:
                    raise Stopped(self._stopped_by)
        self.steps_made = self.step
        self._is_whole = False  # what follows is no state to go on from
        if self._best is not None:
            self._restore(self._best)
        elif self._average is not None:
            self.adapter.load_state_dict(self._average.module.state_dict())

    @property
    def can_be_saved(self) -> bool:
        """Whether `state` may be asked for: steps were made, and none is half done."""
        return self.step > 0 and self._is_whole

    def state(self) -> dict[str, Any]:
        """All that the rest of the training follows from, but for the weights in `adapter`.

        Returns:
            Plain values, and tensors that later steps may change in place.
        """
        average = None if self._average is None else self._average.state_dict()
        return {
            "step": self.step,
            "validated": self._validated,
            "stale": self._stale,
            "start_score": None if self.start_score is None else self.start_score.to_json(),
            "best_score": None if self.best_score is None else self.best_score.to_json(),
            "best": None if self._best is None else vars(self._best),
            "average": average,
            "optimiser": self._optimiser.state_dict()["state"],
            "schedule": self._schedule.state_dict(),
            "loss": self.loss.state_dict(),
            "position": self.loss.position(),
            "batches": self._batches.state(),
            "rng": self._rng.bit_generator.state,
        }

    def go_to(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` said; the adapters hold the weights of that step already.

        Args:
            state: it; may have been JSON in between, but for its tensors.
        """
        self.step, self._validated = state["step"], state["validated"]
        self._stale = state["stale"]
        self.start_score, self.best_score = (
            None if state[name] is None else Score(**state[name])
            for name in ("start_score", "best_score")
        )
        if state["best"] is not None:
            self._best = _Kept(**{**state["best"], "sigma": as_sigma(state["best"]["sigma"])})
        if self._average is not None:
            self._average.load_state_dict(state["average"])
        moments = {int(number): moment for number, moment in state["optimiser"].items()}
        groups = self._optimiser.state_dict()["param_groups"]
        self._optimiser.load_state_dict({"state": moments, "param_groups": groups})
        self._schedule.load_state_dict(dict(state["schedule"]))
        rates = self._schedule.get_last_lr()
        for group, rate in zip(self._optimiser.param_groups, rates, strict=True):
            group["lr"] = rate
        self.loss.load_state_dict(state["loss"])
        self.loss.go_to(state["position"])
        self._batches.go_to(state["batches"])
        self._rng.bit_generator.state = state["rng"]

    @contextmanager
    def _whole(self) -> Iterator[None]:
        """Around what changes the state: a signal waits, and what ends it leaves no state."""
        self._is_whole = False
        with signals.delayed():
            yield
            self._is_whole = True

    def _is_stale(self) -> bool:
        if not self._validates or self._stale < self.config.patience:
            return False
        log.info("no better validation for %d in a row: stopped early", self._stale)
        return True

    def _make_optimiser(self) -> torch.optim.Optimizer:
        parameters = [p for p in self.adapter.parameters() if p.requires_grad]
        groups: list[dict[str, Any]] = [
            {"params": [p for p in parameters if p.ndim > 1]},
            # Neither a bias nor the temperature should be drawn to zero.
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
            {"params": list(self.loss.parameters()), "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(
            groups,
            lr=self.config.learning_rate,
            weight_decay=self.config.weight_decay,
            fused=True,  # one pass over the weights: a quarter of the time of one an operation
        )

    def _make_schedule(self) -> torch.optim.lr_scheduler.LRScheduler:
        total = max(1, self.total_steps())
        warmup = max(1, round(self.config.warmup * total))

        def factor(step: int) -> float:
            cosine = (1 + math.cos(math.pi * min(1.0, step / total))) / 2
            return min(1.0, (step + 1) / warmup) * cosine

        return torch.optim.lr_scheduler.LambdaLR(self._optimiser, factor)

    def _train_step(self, batch: Batch) -> None:
        self.adapter.train()
        self.step += 1
        self._seed_torch()
        weight = self.loss.weight.value
        parts = self.loss(batch, self.step, self._rng)
        self._require_finite(parts)
        self._optimiser.zero_grad(set_to_none=True)
        parts.total.backward()
        self._sum_over_processes()
        norm = nn.utils.clip_grad_norm_(self.adapter.parameters(), self.config.clip_norm)
        if not torch.isfinite(norm):
            raise self._diverged("the gradient's norm", float(norm))
        rate = self._schedule.get_last_lr()[0]
        self._optimiser.step()
        self._schedule.step()
        self.loss.clamp()
        if self._average is not None:
            self._average.update_parameters(self.adapter)
        if not distributed.is_main_process():
            return
        self._record(
            {
                "step": self.step,
                "loss": float(parts.total.detach()),
                "pairwise": float(parts.pairwise.detach()),
                "pairwise_others": None if parts.others is None else float(parts.others.detach()),
                "divergence": float(parts.divergence.detach()) if weight else None,
                "cs_weight": weight,
                "token": float(parts.token.detach()) if self.config.token_weight else None,
                "logit_scale": self.loss.logit_scale,
                "bandwidth": self.loss.sigma,
                "gradient_norm": float(norm),
                "learning_rate": rate,
            }
        )

    def _seed_torch(self) -> None:
        """Seed torch's own generators, for adapters that draw by them: anew in each step.

        They are of no state then. In several processes what they draw differs.
        """
        place = [self.config.seed, 2, self.step, distributed.world().rank]
        words = np.random.SeedSequence(place).generate_state(1, np.uint64)
        torch.manual_seed(int(words[0]))

    def _sum_over_processes(self) -> None:
        """Make the adapters' gradient that of all rows, and see who was asked to stop.

        The objective's own parameters have the whole gradient in each process already.
        """
        if distributed.world().size == 1:
            return
        gradients = [p.grad for p in self.adapter.parameters() if p.grad is not None]
        asked = gradients[0].new_tensor([signals.pending() == signum for signum in _SIGNALS])
        flat = torch.cat([*(gradient.flatten() for gradient in gradients), asked])
        distributed.all_reduce_sum(flat)
        sizes = [*(gradient.numel() for gradient in gradients), len(asked)]
        *summed, asked = torch.split(flat, sizes)
        for gradient, whole in zip(gradients, summed, strict=True):
            gradient.copy_(whole.view_as(gradient))
        arrived = [signum for signum, count in zip(_SIGNALS, asked.tolist(), strict=True) if count]
        self._stopped_by = arrived[0] if arrived else None

    def _require_finite(self, parts: LossParts) -> None:
        names = {"pairwise": self.config.pairwise, "divergence": self.config.divergence}
        for term, value in parts._asdict().items():
            name = names.get(term, term)
            if term != "total" and value is not None and not torch.isfinite(value):
                raise self._diverged(f"the {name} term", float(value.detach()))
        if not torch.isfinite(parts.total):
            raise self._diverged("the total loss", float(parts.total.detach()))

    def _diverged(self, what: str, value: float) -> TrainingError:
        return TrainingError(
            f"step {self.step}: {what} is {value}; lower --learning-rate, --logit-scale, "
            "--cs-weight or --token-weight, or leave --bandwidth at median"
        )

    def _validate(self) -> None:
        """Measure, record, and keep the weights if they are the best so far."""
        if not self._validates:
            self._validated = self.step
            return
        adapter = self._kept_adapter()
        score = Score(**distributed.broadcast(lambda: self._measure(adapter).to_json()))
        with self._whole():
            self._validated = self.step
            if distributed.is_main_process():
                self._record({"step": self.step, "validation": score.to_json()})
            self.loss.weight = self.loss.weight.after(score, self.best_score)
            if self.step == 0:
                self.start_score = score
            if not score.better_than(self.best_score):
                self._stale += 1
                return
            self._stale, self.best_score = 0, score
            weights = copy.deepcopy(adapter.state_dict())
            temperature = copy.deepcopy(self.loss.state_dict())
            self._best = _Kept(self.step, weights, temperature, self.loss.sigma)

    def _measure(self, adapter: Adapter) -> Score:
        assert self.val is not None
        return validate(adapter, self.val, self.tokens.features if self.tokens else None)

    def _kept_adapter(self) -> Adapter:
        """The weights that would be kept now: the running average, where there is one."""
        if self._average is None:
            return self.adapter
        assert isinstance(self._average.module, Adapter)
        return self._average.module

    def _restore(self, kept: "_Kept") -> None:
        self.adapter.load_state_dict(kept.weights)
        self.loss.load_state_dict(kept.loss)
        self.step, self.loss.sigma = kept.step, kept.sigma

    def _record(self, line: dict[str, Any]) -> None:
        path = self.folder / LINES
        with atomic.translate_os_errors(path), path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        figures = figures_of(line)
        for log_figures in self.logs:
            log_figures(self.step, figures)
        if self._progress is not None:
            show_figures(self._progress, figures)
