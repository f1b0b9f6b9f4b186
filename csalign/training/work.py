"""What a run trains on and how: its trainers, closed forms and the time left."""

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from csalign.adapters.model import Adapter, find_kind
from csalign.adapters.side import mean_square
from csalign.core import distributed
from csalign.core.arrays import Mask
from csalign.core.devices import free_bytes, pick_device
from csalign.core.enums import Modality, PairwiseName
from csalign.core.errors import ConfigError, reason_of
from csalign.features.reader import FeatureSet
from csalign.features.streaming import MIB
from csalign.training.checkpoints import info_of
from csalign.training.closed_forms.initialization import Start, fit_setting, initialize
from csalign.training.closed_forms.settings import Setting
from csalign.training.closed_forms.unpaired import Matches
from csalign.training.config import (
    AdapterOptions,
    DataOptions,
    ObjectiveOptions,
    OptimizerOptions,
    TokenOptions,
    TrainConfig,
)
from csalign.training.data import StoredTokens, TrainingData, announce_rows, open_tokens
from csalign.training.network.batch_loss import BatchLoss, check_terms, compares_sets, uses_unpaired
from csalign.training.network.device_rows import SHARE
from csalign.training.network.loop import FIRST, Loader, Phase, Trainer, Validation
from csalign.training.network.memory import LEAST_BATCH, largest_batch
from csalign.training.network.sampler import BatchLoader, PairSampler, make_sampler
from csalign.training.network.schedule import Timer, plan
from csalign.training.network.step import prepare_step
from csalign.training.network.validation import logit_scale, validate

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Job:
    """What all processes of a run train from, and the time that it takes."""

    config: TrainConfig
    data: Any  # rows to train on
    clock: Callable[[], float] = field(default=time.monotonic, kw_only=True)  # seconds so far

    @property
    def seconds_left(self) -> float:
        """Seconds that are left of ``--minutes``."""
        minutes = self.config.minutes
        return math.inf if minutes is None else 60 * minutes - self.clock()

    @property
    def further(self) -> int:
        """Networks to train after the first."""
        return int(self.config.networks + self.data.refits - 1)

    def timer(self, *, combines: bool = False) -> Timer:
        """Build the timer of the first network, which a kernel CCA may follow."""
        return Timer(self.clock, self.config.minutes, self.further + 1, combines)

    def refits(self, phase: Phase) -> bool:
        """Return whether a phase learns from the held-out rows too."""
        return phase.number > 0 and bool(self.data.refits)

    def complete(self, adapter: Adapter) -> Adapter:
        """Return the adapter of a run, of one that a network is trained in."""
        return adapter

    def sampler(self, phase: Phase = FIRST) -> Any:
        """Return the sampler of what a phase learns from; its length is that of an epoch."""
        raise NotImplementedError

    def load(
        self, sampler: Any, size: int, seed: int, device: torch.device, unpaired: int
    ) -> Loader:
        """Make the batches of a size on a device, with unpaired rows of each side."""
        raise NotImplementedError

    def loss(self, objective: ObjectiveOptions, **values: Any) -> BatchLoss:
        """Make the loss of a batch."""
        return BatchLoss(objective, **values)

    def scale(self, adapter: Adapter) -> float:
        """Find the scale of the logits by the recall of a start."""
        raise NotImplementedError

    def fitting(self, adapter: Adapter, device: torch.device) -> int:
        """Find the batch that fits into the memory of a device."""
        raise NotImplementedError

    def validation(self) -> Validation | None:
        """Return how to validate; None without validation, and outside of the main process."""
        raise NotImplementedError

    def trainer(
        self, adapter: Adapter, phase: Phase = FIRST, timer: Timer | None = None
    ) -> Trainer:
        """Build the trainer of a phase; the adapter moves to the device.

        Raises:
            ConfigError: options conflict, or are of no use on these rows.
        """
        config, seed = self.config, self.config.seed + phase.number
        objective, options = config.group(ObjectiveOptions), config.group(OptimizerOptions)
        sampler, device = self.sampler(phase), pick_device(config.device)
        items, size, scale = len(sampler), options.batch_size, phase.scale
        adapter.to(device)
        if size == "auto":
            size = phase.batch_size or self.fitting(adapter, device)
        trains = 0 not in (options.steps, phase.steps)
        is_infonce = objective.pairwise is PairwiseName.INFONCE
        if trains and is_infonce and objective.logit_scale == "auto":
            scale = phase.scale or distributed.broadcast(lambda: self.scale(adapter))
            objective = objective.model_copy(update={"logit_scale": scale})
        rows = min(size, items) if trains else 0
        check_terms(objective, captions=config.captions, rows=rows)
        loss = self.loss(
            objective,
            precision=options.precision,
            sub_batch=options.sub_batch,
            compiled=options.compile and device.type == "cuda",
        )
        unpaired = round(size * objective.unpaired_ratio * uses_unpaired(objective))
        given = options.model_dump(include={"epochs", "minutes", "validations", "patience"})
        given["steps"] = options.steps if phase.steps is None else phase.steps
        schedule = plan(max(1, items), size, **given, others=len(adapter.names) - 1)
        if phase.last is not None:
            schedule = schedule._replace(last=phase.last)
        return Trainer(
            adapter,
            self.load(sampler, size, seed, device, unpaired),
            loss.to(device),
            options,
            schedule,
            device=device,
            seed=seed,
            batch_size=size,
            rows=rows,
            scale=scale,
            phase=phase,
            timer=timer,
            validation=None if phase.number else self.validation(),
        )


