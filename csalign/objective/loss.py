"""The objective: pairwise term + lambda * distribution term + mu * token term."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from csalign.core.enums import DivergenceName, PairwiseName, Precision
from csalign.objective.divergences import divergence, token_divergence, unit_tokens
from csalign.objective.fused import fused_terms
from csalign.objective.kernels import Sigma
from csalign.objective.pairwise import (
    align_uniform,
    check_matched,
    check_owner,
    check_smoothing,
    infonce,
    sigmoid_loss,
)

MIN_TILED = 256  # rows per side from which tiles are faster than the plain formulas, about twice


class LossParts(NamedTuple):
    """The objective and its terms, each a () tensor.

    total is what is minimised; the terms are unweighted, and 0 where their weight is 0. others is a
    second pairwise term, on other captions; None without one.
    """

    total: Tensor
    pairwise: Tensor
    divergence: Tensor
    token: Tensor
    others: Tensor | None = None


class TokenBatch(NamedTuple):
    """Adapted tokens of a batch of pairs, (b, v, d) and (b, l, d) of any norm, and bool masks."""

    x: Tensor
    y: Tensor
    x_mask: Tensor
    y_mask: Tensor


@dataclass(frozen=True)
class Objective:
    """L_pair + weight * D(X, Y) + token_weight * L_token (CS-Aligner, arXiv 2502.17028).

    Call it with a batch. A term whose weight is 0 is not computed. InfoNCE of single positives, CS
    and MMD are computed in tiles if a side has 256 rows or more: the same numbers up to rounding,
    in less time and memory. If divided, the processes of the job share the tiles, must all pass the
    same batch, and get the values and gradients of the whole.

    Raises:
        ValueError: a name is unknown, a weight is negative or not finite, or label_smoothing does
            not fit.
    """

    pairwise: PairwiseName = PairwiseName.INFONCE  # the loss on matched rows
    divergence: DivergenceName = DivergenceName.CS  # the distribution term
    weight: float = 0.0  # lambda, >= 0, of the distribution term
    token_weight: float = 0.0  # mu, >= 0, of the token term, which is always the CS divergence
    label_smoothing: float = 0.0  # of InfoNCE, in [0, 1)
    uniformity: float = 2.0  # weight, >= 0, of the second term of align-uniform
    precision: Precision = Precision.FLOAT32  # of the matrix products in tiles
    compiled: bool = False  # whether torch.compile fuses what is done to a tile
    divided: bool = False  # whether processes share the tiles

    def __post_init__(self) -> None:
        check_smoothing(self.label_smoothing)
        for name, kind in (("pairwise", PairwiseName), ("precision", Precision)):
            object.__setattr__(self, name, kind(getattr(self, name)))  # plain strings too
        pairwise = self.pairwise
        if self.label_smoothing and pairwise is not PairwiseName.INFONCE:
            raise ValueError(
                f"label smoothing works with infonce only; the pairwise loss is {pairwise.value!r}"
            )
        divergence(self.divergence)
        for weight in (self.weight, self.token_weight, self.uniformity):
            if not (weight >= 0 and math.isfinite(weight)):
                raise ValueError(f"weights must be finite and not negative, got {weight}")

    def __call__(
        self,
        x: Tensor,
        y: Tensor,
        *,
        logit_scale: Tensor | float,
        max_scale: float | None = None,
        sigma: Sigma = 1.0,
        logit_bias: Tensor | float = 0.0,
        owner: Tensor | None = None,
        x_extra: Tensor | None = None,
        y_extra: Tensor | None = None,
        negatives: tuple[int, int] = (0, 0),
        tokens: TokenBatch | None = None,
    ) -> LossParts:
        """Compute the objective of one batch; all rows are normalised here.

        Args:
            x: (n, d), float, adapted image embeddings, any norm.
            y: (m, d), adapted text embeddings; m = n unless owner is given.
            logit_scale: 1 / temperature of the pairwise loss.
            max_scale: bound of logit_scale known on the host, by default itself if it is a float;
                InfoNCE in tiles takes less time if it is 35 at most.
            sigma: bandwidth or bandwidths of the distribution and the token term; those of a
                tensor, () or (s,), must be > 0, which is not checked.
            logit_bias: of the sigmoid loss.
            owner: (m,), int64, the image of each text; None where row i belongs to row i.
            x_extra: (k, d), adapted unpaired images, added to x in the distribution term.
            y_extra: (l, d), adapted unpaired texts.
            negatives: number of rows at the start of x_extra and of y_extra that are also
                negatives of InfoNCE, or in the uniformity of align-uniform.
            tokens: input of the token term; needed where token_weight is not 0.

        Raises:
            ShapeError: the shapes do not fit together, or there are too few rows.
            ValueError: an owner or sigma is out of range, or tokens are missing.
        """
        x, y = normalize(x, dim=1), normalize(y, dim=1)
        all_x, all_y, measure = x, y, divergence(self.divergence)
        if any(negatives) or (self.weight and not measure.matched):
            all_x, all_y = _with_extra(x, x_extra), _with_extra(y, y_extra)
        ends = len(x) + negatives[0], len(y) + negatives[1]
        further = all_x[len(x) : ends[0]], all_y[len(y) : ends[1]]
        of_means = measure.of_means if self.weight else None
        if max(len(all_x), len(all_y)) < MIN_TILED:
            of_means = None
        is_infonce = self.pairwise is PairwiseName.INFONCE and owner is None
        in_tiles = is_infonce and min(len(x), len(y)) >= MIN_TILED
        if in_tiles:
            check_matched(x, y)
        if in_tiles or of_means is not None:
            fused = fused_terms(
                all_x if of_means else all_x[: ends[0]],
                all_y if of_means else all_y[: ends[1]],
                pairs=len(x) if in_tiles else 0,
                negatives=negatives if in_tiles else (0, 0),
                logit_scale=logit_scale,
                max_scale=max_scale,
                sigma=sigma if of_means else None,
                label_smoothing=self.label_smoothing,
                precision=self.precision,
                compiled=self.compiled,
                divided=self.divided,
            )
        if in_tiles:
            pairwise = fused.infonce
        elif self.pairwise is PairwiseName.INFONCE:
            pairwise = infonce(
                x,
                y,
                logit_scale=logit_scale,
                owner=owner,
                label_smoothing=self.label_smoothing,
                negatives=further,
            )
        elif self.pairwise is PairwiseName.SIGMOID:
            pairwise = sigmoid_loss(
                x, y, logit_scale=logit_scale, logit_bias=logit_bias, owner=owner
            )
        elif self.pairwise is PairwiseName.ALIGN_UNIFORM:
            pairwise = align_uniform(x, y, uniformity=self.uniformity, owner=owner, further=further)
        else:
            pairwise = x[:0].sum() + y[:0].sum()  # an empty sum is 0 and keeps the graph
        total = pairwise
        apart = token = torch.zeros_like(pairwise)
        if self.weight:
            if of_means is not None:
                apart = of_means(fused.log_means)
            elif not measure.matched:
                apart = measure(all_x, all_y, sigma=sigma)
            else:
                if owner is not None:
                    check_owner(x, y, owner)
                apart = measure(x if owner is None else x[owner], y, sigma=sigma)
            total = total + self.weight * apart
        if self.token_weight:
            if tokens is None:
                raise ValueError("the token term has a weight, but the batch has no tokens")
            token = token_divergence(
                unit_tokens(tokens.x, tokens.x_mask),
                unit_tokens(tokens.y, tokens.y_mask),
                tokens.x_mask,
                tokens.y_mask,
                sigma=sigma,
            )
            total = total + self.token_weight * token
        return LossParts(total, pairwise, apart, token)


def _with_extra(rows: Tensor, extra: Tensor | None) -> Tensor:
    return rows if extra is None else torch.cat([rows, normalize(extra, dim=1)])
