"""The trainer of a network: its batch size, logit scale, terms and schedule, found or checked."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from csalign.adapters.model import Adapter
from csalign.core import distributed
from csalign.core.devices import free_bytes, pick_device
from csalign.core.enums import PairwiseName
from csalign.core.errors import ConfigError, reason_of
from csalign.features.streaming import MIB
from csalign.training.config import ObjectiveOptions, OptimizerOptions
from csalign.training.data import StoredTokens, TrainingData
from csalign.training.network.batch_loss import BatchLoss, check_terms, compares_sets, uses_unpaired
from csalign.training.network.device_rows import SHARE
from csalign.training.network.loop import FIRST, Loader, Phase, Trainer, Validation
from csalign.training.network.memory import LEAST_BATCH, largest_batch
from csalign.training.network.sampler import BatchLoader, PairSampler
from csalign.training.network.schedule import Timer, plan
from csalign.training.network.step import prepare_step
from csalign.training.network.validation import logit_scale, validate

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """What a network learns from."""

    items: int  # in an epoch, each with a pair
    # Makes the batches of a size and a seed on a device, with unpaired rows of each side.
    load: Callable[[int, int, torch.device, int], Loader]
    scale: Callable[[Adapter], float]  # of the logits, by the recall of a start
    # Finds the batch that fits into the memory of a device; None where it cannot be found.
    fitting: Callable[[Adapter, torch.device], int] | None
    validation: Validation | None  # None without one, and outside of the main process
    loss: type[BatchLoss] | Callable[..., BatchLoss] = BatchLoss


def source_of_pairs(
    data: TrainingData,
    tokens: StoredTokens | None,
    sampler: PairSampler,
    objective: ObjectiveOptions,
    options: OptimizerOptions,
    captions: str,
) -> Source:
    """Describe the training on images and texts."""
    features, val = tokens.features if tokens else None, data.val

    def load(size: int, seed: int, device: torch.device, unpaired: int) -> BatchLoader:
        return BatchLoader(
            data.rows,
            sampler,
            size,
            seed,
            device,
            data.unpaired,
            unpaired_rows=unpaired,
            further_captions=compares_sets(objective) and objective.cs_captions == "all",
            mixing=objective.mixing,
            tokens=tokens,
        )

    def fitting(adapter: Adapter, device: torch.device) -> int:
        if tokens is not None:
            raise ConfigError("--batch-size auto: cannot be combined with tokens; give a number")
        texts = data.rows.pairs / max(1, int((data.rows.caption_counts > 0).sum()))
        common = adapter.shapes, objective, options, device, texts
        step = partial(prepare_step, *common, captions=captions)
        memory = int(SHARE * (1 - SHARE) * free_bytes(device))  # beside the embeddings
        return distributed.broadcast(lambda: _largest_batch(step, len(sampler), memory))

    validation = None
    if val is not None:
        held_out = int((val.caption_counts > 0).sum())
        validation = Validation(lambda adapter: validate(adapter, val, features), held_out)
    scale = partial(logit_scale, rows=val, features=features)
    return Source(len(sampler), load, scale, fitting, validation)


def build_trainer(
    adapter: Adapter,
    source: Source,
    objective: ObjectiveOptions,
    options: OptimizerOptions,
    *,
    captions: str,
    device: str,
    seed: int,
    phase: Phase = FIRST,
    timer: Timer | None = None,
) -> Trainer:
    """Build the trainer of a phase; the adapter moves to the device.

    Raises:
        ConfigError: options conflict, or are of no use on these rows.
    """
    seed += phase.number
    where = pick_device(device)
    adapter.to(where)
    size, scale = options.batch_size, phase.scale
    if size == "auto":
        if source.fitting is None and not phase.batch_size:
            raise ConfigError("--batch-size auto: needs a set of two sides; give a number")
        size = phase.batch_size or (source.fitting and source.fitting(adapter, where)) or 0
    trains = 0 not in (options.steps, phase.steps)
    is_infonce = objective.pairwise is PairwiseName.INFONCE
    if trains and is_infonce and objective.logit_scale == "auto":
        scale = phase.scale or distributed.broadcast(lambda: source.scale(adapter))
        objective = objective.model_copy(update={"logit_scale": scale})
    rows = min(size, source.items) if trains else 0
    check_terms(objective, captions=captions, rows=rows)
    loss = source.loss(
        objective,
        precision=options.precision,
        sub_batch=options.sub_batch,
        compiled=options.compile and where.type == "cuda",
    )
    unpaired = round(size * objective.unpaired_ratio * uses_unpaired(objective))
    given = options.model_dump(include={"epochs", "minutes", "validations", "patience"})
    given["steps"] = options.steps if phase.steps is None else phase.steps
    schedule = plan(max(1, source.items), size, **given)
    if phase.last is not None:
        schedule = schedule._replace(last=phase.last)
    return Trainer(
        adapter,
        source.load(size, seed, where, unpaired),
        loss.to(where),
        options,
        schedule,
        device=where,
        seed=seed,
        batch_size=size,
        rows=rows,
        scale=scale,
        phase=phase,
        timer=timer,
        validation=None if phase.number else source.validation,
    )


def _largest_batch(step: Callable[[int], Any], pairs: int, memory: int) -> int:
    """Find the largest batch that fits into some bytes; 512 if that cannot be found."""
    try:
        found, needed = largest_batch(step, pairs=pairs, memory=memory)
    except Exception as error:  # adapters of users may need values, and fail in any way
        text = "--batch-size auto: the memory of a step cannot be found (%s); using %d pairs"
        log.warning(text, reason_of(error), LEAST_BATCH)
        return LEAST_BATCH
    counted = f"{found:,} pairs, a step takes {needed // MIB:,} MiB of {memory // MIB:,}"
    log.info("--batch-size auto: %s", counted)
    return found
