"""The objective: pairwise term + lambda * distribution term + mu * token term."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from csalign.core.enums import DivergenceName, PairwiseName, Precision
from csalign.objective.divergences import divergence
from csalign.objective.fused import fused_terms
from csalign.objective.kernels import Sigma
from csalign.objective.owners import check_matched, check_owner
from csalign.objective.pairwise import pairwise_loss
from csalign.objective.tokens import token_divergence, unit_tokens

LEAST_TILED = 256  # rows of a side; tiles halve the time from here on


class LossParts(NamedTuple):
    """The objective and what it is made of, each a () tensor.

    Attributes:
        total: what is minimised.
        pairwise: the pairwise term.
        divergence: the distribution term, unweighted; 0 where its weight is 0.
        token: the token term, unweighted; 0 where its weight is 0.
        others: a second pairwise term, on other captions, unweighted; None without one.
    """

    total: Tensor
    pairwise: Tensor
    divergence: Tensor
    token: Tensor
    others: Tensor | None = None


class TokenBatch(NamedTuple):
    """Adapted tokens of a batch of pairs, any norm, and where there are tokens.

    Attributes:
        x: (b, v, d), float, of the images.
        y: (b, l, d), of the texts.
        x_mask: (b, v), bool, True where there is a token.
        y_mask: (b, l), bool.
    """

    x: Tensor
    y: Tensor
    x_mask: Tensor
    y_mask: Tensor


@dataclass(frozen=True)
class Objective:
    """L_pair + weight * D(X, Y) + token_weight * L_token (CS-Aligner, arXiv 2502.17028).

    Call it with a batch. A term whose weight is 0 is not computed, so that the total is that of
    the others bit for bit. InfoNCE of single positives, CS and MMD are computed in tiles where a
    side has 256 rows or more: the same numbers up to rounding, in less time and memory.

    Attributes:
        pairwise: the loss on matched rows.
        divergence: the distribution term.
        weight: lambda, >= 0, of the distribution term.
        token_weight: mu, >= 0, of the token term, which is always the CS divergence.
        label_smoothing: of InfoNCE, in [0, 1).
        precision: of the factors of matrix products, where terms are computed in tiles.
        estimator: computes the distribution term of (x, y, sigma=) in place of `divergence`,
            whose name it goes by.
        divided: whether each process of the job computes a part of the terms that divide (those
            in tiles, and the sigmoid loss), all being called with the same batch. The others each
            computes whole; values and gradients are those of the whole in any case.

    Raises:
        ValueError: a name is unknown, a weight is negative or not finite, or label_smoothing does
            not fit.
    """

    pairwise: PairwiseName = PairwiseName.INFONCE
    divergence: DivergenceName = DivergenceName.CS
    weight: float = 0.0
    token_weight: float = 0.0
    label_smoothing: float = 0.0
    precision: Precision = Precision.FLOAT32
    estimator: Callable[..., Tensor] | None = None
    divided: bool = False

    def __post_init__(self) -> None:
        pairwise_loss(self.pairwise, label_smoothing=self.label_smoothing)
        divergence(self.divergence)
        for weight in (self.weight, self.token_weight):
            if not (weight >= 0 and math.isfinite(weight)):
                raise ValueError(f"weights must be finite and not negative, got {weight}")

    def __call__(
        self,
        x: Tensor,
        y: Tensor,
        *,
        logit_scale: Tensor | float,
        sigma: Sigma = 1.0,
        logit_bias: Tensor | float = 0.0,
        owner: Tensor | None = None,
        x_extra: Tensor | None = None,
        y_extra: Tensor | None = None,
        negatives: tuple[int, int] = (0, 0),
        tokens: TokenBatch | None = None,
    ) -> LossParts:
        """The objective of one batch; all rows are normalised here.

        Args:
            x: (n, d), float, adapted image embeddings, any norm.
            y: (m, d), adapted text embeddings; m = n unless owner is given.
            logit_scale: 1 / temperature of the pairwise loss.
            sigma: bandwidth or bandwidths of the distribution and the token term.
            logit_bias: of the sigmoid loss.
            owner: (m,), int64, the image of each text; None where row i belongs to row i.
            x_extra: (k, d), adapted unpaired images that the distribution term sees beside x.
            y_extra: (l, d), adapted unpaired texts.
            negatives: so many rows at the start of x_extra and of y_extra are negatives of
                InfoNCE besides.
            tokens: what the token term compares; needed where token_weight is not 0.

        Raises:
            ShapeError: the shapes do not fit together, or there are too few rows.
            ValueError: an owner or sigma is out of range, or tokens are missing.
        """
        x, y = normalize(x, dim=1), normalize(y, dim=1)
        sets = x, y
        if any(negatives) or (self.weight and not divergence(self.divergence).matched):
            sets = _with_extra(x, x_extra), _with_extra(y, y_extra)
        seen = len(x) + negatives[0], len(y) + negatives[1]
        pairwise, apart = self._tiled(sets, (len(x), len(y)), seen, logit_scale, sigma, owner)
        if pairwise is None:
            loss = pairwise_loss(
                self.pairwise, label_smoothing=self.label_smoothing, divided=self.divided
            )
            pairwise = loss(
                x,
                y,
                logit_scale=logit_scale,
                logit_bias=logit_bias,
                owner=owner,
                negatives=(
                    sets[0][len(x) : seen[0]] if negatives[0] else None,
                    sets[1][len(y) : seen[1]] if negatives[1] else None,
                ),
            )
        total = pairwise
        if not self.weight:
            apart = torch.zeros_like(pairwise)
        else:
            if apart is None:
                apart = self._divergence(sets, (x, y), owner, sigma)
            total = total + self.weight * apart
        token = torch.zeros_like(pairwise)
        if self.token_weight:
            token = self._token(tokens, sigma)
            total = total + self.token_weight * token
        return LossParts(total, pairwise, apart, token)

    def _tiled(
        self,
        sets: tuple[Tensor, Tensor],
        pairs: tuple[int, int],
        seen: tuple[int, int],
        logit_scale: Tensor | float,
        sigma: Sigma,
        owner: Tensor | None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """The pairwise and the distribution term; None for what tiles cannot give or not faster.

        Args:
            sets: rows of both sides: of the pairs, negatives, others.
            pairs: so many of them are of pairs.
            seen: so many of them InfoNCE sees.
            logit_scale: as in a call.
            sigma: as in a call.
            owner: as in a call.
        """
        of_means = divergence(self.divergence).of_means if self.weight else None
        if self.estimator is not None or max(map(len, sets)) < LEAST_TILED:
            of_means = None
        is_infonce = self.pairwise is PairwiseName.INFONCE and owner is None
        has_pairs = is_infonce and min(pairs) >= LEAST_TILED
        if of_means is None and not has_pairs:
            return None, None
        x, y = sets
        if has_pairs:
            check_matched(x[: pairs[0]], y[: pairs[1]])
        found = fused_terms(
            x if of_means else x[: seen[0]],
            y if of_means else y[: seen[1]],
            pairs=pairs[0] if has_pairs else 0,
            negatives=(seen[0] - pairs[0], seen[1] - pairs[1]) if has_pairs else (0, 0),
            logit_scale=logit_scale,
            sigma=sigma if of_means else None,
            label_smoothing=self.label_smoothing,
            precision=self.precision,
            divided=self.divided,
        )
        pairwise = found.infonce if has_pairs else None
        return pairwise, of_means(found.log_means) if of_means else None

    def _divergence(
        self,
        sets: tuple[Tensor, Tensor],
        pairs: tuple[Tensor, Tensor],
        owner: Tensor | None,
        sigma: Sigma,
    ) -> Tensor:
        measure = divergence(self.divergence)
        if not measure.matched:
            return (self.estimator or measure)(*sets, sigma=sigma)
        x, y = pairs
        if owner is not None:
            check_owner(x, y, owner)
            x = x[owner]
        return measure(x, y, sigma=sigma)

    def _token(self, tokens: TokenBatch | None, sigma: Sigma) -> Tensor:
        if tokens is None:
            raise ValueError("the token term has a weight, but the batch has no tokens")
        x, y = unit_tokens(tokens.x, tokens.x_mask), unit_tokens(tokens.y, tokens.y_mask)
        return token_divergence(x, y, tokens.x_mask, tokens.y_mask, sigma=sigma)


def _with_extra(rows: Tensor, extra: Tensor | None) -> Tensor:
    return rows if extra is None else torch.cat([rows, normalize(extra, dim=1)])
