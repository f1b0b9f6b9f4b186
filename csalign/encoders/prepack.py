"""Weights of frozen networks laid out for oneDNN, whose products are faster on some CPUs.

float32 may be faster with oneDNN than with torch.s own product; bfloat16 is
multiplied with oneDNN by torch itself, but it lays out the weights anew at each call. Here they are
laid out once.

Each process decides by a trial of its own, so where both are about as fast, two processes may
compute the same item with other last digits: some 1e-7 of it, which in float16 now and then is the
next number (3e-5 at 0.05).
"""

from collections.abc import Collection, Iterator
from functools import cache

import torch
from torch.nn import functional

from csalign.core.onednn import multiply, pack, speed_ratio

# How far a product may be from torch's own, relative to its largest value.
_TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 1e-2}
# Below this ratio noise would decide, and the outputs' last digits would change between runs.
_WORTHWHILE = 1.15


def prepack(network: torch.nn.Module) -> int:
    """Pack the linear and attention layers of a frozen network in place, where that is faster.

    Packed are `torch.nn.Linear` and self-attention by `torch.nn.MultiheadAttention`, in float32
    or bfloat16, on the CPU, in evaluation mode and without gradients; all else stays as it is.
    Outputs are the same up to rounding, for any batch size, from any thread.

    Do this last: packed weights are no parameters any more. Moving or converting the network does
    not reach them, `state_dict` lacks them and `copy.deepcopy` raises. Reading `weight` or
    `in_proj_weight` still gives their values, copied at each read; so do calls that the packed
    layers are not made for, such as under autocast, which are therefore slow but right.

    Args:
        network: the network to change.

    Returns:
        How many layers were packed, an attention counting as one; 0 if this build of torch cannot
        do it, or if it would not be faster on this machine.
    """
    dtypes = {weight.dtype for _, weight in _layers(network)}
    return pack_layers(network, [dtype for dtype in dtypes if _is_faster(dtype)])


def pack_layers(
    network: torch.nn.Module, dtypes: Collection[torch.dtype] = tuple(_TOLERANCES)
) -> int:
    """Do what `prepack` does without asking whether it is faster.

    Args:
        network: the network to change.
        dtypes: of the layers to pack (default: all that can be packed).

    Returns:
        How many layers were packed; 0 if this build of torch cannot do it.
    """
    usable = _usable(network, dtypes)
    # A list of modules alone, so that each weight is released when its layer is packed.
    fitting = [module for module, weight in _layers(network) if weight.dtype in usable]
    return sum(_pack(module) for module in fitting)


def _usable(network: torch.nn.Module, dtypes: Collection[torch.dtype]) -> set[torch.dtype]:
    """Those of the dtypes that work, by a trial with the network's largest weight of each."""
    largest: dict[torch.dtype, torch.Tensor] = {}
    for _, weight in _layers(network):
        if weight.dtype not in largest or weight.numel() > largest[weight.dtype].numel():
            largest[weight.dtype] = weight
    return {dtype for dtype in dtypes if dtype in largest and _is_right(largest[dtype])}


def _layers(network: torch.nn.Module) -> Iterator[tuple[torch.nn.Module, torch.Tensor]]:
    """The layers that can be packed, with the weight that says their dtype."""
    for module in network.modules():
        weight = _weight(module)
        if weight is not None:
            yield module, weight


def _weight(module: torch.nn.Module) -> torch.Tensor | None:
    """The matrix of a layer that can be packed, None for any other module."""
    # Exact types: a subclass may do anything. Attention never calls its output projection, which
    # is of a subclass, so that one is packed with the attention or not at all.
    if type(module) is torch.nn.Linear:
        weights = [module._parameters.get("weight")]
    elif type(module) is torch.nn.MultiheadAttention:
        # Without the first there are separate weights, because keys are of another width.
        weights = [module.in_proj_weight, module.out_proj._parameters.get("weight")]
        if module.bias_k is not None or module.add_zero_attn:
            return None
    else:
        return None
    if module.training or "forward" in vars(module):
        return None
    if not all(_is_packable(weight) for weight in weights):
        return None
    return weights[0]


def _is_packable(weight: torch.Tensor | None) -> bool:
    return (
        type(weight) is torch.nn.Parameter  # a subclass may hold anything, say quantised values
        and weight.dtype in _TOLERANCES
        and weight.device.type == "cpu"
        and weight.numel() > 0
        and not weight.requires_grad
    )


