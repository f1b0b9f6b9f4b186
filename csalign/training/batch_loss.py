"""The loss of one batch: adapters, pairwise terms, unpaired rows, bandwidth, temperature."""

import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from csalign.adapters.model import Adapter
from csalign.adapters.side import to_tensor
from csalign.core import distributed
from csalign.core.enums import DivergenceName, Modality, PairwiseName
from csalign.features.join import Pairs
from csalign.objective.divergences import divergence
from csalign.objective.kernels import Sigma, diagonal_share, median_distance
from csalign.objective.loss import LossParts, Objective, TokenBatch
from csalign.objective.pairwise import mix_pairs
from csalign.training.batch_tokens import BatchTokens
from csalign.training.config import TrainConfig
from csalign.training.forward import Embedder, Inputs
from csalign.training.sampler import Batch, Ints
from csalign.training.schedule import Weight
from csalign.training.token_data import StoredTokens
from csalign.training.unpaired import Unpaired

log = logging.getLogger(__name__)

MAX_LOGIT_SCALE = 100.0  # CLIP's clamp; beyond it training turns unstable
MEDIAN_EVERY = 10  # steps between refreshes of a median bandwidth
MIN_MEDIAN = 0.1  # unit rows this close have collapsed; a narrower kernel would not help them
NEARLY_DIAGONAL = 0.5  # share of the kernel's mass on the diagonal above which to warn
SIGLIP_BIAS = -10.0  # SigLIP's start: nearly all pairs are negatives


