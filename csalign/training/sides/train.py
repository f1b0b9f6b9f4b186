"""Training on several sides: one adapter per side, with the loop and the phases of two."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from csalign.adapters.checkpoint import load_adapter_with_info
from csalign.adapters.model import Adapter
from csalign.adapters.side import mean_square
from csalign.core.enums import AnySide, Modality, side_of
from csalign.core.errors import ConfigError
from csalign.features.reader import FeatureSet
from csalign.features.sides import SidedRows, chosen_sides
from csalign.runs.load import check_encoders
from csalign.training.checkpoints import UnfinishedRun, info_of
from csalign.training.closed_forms.initialization import Start
from csalign.training.closed_forms.settings import Setting
from csalign.training.config import (
    AdapterOptions,
    DataOptions,
    ObjectiveOptions,
    TrainConfig,
)
from csalign.training.network.loop import FIRST, Log, Phase, Validation
from csalign.training.network.schedule import Timer
from csalign.training.phases import Trained, announce_refit, train_networks
from csalign.training.sides.data import Sampler, SidesData, announce_sides, load_sides_data
from csalign.training.sides.kernels import assemble_sides, choose_kernels
from csalign.training.sides.loader import SidesLoader
from csalign.training.sides.loss import SidesLoss
from csalign.training.sides.options import check_several, check_two
from csalign.training.sides.start import FROZEN, Starts, kinds_of
from csalign.training.sides.validation import scale_of_sides, validate_sides
from csalign.training.work import Job

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class SidesWork(Job):
    """A job on several sides.

    With a `base`, a side is added to it: its own sides are in `data` as it aligns them.
    """

    data: SidesData
    kinds: Mapping[AnySide, str]
    base: Adapter | None = None
    _starts: dict[int, Starts] = field(default_factory=dict)

    @property
    def added(self) -> AnySide | None:
        """The side that is added to the base."""
        return None if self.config.add_side is None else side_of(self.config.add_side)

    def announce(self) -> None:
        """Log what is trained and validated on."""
        if self.base is not None:
            through = ", ".join(side for side in self.data.rows.sides if side != self.added)
            log.info("adding %s to %s, through %s", self.added, self.config.into, through)
        announce_sides(self.data)

    def counts(self) -> dict[str, int]:
        """Count the items of two sides or more that are trained and validated on."""
        val = self.data.val
        return {"train": self.data.trained, "validation": val.count if val else 0}

    def sampler(self, phase: Phase = FIRST) -> Sampler:
        """See `Job.sampler`."""
        leave_out = None if self.refits(phase) else self.data.held_out
        return Sampler(self.data, leave_out, once=self.config.caption_weights)

    def load(
        self, sampler: Any, size: int, seed: int, device: torch.device, unpaired: int
    ) -> SidesLoader:
        """See `Job.load`."""
        return SidesLoader(self.data, sampler, size, seed, device, unpaired, self.added)

    def loss(self, objective: ObjectiveOptions, **values: Any) -> SidesLoss:
        """See `Job.loss`."""
        return SidesLoss(objective, hub=self.config.hub and side_of(self.config.hub), **values)

    def scale(self, adapter: Adapter) -> float:
        """See `Job.scale`."""
        return scale_of_sides(adapter, self.data.val, self.added)

    def validation(self) -> Validation | None:
        """See `Job.validation`."""
        if (val := self.data.val) is None:
            return None
        return Validation(lambda own: validate_sides(own, val, self.added), val.count)

    def initialize(self) -> Start:
        """Choose a closed form."""
        return self._of_seed(self.config.seed).initialize()

    def fit(self, setting: Setting, phase: Phase) -> tuple[Adapter, None]:
        """Fit a closed form on the items of a phase."""
        leave_out = None if self.refits(phase) else self.data.held_out
        starts = self._of_seed(self.config.seed + phase.number)
        return starts.start(setting, leave_out, "").adapter, None

    def info(self, phase: Phase) -> dict[str, Any]:
        """Return what a run records of the rows that a phase learns from."""
        data, images = self.data, self.data.rows.sides.get(Modality.IMAGE)
        found = info_of(data.features, data.rows.sides) | {
            "train_split": data.refit_split if self.refits(phase) else data.split,
            "image_norm": None if images is None else mean_square(images.embeddings) ** 0.5,
        }
        if self.base is None or self.base.info is None:
            return found
        before = self.base.info
        for name in ("encoders", "encoder_fingerprints", "encoder_settings"):
            new = {self.added: found[name][self.added]}
            found[name] = (getattr(before, name) or dict.fromkeys(before.encoders)) | new
        return found | {"image_norm": before.image_norm}

    def complete(self, adapter: Adapter) -> Adapter:
        """Return the adapter of a run: with the sides of the base, which stay as they are."""
        if self.base is None:
            return adapter
        sides = {side: self.base.side(side) for side in self.base.names}
        return Adapter.of_sides(sides | {self.added: adapter.side(str(self.added))})

    def run(self, run: UnfinishedRun, log_lines: Log) -> Trained:
        """Train the network, in the main process, and again on all items if it is refitted."""
        data = self.data
        networks, decided = train_networks(self, run, log_lines)
        counts = int(data.together.sum()), data.trained
        refit = announce_refit(data, decided, *counts, log_lines, "items", 1)
        if not self._combines:
            adapter = self.complete(networks[-1])
            return Trained(adapter, adapter, decided, "", refit)
        starts, setting = self._of_seed(self.config.seed), decided.setting
        joins = self.config.width is None or self.base is not None
        seconds = self.seconds_left
        name = "network" if decided.best else "closed form"
        chosen = choose_kernels(networks[0], starts, setting, name, joins=joins, seconds=seconds)
        leave_out = None if data.refits else data.held_out
        adapter = self.complete(assemble_sides(chosen, networks[-1], starts, setting, leave_out))
        if chosen.score is not None:
            score = chosen.score._asdict()
            log_lines([{"step": decided.made, "validation": score, "matched": True}])
            decided = decided.model_copy(update={"scores": {**decided.scores, "parts": score}})
        return Trained(adapter, adapter, decided, chosen.words, refit)

    @property
    def _combines(self) -> bool:
        """Whether kernels may stand beside the network, or instead of it."""
        chooses = self.config.ensemble == "auto" and self.config.init == "canonical"
        return chooses and self.data.val is not None

    def timer(self, *, combines: bool = False) -> Timer:
        """Build the timer of the first network, which kernels may follow."""
        return super().timer(combines=combines or self._combines)

    def _of_seed(self, seed: int) -> Starts:
        if seed not in self._starts:
            options = self.config.group(AdapterOptions)
            self._starts[seed] = Starts(options, self.data, self.kinds, seed, self.added)
        return self._starts[seed]


def sides_work(config: TrainConfig) -> SidesWork | None:
    """Prepare to train on several sides; None to train on images and texts alone.

    Raises:
        ConfigError: options have no meaning for these sides.
        DataError: see `load_sides_data`; or a set is of other encoders than the run to add to.
    """
    features = FeatureSet.open(config.features)
    sides = several_sides(config, features)
    if sides is None:
        return None
    base = None
    if config.add_side is not None and config.into is not None:
        base, info = load_adapter_with_info(config.into)
        sides = _sides_with(base, side_of(config.add_side), sides, config)
    check_several(config, sides)
    new = None if base is None else side_of(str(config.add_side))
    data = load_sides_data(features, config.group(DataOptions), sides, config.seed, new)
    if base is None or new is None or config.into is None:
        return SidesWork(config, data, kinds_of(config.group(AdapterOptions), sides))
    known = [side for side in base.names if side in features.sides]
    check_encoders(features, config.into, info, any_encoder=config.any_encoder, sides=known)
    kinds = dict.fromkeys(sides, FROZEN) | kinds_of(config.group(AdapterOptions), (new,))
    held = data.val
    data = replace(data, rows=_aligned(base, data.rows), val=held and _aligned(base, held))
    return SidesWork(config, data, kinds, base)


def several_sides(config: TrainConfig, features: FeatureSet) -> tuple[AnySide, ...] | None:
    """Return the sides to train on; None if a set has, or the options name, images and texts.

    Raises:
        ConfigError: the set has no such sides, or options need other sides.
    """
    if config.sides is not None or features.is_sided:
        sides = chosen_sides(features, config.sides)
        if {*sides} != {*Modality}:
            return sides
    check_two(config)
    return None


def _sides_with(
    base: Adapter, added: AnySide, sides: tuple[AnySide, ...], config: TrainConfig
) -> tuple[AnySide, ...]:
    """Return the sides of a set that train the one that is added to a run, and this one."""
    if added in base.names:
        raise ConfigError(
            f"--add-side: {config.into} has a side {added} already; its sides are "
            f"{', '.join(base.names)}; name one that it lacks"
        )
    known = tuple(side for side in sides if side in base.names)
    if added in sides and not known:
        raise ConfigError(
            f"--into: {config.into} aligns {', '.join(base.names)}, of which {config.features} has "
            "none; a side that both have is needed"
        )
    return tuple(side for side in sides if side in (*known, added))


def _aligned(base: Adapter, rows: SidedRows) -> SidedRows:
    """Replace the embeddings of the sides that an adapter has by those that it makes."""
    sides = {
        side: replace(own, embeddings=base.embed(side, own.embeddings))
        if side in base.names
        else own
        for side, own in rows.sides.items()
    }
    return replace(rows, sides=sides)
