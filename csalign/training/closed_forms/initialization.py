"""Initialization of the adapters: the best closed form on validation, or random weights."""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from csalign.adapters.assignment import Trust
from csalign.adapters.canonical import ClosedForm, PairMoments, is_non_negative
from csalign.adapters.checkpoint import load_adapter_with_info
from csalign.adapters.kinds import BASELINES
from csalign.adapters.model import Adapter, find_kind, shared_width
from csalign.adapters.side import LOUD, SideShape, UnitRows, loud_scale
from csalign.core.arrays import Mask
from csalign.core.enums import Modality
from csalign.core.errors import ConfigError
from csalign.core.progress import duration, show_figures, tick
from csalign.features.join import Pairs
from csalign.runs.baselines import fit_baseline, some_of
from csalign.training.closed_forms.settings import (
    POWERS,
    Candidate,
    Setting,
    best_of,
    climb,
    ridge_at,
)
from csalign.training.closed_forms.unpaired import FEW_PAIRS, Matches, Pools, search
from csalign.training.config import AdapterOptions
from csalign.training.data import LEAST_UNPAIRED, TrainingData
from csalign.training.network.sampler import PairSampler
from csalign.training.network.validation import Measured, measure, pool

log = logging.getLogger(__name__)

FEWER_THAN_CLUSTERS = 30  # pairs, with which clusters are matched

Units = tuple[UnitRows, UnitRows]
Form = Literal["centred", "ridge", "cca"]
ROOTED = ("ridge", "cca", "assignment")  # take the square root of non-negative rows first


class Start(NamedTuple):
    """Initialized adapters, the name of their closed form or "random", and a summary for people."""

    adapter: Adapter
    name: str
    summary: str
    setting: Setting
    matches: Matches | None  # of unpaired rows under the closed form; None if it uses none


def initialize(
    options: AdapterOptions,
    data: TrainingData,
    sampler_of: Callable[[Mask | None], PairSampler],
    token_widths: Mapping[Modality, int],
    seed: int,
    *,
    unpaired_matches: bool = True,
) -> Start:
    """Build adapters at the closed form that does best on validation, or with random weights.

    The candidates depend on what the two kinds can represent. Two kinds with a linear path choose
    among CCA over a grid of ridges and powers and, if the encoders have the same width, the
    centred features themselves: encoders that are already aligned, such as CLIP's, can only lose
    by a map fitted on few pairs. If one side keeps its space, the other is regressed onto it.
    With unpaired rows on both sides, CCA also learns from matches among them, and with fewer than
    30 pairs clusters of both sides are matched too. A candidate replaces a simpler one only if it
    gains more than one standard error; matched clusters that look like chance replace none.

    With several folds a setting is fitted without the images of each, and all are measured; the
    adapters are those fitted without the first.

    Raises:
        ConfigError: there are no pairs, and the options exclude matches of unpaired rows.
    """
    began = time.monotonic()
    fits = _Fits(options, data, token_widths, seed)
    samplers = [sampler_of(fold) for fold in data.folds or (None,)]
    is_canonical = options.init == "canonical" and bool(fits.forms)
    few = len(samplers[0]) < FEWER_THAN_CLUSTERS
    few = few and is_canonical and unpaired_matches and fits.has_unpaired
    few = few and min(map(len, fits.pools.clustered)) >= LEAST_UNPAIRED
    if not (few or len(samplers[0])):
        raise ConfigError(
            f"{data.rows.name}: has no pairs, so that {LEAST_UNPAIRED} different rows of each side "
            "and two adapters that start from a closed form are needed; add rows, or leave out "
            "--adapter, --init random and --no-unpaired-matches"
        )
    if options.adapter in BASELINES:
        return fits.start(Setting(form=options.adapter), samplers[0], "no training: {name}")
    if not is_canonical:
        return fits.start(Setting(form="random"), samplers[0], "start: random weights")
    trust = fits.match_clusters(samplers[0])[1] if few else None
    relies = trust is not None and (trust.word != "chance" or not len(samplers[0]))
    if data.val is None:
        form = "assignment" if relies else fits.forms[-1]
        unused = "" if relies or trust is None else f"; not used: {trust}"
        return fits.start(Setting(form=form), samplers[0], f"closed form: {{name}}{unused}")
    folds = [_Fold(samplers[0], data.val)]
    if len(samplers) > 1:
        held_out = map(data.rows.take, data.folds)
        folds = [_Fold(*own) for own in zip(samplers, held_out, strict=True)]
    choice = _Choice(fits, folds)
    best, alone = choice.without_matches(), ""
    uses_matches = unpaired_matches and fits.has_unpaired
    rivals = [(choice.with_matches, "from the pairs alone")] * uses_matches
    rivals += [(choice.with_clusters, "without")] * relies
    for choose, other in rivals:
        rival = choose()
        if rival.measured.beats(best.measured):
            alone = f" ({100 * best.measured.score.mean_recall:.1f} % {other})"
            best = rival
    past = duration(time.monotonic() - began)
    recall = f"{100 * best.measured.score.mean_recall:.1f} %"
    recall += f" over {len(folds)} hold-outs" * (len(folds) > 1)
    summary = f"closed form: {choice.tried} settings in {past}, best R {recall}: {{name}}{alone}"
    return fits.start(best.setting, samplers[0], summary)


