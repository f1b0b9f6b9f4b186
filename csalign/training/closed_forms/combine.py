"""Parts of the final adapter: the trained network and a kernel CCA, side by side or one of them."""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import numpy as np
import torch

from csalign.adapters.builtin import Parts
from csalign.adapters.kernel_cca import MAX_LANDMARKS, KernelCca, KernelPairs, KernelSetting
from csalign.adapters.model import Adapter, find_kind
from csalign.adapters.side import SideAdapter, to_tensor
from csalign.core.arrays import Array
from csalign.core.enums import Modality
from csalign.core.progress import duration, show_figures, tick
from csalign.core.records import Record
from csalign.features.join import Pairs
from csalign.training.closed_forms.settings import POWERS, nearby, ridge_at, step_of
from csalign.training.closed_forms.unpaired import Matches
from csalign.training.network.sampler import PairSampler
from csalign.training.network.validation import Measured, measure, pool

MAX_PAIRS = 100_000  # to fit a kernel CCA on, which are in memory
SEARCH_ROWS = 2_000  # of the kernel side, on which the side, gamma and ridge are chosen
GAMMAS = (0.4, 0.75, 1.5)
STEPS = range(-2, 3)  # of the kernel's ridge, see `ridge_at`
OTHER_RIDGES = (0.1, 0.3, 1.0, 3.0)
ENOUGH_IMAGES = 100  # to validate on, for a choice by one standard error
FULL_FITS = 2.5  # what those on all rows take, in fits of as many rows on a coarse grid
SHARES = (0.5, 2 / 3)  # of the kernel, beside the network
SEARCH = "kernel CCA: fits"  # the phase of progress

Sides = Mapping[Modality, SideAdapter]


class Fold(NamedTuple):
    """Pairs to fit on, and pairs to validate on."""

    sampler: PairSampler
    val: Pairs


class Combination(Record):
    """Chosen parts, from which an adapter can be put together."""

    kernel: KernelSetting | None  # None for the networks alone
    share: float  # of the kernel in cosines; the rest is the networks'


class Combined(NamedTuple):
    """An adapter, how it was combined, its validation, and a summary for people."""

    adapter: Adapter
    combination: Combination
    measured: Measured
    summary: str


def can_combine(adapter: Adapter) -> bool:
    """Return whether a kernel CCA may stand beside or instead of an adapter.

    Its space must be free to choose, and its embeddings must not depend on tokens.
    """
    shapes = adapter.shapes.values()
    kinds = [find_kind(shape.kind, allow=(shape.kind,)) for shape in shapes]
    return all(kind.accepts_closed_form for kind in kinds) and all(
        shape.token_width is None for shape in shapes
    )


def combine(
    network: Adapter,
    rows: Pairs,
    folds: Sequence[Fold],
    matches: Matches | None,
    *,
    name: str,
    joins: bool,
    seed: int,
    seconds: float = math.inf,
) -> Combined:
    """Fit a kernel CCA, and choose on validation: the network, the kernel, or both.

    The network stays unless another choice gains more than the standard error of the difference,
    or two with fewer than 100 images to validate on.

    Args:
        network: trained, of kinds for which `can_combine`.
        rows: of the pairs.
        folds: to choose the kernel by; the network was trained without the rows of the first.
        matches: of unpaired rows, None without any.
        name: of the network for people, which may still be its closed form.
        joins: whether both may stand side by side, twice as wide.
        seed: of samples.
        seconds: that it may take, with `assemble`.

    Raises:
        TooSlow: as the first fits show, it would take longer; names that time.
    """
    val, source = folds[0].val, _Source.beside(network, rows, matches, seed)
    own = _embed(network, val)
    found = {0.0: _joined([(own, 1.0)], val)}
    alone = found[0.0]
    if alone.score.is_perfect:
        summary = f"parts: the {name} alone, which finds every match on validation"
        return Combined(network, Combination(kernel=None, share=0.0), alone, summary)
    setting, kernel = _search(source, folds, seconds)
    other = _embed(kernel, val)
    for share in (1.0, *(SHARES if joins else ())):
        found[share] = _joined([(own, 1 - share), (other, share)], val)
    best = 0.0
    for share, measured in found.items():
        if measured.score.better_than(found[best].score):
            best = share
    # The best of many settings looks good on few images, where a kernel of few rows opens the gap.
    errors = 1.0 if len(alone.recalls) >= ENOUGH_IMAGES else 2.0
    share = best if found[best].beats(alone, errors) else 0.0
    adapter = _put_together([network], kernel, share)
    combination = Combination(kernel=setting if share else None, share=share)
    summary = _summary(found, share, name, adapter.image.shape.width)
    return Combined(adapter, combination, found[share], summary)


