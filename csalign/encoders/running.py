"""How every encoder's network is run: device, precision, batches, and the record of them."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch

from csalign.core.enums import Modality
from csalign.encoders.base import Embedded, EncoderOptions, Floats
from csalign.features.manifest import EncoderInfo

Network = TypeVar("Network", bound=torch.nn.Module)


def precision_of(options: EncoderOptions) -> str:
    """The precision of the forward pass, "auto" resolved."""
    if options.precision != "auto":
        return options.precision
    return "float32" if options.device.type == "cpu" else "float16"


def batch_size_of(options: EncoderOptions) -> int:
    """How many items go through a forward pass."""
    return options.batch_size or (32 if options.device.type == "cpu" else 256)


def fingerprint(network: torch.nn.Module) -> str:
    """Hex SHA-256 over names, shapes and values of all weights, whatever file they came from.

    Taken before `ready`, so that it does not depend on how the network is run.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def ready(network: Network, options: EncoderOptions) -> Network:
    """Make a finished network ready to be run, in place; the last thing done to it.

    Weights are bfloat16 where that is the precision, since autocast would convert them at each
    call; otherwise float32, float16 being left to autocast for its range.
    """
    network.eval().requires_grad_(False)
    exact = [
        (module, name, values)
        for module in network.modules()
        for name, values in module.named_buffers(recurse=False)
        # Frequencies of rotary positions: rounded, they would move far positions.
        if name.endswith("inv_freq")
    ]
    network.to(options.device, _weights_dtype(options))
    for module, name, values in exact:
        setattr(module, name, values.to(options.device))
    if options.device.type == "cuda":
        # Only convolutions have such weights, and they are faster so.
        network.to(memory_format=torch.channels_last)
    if options.compile and not _compile_blocks(network):
        network.compile()
    return network


def _compile_blocks(module: torch.nn.Module) -> bool:
    """Compile each of the blocks that a network is a stack of; whether there are any.

    One block stands for all of its kind, where a whole network takes minutes, and again for each
    length of text.
    """
    children = list(module.children())
    if isinstance(module, torch.nn.ModuleList | torch.nn.Sequential) and (
        len(children) > 1 and len({type(child) for child in children}) == 1
    ):
        for child in children:
            child.compile()
        return True
    found = [_compile_blocks(child) for child in children]
    return any(found)


@contextmanager
def inference(options: EncoderOptions) -> Iterator[None]:
    """Everything that a forward pass is run under."""
    autocast = torch.autocast(
        options.device.type, dtype=torch.float16, enabled=precision_of(options) == "float16"
    )
    with torch.inference_mode(), autocast:
        yield


def to_device(tensor: torch.Tensor, options: EncoderOptions) -> torch.Tensor:
    """Move an input to where the network is; pixels take the type of its weights."""
    dtype = _weights_dtype(options) if tensor.is_floating_point() else tensor.dtype
    if options.device.type != "cuda":
        return tensor.to(options.device, dtype)
    layout = torch.channels_last if tensor.ndim == 4 else torch.preserve_format
    sent = tensor.pin_memory().to(options.device, non_blocking=True)
    return sent.to(dtype, memory_format=layout)


def to_numpy(tensor: torch.Tensor) -> Floats:
    """The values as float32 on the CPU."""
    array: Floats = tensor.float().cpu().numpy()
    return array


def embed_by_length(
    lengths: Sequence[int], batch_size: int, embed: Callable[[list[int]], Embedded]
) -> Embedded:
    """Embed items in batches of like length and give the results in the items' order.

    Args:
        lengths: of each of one or more items.
        batch_size: items in a batch.
        embed: embeds the items at the positions given.
    """
    order = np.argsort(lengths, kind="stable").tolist()
    embeddings: list[Floats] = [np.empty(0)] * len(order)
    tokens: list[Floats] = [np.empty(0)] * len(order)
    with_tokens = False
    for start in range(0, len(order), batch_size):
        positions = order[start : start + batch_size]
        batch = embed(positions)
        with_tokens = batch.tokens is not None
        for row, position in enumerate(positions):
            embeddings[position] = batch.embeddings[row]
            if batch.tokens is not None:
                tokens[position] = batch.tokens[row]
    return Embedded(np.stack(embeddings), tokens if with_tokens else None)


def describe(
    embedded: Embedded,
    options: EncoderOptions,
    *,
    spec: str,
    fingerprint: str | None,
    preprocessing: dict[str, Any],
) -> EncoderInfo:
    """The record of an encoder, given something that it embedded.

    Args:
        embedded: one item or more.
        options: how the encoder is run.
        spec: the encoder as the user named it.
        fingerprint: of its weights, if known.
        preprocessing: what decides the numbers, beside the options.
    """
    tokens = embedded.tokens
    preprocessing = {**preprocessing, "precision": precision_of(options)}
    if tokens is not None and options.max_tokens is not None:
        preprocessing["max_tokens"] = options.max_tokens
    return EncoderInfo(
        spec=spec,
        fingerprint=fingerprint,
        width=embedded.embeddings.shape[1],
        token_width=None if tokens is None else tokens[0].shape[1],
        token_space=None if tokens is None else options.token_space,
        preprocessing=preprocessing,
    )


def gives_tokens(options: EncoderOptions, side: Modality) -> bool:
    """Whether one side is to give tokens."""
    return side in options.tokens


def _weights_dtype(options: EncoderOptions) -> torch.dtype:
    return torch.bfloat16 if precision_of(options) == "bfloat16" else torch.float32