def fit_setting(
    setting: Setting | Mapping[str, Any],
    options: AdapterOptions,
    data: TrainingData,
    sampler: PairSampler,
    token_widths: Mapping[Modality, int],
    seed: int,
) -> tuple[Adapter, Matches | None]:
    """Fit the closed form that `initialize` chose on other pairs, such as all of them."""
    chosen = Setting.model_validate(setting)
    start = _Fits(options, data, token_widths, seed).start(chosen, sampler, "")
    return start.adapter, start.matches


def announce_start(start: Start) -> None:
    """Log the start, and which dimensions of the embeddings it scales down."""
    log.info("%s", start.summary)
    for side in start.adapter.names:
        scale = start.adapter.side(side).scale
        if scale is not None:
            loud = (scale < 1).nonzero()[:, 0].tolist()
            log.info(
                "%s embeddings: %d of %d dimensions (%s) vary more than %g times as much as most "
                "others; scaled down",
                side,
                len(loud),
                len(scale),
                ", ".join(map(str, loud[:5])) + ", ..." * (len(loud) > 5),
                LOUD,
            )


def load_initialized(folder: Path, allow: set[str]) -> tuple[Adapter, str]:
    """Load the adapters of a checkpoint, and the name of their initialization; see `find_kind`."""
    with torch.random.fork_rng(devices=[]):
        adapter, info = load_adapter_with_info(folder, allow=allow)
    return adapter, info.start


