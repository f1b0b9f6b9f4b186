"""Embeddings as adapters take them in."""

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import normalize

Array = npt.NDArray[Any]

CHUNK_ROWS = 8_192


class Rows(Protocol):
    """Embeddings (n, d), of which some at a time are taken as an array."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(n, d)."""

    def __len__(self) -> int: ...
    def __getitem__(self, key: Any, /) -> Any: ...


def unit_inputs(x: Tensor, *, signed_sqrt: bool) -> Tensor:
    """Rows as the linear path sees them before centring: (..., d) float32, norm 1."""
    x = x.float()
    if signed_sqrt:
        x = x.sign() * x.abs().sqrt()
    return normalize(x, dim=-1)


def to_tensor(values: Array, device: torch.device) -> Tensor:
    """A float32 tensor on a device; the cast from float16 happens there."""
    # A read-only array (Arrow's memory) must be copied before torch may share it.
    own = torch.from_numpy(np.array(values))
    if device.type == "cuda":  # where it is copied while the processor goes on
        return own.pin_memory().to(device, non_blocking=True).float()
    return own.to(device).float()


def mean_square(rows: Rows) -> float:
    """Mean squared norm of rows (n, d), n >= 1, read some at a time."""
    total = 0.0
    for start in range(0, len(rows), CHUNK_ROWS):
        part = np.asarray(rows[start : start + CHUNK_ROWS], np.float32)
        total += float(np.einsum("ij,ij->", part, part, dtype=np.float64))
    return total / len(rows)
