"""Parts of the final adapter: the trained network and a kernel CCA, side by side or one of them."""

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from csalign.adapters.builtin import Parts
from csalign.adapters.kernel_cca import MAX_LANDMARKS, KernelCca, KernelPairs, KernelSetting
from csalign.adapters.model import Adapter, find_kind
from csalign.adapters.side import SideAdapter, SideShape, unit_inputs
from csalign.core.enums import Modality
from csalign.core.progress import show_figures, tick
from csalign.core.records import Record
from csalign.features.join import Pairs
from csalign.training.closed_forms.settings import POWERS, nearby, ridge_at, step_of
from csalign.training.closed_forms.unpaired import Matches
from csalign.training.sampler import PairSampler
from csalign.training.validation import Measured, measure, pool

log = logging.getLogger(__name__)

Array = npt.NDArray[Any]

MAX_PAIRS = 100_000  # to fit a kernel CCA on, which are in memory
SEARCH_ROWS = 2_000  # of the kernel side, on which the side, gamma and ridge are chosen
GAMMAS = (0.4, 0.75, 1.5)
STEPS = range(-2, 3)  # of the kernel's ridge, see `ridge_at`
OTHER_RIDGES = (0.1, 0.3, 1.0, 3.0)
SHARES = (0.5, 2 / 3)  # of the kernel, beside the network
SEARCH = "kernel CCA: fits"  # the phase of progress

Inputs = Mapping[Modality, SideAdapter]


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
    joins: bool,
    seed: int,
) -> Combined:
    """Fit a kernel CCA, and choose on validation: the network, the kernel, or both.

    The network stays unless another choice gains more than the standard error of the difference.

    Args:
        network: trained, of kinds for which `can_combine`.
        rows: of the pairs.
        folds: to choose the kernel by; the network was trained without the rows of the first.
        matches: of unpaired rows, None without any.
        joins: whether both may stand side by side, twice as wide.
        seed: of samples.
    """
    width, val = network.image.shape.width, folds[0].val
    inputs = {side: network.side(side).cpu() for side in Modality}
    own = _embed(network, val)
    found = {0.0: _joined([(own, 1.0)], val)}
    alone = found[0.0]
    if alone.score.is_perfect:
        summary = "parts: the network alone, which finds every match on validation"
        return Combined(network, Combination(kernel=None, share=0.0), alone, summary)
    setting, sides = _search(rows, folds, matches, inputs, width, seed)
    other = _embed(Adapter.of_sides(sides), val)
    for share in (1.0, *(SHARES if joins else ())):
        found[share] = _joined([(own, 1 - share), (other, share)], val)
    best = 0.0
    for share, measured in found.items():
        if measured.score.better_than(found[best].score):
            best = share
    share = best if found[best].beats(alone) else 0.0
    adapter = _put_together([network], sides, share) if share else network
    combination = Combination(kernel=setting if share else None, share=share)
    summary = _summary(found, share, adapter.image.shape.width)
    return Combined(adapter, combination, found[share], summary)


def assemble(
    combination: Combination,
    networks: Sequence[Adapter],
    rows: Pairs,
    sampler: PairSampler,
    matches: Matches | None,
    seed: int,
) -> Adapter:
    """Fit the kernel of a combination on a sampler's pairs, and put it beside the networks.

    Args:
        combination: what was chosen.
        networks: equal shares of what the kernel leaves; at least one, even if it has no share.
        rows: of the pairs.
        sampler: of the pairs to fit on.
        matches: of unpaired rows, None without any.
        seed: of samples.
    """
    if combination.kernel is None:
        return networks[0] if len(networks) == 1 else _put_together(networks, None, 0.0)
    inputs = {side: networks[0].side(side).cpu() for side in Modality}
    width = networks[0].image.shape.width
    tick("kernel CCA of all parts")
    sides = _fit(combination.kernel, rows, sampler, matches, inputs, width, seed)
    return _put_together(networks, sides, combination.share)


def _put_together(
    networks: Sequence[Adapter], kernel: Mapping[Modality, SideAdapter] | None, share: float
) -> Adapter:
    """Put parts side by side; the networks share what the kernel leaves."""
    if kernel is not None and share == 1:
        return Adapter.of_sides(kernel)
    shares = [(1 - share) / len(networks)] * len(networks) + [share] * (kernel is not None)
    sides = {}
    for side in Modality:
        parts = [network.side(side).cpu() for network in networks]
        parts += [] if kernel is None else [kernel[side]]
        shapes = tuple(part.shape for part in parts)
        width = sum(shape.width for shape in shapes)
        shape = SideShape("parts", shapes[0].input_width, width, parts=shapes)
        sides[side] = Parts(shape, parts)
        sides[side].shares = torch.tensor(shares)
    return Adapter.of_sides(sides)


