"""The loss of one batch: adapters, pairwise terms, distribution term, token term."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from torch.utils.checkpoint import checkpoint

from csalign.adapters.model import Adapter
from csalign.adapters.side import SideAdapter
from csalign.core import distributed
from csalign.core.enums import DivergenceName, PairwiseName, Precision
from csalign.core.errors import ConfigError
from csalign.objective.divergences import divergence
from csalign.objective.kernels import Sigma, diagonal_share, median_distance
from csalign.objective.loss import LossParts, Objective, TokenBatch
from csalign.training.config import ObjectiveOptions
from csalign.training.network.sampler import Batch, SideBatch

log = logging.getLogger(__name__)

Bandwidth = float | tuple[float, ...] | None

LEAST_SCALE = 7.0  # of logits in training, where it is chosen automatically
MAX_LOGIT_SCALE = 100.0  # CLIP's clamp; training is unstable beyond it
MEDIAN_EVERY = 10  # steps between refreshes of a median bandwidth
MIN_MEDIAN = 0.1  # unit rows this close have collapsed; a narrower kernel would not help them
NEARLY_DIAGONAL = 0.5  # share of the kernel's mass on the diagonal above which to warn
SIGLIP_BIAS = -10.0  # SigLIP's initial value: nearly all pairs are negatives
LEAST_ROWS = 8  # a distribution estimated from fewer rows pulls in random directions
SUB_BATCH = 8_192  # rows per adapter pass by default
AUTO_WEIGHT = 0.1  # initial value of an automatic lambda
MIN_WEIGHT, MAX_WEIGHT = 1e-3, 10.0  # its limits
RAISE, LOWER = 1.5, 0.5  # its factors after a validation
_KERNELS = (DivergenceName.CS, DivergenceName.HOLDER, DivergenceName.MMD)
# Options that only some pairwise losses use.
_OF_LOSSES = {
    "label_smoothing": (PairwiseName.INFONCE,),
    "uniformity": (PairwiseName.ALIGN_UNIFORM,),
    "unpaired_negatives": (PairwiseName.INFONCE, PairwiseName.ALIGN_UNIFORM),
}


def all_gather_rows(rows: Tensor, counts: Sequence[int]) -> Tensor:
    """Concatenate the rows of all processes, (sum of counts, d).

    All processes must compute the same from the result: each keeps the gradient of its own rows.
    """
    found: Tensor = _AllGatherRows.apply(rows, counts)
    return found


class _AllGatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, counts: Sequence[int]) -> Tensor:
        before = sum(counts[: distributed.world().rank])
        ctx.own = slice(before, before + len(rows))
        return torch.cat(distributed.all_gather_rows(rows.contiguous(), counts))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient[ctx.own], None


def compares_sets(options: ObjectiveOptions) -> bool:
    """Return whether a distribution term uses all rows of both sides, paired or not."""
    return bool(distribution_weight(options)) and not divergence(options.divergence).matched


def uses_unpaired(options: ObjectiveOptions) -> bool:
    """Return whether a term uses rows besides the pairs."""
    return compares_sets(options) or options.unpaired_negatives


def distribution_weight(options: ObjectiveOptions) -> float:
    """Return the initial weight (lambda) of the distribution term."""
    if options.divergence is DivergenceName.NONE:
        return 0.0
    return AUTO_WEIGHT if isinstance(options.cs_weight, str) else options.cs_weight


def initial_scale(options: ObjectiveOptions) -> float:
    """Return the logit scale that training starts with; "auto" that is not found yet is 7."""
    return LEAST_SCALE if isinstance(options.logit_scale, str) else options.logit_scale


def check_terms(options: ObjectiveOptions, *, captions: str, rows: int) -> None:
    """Refuse terms that would be ignored, cannot be computed, or mean nothing.

    Raises:
        ConfigError: options conflict.
    """
    has_other_terms = bool(distribution_weight(options) or options.token_weight)
    if options.pairwise is PairwiseName.NONE and not has_other_terms and rows:
        raise ConfigError(
            "--pairwise none leaves nothing to train on without a distribution term; pass a "
            "--cs-weight and a --divergence, or --steps 0 to keep the initialization"
        )
    default = ObjectiveOptions()
    for name, losses in _OF_LOSSES.items():
        usual = getattr(default, name)
        if getattr(options, name) != usual and options.pairwise not in losses:
            raise ConfigError(
                f"{options.shown(name)}: applies to {' and '.join(losses)} only, the pairwise loss "
                f"is {options.pairwise}; leave it at {usual}, the default"
            )
    is_scaled = initial_scale(options) != LEAST_SCALE and options.bandwidth != "tied"
    is_rival = options.pairwise is PairwiseName.ALIGN_UNIFORM
    if is_rival and (is_scaled or options.learn_scale):
        given = "--learn-scale" if options.learn_scale else f"--logit-scale {options.logit_scale}"
        raise ConfigError(
            f"{given}: align-uniform has no logits; pass --logit-scale {default.logit_scale} "
            "--no-learn-scale (--uniformity weights it)"
        )
    if options.mixing and captions == "all":
        raise ConfigError(
            "--mixing: mixes an image and one caption with another pair; use --captions first or "
            "sample"
        )
    if compares_sets(options) and 0 < rows < LEAST_ROWS:
        raise ConfigError(
            f"--divergence {options.divergence}: is estimated from the {rows} pairs of a step, "
            f"which are too few; use a --batch-size and a set of {LEAST_ROWS} or more, or "
            "--cs-weight 0"
        )


class BatchLoss(nn.Module):
    """Objective of a batch, with its learned temperature and its bandwidth.

    If several processes train, each embeds its share of the rows, and all of them then compute
    the objective of the whole batch together; its value is the same in each.

    Attributes:
        options: the terms.
        sigma: bandwidth(s) of the last batch, on the device if found there; None if no term has
            one.
        diagonal_share: share of the kernel's mass that is each row with itself, likewise, at the
            last step that measured it; see `warn_if_narrow`.
    """

    def __init__(
        self,
        options: ObjectiveOptions,
        *,
        precision: Precision = Precision.FLOAT32,
        sub_batch: int | None = None,
        compiled: bool = False,
    ) -> None:
        super().__init__()
        self.options = options
        self._precision = precision
        self._sub_batch = sub_batch or SUB_BATCH
        self._objective = Objective(
            pairwise=options.pairwise,
            divergence=options.divergence,
            weight=distribution_weight(options),
            token_weight=options.token_weight,
            label_smoothing=options.label_smoothing,
            uniformity=options.uniformity,
            precision=precision,
            compiled=compiled,
            divided=distributed.world().size > 1,
        )
        self._pairwise_only = replace(self._objective, weight=0.0, token_weight=0.0)
        is_sigmoid = options.pairwise is PairwiseName.SIGMOID
        initial = initial_scale(options)
        scale = torch.tensor(math.log(initial))
        self.log_scale = nn.Parameter(scale, requires_grad=options.learn_scale)
        bias = torch.tensor(SIGLIP_BIAS if is_sigmoid else 0.0)
        self.logit_bias = nn.Parameter(bias, requires_grad=is_sigmoid)
        self._has_bandwidth = bool(options.token_weight) or (
            bool(self._objective.weight) and divergence(options.divergence).has_bandwidth
        )
        # What does not change stays on the host, as constants of the step.
        self._scale = None if options.learn_scale else initial
        self.sigma: Sigma | None = None
        if self._has_bandwidth and not isinstance(options.bandwidth, str):
            self.sigma = options.bandwidth
        elif self._has_bandwidth and options.bandwidth == "tied" and self._scale:
            self.sigma = self._scale**-0.5
        self.diagonal_share: Tensor | float = 0.0
        self._warned = False

    @property
    def weight(self) -> float:
        """Weight (lambda) of the distribution term."""
        return self._objective.weight

    @weight.setter
    def weight(self, value: float) -> None:
        self._objective = replace(self._objective, weight=value)

    def adapt_weight(self, *, recall_holds: bool) -> None:
        """Raise an automatic lambda while validation recall holds, and halve it otherwise.

        Halving undoes more than one raise, so that it settles where the term costs no recall.
        """
        if self.options.cs_weight == "auto" and self.weight:
            value = self.weight * (RAISE if recall_holds else LOWER)
            self.weight = min(MAX_WEIGHT, max(MIN_WEIGHT, value))

    @property
    def logit_scale(self) -> float:
        """Scale of cosines (1 / temperature) in the pairwise term, read from the device."""
        return float(self.log_scale.detach().exp())

    @property
    def bandwidth(self) -> Bandwidth:
        """`sigma`, read from the device."""
        return float(self.sigma) if isinstance(self.sigma, Tensor) else self.sigma

    def clamp(self) -> None:
        """Clamp a learned temperature to where training is stable."""
        if self.options.learn_scale:
            with torch.no_grad():
                self.log_scale.clamp_(max=math.log(MAX_LOGIT_SCALE))

    def get_extra_state(self) -> dict[str, Any]:
        """Return what `state_dict` contains beside the parameters."""
        return {"weight": self.weight, "sigma": self.bandwidth}

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        """Restore what `get_extra_state` returned, possibly after a round trip through JSON."""
        sigma = state["sigma"]
        self.sigma = tuple(sigma) if isinstance(sigma, list) else sigma
        if self.options.bandwidth == "median" and sigma is not None:
            self.sigma = torch.tensor(sigma, device=self.log_scale.device)
        self.weight = state["weight"]

    def forward(self, adapter: Adapter, batch: Batch, step: int) -> LossParts:
        """Compute the objective of a batch; `step` is counted from 1."""
        x, x_tokens = self._embed(adapter.image, batch.images, batch.token_pairs[0])
        y, y_tokens = self._embed(adapter.text, batch.texts, batch.token_pairs[1])
        tokens = None
        if self.options.token_weight and x_tokens and y_tokens:
            tokens = TokenBatch(x_tokens[0], y_tokens[0], x_tokens[1], y_tokens[1])
        images, _, _, unpaired_images = torch.split(x, batch.images.counts)
        texts, others, further, unpaired_texts = torch.split(y, batch.texts.counts)
        negatives = 0, 0
        if self.options.unpaired_negatives:
            negatives = len(unpaired_images), len(unpaired_texts)
        extra_texts = unpaired_texts
        if self.options.cs_captions == "all":
            extra_texts = torch.cat([unpaired_texts, others, further])
        scale = self._scale or self.log_scale.exp()
        most = self._scale or max(MAX_LOGIT_SCALE, initial_scale(self.options))
        parts = self._objective(
            images,
            texts,
            logit_scale=scale,
            max_scale=most,
            logit_bias=self.logit_bias,
            sigma=self._bandwidth((images, texts), step),
            owner=batch.owner,
            x_extra=unpaired_images,
            y_extra=extra_texts,
            negatives=negatives,
            tokens=tokens,
        )
        if not len(others):
            return parts
        extra = self._pairwise_only(
            images[batch.others],
            others,
            logit_scale=scale,
            max_scale=most,
            logit_bias=self.logit_bias,
            x_extra=unpaired_images,
            y_extra=unpaired_texts,
            negatives=negatives,
        ).pairwise
        return parts._replace(total=parts.total + self.options.other_captions * extra, others=extra)

    def _embed(
        self, side: SideAdapter, batch: SideBatch, token_pairs: Tensor
    ) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
        """Embed the rows of one side, (n, width) of all processes, and the token term's tokens."""
        noise = self.options.noise
        is_rounded = self._precision is Precision.BFLOAT16
        with torch.autocast(batch.rows.device.type, torch.bfloat16, enabled=is_rounded):
            if batch.tokens is None:
                return self._gather(self._embed_share(side, batch.rows), sum(batch.counts)), None
            values, mask = batch.tokens
            if side.embeds_with_tokens:
                found = side.forward_tokens(batch.rows, values, mask, noise)
                embeddings, tokens = found.embeddings, found.tokens[token_pairs]
                mask = mask[token_pairs]
            else:
                embeddings = self._embed_share(side, batch.rows)
                tokens = side.forward_tokens(batch.rows[token_pairs], values, mask, noise).tokens
        return embeddings.float(), (tokens.float(), mask)

    def _embed_share(self, side: SideAdapter, rows: Tensor) -> Tensor:
        """Embed rows; in sub-batches if many, recomputed with the same noise in the backward."""
        noise = self.options.noise
        if len(rows) <= self._sub_batch:
            embeddings: Tensor = side(rows, noise)
            return embeddings.float()
        pieces = torch.split(rows, self._sub_batch)
        return torch.cat(
            [checkpoint(side, piece, noise, use_reentrant=False).float() for piece in pieces]
        )

    @staticmethod
    def _gather(embeddings: Tensor, total: int) -> Tensor:
        """Gather the shares of all processes."""
        size = distributed.world().size
        if size == 1:
            return embeddings
        shares = [distributed.share_of(total, rank) for rank in range(size)]
        counts = [share.stop - share.start for share in shares]
        return all_gather_rows(embeddings[: counts[distributed.world().rank]], counts)

    def measures(self, step: int) -> bool:
        """Return whether a step measures distances besides, for the bandwidth or a warning."""
        return self._has_bandwidth and (step - 1) % MEDIAN_EVERY == 0

    def _set_sigma(self, value: Tensor) -> None:
        """Set sigma in place, so that a recorded step reads it where it always is."""
        if isinstance(self.sigma, Tensor):
            self.sigma.copy_(value)
        else:
            self.sigma = value

    def _bandwidth(self, sides: Sequence[Tensor], step: int) -> Sigma:
        """Return sigma for this batch; measure at times how much of the kernel is diagonal."""
        if not self._has_bandwidth:
            return 1.0
        is_due = self.measures(step)
        if is_due:
            sides = [normalize(side.detach(), dim=1) for side in sides]
        if self.options.bandwidth == "tied" and not self._scale:
            self._set_sigma((self.log_scale.detach() / -2).exp())
        elif self.options.bandwidth == "median" and is_due:

            def median() -> Tensor:
                return median_distance(sides[0], torch.cat([*sides[1:]])).clamp(min=MIN_MEDIAN)

            self._set_sigma(distributed.broadcast_tensor(median, self.log_scale))
        assert self.sigma is not None
        is_kernel = self.options.divergence in _KERNELS and min(map(len, sides)) > 2
        if is_due and not self._warned and is_kernel:
            shares = [diagonal_share(side, sigma=self.sigma) for side in sides]
            self.diagonal_share = torch.stack(shares).max()
        return self.sigma

    def warn_if_narrow(self, bandwidth: Bandwidth, share: float) -> None:
        """Warn once if a `diagonal_share` is large."""
        if share > NEARLY_DIAGONAL and not self._warned:
            self._warned = True
            log.warning(
                "bandwidth %.3g is so small that %.0f %% of the kernel's mass is each row with "
                "itself: the divergence then only pulls the nearest cross pairs together and "
                "retrieval suffers; use --bandwidth median or 0.5 and above",
                max(bandwidth) if isinstance(bandwidth, tuple) else bandwidth,
                100 * share,
            )
