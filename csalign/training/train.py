"""``csalign train``: adapters on cached features, with the CS-Aligner objective."""

import logging
from typing import Any

from csalign.adapters.model import Adapter
from csalign.core import devices, distributed
from csalign.core.progress import Progress, reported_to, silent, tick
from csalign.core.results import TrainResult
from csalign.training.checkpoints import TrainingJob, check_run_folder, open_run
from csalign.training.config import (
    AdapterOptions,
    DataOptions,
    ObjectiveOptions,
    OptimizerOptions,
    TokenOptions,
    TrainConfig,
)
from csalign.training.data import StoredTokens, TrainingData, announce_rows, load_data, open_tokens
from csalign.training.initialization import announce_start, initialize, load_initialized
from csalign.training.loggers import check_logs, open_logs, write_page
from csalign.training.loop import Trainer, follow
from csalign.training.moment_matching import match_outputs
from csalign.training.sampler import PairSampler, make_sampler

log = logging.getLogger(__name__)


def train(config: TrainConfig, progress: Progress = silent) -> TrainResult:
    """Train adapters on a feature set and write a run folder.

    A run that was stopped or killed leaves ``OUT.partial``; the same call resumes it, with the
    result of an uninterrupted run.

    Under torchrun all processes train together, each on its share of every batch, with the losses
    of one process up to rounding. The main process alone writes, validates and reports progress.

    Raises:
        ConfigError: options that cannot be combined, or a logger's library is not installed.
        DataError: the features cannot be trained on: no pairs in the split, damaged files, rows
            without a direction, missing tokens.
        OutputError: ``config.out`` exists and is not to be replaced, an unfinished run there has
            other options, or the page cannot be written.
        TrainingError: the loss is not finite any more; names the last good checkpoint.
        ElsewhereError: another process failed.

    >>> import csalign, numpy
    >>> images, texts = numpy.random.default_rng(0).normal(size=(2, 60, 8))
    >>> result = csalign.train((images, texts), "run", steps=2, hidden=8)
    >>> result.run, result["pairs"]
    (PosixPath('run'), {'train': 45, 'validation': 15})
    >>> list(result.to_frame().columns)
    ['weights', 'mean_recall', 'mrr', 'centroid_distance']
    """
    config.check()
    devices.pick_device(config.device)  # refused before anything is loaded or replaced
    with reported_to(progress), distributed.process_group():
        if distributed.is_main_process():
            check_logs(config.log_to or (), config)
            check_run_folder(config.out, config.features, overwrite=config.overwrite)
        tokens = find_tokens(config)
        data = load_data(config.group(DataOptions), out=config.out, seed=config.seed)
        options, other_weight = config.group(DataOptions), config.other_captions
        sampler = make_sampler(options, other_weight, data.rows, tokens)
        if distributed.is_main_process():
            return _train(config, data, tokens, sampler)
        return _follow(config, data, tokens, sampler)


def _train(
    config: TrainConfig, data: TrainingData, tokens: StoredTokens | None, sampler: PairSampler
) -> TrainResult:
    """Train, validate and write, in the main process."""
    options = config.model_dump(mode="json", exclude_none=True)
    job = TrainingJob.of(config.model_dump(mode="json"), data.features, config.unpaired)
    with open_run(config.out, job, restart=config.overwrite, every=config.save_every) as run:
        if run.resumed is None:
            groups = config.group(AdapterOptions)
            widths = tokens.widths if tokens else {}
            announce_rows(data)
            found = initialize(groups, data.rows, sampler, data.val, widths, config.seed)
            adapter, start = found.adapter, found.name
            announce_start(found)
        else:
            adapter, start = load_initialized(run.resumed.folder, config.kinds)
        state = run.resumed and run.resumed.trainer
        distributed.broadcast(lambda: (adapter.shapes, adapter.state_dict(), state))
        tick("preparing")
        trainer = build_trainer(config, data, tokens, sampler, adapter)
        run.begin(trainer, data, start, config=config.to_toml(), seed=config.seed)
        pairs = min(config.batch_size, len(sampler))
        log.info("training on %s: %d steps of %d pairs", trainer.device, trainer.steps, pairs)
        logs = open_logs(config.log_to or (), run.path, config.out.name, options, trainer.step)
        with logs as log_line, run.saved_when_stopped():
            for validated in trainer.fit(log_line):
                if validated and trainer.step:
                    run.keep()
                if run.is_due(trainer.step):
                    run.save()
            scores = {"start": trainer.start_score, "kept": trainer.best_score}
            if config.match_moments:
                once, best = config.caption_weights, trainer.best_score
                matched = match_outputs(adapter, data, sampler, best, once=once, seed=config.seed)
                if matched is not None:
                    scores["matched"] = matched
                    figures = {"validation": matched._asdict(), "matched": True}
                    # Weights & Biases ignores a step before its last one.
                    log_line({"step": trainer.steps_made, **figures})
        validation = {name: score._asdict() for name, score in scores.items() if score}
        tick("saving")
        seconds = run.finish([*validation.values()][-1] if validation else None)
    if config.report is not None:
        write_page(config, config.out, adapter, data, config.seed)
    result = TrainResult(
        run=config.out,
        steps=trainer.steps_made,
        best_step=trainer.step,
        start=start,
        pairs={"train": data.rows.pairs, "validation": data.val.pairs if data.val else 0},
        parameters=adapter.parameter_counts(),
        validation=validation,
        seconds=seconds,
        names=data.features.manifest.names,
    )
    return distributed.broadcast(lambda: result)


def _follow(
    config: TrainConfig, data: TrainingData, tokens: StoredTokens | None, sampler: PairSampler
) -> TrainResult:
    """Take the same steps as the main process; write nothing."""
    shapes, weights, state = distributed.broadcast(_nothing)
    adapter = Adapter(shapes, allow=set(config.kinds.values()))
    adapter.load_state_dict(weights)
    trainer = build_trainer(config, data, tokens, sampler, adapter)
    if state is not None:
        trainer.load_state_dict(state)
    follow(trainer)
    result: TrainResult = distributed.broadcast(_nothing)
    return result


def _nothing() -> Any:
    """Return what the main process broadcasts, which is never called elsewhere."""


def find_tokens(config: TrainConfig) -> StoredTokens | None:
    """Open the tokens to train with, None without any; see `open_tokens`."""
    return open_tokens(
        config.features,
        config.group(TokenOptions),
        config.group(ObjectiveOptions),
        config.kinds,
        unpaired=config.unpaired,
        sub_batch=config.sub_batch,
    )


def build_trainer(
    config: TrainConfig,
    data: TrainingData,
    tokens: StoredTokens | None,
    sampler: PairSampler,
    adapter: Adapter,
) -> Trainer:
    """Build a trainer of the adapter."""
    return Trainer(
        adapter,
        data,
        tokens,
        sampler,
        config.group(ObjectiveOptions),
        config.group(OptimizerOptions),
        captions=config.captions,
        device=config.device,
        seed=config.seed,
    )