def assemble(
    combination: Combination,
    networks: Sequence[Adapter],
    rows: Pairs,
    sampler: PairSampler,
    matches: Matches | None,
    seed: int,
) -> Adapter:
    """Fit the kernel of a combination on a sampler's pairs, beside networks of equal shares."""
    setting, kernel = combination.kernel, None
    if setting is not None:
        tick("kernel CCA of all parts")
        source = _Source.beside(networks[0], rows, matches, seed)
        fit = source.fit(sampler, setting.side, setting.gamma, MAX_LANDMARKS)
        kernel = Adapter.of_sides(fit.fit(setting))
    return _put_together(networks, kernel, combination.share)


def _put_together(networks: Sequence[Adapter], kernel: Adapter | None, share: float) -> Adapter:
    """Put parts side by side, of those with a share; the networks share what the kernel leaves."""
    even = (1 - share) / len(networks)
    weighed = [*((network, even) for network in networks), (kernel, share)]
    parts = [(part, own) for part, own in weighed if own and part is not None]
    if len(parts) == 1:
        return parts[0][0]
    shares = [share for _, share in parts]
    sides = {
        side: Parts.of([part.side(side).cpu() for part, _ in parts], shares) for side in Modality
    }
    return Adapter.of_sides(sides)


class TooSlow(Exception):
    """A kernel CCA would take longer than it may; the message is that time."""


@dataclass(frozen=True)
class _Source:
    """What kernel CCAs are fitted on, of the pairs that a sampler chooses."""

    rows: Pairs
    matches: Matches | None
    inputs: Sides  # of a network, see `KernelCca`
    seed: int

    @classmethod
    def beside(cls, network: Adapter, rows: Pairs, matches: Matches | None, seed: int) -> "_Source":
        """Take the inputs of a network, which is moved to the CPU."""
        return cls(rows, matches, {side: network.side(side).cpu() for side in Modality}, seed)

    def fit(self, sampler: PairSampler, side: Modality, gamma: float, limit: int) -> KernelCca:
        """Fit on the pairs of at most `limit` rows of a side, chosen at random, and on matches."""
        pairs = self._pairs(sampler, side, limit)
        return KernelCca(pairs, gamma, side, self.seed, self.inputs)

    def _pairs(self, sampler: PairSampler, side: Modality, limit: int) -> KernelPairs:
        (images, texts), weights = sampler.weighted_pairs()
        chosen = np.arange(len(images))
        if len(chosen) > MAX_PAIRS:
            rng = np.random.default_rng(self.seed)
            chosen = np.sort(rng.choice(len(chosen), MAX_PAIRS, replace=False))
        groups = (images if side is Modality.IMAGE else self.rows.caption_keys[texts])[chosen]
        names = np.unique(groups)
        if len(names) > limit:
            some = np.random.default_rng(self.seed).choice(names, limit, replace=False)
            kept = np.isin(groups, some)
            chosen, groups = chosen[kept], groups[kept]
        weights = weights[chosen]
        values = [self.rows.images[images[chosen]], self.rows.texts[texts[chosen]]]
        room = limit - len(names)
        if self.matches is not None and room > 0:
            total, share = len(self.matches.images), self.matches.share
            extra = np.linspace(0, total - 1, min(total, room)).astype(np.int64)
            weight = weights.sum() * share / (1 - share) / len(extra)
            weights = np.concatenate([weights, np.full(len(extra), weight)])
            groups = np.concatenate([groups, groups.max() + 1 + np.arange(len(extra))])
            matched = self.matches.images[extra], self.matches.texts[extra]
            values = [np.concatenate(own) for own in zip(values, matched, strict=True)]
        units = {
            one: self.inputs[one].unit(to_tensor(own, torch.device("cpu")))
            for one, own in zip(Modality, values, strict=True)
        }
        return KernelPairs(units[side.other], units[side], groups, weights)