class _PackedLinear(torch.nn.Linear):
    """A linear layer with packed weights; layers become it by a change of class."""

    _packed: torch.Tensor

    @property
    def weight(self) -> torch.Tensor:  # type: ignore[override]
        """A copy of the weights, (out, in), for code that reads them."""
        return self._packed.to_dense()

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map (..., in) to (..., out)."""
        if not _takes(self._packed, input):
            return super().forward(input)
        return multiply(input, self._packed, self.bias)


class _PackedAttention(torch.nn.MultiheadAttention):
    """Self-attention with packed weights; attentions become it by a change of class."""

    _packed: torch.Tensor

    @property
    def in_proj_weight(self) -> torch.Tensor:  # type: ignore[override]
        """A copy of the weights of queries, keys and values, (3 d, d), for code that reads them."""
        return self._packed.to_dense()

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        key_padding_mask: torch.Tensor | None = None,
        need_weights: bool = True,
        attn_mask: torch.Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See `torch.nn.MultiheadAttention`."""
        is_plain = key is query and value is query and query.dim() == 3 and not self.training
        asks_more = need_weights or key_padding_mask is not None or is_causal
        if asks_more or not is_plain or not _takes(self._packed, query):
            return super().forward(
                query,
                key,
                value,
                key_padding_mask,
                need_weights,
                attn_mask,
                average_attn_weights,
                is_causal,
            )
        if self.batch_first:
            return self._attend(query, attn_mask), None
        return self._attend(query.transpose(0, 1), attn_mask).transpose(0, 1), None

    def _attend(self, x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        """Attend within x (n, t, d); True or minus infinity in the mask forbids."""
        n, t, width = x.shape
        if mask is not None:
            if mask.dtype is torch.bool:
                mask = torch.zeros_like(mask, dtype=x.dtype).masked_fill_(mask, float("-inf"))
            if mask.dim() == 3:
                mask = mask.reshape(n, self.num_heads, t, t)
        projected = multiply(x, self._packed, self.in_proj_bias)
        q, k, v = projected.view(n, t, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        output: torch.Tensor = self.out_proj(attended.transpose(1, 2).reshape(n, t, width))
        return output


def _pack(module: torch.nn.Module) -> bool:
    """Pack a layer that `_weight` found fit; say whether that worked."""
    if isinstance(module, torch.nn.MultiheadAttention):
        changes = [
            (module, "in_proj_weight", _PackedAttention),
            (module.out_proj, "weight", _PackedLinear),
        ]
    else:
        changes = [(module, "weight", _PackedLinear)]
    try:
        packed = [pack(layer._parameters[name]) for layer, name, _ in changes]
    except (AttributeError, RuntimeError):
        return False
    for (layer, name, kind), weight in zip(changes, packed, strict=True):
        # Changed where it is, since other modules may hold it as well. The weight goes first: a
        # parameter would hide behind the property of its name, and be kept.
        del layer._parameters[name]
        layer.__class__ = kind
        layer._packed = weight  # no buffer: oneDNN's tensors cannot be moved or converted
    return True


def _takes(packed: torch.Tensor, x: torch.Tensor) -> bool:
    """Whether oneDNN can multiply x as torch would."""
    return (
        x.dtype is packed.dtype
        and x.device.type == "cpu"
        and not x.is_nested
        and not (x.requires_grad and torch.is_grad_enabled())
        and not torch.is_autocast_enabled("cpu")
    )


def _is_right(weight: torch.Tensor) -> bool:
    """Whether oneDNN is there, and multiplies with this weight as torch does."""
    x = _random(33, weight.shape[1], weight.dtype)
    try:
        packed = pack(weight)
        if not torch.equal(packed.to_dense(), weight):
            return False
        with torch.no_grad():
            for rows in (x, x[:1]):
                expected = functional.linear(rows, weight).float()
                error = (multiply(rows, packed).float() - expected).abs().max()
                if not error <= _TOLERANCES[weight.dtype] * expected.abs().max():
                    return False
    except (AttributeError, RuntimeError):
        return False
    return True


@cache
def _is_faster(dtype: torch.dtype) -> bool:
    """Whether a layer of a common size is faster packed; some 0.1 s, once per process."""
    x, weight = _random(256, 768, dtype), _random(3072, 768, dtype)
    if not _is_right(weight):
        return False
    packed = pack(weight)
    ratio = speed_ratio(lambda: functional.linear(x, weight), lambda: multiply(x, packed))
    return ratio >= _WORTHWHILE


def _random(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)  # the caller's random numbers stay what they are
    return torch.randn(rows, columns, generator=generator).to(dtype)
