"""The CS-Aligner objective: the pairwise term plus lambda times the distribution term."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from csalign.objective.divergence import cs_divergence
from csalign.objective.infonce import infonce


class LossParts(NamedTuple):
    """The objective and what it is made of, each a () tensor in nats.

    Attributes:
        total: what is minimised.
        infonce: the pairwise term.
        cs: the Cauchy-Schwarz divergence, unweighted; 0 where its weight is 0.
        others: a second pairwise term, on other captions, unweighted; None without one.
    """

    total: Tensor
    infonce: Tensor
    cs: Tensor
    others: Tensor | None = None


def alignment_loss(
    x: Tensor, y: Tensor, *, logit_scale: Tensor | float, cs_weight: float, sigma: float
) -> LossParts:
    """InfoNCE + cs_weight * CS divergence of a batch of pairs (arXiv 2502.17028).

    Args:
        x: (n, d), float, adapted image embeddings, any norm; normalised here.
        y: (n, d), adapted text embeddings, row i the match of x's row i.
        logit_scale: 1 / temperature of InfoNCE.
        cs_weight: lambda, >= 0; at 0 the divergence is not computed at all, so that the result is
            InfoNCE's bit for bit.
        sigma: bandwidth of the divergence.
    """
    x, y = normalize(x, dim=1), normalize(y, dim=1)
    pairwise = infonce(x, y, logit_scale=logit_scale)
    if not cs_weight:
        return LossParts(pairwise, pairwise, torch.zeros_like(pairwise))
    divergence = cs_divergence(x, y, sigma=sigma)
    return LossParts(pairwise + cs_weight * divergence, pairwise, divergence)
