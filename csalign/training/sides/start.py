"""The start of the adapters of any sides: the best closed form on validation, or random weights."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import numpy as np
import torch
from torch import Tensor

from csalign.adapters.canonical import is_non_negative
from csalign.adapters.generalised import (
    GeneralForm,
    SideInput,
    SideMap,
    SideMoments,
    add_side,
    consensus,
)
from csalign.adapters.model import DEFAULT_WIDTH, Adapter, find_kind
from csalign.adapters.side import UnitRows, loud_scale
from csalign.core.arrays import Array, Ints, Mask
from csalign.core.enums import AnySide, Modality
from csalign.core.errors import ConfigError
from csalign.core.progress import duration, show_figures, tick
from csalign.training.closed_forms.initialization import Start, build_adapter
from csalign.training.closed_forms.settings import (
    POWERS,
    Candidate,
    Setting,
    best_of,
    climb,
    ridge_at,
)
from csalign.training.config import AdapterOptions
from csalign.training.network.validation import Measured
from csalign.training.sides.data import SidesData
from csalign.training.sides.validation import first_rows, measure_sides

FROZEN = "identity"


def kinds_of(options: AdapterOptions, sides: tuple[AnySide, ...]) -> dict[AnySide, str]:
    """Return the kind of each side's adapter.

    Raises:
        ConfigError: a kind cannot be one of several sides.
    """
    own: dict[AnySide, str | None]
    own = {Modality.IMAGE: options.image_adapter, Modality.TEXT: options.text_adapter}
    for side, given in own.items():
        if given is not None and side not in sides:
            raise ConfigError(f"--{side}-adapter: there is no {side} side among {', '.join(sides)}")
    kinds = {side: own.get(side) or options.adapter for side in sides}
    for kind in kinds.values():
        found = find_kind(kind, allow={kind})
        if found.keeps_width or not (found.accepts_closed_form or options.init == "random"):
            raise ConfigError(
                f"--adapter {kind}: needs one of two sides; with several use linear, mlp, glu or "
                "transformer, or with --init random a kind that maps to any width"
            )
    return kinds


@dataclass
class Starts:
    """Closed forms of any sides, and adapters that start from them.

    Attributes:
        options: of the adapters.
        data: rows.
        kinds: of the adapters by side.
        seed: of random weights.
        added: a side to add to the others, whose embeddings are in the shared space already.
    """

    options: AdapterOptions
    data: SidesData
    kinds: Mapping[AnySide, str]
    seed: int
    added: AnySide | None = None
    _units: dict[tuple[AnySide, bool], UnitRows] = field(default_factory=dict)
    _moments: dict[tuple[bool, str], SideMoments] = field(default_factory=dict)

    def initialize(self) -> Start:
        """Build adapters at the closed form that does best on validation, or random weights.

        The candidates are generalised CCA over a grid of ridges and powers and, if all encoders
        have the same width, the centred features; a side that is added is regressed onto the
        others. Without validation it is the last of these, with the usual settings.
        """
        began, data = time.monotonic(), self.data
        if self.options.init == "random":
            return self.start(Setting(form="random"), data.held_out, "start: random weights")
        if data.val is None:
            setting = Setting(form=self._forms[-1])
            return self.start(setting, data.held_out, "closed form: {name}")
        tick("closed form")
        self._tried, self._most = 0, 0.0
        found = [self._climb(form) for form in self._forms]
        best = found[0]
        for later in found[1:]:
            best = later if later.measured.beats(best.measured) else best
        recall = f"{100 * best.measured.score.mean_recall:.1f} %"
        past = duration(time.monotonic() - began)
        summary = f"closed form: {self._tried} settings in {past}, best R {recall}: {{name}}"
        return self.start(best.setting, data.held_out, summary)

    def start(self, setting: Setting, leave_out: Mask | None, summary: str) -> Start:
        """Fit a setting without some items, and build adapters that start from it."""
        if setting.form == "random":
            adapter = self._build(self._width, setting.form)
            return Start(adapter, "random", summary, setting, None)
        (form,) = self.fit(setting.form, setting.ridge, (setting.power,), leave_out)
        adapter = self._build(len(next(iter(form.sides.values())).weight), setting.form)
        for side, own in form.sides.items():
            if side != self.added and self.added is not None:
                continue
            adapter.side(side).start_from(own.mean, own.weight, own.bias)
        return Start(adapter, form.name, summary.format(name=form.name), setting, None)

    @cached_property
    def _widths(self) -> dict[AnySide, int]:
        return {side: own.embeddings.shape[1] for side, own in self.data.rows.sides.items()}

    @cached_property
    def _width(self) -> int:
        """Width of the shared space: at most that of the second widest side."""
        if self.added is not None:
            return next(width for side, width in self._widths.items() if side != self.added)
        most = sorted(self._widths.values())[-2]
        if self.options.width is not None and self.options.width > most:
            raise ConfigError(
                f"--width: {self.options.width} is more than the {most} of the second widest side; "
                "lower it"
            )
        return self.options.width or min(DEFAULT_WIDTH, most)

    @cached_property
    def _forms(self) -> tuple[str, ...]:
        if self.added is not None:
            return ("ridge",)
        widths = {*self._widths.values()}
        keeps = len(widths) == 1 and self.options.width in (None, *widths)
        return ("centred", "gcca") if keeps else ("gcca",)

    def _unit(self, side: AnySide, form: str) -> UnitRows:
        """Return how a form makes unit rows of a side; those of a finished space stay."""
        if self.added not in (None, side):
            return UnitRows()
        rows = self.data.rows.sides[side].embeddings
        root = form != "centred" and form != "random" and is_non_negative(rows)
        if (side, root) not in self._units:
            self._units[side, root] = UnitRows(root, loud_scale(rows, signed_sqrt=root))
        return self._units[side, root]

    def inputs(self, form: str, leave_out: Mask | None) -> dict[str, SideInput]:
        """Return the rows of a form by side, without those of some items."""
        inputs: dict[str, SideInput] = {}
        for side, own in self.data.rows.sides.items():
            items = own.items
            if leave_out is not None:
                items = np.where(leave_out[items], -1, items)
            inputs[side] = SideInput(own.embeddings, items, self._unit(side, form))
        return inputs

    def fit(
        self, form: str, ridge: float, powers: tuple[float, ...], leave_out: Mask | None
    ) -> list[GeneralForm]:
        """Fit a form for each of some powers, if it has any."""
        if form == "ridge":
            return [self._fit_added(ridge, leave_out)]
        key = leave_out is None, form
        if key not in self._moments:
            self._moments[key] = SideMoments.of(self.inputs(form, leave_out))
        moments = self._moments[key]
        if form == "gcca":
            return [*moments.gcca(ridge=ridge, powers=powers, width=self._width)]
        means = {side: own.mean.float() for side, own in moments.spectra.items()}
        maps = {side: SideMap(mean, torch.eye(len(mean))) for side, mean in means.items()}
        return [GeneralForm("centred features", maps)]

    def added_targets(self, leave_out: Mask | None) -> tuple[SideInput, Array]:
        """Return the rows of the side that is added, and the mean output of their items' others."""
        assert self.added is not None
        others = self.inputs("ridge", leave_out)
        new = others.pop(self.added)
        outputs = dict.fromkeys(others, torch.from_numpy)
        numbers, place = np.unique(new.items, return_inverse=True)
        targets, counts = (own.numpy()[place] for own in consensus(others, outputs, numbers))
        return replace(new, items=np.where(counts > 0, new.items, -1)), targets

    def _fit_added(self, ridge: float, leave_out: Mask | None) -> GeneralForm:
        """Regress the side that is added on the mean output of the other sides of an item."""
        new, targets = self.added_targets(leave_out)
        kept = SideMap(torch.zeros(self._width), torch.eye(self._width))
        maps: dict[str, SideMap] = dict.fromkeys(self.kinds, kept)
        maps[str(self.added)] = add_side(new, targets, ridge=ridge)
        return GeneralForm(f"ridge regression onto the others (ridge {ridge:g})", maps)

    def _build(self, width: int, form: str) -> Adapter:
        units = {side: self._unit(side, form) for side in self.kinds}
        return build_adapter(self.options, self.kinds, self._widths, width, units, self.seed)

    def _climb(self, form: str) -> Candidate:
        if form == "centred":
            return self._at(form, 0)
        return climb(partial(self._at, form), self.data.rows.name)

    def _at(self, form: str, step: int) -> Candidate:
        """Fit a form at a step of the ridges; the best of its powers."""
        ridge, found = ridge_at(step), []
        forms = self.fit(form, ridge, POWERS, self.data.held_out)
        for power, own in zip(POWERS, forms, strict=False):
            setting = Setting.model_validate({"form": form, "ridge": ridge, "power": power})
            found.append(Candidate(setting, step, [own], self._measure(own, form)))
            recall = found[-1].measured.score.mean_recall
            self._tried, self._most = self._tried + 1, max(self._most, recall)
            tick("closed form", self._tried)
            show_figures({"": own.name, "best R": f"{100 * self._most:.1f} %"})
        return best_of(found)

    def _measure(self, form: GeneralForm, name: str) -> Measured:
        outputs = {}
        for side, (units, items) in self._val_units(name).items():
            outputs[side] = form.sides[side].outputs(units).numpy(), items
        return measure_sides(outputs, self.added)

    def _val_units(self, form: str) -> dict[AnySide, tuple[Tensor, Ints]]:
        assert self.data.val is not None
        found = first_rows(self.data.val).items()
        return {side: (self._unit(side, form)(own), n) for side, (own, n) in found if len(n)}
