"""Kernel ridge regressions of any number of sides, each to the consensus of the others.

The consensus is the mean output of an item's other sides in a space, such as that of generalised
CCA. A prediction of it keeps what a side shares with the others, so predictions from two sides can
be compared; a Gaussian kernel predicts more than a linear map.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from csalign.adapters.builtin import Kernel, fixed
from csalign.adapters.generalised import SideInput, consensus, item_weights
from csalign.adapters.kernel_cca import MAX_LANDMARKS, regress
from csalign.adapters.side import SideAdapter, SideShape
from csalign.core.arrays import Array
from csalign.core.records import Record


class SidesSetting(Record):
    """Settings of the kernels of any sides."""

    gamma: float  # of exp(-gamma |u - v|^2)
    ridge: float  # relative to the mean eigenvalue of each side's centred kernel matrix

    @property
    def name(self) -> str:
        """The settings, as shown to users."""
        return f"kernels (gamma {self.gamma:g}, ridge {self.ridge:.2g})"


def kernel_candidates(
    sides: Mapping[str, SideInput],
    outputs: Mapping[str, Callable[[Array], Tensor]],
    gamma: float,
    ridges: Sequence[float],
    *,
    seed: int,
    limit: int = MAX_LANDMARKS,
) -> Iterator[tuple[SidesSetting, dict[str, SideAdapter]]]:
    """Fit the kernels of all sides for some ridges; yield an adapter of each side.

    Args:
        sides: by name; each has an item that another side has.
        outputs: functions from raw rows of each side to unit outputs (n, k) float32, of one space.
        gamma: > 0.
        ridges: > 0.
        seed: of the rows that are used and of their blocks.
        limit: rows of a side at most.
    """
    fits = {}
    for name, side in sides.items():
        others = {other: own for other, own in sides.items() if other != name}
        partners = np.unique(np.concatenate([own.items for own in others.values()]))
        has_partner = np.isin(side.items, partners) & (side.items >= 0)
        rows = _some(np.flatnonzero(has_partner), seed, limit)
        items, place = np.unique(side.items[rows], return_inverse=True)
        targets = consensus(others, outputs, items)[0].numpy()[place]
        own = SideInput(side.rows[rows], place, side.unit)
        fits[name] = add_kernel_side(own, targets, gamma, ridges, seed=seed, limit=limit)
    for number, ridge in enumerate(ridges):
        setting = SidesSetting(gamma=gamma, ridge=ridge)
        yield setting, {name: own[number] for name, own in fits.items()}


def add_kernel_side(
    side: SideInput,
    targets: Array,
    gamma: float,
    ridges: Sequence[float],
    *,
    seed: int,
    limit: int = MAX_LANDMARKS,
) -> list[Kernel]:
    """Regress the unit outputs of other sides on a kernel of one side, for each of some ridges.

    The arguments are those of `add_side` and of `kernel_candidates`.
    """
    rows = _some(np.flatnonzero(side.items >= 0), seed, limit)
    weights = torch.from_numpy(item_weights(side.items[rows])).float()
    units = side.unit(side.rows[rows])
    mean = weights @ units / weights.sum()
    landmarks = normalize(units - mean, dim=1)
    own = torch.from_numpy(targets[rows]).float()
    shape = SideShape(
        "kernel",
        units.shape[1],
        own.shape[1],
        signed_sqrt=side.unit.signed_sqrt,
        scaled=side.unit.scale is not None,
        landmarks=len(rows),
    )
    kernels = []
    for found in regress(own, landmarks, weights, gamma, ridges, seed=seed):
        with torch.device("meta"):  # draws no random numbers
            kernel = Kernel(shape)
        kernel.mean, kernel.gamma, kernel.scale = mean, torch.tensor(gamma), side.unit.scale
        kernel.landmarks = fixed(landmarks)
        kernel.weight, kernel.bias = fixed(found.weight.T.contiguous()), fixed(found.bias)
        kernels.append(kernel)
    return kernels


def _some(rows: Array, seed: int, limit: int) -> Array:
    """Draw `limit` of some rows, ascending; all if there are fewer."""
    if len(rows) <= limit:
        return rows
    return np.sort(np.random.default_rng(seed).choice(rows, limit, replace=False))
