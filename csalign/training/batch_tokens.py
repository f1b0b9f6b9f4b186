"""Batches through adapters with their tokens, and the token sets that the token term compares."""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from csalign.adapters.model import Adapter
from csalign.adapters.side import Aligned, to_tensor
from csalign.core.enums import Modality
from csalign.features.join import Pairs
from csalign.features.tokens import Wanted, take_together
from csalign.objective.loss import TokenBatch
from csalign.training.config import TrainConfig
from csalign.training.forward import forward_pass
from csalign.training.sampler import Batch
from csalign.training.token_data import StoredTokens

Ints = npt.NDArray[np.int64]
_Tokens = tuple[Tensor, Tensor]  # values and mask


class BatchTokens:
    """Reads the tokens of batches, draws some of each row, and maps them.

    Kinds that map tokens one by one are given the tokens of the pairs that the token term sees;
    kinds that mix them into the embedding, those of all pairs.

    Args:
        adapter: both sides.
        rows: training rows.
        stored: their tokens.
        config: how many of them.
        device: where to compute.

    Attributes:
        rng: draws pairs and tokens.
    """

    def __init__(
        self,
        adapter: Adapter,
        rows: Pairs,
        stored: StoredTokens,
        config: TrainConfig,
        device: torch.device,
    ) -> None:
        self._adapter = adapter
        self._rows = rows
        self._sources = stored.sources
        self._config = config
        self._device = device
        # Of its own, so that pairs and noise of the other terms stay what they are without tokens.
        self.rng = np.random.default_rng([config.seed, 3])

    def forward(
        self, batch: Batch, images: Tensor, texts: Tensor, step: int
    ) -> tuple[Tensor, Tensor, TokenBatch | None]:
        """Adapted images and texts of a batch, and tokens if there is a token term.

        Args:
            batch: rows.
            images: (b, input_width), their image embeddings.
            texts: (m, input_width), likewise.
            step: number of the step.
        """
        inputs = {Modality.IMAGE: images, Modality.TEXT: texts}
        rows = {Modality.IMAGE: batch.images, Modality.TEXT: batch.texts}
        chosen = self._seen(len(texts))
        owners = chosen if batch.owner is None else batch.owner[chosen]
        seen = {Modality.IMAGE: owners, Modality.TEXT: chosen}
        asked = {side: rows[side] if self._mixes(side) else rows[side][seen[side]] for side in rows}
        read = self._read({side: asked[side] for side in self._sources})
        whole = {}
        for side in Modality:
            whole[side] = self._whole(side, "pairs", inputs[side], read.get(side), step)
        x, y = whole[Modality.IMAGE].embeddings, whole[Modality.TEXT].embeddings
        if not self._config.token_weight:
            return x, y, None
        sets = []
        for side in Modality:
            at = torch.from_numpy(seen[side]).to(self._device)
            if self._mixes(side):
                sets.append((whole[side].tokens[at], read[side][1][at]))
            else:
                own = self._aligned(side, "tokens", inputs[side][at], read[side], step)
                sets.append((own.tokens, read[side][1]))
        (x_tokens, x_mask), (y_tokens, y_mask) = sets
        return x, y, TokenBatch(x_tokens, y_tokens, x_mask, y_mask)

    def texts(self, role: str, rows: Ints, inputs: Tensor, step: int) -> Tensor:
        """Adapted texts beside those of a batch.

        Args:
            role: what they are, as in `embedder.ROLES`.
            rows: (k,) text rows.
            inputs: (k, input_width), their embeddings.
            step: number of the step.
        """
        side = Modality.TEXT
        read = self._read({side: rows}) if self._mixes(side) else {}
        return self._whole(side, role, inputs, read.get(side), step).embeddings

    def _mixes(self, side: Modality) -> bool:
        return self._adapter.side(side).embeds_with_tokens

    def _whole(
        self, side: Modality, role: str, inputs: Tensor, read: _Tokens | None, step: int
    ) -> Aligned:
        """Adapted rows, with their tokens where the kind mixes them in."""
        if read is not None and self._mixes(side):
            return self._aligned(side, role, inputs, read, step)
        with forward_pass(self._config, self._device, side, role, step):
            own: Tensor = self._adapter.side(side)(inputs, self._config.noise)
        return Aligned(own.float(), own.new_empty(0))

    def _seen(self, count: int) -> Ints:
        """Positions of the pairs that the token term sees, ascending."""
        most = self._config.token_pairs
        if count <= most:
            return np.arange(count)
        return np.sort(self.rng.choice(count, most, replace=False))

    def _read(self, rows: Mapping[Modality, Ints]) -> dict[Modality, _Tokens]:
        """Some tokens of each row (k, t, token_width), and where there are any (k, t)."""
        wanted = [
            Wanted(
                self._sources[side],
                self._rows.table_rows(side)[own],
                self.rng.random((len(own), self._config.token_samples)),
            )
            for side, own in rows.items()
        ]
        return {
            side: (
                to_tensor(found.values, self._device),
                torch.from_numpy(found.mask).to(self._device),
            )
            for side, found in zip(rows, take_together(wanted), strict=True)
        }

    def _aligned(
        self, side: Modality, role: str, inputs: Tensor, tokens: _Tokens, step: int
    ) -> Aligned:
        with forward_pass(self._config, self._device, side, role, step):
            own = self._adapter.side(side).forward_tokens(inputs, *tokens, self._config.noise)
        return Aligned(own.embeddings.float(), own.tokens.float())
