"""Kernels of all sides, beside the network or instead of it."""

import logging
import time
from typing import NamedTuple

import numpy as np
import torch

from csalign.adapters.builtin import Mapped, Parts
from csalign.adapters.kernel_cca import MAX_LANDMARKS
from csalign.adapters.kernel_sides import SidesSetting, add_kernel_side, kernel_candidates
from csalign.adapters.model import Adapter
from csalign.core.arrays import Mask
from csalign.core.enums import AnySide
from csalign.core.progress import duration, show_figures, tick
from csalign.features.checks import scaled
from csalign.training.closed_forms.combine import ENOUGH_IMAGES, GAMMAS, SEARCH_ROWS, SHARES
from csalign.training.closed_forms.settings import SAFE_RIDGE, Setting
from csalign.training.network.validation import Measured, Score
from csalign.training.sides.start import Starts
from csalign.training.sides.validation import Outputs, embed_sides, measure_sides

log = logging.getLogger(__name__)

RIDGES = (0.03, 0.1, 0.3, 1.0, 3.0)
GROWTH = 2.0  # exponent of the time that a fit takes by the number of its rows


class Chosen(NamedTuple):
    """Parts of an adapter, and their validation."""

    kernel: SidesSetting | None  # None for the network alone
    share: float  # of the kernels in cosines
    score: Score | None  # None if the network stays alone
    network: str = "network"  # what it is for people, such as its closed form

    @property
    def words(self) -> str:
        """The parts, "" for the network alone."""
        if self.kernel is None:
            return ""
        percent = round(100 * self.share)
        both = f"{self.network} {100 - percent} %, {self.kernel.name} {percent} %"
        return both if self.share < 1 else f"{self.kernel.name}, instead of the {self.network}"


ALONE = Chosen(None, 0.0, None)


def choose_kernels(
    network: Adapter,
    starts: Starts,
    setting: Setting,
    name: str,
    *,
    joins: bool,
    seconds: float,
) -> Chosen:
    """Fit kernels, and choose on validation: the network, the kernels, or both.

    Gamma and ridge are chosen on at most 2,000 rows per side. The network stays unless another
    choice gains more than a standard error, or two with fewer than 100 items; the kernels stand
    alone only if they gain a standard error on both together.

    Args:
        network: trained without what is held out.
        starts: its rows and closed forms.
        setting: of its closed form.
        name: of the network for people.
        joins: whether both may stand side by side, twice as wide; those of a side that is added
            are summed.
        seconds: that it may take, with a fit on all rows.
    """
    data, began, added = starts.data, time.monotonic(), starts.added
    assert data.val is not None
    own = embed_sides(network, data.val)
    alone = measure_sides(own, added)
    if alone.score.is_perfect:
        return ALONE
    best: tuple[Measured, SidesSetting] | None = None
    for number, gamma in enumerate(GAMMAS):
        tick("kernels: fits", number, len(GAMMAS))
        for found, kernel in _fits(
            network, starts, setting, gamma, RIDGES, data.held_out, SEARCH_ROWS
        ):
            measured = measure_sides(embed_sides(kernel, data.val), added)
            if best is None or measured.score.better_than(best[0].score):
                best = measured, found
            show_figures({"": found.name, "best R": f"{100 * best[0].score.mean_recall:.1f} %"})
    assert best is not None
    rows = min(MAX_LANDMARKS, max(len(side.items) for side in data.rows.sides.values()))
    more = max(1.0, rows / SEARCH_ROWS) ** GROWTH / len(GAMMAS)
    needed = (time.monotonic() - began) * (1 + (1 + data.refits) * more)
    if needed > seconds:
        log.info("--minutes: omits the kernels, which would take about %s", duration(needed))
        return ALONE
    one = best[1].gamma, (best[1].ridge,)
    ((_, kernel),) = _fits(network, starts, setting, *one, data.held_out, MAX_LANDMARKS)
    other, shown = embed_sides(kernel, data.val), {}
    for share in (1.0, *(SHARES if joins else ())):
        shown[share] = measure_sides(_joined(own, other, share, added), added)
    share = max(SHARES if joins else shown, key=lambda own: shown[own].score.mean_recall)
    share = 1.0 if shown[1.0].beats(shown[share]) else share
    errors = 1.0 if len(alone.recalls) >= ENOUGH_IMAGES else 2.0
    chosen = Chosen(best[1], share, shown[share].score, name)
    chosen = chosen if shown[share].beats(alone, errors) else ALONE
    recalls = {name: alone, "kernels": shown.pop(1.0)}
    recalls |= {f"both at {round(100 * own)} %": found for own, found in shown.items()}
    text = ", ".join(f"{name} {100 * own.score.mean_recall:.1f} %" for name, own in recalls.items())
    log.info("parts: %s (val R %s)", chosen.words or f"the {name} alone", text)
    return chosen


