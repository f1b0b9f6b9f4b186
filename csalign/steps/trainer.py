"""The training loop: steps, validations, the best weights so far."""

import copy
import json
import logging
import math
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from csalign.adapters.model import Adapter
from csalign.config import TrainConfig
from csalign.errors import TrainingError
from csalign.objective.kernel import Sigma
from csalign.objective.loss import LossParts
from csalign.progress import Progress, show_figures
from csalign.steps.batch_loss import BatchLoss
from csalign.steps.batches import Batch, PairSampler
from csalign.steps.logs import Log, figures_of
from csalign.steps.tokens import StoredTokens
from csalign.steps.unpaired import Unpaired
from csalign.steps.validation import Score, validate
from csalign.store.join import PairedRows, Pairs

log = logging.getLogger(__name__)

DEFAULT_EPOCHS = 40
MIN_DEFAULT_STEPS = 200  # a small set fills few batches, and too few steps learn nothing


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
        val: held-out rows, or None: then the last weights are kept.
        config: everything else.
        folder: where ``metrics.jsonl`` goes.
        device: where to compute.
        tokens: of the rows, None where no side trains with any.
        logs: where the figures go besides ``metrics.jsonl``.
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
    step: int = 0
    steps_made: int = 0
    best_score: Score | None = None
    start_score: Score | None = None
    loss: BatchLoss = field(init=False)
    _best: "_Kept | None" = None
    _average: AveragedModel | None = None
    _progress: Progress | None = None

    def __post_init__(self) -> None:
        self.adapter.to(self.device)
        if self.config.average:
            decay = get_ema_multi_avg_fn(self.config.average)  # type: ignore[no-untyped-call]
            self._average = AveragedModel(self.adapter, multi_avg_fn=decay)
        self.loss = BatchLoss(
            self.adapter, self.rows, self.unpaired, self.config, self.device, self.tokens
        )

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
        """
        self._progress = progress
        total = self.total_steps()
        every = max(1, round(total / self.config.validations))
        self._validate()
        self.start_score = self.best_score
        if total:
            optimiser, schedule = self._optimiser(total)
        stale = 0
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(self.config.seed)
            rng = np.random.default_rng([self.config.seed, 1])  # leaves the batches what they are
            for batch in self._batches(total):
                self._train_step(batch, rng, optimiser, schedule)
                progress("training steps", self.step, total)
                if self.step % every and self.step != total:
                    continue
                stale = 0 if self._validate() else stale + 1
                yield self.step
                if self.val is not None and stale >= self.config.patience:
                    log.info("no better validation for %d in a row: stopped early", stale)
                    break
        self.steps_made = self.step
        if self._best is not None:
            self._restore(self._best)
        elif self._average is not None:
            self.adapter.load_state_dict(self._average.module.state_dict())

    def _batches(self, total: int) -> Iterator[Batch]:
        rng = np.random.default_rng(self.config.seed)
        made = 0
        while made < total:
            for batch in self.sampler.epoch(self.config.batch_size, rng):
                if made == total:
                    return
                made += 1
                yield batch

    def _optimiser(
        self, total: int
    ) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
        parameters = [p for p in self.adapter.parameters() if p.requires_grad]
        groups: list[dict[str, Any]] = [
            {"params": [p for p in parameters if p.ndim > 1]},
            # Neither a bias nor the temperature should be drawn to zero.
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
            {"params": list(self.loss.parameters()), "weight_decay": 0.0},
        ]
        optimiser = torch.optim.AdamW(
            groups, lr=self.config.learning_rate, weight_decay=self.config.weight_decay
        )
        warmup = max(1, round(self.config.warmup * total))

        def factor(step: int) -> float:
            cosine = (1 + math.cos(math.pi * min(1.0, step / total))) / 2
            return min(1.0, (step + 1) / warmup) * cosine

        return optimiser, torch.optim.lr_scheduler.LambdaLR(optimiser, factor)

    def _train_step(
        self,
        batch: Batch,
        rng: np.random.Generator,
        optimiser: torch.optim.Optimizer,
        schedule: torch.optim.lr_scheduler.LRScheduler,
    ) -> None:
        self.adapter.train()
        self.step += 1
        weight = self.loss.weight.value
        parts = self.loss(batch, self.step, rng)
        self._require_finite(parts)
        optimiser.zero_grad(set_to_none=True)
        parts.total.backward()
        norm = nn.utils.clip_grad_norm_(self.adapter.parameters(), self.config.clip_norm)
        if not torch.isfinite(norm):
            raise self._diverged("the gradient's norm", float(norm))
        rate = schedule.get_last_lr()[0]
        optimiser.step()
        schedule.step()
        self.loss.clamp()
        if self._average is not None:
            self._average.update_parameters(self.adapter)
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

    def _validate(self) -> bool:
        """Measure, record, and keep the weights if they are the best so far."""
        if self.val is None:
            return True
        adapter = self._kept_adapter()
        score = validate(adapter, self.val, self.tokens.features if self.tokens else None)
        self._record({"step": self.step, "validation": score.to_json()})
        better = score.better_than(self.best_score)
        self.loss.weight = self.loss.weight.after(score, self.best_score)
        if better:
            self.best_score = score
            weights = copy.deepcopy(adapter.state_dict())
            temperature = copy.deepcopy(self.loss.state_dict())
            self._best = _Kept(self.step, weights, temperature, self.loss.sigma)
        return better

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
        with (self.folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        figures = figures_of(line)
        for log_figures in self.logs:
            log_figures(self.step, figures)
        if self._progress is not None:
            show_figures(self._progress, figures)
