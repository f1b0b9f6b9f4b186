"""The kind that sees an embedding together with its tokens."""

from dataclasses import replace
from math import gcd

import torch
from torch import Tensor, nn
from torch.nn import TransformerEncoderLayer

from csalign.adapters.linear import Linear, silence
from csalign.adapters.side import Aligned, SideAdapter, SideShape, spread

MAX_HEADS = 8


class Transformer(Linear):
    """The linear path, then pre-norm encoder blocks over [embedding, token, token, ...].

    Tokens have a linear path of their own. The blocks add 0 at the start. There is no position
    encoding: the frozen encoder's tokens tell their place themselves. Without tokens the blocks
    see the embedding alone.
    """

    projects_tokens = True
    accepts_output_map = False  # the blocks end in a sum that no layer of them could hold

    def __init__(self, shape: SideShape) -> None:
        super().__init__(shape)
        self.token_path: Linear | None = None
        if shape.token_width is not None:
            self.token_path = Linear(replace(shape, input_width=shape.token_width))
        self.blocks = nn.ModuleList(_block(shape) for _ in range(shape.layers))
        self._silence()

    def forward(self, x: Tensor, noise: float = 0.0) -> Tensor:
        """See `SideAdapter.forward`."""
        return self._encode(super().forward(x, noise)[:, None], None)[:, 0]

    def forward_tokens(
        self, x: Tensor, tokens: Tensor, mask: Tensor, noise: float = 0.0
    ) -> Aligned:
        """See `SideAdapter.forward_tokens`; the embedding and its tokens see each other."""
        assert self.token_path is not None, "built without a token width"
        own = super().forward(x, noise)[:, None]
        sequence = torch.cat([own, spread(self.token_path(tokens[mask], noise), mask)], 1)
        real = torch.cat([mask.new_ones(len(mask), 1), mask], 1)
        encoded = self._encode(sequence, real)
        return Aligned(encoded[:, 0], encoded[:, 1:].masked_fill(~mask[..., None], 0.0))

    def start_from(self, mean: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
        """See `SideAdapter.start_from`; takes any map, for tokens of the same width too."""
        super().start_from(mean, weight, bias)
        if self.token_path is not None and self.shape.token_width == self.shape.input_width:
            self.token_path.start_from(mean, weight, bias)
        self._silence()

    def then(self, weight: Tensor, bias: Tensor) -> None:
        """See `SideAdapter.then`."""
        SideAdapter.then(self, weight, bias)

    def _encode(self, sequence: Tensor, real: Tensor | None) -> Tensor:
        for block in self.blocks:
            sequence = block(sequence, src_key_padding_mask=None if real is None else ~real)
        return sequence

    def _silence(self) -> None:
        for block in self.blocks:
            assert isinstance(block, TransformerEncoderLayer)
            silence(block.self_attn.out_proj)
            silence(block.linear2)


def _block(shape: SideShape) -> TransformerEncoderLayer:
    block = TransformerEncoderLayer(
        shape.width,
        gcd(shape.width, MAX_HEADS),  # as many heads as the width divides into
        shape.hidden,
        shape.dropout,
        activation="gelu",
        batch_first=True,
        norm_first=True,
    )
    for name in ("dropout", "dropout1", "dropout2"):
        setattr(block, name, nn.Dropout(shape.dropout))
    if shape.token_width is None:
        # Of a single vector there is nothing to attend to, so this would drop whole heads.
        block.self_attn.dropout = 0.0
    return block
