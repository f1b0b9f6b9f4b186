"""Kernel ridge regressions of any number of sides, each to the consensus of the others.

The consensus is the mean output of an item's other sides under a `GeneralForm`. A prediction of it
from one side keeps what that side shares with the others, so predictions of two sides can be
compared; a Gaussian kernel predicts more than a linear map.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from csalign.adapters.builtin import Kernel, fixed
from csalign.adapters.generalised import GeneralForm, SideInput, SideMap, consensus, item_weights
from csalign.adapters.kernel_cca import MAX_LANDMARKS, Regression, regress
from csalign.adapters.side import SideAdapter, SideShape, UnitRows
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


class KernelSides:
    """Kernels of all sides for one gamma > 0, towards the space of a form.

    Args:
        sides: by name, each with items that another side has.
        form: of these sides.
        gamma: of the kernel.
        seed: of the rows that are used and of their blocks.
        limit: rows per side at most.
    """

    def __init__(
        self,
        sides: Mapping[str, SideInput],
        form: GeneralForm,
        gamma: float,
        seed: int,
        *,
        limit: int = MAX_LANDMARKS,
    ) -> None:
        outputs = {
            name: partial(_outputs, side.unit, form.sides[name]) for name, side in sides.items()
        }
        self._sides = {
            name: _Side(
                side,
                {other: own for other, own in sides.items() if other != name},
                outputs,
                np.random.default_rng(seed),
                limit,
            )
            for name, side in sides.items()
        }
        self._gamma, self._seed = gamma, seed

    def candidates(
        self, ridges: Sequence[float]
    ) -> Iterator[tuple[SidesSetting, dict[str, SideAdapter]]]:
        """Fit for some ridges > 0; yield an adapter of each side, all of the form's width."""
        fits = {
            name: side.fit(self._gamma, ridges, self._seed) for name, side in self._sides.items()
        }
        for number, ridge in enumerate(ridges):
            setting = SidesSetting(gamma=self._gamma, ridge=ridge)
            yield setting, {name: own[number] for name, own in fits.items()}


class _Side:
    """Rows of one side, and what to predict from them."""

    def __init__(
        self,
        side: SideInput,
        others: Mapping[str, SideInput],
        outputs: Mapping[str, partial[Tensor]],
        rng: np.random.Generator,
        limit: int,
    ) -> None:
        partners = np.unique(np.concatenate([own.items for own in others.values()]))
        rows = np.flatnonzero((side.items >= 0) & np.isin(side.items, partners))
        if len(rows) > limit:
            rows = np.sort(rng.choice(rows, limit, replace=False))
        items, place = np.unique(side.items[rows], return_inverse=True)
        self.targets = consensus(others, outputs, items)[0][torch.from_numpy(place)]
        self.weights = torch.from_numpy(item_weights(place)).float()
        units = side.unit(side.rows[rows])
        self.mean = self.weights @ units / self.weights.sum()
        self.landmarks = normalize(units - self.mean, dim=1)
        self.unit = side.unit

    def fit(self, gamma: float, ridges: Sequence[float], seed: int) -> list[SideAdapter]:
        """Fit an adapter for each ridge."""
        found = regress(self.targets, self.landmarks, self.weights, gamma, ridges, seed=seed)
        return [self._adapter(gamma, own) for own in found]

    def _adapter(self, gamma: float, found: Regression) -> Kernel:
        shape = SideShape(
            "kernel",
            self.landmarks.shape[1],
            self.targets.shape[1],
            signed_sqrt=self.unit.signed_sqrt,
            scaled=self.unit.scale is not None,
            landmarks=len(self.landmarks),
        )
        with torch.device("meta"):
            kernel = Kernel(shape)
        kernel.mean, kernel.gamma, kernel.scale = self.mean, torch.tensor(gamma), self.unit.scale
        kernel.landmarks = fixed(self.landmarks)
        kernel.weight = fixed(found.weight.T.contiguous())
        kernel.bias = fixed(found.bias)
        return kernel


def _outputs(unit: UnitRows, form: SideMap, rows: Array) -> Tensor:
    return form.outputs(unit(rows))