def assemble_sides(
    chosen: Chosen, network: Adapter, starts: Starts, setting: Setting, leave_out: Mask | None
) -> Adapter:
    """Put the parts together, the kernels fitted without some items."""
    if chosen.kernel is None:
        return network
    tick("kernels of all parts")
    one = chosen.kernel.gamma, (chosen.kernel.ridge,)
    ((_, kernel),) = _fits(network, starts, setting, *one, leave_out, MAX_LANDMARKS)
    if chosen.share == 1:
        return kernel
    shares = 1 - chosen.share, chosen.share
    sides = {side: network.side(side) for side in network.names}
    for side in sides if starts.added is None else [starts.added]:
        sides[side] = Parts.of([sides[side], kernel.side(side)], shares)
    if starts.added is not None:  # in one space both outputs are summed
        eye = torch.eye(sides[starts.added].shape.width // 2)
        summed = torch.cat([share**0.5 * eye for share in shares], 1)
        sides[starts.added] = Mapped.of(sides[starts.added], summed, torch.zeros(len(eye)))
    return Adapter.of_sides(sides)


def _fits(
    network: Adapter,
    starts: Starts,
    setting: Setting,
    gamma: float,
    ridges: tuple[float, ...],
    leave_out: Mask | None,
    limit: int,
) -> list[tuple[SidesSetting, Adapter]]:
    """Fit kernels that predict the consensus of the other sides.

    That is in the space of generalised CCA, its directions weighted alike; for a side that is
    added, in the finished space.
    """
    if starts.added is not None:
        sides = {side: network.side(side) for side in network.names}
        new, targets = starts.added_targets(leave_out)
        kernels = add_kernel_side(new, targets, gamma, ridges, seed=starts.seed, limit=limit)
        return [
            (SidesSetting(gamma=gamma, ridge=ridge), Adapter.of_sides({**sides, starts.added: own}))
            for ridge, own in zip(ridges, kernels, strict=True)
        ]
    ridge = setting.ridge if setting.form == "gcca" else SAFE_RIDGE
    inputs = starts.inputs("gcca", leave_out)
    (form,) = starts.fit("gcca", ridge, (0.0,), leave_out)
    outputs = form.functions(inputs)
    fits = kernel_candidates(inputs, outputs, gamma, ridges, seed=starts.seed, limit=limit)
    return [(own, Adapter.of_sides(sides)) for own, sides in fits]


def _joined(own: Outputs, other: Outputs, share: float, added: AnySide | None) -> Outputs:
    """Put outputs side by side, the others with a share of the cosines; sum those of one side."""
    if added is not None:
        rows, items = own[added]
        summed = np.float32(1 - share) * rows + np.float32(share) * other[added][0]
        return {**own, added: (scaled(summed), items)}
    roots = np.float32(1 - share) ** 0.5, np.float32(share) ** 0.5
    return {
        side: (np.concatenate([roots[0] * rows, roots[1] * other[side][0]], 1), items)
        for side, (rows, items) in own.items()
    }
