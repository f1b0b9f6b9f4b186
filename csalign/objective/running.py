"""A divergence that sees the last steps too, through running means of random features."""

from collections import deque
from dataclasses import dataclass, field

import torch
from torch import Tensor

from csalign.objective.features import RandomFeatures, cs_of_means
from csalign.objective.kernels import Sigma, bandwidths


@dataclass
class _Past:
    """Rows of one side of one step, and their mean features by bandwidth."""

    rows: Tensor
    means: dict[float, Tensor] = field(default_factory=dict)

    def sum(self, features: RandomFeatures, sigma: float) -> Tensor:
        """Sum of the features, (2, count); computed once for a bandwidth."""
        if sigma not in self.means:
            self.means[sigma] = features.mean(self.rows, sigma=sigma)
        return self.means[sigma] * len(self.rows)


class RunningDivergence:
    """CS divergence between the rows of the last steps, those of this step among them.

    This step's rows carry the gradient, each as much as it weighs among all rows; the others are
    kept detached, as they were embedded then. To give this step's rows the whole gradient instead
    makes training swing: it then follows where the sets lay some steps ago.

    Args:
        steps: how many are seen, this one included.
        count: frequencies of the features.
        seed: of the frequencies.
    """

    def __init__(self, *, steps: int = 16, count: int = 2_048, seed: int = 0) -> None:
        self._count, self._seed = count, seed
        self._past: deque[tuple[_Past, _Past]] = deque(maxlen=steps - 1)
        self._features: RandomFeatures | None = None

    def __call__(self, x: Tensor, y: Tensor, *, sigma: Sigma) -> Tensor:
        """The divergence with these rows, which are kept for the next call.

        Args:
            x: (n, d), float.
            y: (m, d), same dtype and device.
            sigma: bandwidth or bandwidths, > 0; the mean over several.

        Returns:
            () tensor, >= 0, differentiable in both.

        Raises:
            ShapeError: a side has no rows, or another width than before.
            ValueError: sigma is not positive and finite.
        """
        if self._features is None:
            self._features = RandomFeatures(
                x.shape[1], count=self._count, seed=self._seed, device=x.device, dtype=x.dtype
            )
        found = [
            cs_of_means(self._mean(x, 0, width), self._mean(y, 1, width))
            for width in bandwidths(sigma)
        ]
        self._past.append((_Past(x.detach()), _Past(y.detach())))
        return torch.stack(found).mean()

    def state(self) -> list[list[Tensor]]:
        """The rows of both sides that are kept, step by step."""
        return [[x.rows, y.rows] for x, y in self._past]

    def go_to(self, state: list[list[Tensor]], device: torch.device) -> None:
        """Go on from what `state` said."""
        self._past.clear()
        self._past.extend((_Past(x.to(device)), _Past(y.to(device))) for x, y in state)

    def _mean(self, rows: Tensor, side: int, sigma: float) -> Tensor:
        """Mean feature of all rows of a side, of which these have a gradient."""
        assert self._features is not None
        total, count = len(rows) * self._features.mean(rows, sigma=sigma), len(rows)
        for step in self._past:
            total = total + step[side].sum(self._features, sigma)
            count += len(step[side].rows)
        return total / count
