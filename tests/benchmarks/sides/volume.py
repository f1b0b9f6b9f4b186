"""Train adapters by a loss on volumes, as GRAM does (ICLR 2025), for comparison.

The volume of an item is that of the parallelotope of its unit rows, sqrt(det Gram); InfoNCE takes
its negative as the similarity of the anchor side's row of one item and the other rows of another.
Items of a batch have the same sides, since volumes of unlike numbers of rows do not compare.
GRAM's second term, a classifier of matches by a network over tokens, has no meaning here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import numpy as np
import torch
from matrix import Floats, Ints, Sides, all_ranks, mean_recall
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from csalign.adapters.model import Adapter, build_side
from csalign.adapters.side import SideAdapter, SideShape

TEMPERATURE = 0.07  # GRAM's start
LEAST = 1e-6  # under the root, whose slope at 0 is infinite


def volumes(anchors: Tensor, others: Tensor) -> Tensor:
    """Volumes of every anchor (n, k) with every tuple of m other unit rows (n, m, k): (n, n).

    det of the Gram matrix of both is det G (1 - a' G^-1 a), with G that of the others alone and a
    their cosines with the anchor.
    """
    gram = others @ others.mT + 1e-4 * torch.eye(others.shape[1])
    lower = torch.linalg.cholesky(gram)
    cosines = torch.einsum("ik,jmk->jmi", anchors, others)
    solved = torch.linalg.solve_triangular(lower, cosines, upper=False)
    height = 1 - solved.square().sum(dim=1)  # (tuples, anchors)
    base = lower.diagonal(dim1=-2, dim2=-1).prod(dim=1)
    return (base[:, None] * height.clamp(min=LEAST).sqrt()).T


def volume_loss(anchors: Tensor, others: Tensor) -> Tensor:
    """InfoNCE of the negative volumes, both ways."""
    logits = -volumes(anchors, others) / TEMPERATURE
    target = torch.arange(len(anchors))
    return (cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2


def glu_from(start: SideAdapter) -> SideAdapter:
    """A gated adapter with csalign's defaults that computes the same linear map."""
    own = start.shape
    shape = SideShape(
        "glu", own.input_width, own.width, signed_sqrt=own.signed_sqrt, scaled=own.scaled
    )
    side = build_side(shape)
    with torch.no_grad():
        weight, bias = start.projection.weight, start.projection.bias
        side.start_from(start.mean.clone(), weight.clone(), None if bias is None else bias.clone())
        if own.scaled:
            side.scale.copy_(start.scale)
    return side


def train_volume(
    sides: Sides,
    start: Adapter,
    anchor: str,
    seed: int,
    *,
    stop: int | None = None,
    epochs: int = 15,
    batch_size: int = 512,
    learning_rate: float = 1e-3,
    noise: float = 0.5,
    validations: int = 20,
) -> tuple[dict[str, SideAdapter], dict[str, SideAdapter], int]:
    """Train from a closed form with the settings that ``csalign train`` has by default.

    Args:
        sides: the items.
        start: the closed form, which has not seen the items that validate.
        anchor: the side that every item used has.
        seed: of batches, noise and dropout.
        stop: a step to stop at, of a training on the items that validate too.
        epochs: over the items.
        batch_size: items of a step, at most.
        learning_rate: at its peak.
        noise: as in ``csalign train``.
        validations: spread over the steps.

    Returns:
        The adapter of each side as it was at the best of the validations, and at the end, and the
        step of that validation.
    """
    torch.manual_seed(seed)
    generator = np.random.default_rng(seed)
    adapters = {name: glu_from(start.side(name)) for name in sides.names}
    inputs = {name: torch.from_numpy(rows) for name, rows in sides.rows.items()}
    learned = np.isin(sides.splits, ("train",) if stop is None else ("train", "val"))
    own = {name: rows[learned] for name, rows in sides.of_items.items()}
    groups = grouped(own, anchor, sides.names)
    sizes = np.array([len(items) for _, items in groups])
    steps = max(200, epochs * int(np.ceil(sizes.sum() / batch_size)))
    parameters = [p for side in adapters.values() for p in side.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, weight_decay=0.01)
    warmup = max(1, round(0.05 * steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, (1 + np.cos(np.pi * step / steps)) / 2),
    )
    best, best_step, kept = -1.0, 0, copy.deepcopy(adapters)
    for step in range(steps + 1):
        if step == stop:
            break
        due = step == steps or step % max(1, steps // validations) == 0
        if stop is None and due:
            value = mean_recall(all_ranks(sides, embedding(adapters), "val"))
            if value > best:
                best, best_step, kept = value, step, copy.deepcopy(adapters)
        if step == steps:
            break
        others, items = groups[generator.choice(len(groups), p=sizes / sizes.sum())]
        picked = generator.choice(items, min(batch_size, len(items)), replace=False)
        outputs = {
            name: normalize(adapters[name](inputs[name][own[name][picked]], noise), dim=1)
            for name in (anchor, *others)
        }
        loss = volume_loss(outputs[anchor], torch.stack([outputs[name] for name in others], 1))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
    return kept, adapters, best_step


def grouped(
    own: dict[str, Ints], anchor: str, names: tuple[str, ...]
) -> list[tuple[tuple[str, ...], Ints]]:
    """Group the items that have the anchor and another side by the others that they have."""
    others = [name for name in names if name != anchor]
    has = np.stack([own[name] >= 0 for name in others], axis=1)
    found = []
    for pattern in np.unique(has[has.any(axis=1)], axis=0):
        items = np.flatnonzero((own[anchor] >= 0) & (has == pattern).all(axis=1))
        if len(items) > 1:
            found.append((tuple(np.array(others)[pattern].tolist()), items))
    return found


def embedding(adapters: dict[str, SideAdapter]) -> Callable[[str, Floats], Floats]:
    """Return a function that embeds rows of a side, without dropout."""

    @torch.inference_mode()
    def embed(name: str, rows: Floats) -> Floats:
        side = adapters[name].eval()
        found = normalize(side(torch.from_numpy(rows)), dim=1).numpy()
        side.train()
        return found

    return embed