@dataclass(frozen=True)
class Work(Job):
    """A job on images and texts."""

    data: TrainingData
    tokens: StoredTokens | None
    _samplers: dict[bool, PairSampler] = field(default_factory=dict)

    def sampler(self, phase: Phase = FIRST) -> PairSampler:
        """Return the sampler of the pairs that a phase learns from."""
        refits = self.refits(phase)
        if refits not in self._samplers:
            self._samplers[refits] = self.make_sampler(None if refits else self.data.held_out)
        return self._samplers[refits]

    def make_sampler(self, leave_out: Mask | None) -> PairSampler:
        """Build the sampler of all pairs but those of some images."""
        options, other_weight = self.config.group(DataOptions), self.config.other_captions
        return make_sampler(options, other_weight, self.data.rows, self.tokens, leave_out)

    @property
    def token_widths(self) -> dict[Any, int]:
        """Token width of each side that trains with tokens."""
        return self.tokens.widths if self.tokens else {}

    @property
    def _token_features(self) -> FeatureSet | None:
        return self.tokens.features if self.tokens else None

    def load(
        self, sampler: Any, size: int, seed: int, device: torch.device, unpaired: int
    ) -> BatchLoader:
        """See `Job.load`."""
        objective = self.config.group(ObjectiveOptions)
        return BatchLoader(
            *(self.data.rows, sampler, size, seed, device, self.data.unpaired),
            unpaired_rows=unpaired,
            further_captions=compares_sets(objective) and objective.cs_captions == "all",
            mixing=objective.mixing,
            tokens=self.tokens,
        )

    def scale(self, adapter: Adapter) -> float:
        """See `Job.scale`."""
        return logit_scale(adapter, self.data.val, self._token_features)

    def fitting(self, adapter: Adapter, device: torch.device) -> int:
        """See `Job.fitting`; 512 pairs if that cannot be found."""
        if self.tokens is not None:
            raise ConfigError("--batch-size auto: cannot be combined with tokens; give a number")
        config, rows = self.config, self.data.rows
        objective, options = config.group(ObjectiveOptions), config.group(OptimizerOptions)
        texts = rows.pairs / max(1, int((rows.caption_counts > 0).sum()))
        common = adapter.shapes, objective, options, device, texts
        step = partial(prepare_step, *common, captions=config.captions)
        memory = int(SHARE * (1 - SHARE) * free_bytes(device))  # beside the embeddings
        return distributed.broadcast(lambda: _largest_batch(step, len(self.sampler()), memory))

    def validation(self) -> Validation | None:
        """See `Job.validation`."""
        val, features = self.data.val, self._token_features
        if val is None:
            return None
        held_out = int((val.caption_counts > 0).sum())
        return Validation(lambda adapter: validate(adapter, val, features), held_out)

    def info(self, phase: Phase) -> dict[str, Any]:
        """Return what a run records of the rows that a phase learns from."""
        data = self.data
        return info_of(data.features, Modality) | {
            "train_split": data.refit_split if phase.number and data.refits else data.split,
            "image_norm": mean_square(data.rows.images) ** 0.5,
        }

    def announce(self) -> None:
        """Log what is trained and validated on."""
        announce_rows(self.data)

    def counts(self) -> dict[str, int]:
        """Count the pairs that are trained and validated on."""
        val = self.data.val
        return {"train": self.data.trained[0], "validation": val.pairs if val else 0}

    def initialize(self) -> Start:
        """Choose a closed form; see `initialize`."""
        return initialize(
            self.config.group(AdapterOptions),
            self.data,
            self.make_sampler,
            self.token_widths,
            self.config.seed,
            unpaired_matches=self.config.unpaired_matches,
        )

    def fit(self, setting: Setting, phase: Phase) -> tuple[Adapter, Matches | None]:
        """Fit a closed form on the pairs of a phase."""
        options, seed = self.config.group(AdapterOptions), self.config.seed + phase.number
        sampler, widths = self.sampler(phase), self.token_widths
        return fit_setting(setting, options, self.data, sampler, widths, seed)


def check_networks(config: TrainConfig, tokens: StoredTokens | None) -> None:
    """Raise ConfigError if networks cannot stand side by side."""
    if config.networks == 1:
        return
    if tokens is not None:
        raise ConfigError(
            f"--networks {config.networks}: networks side by side take no tokens; leave out "
            "--networks, or --tokens and --token-weight"
        )
    for kind in config.kinds.values():
        if find_kind(kind, allow={kind}).keeps_width:
            raise ConfigError(
                f"--networks {config.networks}: {kind} keeps the width of its encoder, and "
                "networks side by side are wider; leave out --networks, or use another --adapter"
            )


def find_tokens(config: TrainConfig) -> StoredTokens | None:
    """Open the tokens to train with, None without any; see `open_tokens`."""
    return open_tokens(
        config.features,
        config.group(TokenOptions),
        config.group(ObjectiveOptions),
        config.kinds,
        unpaired=config.unpaired,
        sub_batch=config.sub_batch,
    )


def _largest_batch(step: Callable[[int], Any], pairs: int, memory: int) -> int:
    """Find the largest batch that fits into some bytes; 512 if that cannot be found."""
    try:
        found, needed = largest_batch(step, pairs=pairs, memory=memory)
    except Exception as error:  # adapters of users may need values, and fail in any way
        text = "--batch-size auto: the memory of a step cannot be found (%s); using %d pairs"
        log.warning(text, reason_of(error), LEAST_BATCH)
        return LEAST_BATCH
    counted = f"{found:,} pairs, a step takes {needed // MIB:,} MiB of {memory // MIB:,}"
    log.info("--batch-size auto: %s", counted)
    return found
