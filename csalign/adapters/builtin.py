"""The built-in kinds of adapters; u = normalise(x) - mean is the input of each."""

from collections.abc import Sequence
from dataclasses import replace
from math import gcd

import torch
from torch import Tensor, nn
from torch.nn import TransformerEncoderLayer
from torch.nn.functional import linear, normalize, silu

from csalign.adapters.side import Aligned, SideAdapter, SideShape, map_tokens
from csalign.core.errors import ShapeError
from csalign.objective.products import FastLinear

MAX_HEADS = 8
LANDMARKS_AT_ONCE = 4_096  # so that a batch of 8,192 rows takes 256 MiB


class FastDropout(nn.Dropout):
    """Dropout whose mask on a CPU is drawn in a fifth of the time, 16 random bits per value."""

    def forward(self, input: Tensor) -> Tensor:
        """Set values (...) to 0 with probability p, within 2^-17, and divide the others."""
        if not self.training or input.device.type != "cpu" or torch.compiler.is_compiling():
            return super().forward(input)
        words = torch.empty(-(-input.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
        bits = words.view(torch.int16)[: input.numel()].view(input.shape)
        dropped = min(round(self.p * 2**16), 2**16 - 1)
        kept = (bits >= dropped - 2**15).to(input.dtype)
        return input * kept.mul_(2**16 / (2**16 - dropped))


class Linear(SideAdapter):
    """z = W u + b: any closed form, exactly."""

    accepts_closed_form = True
    accepts_output_map = True

    def __init__(self, shape: SideShape) -> None:
        super().__init__(shape)
        self.projection = FastLinear(shape.input_width, shape.width)

    def forward(self, x: Tensor, noise: float = 0.0) -> Tensor:
        """See `SideAdapter.forward`."""
        z: Tensor = self.projection(self.inputs(x, noise))
        return z

    def residual_ends(self) -> list[nn.Linear]:
        """Return the layers whose outputs are added to the linear path."""
        return []

    def start_from(self, mean: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
        """See `SideAdapter.start_from`; accepts any map, and sets the residual to 0."""
        with torch.no_grad():
            self.mean.copy_(mean)
            self.projection.weight.copy_(weight)
            self.projection.bias.copy_(torch.zeros(self.shape.width) if bias is None else bias)
        _set_to_zero(*self.residual_ends())

    def then(self, weight: Tensor, bias: Tensor) -> None:
        """See `SideAdapter.then`."""
        with torch.no_grad():
            for layer in (self.projection, *self.residual_ends()):
                layer.weight.copy_(weight @ layer.weight)
                layer.bias.copy_(weight @ layer.bias)
            self.projection.bias.add_(bias)


class Mlp(Linear):
    """z = W u + b + MLP(sqrt(d) u); the MLP is 0 at a closed form."""

    def __init__(self, shape: SideShape) -> None:
        super().__init__(shape)
        self.residual = nn.Sequential(
            FastLinear(shape.input_width, shape.hidden),
            nn.GELU(),
            FastDropout(shape.dropout),
            FastLinear(shape.hidden, shape.width),
        )

    def residual_ends(self) -> list[nn.Linear]:
        """See `Linear.residual_ends`."""
        return [layer for layer in self.residual[-1:] if isinstance(layer, nn.Linear)]

    def forward(self, x: Tensor, noise: float = 0.0) -> Tensor:
        """See `SideAdapter.forward`."""
        u = self.inputs(x, noise)
        z: Tensor = self.projection(u) + self.residual(self.shape.input_width**0.5 * u)
        return z


class Glu(Linear):
    """z = W u + b + W3 (silu(W1 v) * W2 v) with v = sqrt(d) u and W3 = 0 at the start."""

    def __init__(self, shape: SideShape) -> None:
        super().__init__(shape)
        self.gate = FastLinear(shape.input_width, shape.hidden)
        self.value = FastLinear(shape.input_width, shape.hidden)
        self.dropout = FastDropout(shape.dropout)
        self.out = FastLinear(shape.hidden, shape.width)
        _set_to_zero(self.out)

    def residual_ends(self) -> list[nn.Linear]:
        """See `Linear.residual_ends`."""
        return [self.out]

    def forward(self, x: Tensor, noise: float = 0.0) -> Tensor:
        """See `SideAdapter.forward`."""
        u = self.inputs(x, noise)
        v = self.shape.input_width**0.5 * u
        z: Tensor = self.projection(u) + self.out(self.dropout(silu(self.gate(v)) * self.value(v)))
        return z


class Kernel(SideAdapter):
    """z = W k(v) + b with k_l(v) = exp(-gamma |v - l|^2) of landmarks l, v = normalise(u).

    It is fitted in closed form, by `csalign.adapters.kernel_cca`, and not trained.
    """

    accepts_output_map = True
    gamma: Tensor

    def __init__(self, shape: SideShape) -> None:
        super().__init__(shape)
        self.register_buffer("gamma", torch.ones(()))
        self.landmarks = fixed(torch.zeros(shape.landmarks, shape.input_width))
        self.weight = fixed(torch.zeros(shape.width, shape.landmarks))
        self.bias = fixed(torch.zeros(shape.width))

    def forward(self, x: Tensor, noise: float = 0.0) -> Tensor:
        """See `SideAdapter.forward`."""
        v = normalize(self.inputs(x, noise), dim=-1)
        # Outputs are small differences of large sums, which float32 would round to 1e-5.
        exact = v.dtype if v.device.type == "mps" else torch.float64
        v, z = v.to(exact), self.bias.to(exact)
        for start in range(0, self.shape.landmarks, LANDMARKS_AT_ONCE):
            part = slice(start, start + LANDMARKS_AT_ONCE)
            values = gaussian(v, self.landmarks[part].to(exact), self.gamma.to(exact))
            z = z + values @ self.weight[:, part].to(exact).T
        return z.float()

    def then(self, weight: Tensor, bias: Tensor) -> None:
        """See `SideAdapter.then`."""
        self.weight, self.bias = fixed(weight @ self.weight), fixed(weight @ self.bias + bias)


def fixed(values: Tensor) -> nn.Parameter:
    """Make a parameter that is not trained."""
    return nn.Parameter(values.detach(), requires_grad=False)


def gaussian(u: Tensor, v: Tensor, gamma: Tensor | float) -> Tensor:
    """Return exp(-gamma |u_i - v_j|^2) of unit rows (n, d) and (m, d): (n, m)."""
    return torch.exp(2 * gamma * (u @ v.T - 1))


class Parts(SideAdapter):
    """z = [sqrt(s_1) normalise(z_1), sqrt(s_2) normalise(z_2), ...]: adapters side by side.

    A cosine of these outputs is the mean of the cosines of the parts, weighted by the shares s,
    which sum to 1.
    """

    shares: Tensor

    def __init__(self, shape: SideShape, parts: Sequence[SideAdapter]) -> None:
        super().__init__(shape)
        self.parts = nn.ModuleList(parts)
        self.register_buffer("shares", torch.full((len(parts),), 1 / len(parts)))

    @classmethod
    def of(cls, parts: Sequence[SideAdapter], shares: Sequence[float]) -> "Parts":
        """Put adapters of one input width side by side, with shares that sum to 1."""
        shapes = tuple(part.shape for part in parts)
        width = sum(shape.width for shape in shapes)
        found = cls(SideShape("parts", shapes[0].input_width, width, parts=shapes), parts)
        found.shares = torch.tensor(shares)
        return found

    def forward(self, x: Tensor, noise: float = 0.0) -> Tensor:
        """See `SideAdapter.forward`."""
        roots = self.shares.sqrt()
        outputs = [normalize(part(x, noise), dim=-1) for part in self.parts]
        return torch.cat([root * z for root, z in zip(roots, outputs, strict=True)], dim=-1)


class Mapped(SideAdapter):
    """z = W normalise(z_0) + b: an adapter, and a map of its unit outputs to another space.

    It is put together by ``csalign bind``, and not trained.
    """

    def __init__(self, shape: SideShape, inner: SideAdapter) -> None:
        super().__init__(shape)
        self.inner = inner
        self.weight = fixed(torch.zeros(shape.width, inner.shape.width))
        self.bias = fixed(torch.zeros(shape.width))

    @classmethod
    def of(cls, inner: SideAdapter, weight: Tensor, bias: Tensor) -> "Mapped":
        """Map an adapter by a weight (width, inner width) and a bias (width,)."""
        own = SideShape("mapped", inner.shape.input_width, len(bias), parts=(inner.shape,))
        mapped = cls(own, inner)
        mapped.weight, mapped.bias = fixed(weight), fixed(bias)
        return mapped

    def forward(self, x: Tensor, noise: float = 0.0) -> Tensor:
        """See `SideAdapter.forward`."""
        return linear(normalize(self.inner(x, noise), dim=-1), self.weight, self.bias)


class Identity(SideAdapter):
    """z = normalise(x): a frozen side, for whatever was built on its embeddings.

    It is not centred, since a decoder needs these embeddings unchanged, and ignores the noise.
    """

    keeps_width = True

    def __init__(self, shape: SideShape) -> None:
        super().__init__(shape)
        if shape.signed_sqrt or shape.scaled:
            raise ShapeError(
                f"{shape.kind}: starts at the encoder's own embeddings, so it cannot take their "
                "square roots or scale their dimensions; use another kind"
            )

    def forward(self, x: Tensor, noise: float = 0.0) -> Tensor:
        """See `SideAdapter.forward`; the noise is not used."""
        return self.inputs(x)

    def start_from(self, mean: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
        """See `SideAdapter.start_from`; accepts the identity without mean and bias."""
        self._require_identity(weight)
        if mean.any() or (bias is not None and bias.any()):
            raise ValueError(f"{self.shape.kind}: cannot be moved")

    def _require_identity(self, weight: Tensor) -> None:
        if not torch.equal(weight.cpu(), torch.eye(self.shape.width)):
            raise ValueError(f"{self.shape.kind}: starts from the identity alone")


class LowRank(Identity):
    """z = u + B A u + b: the identity plus an update of low rank, B = 0 and b = 0 at the start."""

    def __init__(self, shape: SideShape) -> None:
        super().__init__(shape)
        self.down = FastLinear(shape.input_width, shape.rank, bias=False)
        # Gives components around 1 for a unit row, where the usual learning rates work.
        nn.init.normal_(self.down.weight)
        self.dropout = FastDropout(shape.dropout)
        self.up = FastLinear(shape.rank, shape.width)
        _set_to_zero(self.up)

    def forward(self, x: Tensor, noise: float = 0.0) -> Tensor:
        """See `SideAdapter.forward`."""
        u = self.inputs(x, noise)
        z: Tensor = u + self.up(self.dropout(self.down(u)))
        return z

    def start_from(self, mean: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
        """See `SideAdapter.start_from`; accepts the identity with any mean and bias."""
        self._require_identity(weight)
        _set_to_zero(self.up)
        with torch.no_grad():
            self.mean.copy_(mean)
            if bias is not None:
                self.up.bias.copy_(bias)


class Transformer(Linear):
    """The linear path, then pre-norm encoder blocks over [embedding, token, token, ...].

    Tokens have a linear path of their own. The blocks add 0 at the start. There is no position
    encoding: tokens of a frozen encoder already encode their positions. Without tokens the blocks
    see the embedding alone.
    """

    projects_tokens = True
    accepts_output_map = False  # no single layer produces the sum that the blocks end in
    then = SideAdapter.then

    def __init__(self, shape: SideShape) -> None:
        super().__init__(shape)
        self.token_path: Linear | None = None
        if shape.token_width is not None:
            scaled = shape.scaled and shape.token_width == shape.input_width
            path = replace(shape, input_width=shape.token_width, scaled=scaled)
            self.token_path = Linear(path)
        self.blocks = nn.ModuleList(_encoder_block(shape) for _ in range(shape.layers))
        _set_to_zero(*self.residual_ends())

    def residual_ends(self) -> list[nn.Linear]:
        """See `Linear.residual_ends`."""
        blocks = [block for block in self.blocks if isinstance(block, TransformerEncoderLayer)]
        return [end for block in blocks for end in (block.self_attn.out_proj, block.linear2)]

    def forward(self, x: Tensor, noise: float = 0.0) -> Tensor:
        """See `SideAdapter.forward`."""
        return self._encode(super().forward(x, noise)[:, None], None)[:, 0]

    def forward_tokens(
        self, x: Tensor, tokens: Tensor, mask: Tensor, noise: float = 0.0
    ) -> Aligned:
        """See `SideAdapter.forward_tokens`; the embedding and its tokens see each other."""
        assert self.token_path is not None, "built without a token width"
        own = super().forward(x, noise)[:, None]
        sequence = torch.cat([own, map_tokens(self.token_path, tokens, mask, noise)], 1)
        padding = torch.cat([mask.new_zeros(len(mask), 1), ~mask], 1)
        encoded = self._encode(sequence, padding)
        return Aligned(encoded[:, 0], encoded[:, 1:].masked_fill(~mask[..., None], 0.0))

    def start_from(self, mean: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
        """See `SideAdapter.start_from`; accepts any map, for tokens of the same width too."""
        super().start_from(mean, weight, bias)
        if self.token_path is not None and self.shape.token_width == self.shape.input_width:
            self.token_path.start_from(mean, weight, bias)

    def _encode(self, sequence: Tensor, padding: Tensor | None) -> Tensor:
        for block in self.blocks:
            sequence = block(sequence, src_key_padding_mask=padding)
        return sequence


def _encoder_block(shape: SideShape) -> TransformerEncoderLayer:
    block = TransformerEncoderLayer(
        shape.width,
        gcd(shape.width, MAX_HEADS),
        shape.hidden,
        shape.dropout,
        activation="gelu",
        batch_first=True,
        norm_first=True,
    )
    if shape.token_width is None:
        # A single vector attends to itself only, so attention dropout would drop whole heads.
        block.self_attn.dropout = 0.0
    return block


def _set_to_zero(*layers: nn.Linear) -> None:
    for layer in layers:
        for parameter in layer.parameters():
            nn.init.zeros_(parameter)
