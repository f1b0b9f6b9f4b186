"""The pairwise losses by name."""

from typing import Protocol

from torch import Tensor

from csalign.core.enums import PairwiseName
from csalign.objective.infonce import Negatives, check_smoothing, infonce, multi_positive_infonce
from csalign.objective.sigmoid import SigmoidDivisor, sigmoid_loss


class PairwiseLoss(Protocol):
    """A loss on matched unit rows.

    x is (n, d), y (m, d); owner is (m,), int64, the row of x that each row of y belongs to, or
    None where m = n and row i belongs to row i; negatives are further unit rows of either side.
    Returns a () tensor.
    """

    def __call__(
        self,
        x: Tensor,
        y: Tensor,
        *,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float = 0.0,
        owner: Tensor | None = None,
        negatives: Negatives = (None, None),
    ) -> Tensor:
        """The loss; logit_bias is read by the sigmoid loss alone, negatives by InfoNCE alone."""


def pairwise_loss(
    name: PairwiseName,
    *,
    label_smoothing: float = 0.0,
    sigmoid_divisor: SigmoidDivisor = "rows",
    divided: bool = False,
) -> PairwiseLoss:
    """The pairwise loss of a name.

    Args:
        name: "infonce", "sigmoid" or "none"; "none" is a constant 0 that still has a (zero)
            gradient.
        label_smoothing: of InfoNCE, in [0, 1).
        sigmoid_divisor: of the sigmoid loss, see `sigmoid_loss`.
        divided: whether the processes of the job share the sigmoid loss; InfoNCE they share in
            `fused_terms` alone.

    Raises:
        ValueError: there is no such name, or label_smoothing is out of range or is given for
            another loss than InfoNCE.
    """
    name = PairwiseName(name)
    check_smoothing(label_smoothing)
    if label_smoothing and name is not PairwiseName.INFONCE:
        raise ValueError(f"label smoothing is InfoNCE's; the pairwise loss is {name.value!r}")

    def loss(
        x: Tensor,
        y: Tensor,
        *,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float = 0.0,
        owner: Tensor | None = None,
        negatives: Negatives = (None, None),
    ) -> Tensor:
        if name is PairwiseName.NONE:
            return x[:0].sum() + y[:0].sum()
        if name is PairwiseName.SIGMOID:
            return sigmoid_loss(
                x,
                y,
                logit_scale=logit_scale,
                logit_bias=logit_bias,
                owner=owner,
                divisor=sigmoid_divisor,
                divided=divided,
            )
        if owner is None:
            return infonce(
                x,
                y,
                logit_scale=logit_scale,
                label_smoothing=label_smoothing,
                negatives=negatives,
            )
        return multi_positive_infonce(
            x,
            y,
            owner,
            logit_scale=logit_scale,
            label_smoothing=label_smoothing,
            negatives=negatives,
        )

    return loss
