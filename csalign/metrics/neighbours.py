"""The items that score highest for each query, and how often an item is among them."""

from threading import Lock

import numpy as np
import torch
from torch import Tensor

from csalign.core import distributed
from csalign.core.arrays import Ints

NEIGHBOURS = 10
GROUP = 16
ITEMS = (1 << 29) - 1  # the bits of a float64 that a float32 leaves free
TIE = 1e-6  # scores of unit rows closer than this are equal, up to rounding


def largest(scores: Tensor, k: int, first: int = 0) -> Tensor:
    """Find the k largest of each row (r, c), as keys (r, min(k, c)) in no order.

    A key is a float64 that has the score in its upper bits and the number of its column, counted
    from `first`, in the others, so that keys are compared as their scores; `unpacked` reads them.
    On the CPU it takes a third of the time of ``topk``: the k largest are in the k groups of
    columns with the largest maxima, and numpy partitions by SIMD.

    Args:
        scores: float32, finite; any strides.
        k: how many.
        first: number of the first column; all are below 2^29.
    """
    rows, width = scores.shape
    k, groups = min(k, width), width // GROUP
    if scores.device.type != "cpu":
        found = scores.topk(k, dim=1, sorted=False)
        return _packed(found.values, found.indices + first)
    grouped = groups * GROUP
    columns = torch.arange(width).expand(rows, -1)
    if groups > k:
        if scores.stride(1) == 1:
            maxima = scores[:, :grouped].view(rows, GROUP, groups).amax(1)
        else:  # columns that are rows in memory are compared as such
            maxima = scores.T[:grouped].view(GROUP, groups, rows).amax(0).T.contiguous()
        best = torch.from_numpy(np.argpartition(maxima.numpy(), -k, axis=1)[:, -k:])
        inside = (best[:, None] + torch.arange(0, grouped, groups)[:, None]).flatten(1)
        columns = torch.cat([inside, columns[:, grouped:]], dim=1) if grouped < width else inside
    return last(_packed(scores.gather(1, columns), columns + first), k)


def last(keys: Tensor, k: int) -> Tensor:
    """Select the k largest keys of each row, in no order."""
    if keys.device.type != "cpu":
        return keys.topk(k, dim=1, sorted=False).values
    return torch.from_numpy(np.partition(keys.numpy(), -k, axis=1)[:, -k:])


def _packed(scores: Tensor, columns: Tensor) -> Tensor:
    return (scores.double().view(torch.int64) | columns).view(torch.float64)


def unpacked(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Return the scores, float32, and columns, int64, of some keys."""
    bits = keys.view(torch.int64)
    return (bits & ~ITEMS).view(torch.float64).float(), bits & ITEMS


class Neighbours:
    """The `NEIGHBOURS` best items of each query, in the tiles of scores so far."""

    def __init__(self, queries: int, device: torch.device | None = None) -> None:
        shape = queries, NEIGHBOURS
        self._keys = torch.full(shape, -torch.inf, dtype=torch.float64, device=device)
        self._locks: dict[int, Lock] = {}

    def __len__(self) -> int:
        return len(self._keys)

    def add(self, query: int, item: int, scores: Tensor) -> None:
        """Add the scores (q, i) of items, from one on, for queries, from one on; in any thread."""
        some = slice(query, query + len(scores))
        least = unpacked(self._keys[some].amin(1))[0]
        if scores.device.type != "cpu" or least.min() == -torch.inf:
            self._merge(some, largest(scores, NEIGHBOURS, item))
            return
        better = np.ascontiguousarray(scores.numpy() > least.numpy()[:, None])  # few, later on
        rows, columns = map(torch.from_numpy, np.divmod(np.flatnonzero(better), better.shape[1]))
        counts = rows.bincount(minlength=len(scores))
        keys = torch.full((len(scores), int(counts.max())), -torch.inf, dtype=torch.float64)
        place = torch.arange(len(rows)) - (counts.cumsum(0) - counts)[rows]
        keys[rows, place] = _packed(scores[rows, columns], columns + item)
        self._merge(some, keys)

    def _merge(self, some: slice, keys: Tensor) -> None:
        with self._locks.setdefault(some.start, Lock()):
            self._keys[some] = last(torch.cat([self._keys[some], keys], dim=1), NEIGHBOURS)

    def merge_processes(self) -> None:
        """Add what the other processes of the group have found; all have to call it."""
        found = distributed.all_gather(self._keys.cpu())
        del found[distributed.world().rank]
        for keys in found:
            self._merge(slice(0, len(self)), keys.to(self._keys.device))

    def number(self, queries: Ints, items: Ints) -> None:
        """Replace the numbers of all queries and items by others, (q,) and (i,)."""
        scores, found = unpacked(self._keys)
        columns = torch.from_numpy(items).to(found.device)[found]
        keys = torch.where(scores > -torch.inf, _packed(scores, columns), -torch.inf)
        self._keys[torch.from_numpy(queries).to(found.device)] = keys

    def best(self, queries: Ints) -> tuple[Tensor, Tensor]:
        """Return the scores, -inf for none, and items of some queries, (k, `NEIGHBOURS`)."""
        return unpacked(self._keys.cpu()[torch.from_numpy(queries)])

    def skewness(self, items: int) -> float:
        """Compute the skewness of the number of queries that have each item among their best.

        E[(N - mean)^3] / std^3 over so many items, 0 where all N are equal.
        """
        keys = self._keys.cpu()
        listed = unpacked(keys[keys > -torch.inf])[1]
        counts = torch.bincount(listed, minlength=items).double()
        centred = counts - counts.mean()
        spread = float(centred.square().mean())
        return float(centred.pow(3).mean()) / spread**1.5 if spread else 0.0


Both = tuple[Neighbours, Neighbours]  # of all images, and of all texts