class _Search:
    """Kernel CCAs of at most some landmarks, measured on all folds."""

    def __init__(
        self,
        rows: Pairs,
        folds: Sequence[Fold],
        matches: Matches | None,
        inputs: Inputs,
        width: int,
        limit: int,
        seed: int,
    ) -> None:
        self._folds, self._inputs, self._width, self._seed = folds, inputs, width, seed
        self._pairs = partial(_pairs, rows, matches=matches, inputs=inputs, limit=limit, seed=seed)
        self._fits: dict[tuple[Modality, float], list[KernelCca]] = {}
        self._found: dict[KernelSetting, Measured] = {}

    def fits(self, side: Modality, gamma: float) -> list[KernelCca]:
        """Return the fit of each fold, the last ones in memory alone."""
        if (side, gamma) not in self._fits:
            pairs = [self._pairs(fold.sampler, side) for fold in self._folds]
            own = [KernelCca(some, gamma, side, self._seed, self._inputs) for some in pairs]
            self._fits = {(side, gamma): own}
        return self._fits[side, gamma]

    def measure(
        self, side: Modality, gamma: float, steps: Sequence[int], others: Sequence[float]
    ) -> KernelSetting:
        """Measure ridges of the kernel, by their steps, and of the other side; the best so far."""
        ridges = [ridge_at(step) for step in steps]
        found: dict[KernelSetting, list[Measured]] = {}
        for fit, (_, val) in zip(self.fits(side, gamma), self._folds, strict=True):
            for setting, own in fit.candidates(ridges, others, POWERS, self._width):
                both = _embed(Adapter.of_sides(own), val)
                found.setdefault(setting, []).append(measure(both[0], both[1], val.text_image))
        self._found |= {setting: pool(own) for setting, own in found.items()}
        best = max(self._found, key=lambda setting: self._found[setting].score.mean_recall)
        show_figures({"best R": f"{100 * self._found[best].score.mean_recall:.1f} %"})
        return best


def _search(
    rows: Pairs,
    folds: Sequence[Fold],
    matches: Matches | None,
    inputs: Inputs,
    width: int,
    seed: int,
) -> tuple[KernelSetting, dict[Modality, SideAdapter]]:
    """Choose the settings of the kernel: coarsely on few rows, then around these on all.

    Returns:
        The settings, and both sides fitted without the rows of the first fold.
    """
    options = rows, folds, matches, inputs, width
    grid = list(product(Modality, GAMMAS))
    tick(SEARCH, 0, len(grid) + 1)
    coarse = _Search(*options, SEARCH_ROWS, seed)
    for number, (side, gamma) in enumerate(grid, 1):
        few = coarse.measure(side, gamma, STEPS, OTHER_RIDGES[2:3])
        tick(SEARCH, number, len(grid) + 1)
    fine, best, tried = _Search(*options, MAX_LANDMARKS, seed), few, set[int]()
    while steps := [step for step in nearby(step_of(best.ridge)) if step not in tried]:
        best = fine.measure(few.side, few.gamma, steps, OTHER_RIDGES)
        tried |= {*steps}  # until the best lies between two that are worse
    tick(SEARCH, len(grid) + 1, len(grid) + 1)
    return best, fine.fits(few.side, few.gamma)[0].fit(best, width)


def _fit(
    setting: KernelSetting,
    rows: Pairs,
    sampler: PairSampler,
    matches: Matches | None,
    inputs: Inputs,
    width: int,
    seed: int,
) -> dict[Modality, SideAdapter]:
    pairs = _pairs(
        rows,
        sampler,
        setting.side,
        matches=matches,
        inputs=inputs,
        limit=MAX_LANDMARKS,
        seed=seed,
    )
    return KernelCca(pairs, setting.gamma, setting.side, seed, inputs).fit(setting, width)


def _pairs(
    rows: Pairs,
    sampler: PairSampler,
    side: Modality,
    *,
    matches: Matches | None,
    inputs: Inputs,
    limit: int,
    seed: int,
) -> KernelPairs:
    """Read the pairs of at most `limit` rows of a side, chosen at random, and the matches."""
    (images, texts), weights = sampler.weighted_pairs()
    if len(images) > MAX_PAIRS:
        some = np.sort(np.random.default_rng(seed).choice(len(images), MAX_PAIRS, replace=False))
        images, texts, weights = images[some], texts[some], weights[some]
    groups = images if side is Modality.IMAGE else rows.caption_keys[texts]
    names = np.unique(groups)
    if len(names) > limit:
        chosen = np.random.default_rng(seed).choice(names, limit, replace=False)
        kept = np.isin(groups, chosen)
        images, texts, weights, groups = images[kept], texts[kept], weights[kept], groups[kept]
    values = {Modality.IMAGE: rows.images[images], Modality.TEXT: rows.texts[texts]}
    if matches is not None:
        extra = slice(0, max(0, limit - len(names)))
        own = {Modality.IMAGE: matches.images[extra], Modality.TEXT: matches.texts[extra]}
        count = len(own[side])
        if count:
            weight = weights.sum() * matches.share / (1 - matches.share) / count
            weights = np.concatenate([weights, np.full(count, weight)])
            groups = np.concatenate([groups, groups.max() + 1 + np.arange(count)])
            values = {one: np.concatenate([values[one], own[one]]) for one in Modality}
    units = {
        one: unit_inputs(
            torch.from_numpy(np.asarray(values[one])),
            signed_sqrt=inputs[one].shape.signed_sqrt,
            scale=inputs[one].scale,
        )
        for one in Modality
    }
    return KernelPairs(units[side.other], units[side], groups, weights)


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


def _summary(found: Mapping[float, Measured], share: float, width: int) -> str:
    """Word what was chosen, and the recall of each choice."""
    both = [own for own in found if 0 < own < 1]
    shown = {0.0: "network", 1.0: "kernel"}
    if both:
        best = max(both, key=lambda own: found[own].score.mean_recall)
        shown[share if share in both else best] = "both"
    recalls = {own: f"{100 * found[own].score.mean_recall:.1f} %" for own in shown}
    rest = ", ".join(f"{shown[own]} {recalls[own]}" for own in shown if own != share)
    noise = any(found[own].score.mean_recall > found[share].score.mean_recall for own in shown)
    within = ", within noise" if noise else ""
    return f"parts: {shown[share]}, val R {recalls[share]} ({rest}{within}), {width} wide"