@dataclass
class _Fits:
    """Closed forms that two kinds can represent, and adapters that start from them."""

    options: AdapterOptions
    data: TrainingData
    token_widths: Mapping[Modality, int]
    seed: int
    _moments: dict[tuple[PairSampler, Units], PairMoments] = field(default_factory=dict)
    _units: dict[tuple[Modality, bool], UnitRows] = field(default_factory=dict)
    _matched: dict[PairSampler, tuple[ClosedForm, Trust]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        kinds = self.options.kinds
        self._kinds, self._allow = kinds, set(kinds.values())  # the user named them
        self._widths = {side: self.data.rows.embeddings(side).shape[1] for side in Modality}
        classes = {side: find_kind(kind, allow=self._allow) for side, kind in kinds.items()}
        self._kept = [side for side, kind in classes.items() if kind.keeps_width]
        self._free = [side for side, kind in classes.items() if kind.accepts_closed_form]

    @cached_property
    def width(self) -> int:
        """Width of the shared space, except of centred features."""
        return shared_width(self._kinds, self._widths, self.options.width, allow=self._allow)

    @cached_property
    def forms(self) -> tuple[Form, ...]:
        """The forms that the kinds can represent, the simplest first."""
        if len(self._kept) + len(self._free) < len(Modality):
            return ()
        width = self.width
        if self._kept:
            return ("ridge",) if self._free else ("centred",)
        narrower, wider = sorted(self._widths.values())
        if width > narrower:
            raise ConfigError(
                f"--width: {width} is more than the narrower encoder's {narrower}, which the "
                "closed form cannot give; lower it, or use --init random"
            )
        keeps_width = narrower == wider and self.options.width in (None, narrower)
        return ("centred", "cca") if keeps_width else ("cca",)

    @property
    def has_unpaired(self) -> bool:
        """Whether CCA can learn from matches of unpaired rows."""
        counts = [self.data.unpaired.count(side) for side in Modality]
        return "cca" in self.forms and min(counts) >= LEAST_UNPAIRED

    @cached_property
    def _non_negative(self) -> set[Modality]:
        return {side for side in Modality if is_non_negative(self.data.rows.embeddings(side))}

    def units(self, form: str) -> Units:
        """Return how a form makes unit rows, of images and of texts; a kept side's are plain."""
        images, texts = (self._units_of(side, form) for side in Modality)
        return images, texts

    def _units_of(self, side: Modality, form: str) -> UnitRows:
        root = form in ROOTED and self._kept != [side] and side in self._non_negative
        if (side, root) not in self._units:
            is_free, rows = side not in self._kept, self.data.rows.embeddings(side)
            scale = loud_scale(rows, signed_sqrt=root) if is_free else None
            self._units[side, root] = UnitRows(root, scale)
        return self._units[side, root]

    @cached_property
    def pools(self) -> Pools:
        """The unpaired rows."""
        return Pools(self.data.unpaired, self.units("cca"), self.seed)

    def moments(self, sampler: PairSampler, form: str) -> PairMoments:
        """Return the moments of a sampler's pairs, as a form needs them."""
        key = sampler, self.units(form)
        if key not in self._moments:
            pairs, weights = sampler.weighted_pairs()
            rows = self.data.rows
            self._moments[key] = PairMoments.of(rows.images, rows.texts, pairs, weights, key[1])
        return self._moments[key]

    def match_clusters(self, sampler: PairSampler) -> tuple[ClosedForm, Trust]:
        """Match clusters of unpaired rows, with the pairs of a sampler."""
        if sampler not in self._matched:
            tick("matching clusters")
            known = self.pools.first_pairs(self.data.rows, sampler)
            self._matched[sampler] = self.pools.clusters(self.width).start(known)
        return self._matched[sampler]

    def fit(
        self, form: str, ridge: float, powers: tuple[float, ...], sampler: PairSampler
    ) -> list[ClosedForm]:
        """Fit a form on the pairs of a sampler, for each of some powers if it has any."""
        if form == "assignment":
            if sampler in self._matched:
                return [self._matched[sampler][0]]
            clusters = self.pools.clusters(self.width)
            return [clusters.fit(self.pools.first_pairs(self.data.rows, sampler))]
        moments = self.moments(sampler, form)
        if form == "cca":
            return [*moments.cca(ridge=ridge, powers=powers, width=self.width)]
        if form == "ridge":
            (target,) = self._kept
            centre = self._kinds[target] != "identity"
            return [moments.ridge(target, ridge, centre=centre)]
        frozen = [side for side in self._kept if self._kinds[side] == "identity"]
        return [moments.centred(*frozen)]

    def start(self, setting: Setting, sampler: PairSampler, summary: str) -> Start:
        """Fit a setting on the pairs of a sampler, and build adapters that start from it."""
        if setting.form in BASELINES:
            learned = np.isin(np.arange(len(self.data.rows.images)), sampler.weighted_pairs()[0][0])
            adapter, name = fit_baseline(setting.form, self.data.rows.take(some_of(learned)))
            return Start(adapter, name, summary.format(name=name), setting, None)
        units = self.units(setting.form)
        if setting.form == "random":
            return Start(self._build(None, units), "random", summary, setting, None)
        # The map of the first round's matches; of very few pairs, another form may start better.
        is_matched = setting.form == "assignment"
        trust = self.match_clusters(sampler)[1] if is_matched else None
        (form,) = self.fit(setting.form, setting.ridge, (setting.power,), sampler)
        name, matches = str(trust) if trust else form.name, None
        if setting.path:
            pairs = self.moments(sampler, setting.form)
            form, matches = self.pools.follow(pairs, form, setting, self.width)
            rounds = f"share {setting.share:g}, {setting.rounds} rounds"
            name = f"{form.name} + unpaired matches ({rounds})"
            shown = f"{form.name} + {len(matches.images):,} matches of unpaired rows, {rounds}"
        else:
            shown = name
        adapter = self._build(len(form.image_weight), units)
        adapter.start_from(form)
        return Start(adapter, name, summary.format(name=shown), setting, matches)

    def _build(self, width: int | None, units: Units) -> Adapter:
        """Build adapters with random weights; a width of None is that of the kinds and options."""
        of_sides = dict(zip(Modality, units, strict=True))
        common = self.options, self._kinds, self._widths, width or self.width
        return build_adapter(*common, of_sides, self.seed, self.token_widths)


def build_adapter(
    options: AdapterOptions,
    kinds: Mapping[Any, str],
    widths: Mapping[Any, int],
    width: int,
    units: Mapping[Any, UnitRows],
    seed: int,
    token_widths: Mapping[Any, int] = MappingProxyType({}),
) -> Adapter:
    """Build an adapter with random weights of a seed; all mappings are by side."""
    shapes = {
        side: SideShape(
            kind=kind,
            input_width=widths[side],
            width=width,
            hidden=options.hidden,
            dropout=options.dropout,
            signed_sqrt=units[side].signed_sqrt,
            token_width=token_widths.get(side),
            rank=options.rank,
            layers=options.layers,
            scaled=units[side].scale is not None,
        )
        for side, kind in kinds.items()
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapter = Adapter(shapes, allow=set(kinds.values()))
    for side, own in units.items():
        if own.scale is not None:
            adapter.side(side).set_scale(own.scale)
    return adapter


@dataclass
class _Fold:
    """Pairs to fit on, and rows to measure on."""

    sampler: PairSampler
    val: Pairs
    _rows: dict[Units, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def measure(self, form: ClosedForm, units: Units) -> Measured:
        """Measure a form on the held-out rows."""
        if units not in self._rows:
            self._rows[units] = units[0](self.val.images), units[1](self.val.texts)
        images, texts = form.outputs(*self._rows[units])
        return measure(images.numpy(), texts.numpy(), self.val.text_image)


class _Choice:
    """Measures settings on all folds."""

    def __init__(self, fits: _Fits, folds: list[_Fold]) -> None:
        self.tried, self._most = 0, 0.0
        self._fits, self._folds = fits, folds
        tick("closed form")

    def without_matches(self) -> Candidate:
        """Choose a form by the noise rule, each with the ridge and power that are best."""
        self._best = {form: self._climb(form) for form in self._fits.forms}
        chosen, *later = self._best.values()
        for own in later:
            if own.measured.beats(chosen.measured):
                chosen = own
        self._chosen = chosen
        return chosen

    def with_matches(self) -> Candidate:
        """Find the best rounds of matches, from the chosen form."""
        fits, start = self._fits, self._chosen
        if fits.units(start.setting.form) != fits.units("cca"):
            start = self._best["cca"]
        pairs = [fits.moments(fold.sampler, "cca") for fold in self._folds]
        few = min(len(fold.sampler) for fold in self._folds) < FEW_PAIRS
        measure_all = partial(self._measure, "cca")
        return search(
            fits.pools, pairs, start, fits.width, measure_all, few=few, progress=self._show
        )

    def with_clusters(self) -> Candidate:
        """Match clusters of unpaired rows, with the pairs of each fold."""
        forms = [self._fits.fit("assignment", 0, (), fold.sampler)[0] for fold in self._folds]
        measured = self._measure("assignment", forms)
        found = Candidate(Setting(form="assignment"), 0, forms, measured)
        self._show(found)
        return found

    def _climb(self, form: Form) -> Candidate:
        if form == "centred":
            return self._at(form, 0)
        return climb(partial(self._at, form), self._fits.data.rows.name)

    def _at(self, form: Form, step: int) -> Candidate:
        """Fit a form at a step of the ridges on each fold; the best of its powers."""
        ridge, found = ridge_at(step), []
        fitted = [self._fits.fit(form, ridge, POWERS, fold.sampler) for fold in self._folds]
        for power, forms in zip(POWERS, zip(*fitted, strict=True), strict=False):
            setting = Setting(form=form, ridge=ridge, power=power)
            found.append(Candidate(setting, step, [*forms], self._measure(form, [*forms])))
            self._show(found[-1])
        return best_of(found)

    def _measure(self, form: str, forms: list[ClosedForm]) -> Measured:
        folds, units = zip(self._folds, forms, strict=True), self._fits.units(form)
        return pool([fold.measure(own, units) for fold, own in folds])

    def _show(self, tried: Candidate) -> None:
        self.tried += 1
        tick("closed form", self.tried)
        name, recall = tried.forms[0].name, tried.measured.score.mean_recall
        log.debug("start %s: validation mean recall %.4f", name, recall)
        self._most = max(self._most, recall)
        show_figures({"": name, "best R": f"{100 * self._most:.1f} %"})