class BatchLoss(nn.Module):
    """Computes the objective of a batch.

    Where several processes train, each reads and embeds its part of the rows, and all of them then
    compute the objective of the whole batch together; it comes out the same in each.

    Args:
        adapter: both sides.
        rows: training rows.
        unpaired: what the distribution term sees besides.
        config: the terms and their weights.
        device: where to compute.
        tokens: of the training rows, None where no side trains with any.

    Attributes:
        weight: lambda now.
        sigma: bandwidth or bandwidths of the last batch, None where nothing has one.
    """

    def __init__(
        self,
        adapter: Adapter,
        rows: Pairs,
        unpaired: Unpaired,
        config: TrainConfig,
        device: torch.device,
        tokens: StoredTokens | None = None,
    ) -> None:
        super().__init__()
        self._adapter = [adapter]  # not a submodule: its weights are saved on their own
        self._rows = rows
        self._unpaired = unpaired
        self._config = config
        self._device = device
        self._embed = Embedder(adapter, config)
        self._tokens = (
            None if tokens is None else BatchTokens(adapter, rows, tokens, config, device)
        )
        is_none = config.divergence is DivergenceName.NONE
        self.weight = Weight.of(0.0 if is_none else config.cs_weight)
        scale = torch.tensor(math.log(config.logit_scale), device=device)
        self.log_scale = nn.Parameter(scale, requires_grad=config.learn_scale)
        is_sigmoid = config.pairwise is PairwiseName.SIGMOID
        bias = torch.tensor(SIGLIP_BIAS if is_sigmoid else 0.0, device=device)
        self.logit_bias = nn.Parameter(bias, requires_grad=is_sigmoid)
        self.sigma: Sigma | None = None
        if self._has_bandwidth and not isinstance(config.bandwidth, str):
            self.sigma = config.bandwidth
        self._warned = False

    @property
    def logit_scale(self) -> float:
        """1 / temperature of the pairwise term now."""
        return float(self.log_scale.detach().exp())

    def clamp(self) -> None:
        """Keep a learned temperature where training is stable."""
        if self._config.learn_scale:
            with torch.no_grad():
                self.log_scale.clamp_(max=math.log(MAX_LOGIT_SCALE))

    def position(self) -> dict[str, Any]:
        """What changes with the steps beside the parameters: plain values, and tensors."""
        tokens = None if self._tokens is None else self._tokens.rng.bit_generator.state
        return {"weight": self.weight.value, "sigma": self.sigma, "tokens": tokens}

    def go_to(self, position: dict[str, Any]) -> None:
        """Go on from what `position` said."""
        self.weight = replace(self.weight, value=position["weight"])
        self.sigma = as_sigma(position["sigma"])
        if self._tokens is not None:
            self._tokens.rng.bit_generator.state = position["tokens"]

    def forward(self, batch: Batch, step: int, rng: np.random.Generator) -> LossParts:
        """The objective of a batch.

        Args:
            batch: rows.
            step: number of the step, from 1.
            rng: draws the unpaired rows and what is mixed.
        """
        have = np.empty(0, np.int64)
        if batch.others is not None and (batch.others >= 0).sum() > 1:
            have = np.flatnonzero(batch.others >= 0)
        found, tokens = self._embedded(batch, have, step, rng)
        images, texts = found[Modality.IMAGE], found[Modality.TEXT]
        x, y, other = images["pairs"], texts["pairs"], texts.get("others")
        lone_x, lone_y = images.get("lone"), texts.get("lone")
        negatives = self._negatives(lone_x), self._negatives(lone_y)
        parts = self._objective()(
            x,
            y,
            logit_scale=self.log_scale.exp(),
            logit_bias=self.logit_bias,
            sigma=self._bandwidth(x, y, step),
            owner=None if batch.owner is None else torch.from_numpy(batch.owner).to(self._device),
            x_extra=lone_x,
            y_extra=self._extra_texts(texts),
            negatives=negatives,
            tokens=tokens,
        )
        if other is None:
            return parts
        own = x[torch.from_numpy(have).to(self._device)]
        pairwise_alone = replace(self._objective(), weight=0.0, token_weight=0.0)
        extra = pairwise_alone(
            own,
            other,
            logit_scale=self.log_scale.exp(),
            logit_bias=self.logit_bias,
            x_extra=lone_x,
            y_extra=lone_y,
            negatives=negatives,
        ).pairwise
        total = parts.total + self._config.other_captions * extra
        return parts._replace(total=total, others=extra)

    def _objective(self) -> Objective:
        return Objective(
            pairwise=self._config.pairwise,
            divergence=self._config.divergence,
            weight=self.weight.value,
            token_weight=self._config.token_weight,
            label_smoothing=self._config.label_smoothing,
            precision=self._config.precision,
            divided=distributed.world().size > 1,
        )

    def _embedded(
        self, batch: Batch, have: Ints, step: int, rng: np.random.Generator
    ) -> tuple[dict[Modality, dict[str, Tensor]], TokenBatch | None]:
        """The rows of a step in the shared space, by side and role, and the tokens of the pairs.

        Args:
            batch: rows.
            have: positions of the images whose other caption is asked for.
            step: number of the step.
            rng: draws what is mixed, and unpaired rows.
        """
        images, texts = self._pairs(batch, rng)
        lone = {side: self._draw_unpaired(side, rng) for side in Modality}
        captions = {"others": batch.others[have]} if batch.others is not None and len(have) else {}
        if self._takes_captions and len(batch.further):
            captions["further"] = batch.further
        if self._tokens is None:
            further = {role: self._stored(self._rows.texts, own) for role, own in captions.items()}
            inputs = {
                Modality.IMAGE: {"pairs": images, **lone[Modality.IMAGE]},
                Modality.TEXT: {"pairs": texts, **further, **lone[Modality.TEXT]},
            }
            return {side: self._embed(side, own, step) for side, own in inputs.items()}, None
        found = {side: self._embed(side, own, step) for side, own in lone.items()}
        every = slice(None)
        x, y, tokens = self._tokens.forward(batch, images.take(every), texts.take(every), step)
        found[Modality.IMAGE]["pairs"], found[Modality.TEXT]["pairs"] = x, y
        for role, own in captions.items():
            values = self._stored(self._rows.texts, own).take(every)
            found[Modality.TEXT][role] = self._tokens.texts(role, own, values, step)
        return found, tokens

    def _stored(self, values: Any, rows: Ints) -> Inputs:
        return Inputs(len(rows), lambda part: to_tensor(values[rows[part]], self._device))

    def _pairs(self, batch: Batch, rng: np.random.Generator) -> tuple[Inputs, Inputs]:
        """The pairs, mixed with others if that is asked for (FuseMix)."""
        images = self._stored(self._rows.images, batch.images)
        texts = self._stored(self._rows.texts, batch.texts)
        beta = self._config.mixing
        if not beta:
            return images, texts
        partner = torch.from_numpy(rng.permutation(images.count)).to(self._device)
        x, y = (normalize(inputs.take(slice(None)), dim=1) for inputs in (images, texts))
        x, y = mix_pairs(x, y, float(rng.beta(beta, beta)), partner)
        return Inputs(len(x), lambda part: x[part]), Inputs(len(y), lambda part: y[part])

    @property
    def _takes_extra(self) -> bool:
        """Whether the distribution term has a use for rows beside the pairs."""
        return bool(self.weight.value) and not divergence(self._config.divergence).matched

    @property
    def _takes_negatives(self) -> bool:
        """Whether the pairwise term has a use for rows beside the pairs."""
        is_infonce = self._config.pairwise is PairwiseName.INFONCE
        return self._config.unpaired_negatives and is_infonce

    def _negatives(self, lone: Tensor | None) -> int:
        """How many of some unpaired rows InfoNCE is to tell from the pairs."""
        return 0 if lone is None or not self._takes_negatives else len(lone)

    def _extra_texts(self, texts: Mapping[str, Tensor]) -> Tensor | None:
        """Embedded unpaired texts, and the captions that the pairs leave out."""
        roles = ("lone", *(("others", "further") if self._takes_captions else ()))
        parts = [texts[role] for role in roles if role in texts]
        return torch.cat(parts) if parts else None

    @property
    def _takes_captions(self) -> bool:
        return self._takes_extra and self._config.cs_captions == "all"

    def _draw_unpaired(self, side: Modality, rng: np.random.Generator) -> dict[str, Inputs]:
        """Some unpaired rows; none where there are none, or no term would see them."""
        if not (self._takes_extra or self._takes_negatives):
            return {}
        if self._adapter[0].side(side).embeds_with_tokens:
            return {}  # these rows come without
        count = round(self._config.unpaired_ratio * self._config.batch_size)
        rows = self._unpaired.draw(side, count, rng)

        def take(part: slice) -> Tensor:
            return to_tensor(self._unpaired.take(side, rows[part]), self._device)

        return {"lone": Inputs(len(rows), take)} if len(rows) else {}

    @property
    def _has_bandwidth(self) -> bool:
        if self._config.token_weight:
            return True
        has: bool = divergence(self._config.divergence).has_bandwidth
        return bool(self.weight.value) and has

    def _bandwidth(self, x: Tensor, y: Tensor, step: int) -> Sigma:
        """Sigma for this batch; also looks whether the kernel is nearly diagonal."""
        if not self._has_bandwidth:
            return 1.0
        x, y = (normalize(side.detach(), dim=1) for side in (x, y))
        is_due = (step - 1) % MEDIAN_EVERY == 0
        if self._config.bandwidth == "tied":
            self.sigma = self.logit_scale**-0.5
        elif self._config.bandwidth == "median" and is_due:
            self.sigma = distributed.broadcast(lambda: max(MIN_MEDIAN, median_distance(x, y)))
        assert self.sigma is not None
        if is_due and not self._warned and self._config.divergence in _KERNELS and len(x) > 2:
            self._warn_of_narrow(x, y, self.sigma)
        return self.sigma

    def _warn_of_narrow(self, x: Tensor, y: Tensor, sigma: Sigma) -> None:
        widest = sigma if isinstance(sigma, float) else max(sigma)
        share = max(diagonal_share(x, sigma=widest), diagonal_share(y, sigma=widest))
        if share > NEARLY_DIAGONAL:
            self._warned = True
            log.warning(
                "bandwidth %.3g is so small that %.0f %% of the kernel's mass is each row with "
                "itself: the divergence then only pulls the nearest cross pairs together and "
                "retrieval suffers; use --bandwidth median or 0.5 and above",
                widest,
                100 * share,
            )


_KERNELS = (DivergenceName.CS, DivergenceName.MMD)


def as_sigma(value: Any) -> Sigma | None:
    """A bandwidth that was JSON in between."""
    return tuple(value) if isinstance(value, list) else value