def _search(
    source: _Source, folds: Sequence[Fold], seconds: float
) -> tuple[KernelSetting, Adapter]:
    """Choose the settings of the kernel: coarsely on few rows, then around these on all.

    Returns them, and the kernel CCA fitted without the rows of the first fold.
    """
    began, found = time.monotonic(), dict[KernelSetting, Measured]()
    landmarks = min(len(np.unique(source.rows.caption_keys)), MAX_LANDMARKS)

    def best() -> KernelSetting:
        return max(found, key=lambda setting: found[setting].score.mean_recall)

    def measure_at(fits: list[KernelCca], steps: Sequence[int], others: Sequence[float]) -> None:
        ridges = [ridge_at(step) for step in steps]
        parts: dict[KernelSetting, list[Measured]] = {}
        for fit, (_, val) in zip(fits, folds, strict=True):
            for setting, sides in fit.candidates(ridges, others, POWERS):
                both = _embed(Adapter.of_sides(sides), val)
                parts.setdefault(setting, []).append(measure(both[0], both[1], val.text_image))
        found.update({setting: pool(own) for setting, own in parts.items()})
        show_figures({"best R": f"{100 * found[best()].score.mean_recall:.1f} %"})

    grid = list(product(Modality, GAMMAS))
    tick(SEARCH, 0, len(grid) + 1)
    for number, (side, gamma) in enumerate(grid, 1):
        fits = [source.fit(fold.sampler, side, gamma, SEARCH_ROWS) for fold in folds]
        measure_at(fits, STEPS, OTHER_RIDGES[2:3])
        count = len(grid) + FULL_FITS * max(1.0, landmarks / SEARCH_ROWS)
        if number == 1 and (needed := count * (time.monotonic() - began)) > seconds:
            raise TooSlow(duration(needed))
        tick(SEARCH, number, len(grid) + 1)
    chosen, tried = best(), set[int]()
    fits = [source.fit(fold.sampler, chosen.side, chosen.gamma, MAX_LANDMARKS) for fold in folds]
    found.clear()
    while steps := [step for step in nearby(step_of(chosen.ridge)) if step not in tried]:
        measure_at(fits, steps, OTHER_RIDGES)
        chosen, tried = best(), tried | {*steps}  # until it lies between two that are worse
    tick(SEARCH, len(grid) + 1, len(grid) + 1)
    return chosen, Adapter.of_sides(fits[0].fit(chosen))


def _embed(adapter: Adapter, val: Pairs) -> list[Array]:
    """Align both sides of held-out pairs: unit rows (n, k) and (m, k)."""
    return [adapter.embed(side, val.embeddings(side)) for side in Modality]


def _joined(parts: Sequence[tuple[list[Array], float]], val: Pairs) -> Measured:
    """Validate embeddings side by side, each with its share."""
    images, texts = (
        np.concatenate([share**0.5 * both[number] for both, share in parts], 1)
        for number in range(len(Modality))
    )
    return measure(images, texts, val.text_image)


def _summary(found: Mapping[float, Measured], share: float, name: str, width: int) -> str:
    """Word what was chosen, and the recall of each choice."""
    both = [own for own in found if 0 < own < 1]
    shown = {0.0: name, 1.0: "kernel"}
    if both:
        best = max(both, key=lambda own: found[own].score.mean_recall)
        shown[share if share in both else best] = "both"
    recalls = {own: f"{100 * found[own].score.mean_recall:.1f} %" for own in shown}
    rest = ", ".join(f"{shown[own]} {recalls[own]}" for own in shown if own != share)
    noise = any(found[own].score.mean_recall > found[share].score.mean_recall for own in shown)
    within = ", within noise" if noise else ""
    return f"parts: {shown[share]}, val R {recalls[share]} ({rest}{within}), {width} wide"
