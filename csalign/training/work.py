"""What a run trains on and how: its trainers, closed forms and the time left."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from csalign.adapters.model import Adapter, find_kind
from csalign.adapters.side import mean_square
from csalign.core.arrays import Mask
from csalign.core.enums import Modality
from csalign.core.errors import ConfigError
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
from csalign.training.network.build import build_trainer, source_of_pairs
from csalign.training.network.loop import FIRST, Phase, Trainer
from csalign.training.network.sampler import PairSampler, make_sampler
from csalign.training.network.schedule import Timer


@dataclass(frozen=True)
class Timed:
    """Options of a job, and the time that it takes."""

    config: TrainConfig
    data: Any  # what is trained on
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


@dataclass(frozen=True)
class Work(Timed):
    """What all processes of a job on images and texts train from."""

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

    def trainer(
        self, adapter: Adapter, phase: Phase = FIRST, timer: Timer | None = None
    ) -> Trainer:
        """Build the trainer of a phase."""
        config, data, sampler = self.config, self.data, self.sampler(phase)
        objective, options = config.group(ObjectiveOptions), config.group(OptimizerOptions)
        common = objective, options, config.captions
        return build_trainer(
            adapter,
            source_of_pairs(data, self.tokens, sampler, *common),
            objective,
            options,
            captions=config.captions,
            device=config.device,
            seed=config.seed,
            phase=phase,
            timer=timer,
        )

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
