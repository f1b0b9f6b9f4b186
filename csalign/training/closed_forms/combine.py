"""Parts of the final adapter: the trained network and a kernel CCA, side by side or one of them."""

import logging
from collections.abc import Mapping, Sequence
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
from csalign.training.closed_forms.unpaired import Matches
from csalign.training.sampler import PairSampler
from csalign.training.validation import Measured, measure, pool

log = logging.getLogger(__name__)

Array = npt.NDArray[Any]

SEARCH_ROWS = 2_000  # of the kernel side, on which the side, gamma and ridge are chosen
GAMMAS = (0.4, 0.75, 1.5)
RIDGES = (0.1, 0.3, 1.0, 3.0, 10.0)
OTHER_RIDGES = (0.3, 1.0, 3.0)
POWERS = (0.5, 1.0)
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
    width = network.image.shape.width
    inputs = {side: network.side(side).cpu() for side in Modality}
    setting = _search(rows, folds, matches, inputs, width, seed)
    sampler, val = folds[0]
    sides = _fit(setting, rows, sampler, matches, inputs, width, seed)
    own, other = _embed(network, val), _embed(Adapter.of_sides(sides), val)
    found = {
        share: _joined([(own, 1 - share), (other, share)], val)
        for share in (0.0, 1.0, *(SHARES if joins else ()))
    }
    alone = found[0.0]
    best = max(found, key=lambda share: found[share].score.mean_recall)
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


def _search(
    rows: Pairs,
    folds: Sequence[Fold],
    matches: Matches | None,
    inputs: Inputs,
    width: int,
    seed: int,
) -> KernelSetting:
    """Choose the settings of the kernel: coarsely on few rows, then around these on all."""
    done, total = 0, len(folds) * (len(Modality) * len(GAMMAS) + 1)
    tick(SEARCH, done, total)

    def best(limit: int, *grid: Sequence[Any]) -> KernelSetting:
        nonlocal done
        sides, gammas, ridges, others, powers = grid
        found: dict[KernelSetting, list[Measured]] = {}
        for (sampler, val), side in product(folds, sides):
            pairs = _pairs(rows, sampler, matches, inputs, side, limit, seed)
            for gamma in gammas:
                fit = KernelCca(pairs, gamma, side, seed, inputs)
                for setting, own in fit.candidates(ridges, others, powers, width):
                    both = _embed(Adapter.of_sides(own), val)
                    found.setdefault(setting, []).append(measure(both[0], both[1], val.text_image))
                done += 1
                tick(SEARCH, done, total)
                recall = max(pool(own).score.mean_recall for own in found.values())
                show_figures({"best R": f"{100 * recall:.1f} %"})
        return max(found, key=lambda own: pool(found[own]).score.mean_recall)

    few = best(SEARCH_ROWS, [*Modality], GAMMAS, RIDGES, OTHER_RIDGES[1:2], POWERS[1:])
    ridges = (few.ridge / 3, few.ridge, few.ridge * 3)
    return best(MAX_LANDMARKS, (few.side,), (few.gamma,), ridges, OTHER_RIDGES, POWERS)


def _fit(
    setting: KernelSetting,
    rows: Pairs,
    sampler: PairSampler,
    matches: Matches | None,
    inputs: Inputs,
    width: int,
    seed: int,
) -> dict[Modality, SideAdapter]:
    pairs = _pairs(rows, sampler, matches, inputs, setting.side, MAX_LANDMARKS, seed)
    return KernelCca(pairs, setting.gamma, setting.side, seed, inputs).fit(setting, width)


def _pairs(
    rows: Pairs,
    sampler: PairSampler,
    matches: Matches | None,
    inputs: Inputs,
    side: Modality,
    limit: int,
    seed: int,
) -> KernelPairs:
    """Read the pairs of at most `limit` rows of a side, chosen at random, and the matches."""
    (images, texts), weights = sampler.weighted_pairs()
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
