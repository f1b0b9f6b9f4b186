"""``csalign train``: adapters on cached features, with the CS-Aligner objective."""

import logging
from dataclasses import replace

from csalign.core import devices, distributed
from csalign.core.progress import Progress, current_call, reported_to, silent, tick
from csalign.core.results import TrainResult
from csalign.training.checkpoints import TrainingJob, check_run_folder, open_run
from csalign.training.config import DataOptions, ObjectiveOptions, TrainConfig
from csalign.training.data import TrainingData, load_data
from csalign.training.loggers import check_logs, open_logs, write_page
from csalign.training.network.batch_loss import check_terms
from csalign.training.phases import follow_phases, run_phases
from csalign.training.sides.train import SidesWork, sides_work
from csalign.training.work import Work, check_networks, find_tokens

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
    began = current_call().began
    config.check()
    terms = config.group(ObjectiveOptions)
    check_terms(terms, captions=config.captions, rows=0)  # those of a step once rows are known
    devices.pick_device(config.device)  # refused before anything is loaded or replaced
    with reported_to(progress), distributed.process_group():
        if distributed.is_main_process():
            check_logs(config.log_to or (), config)
            check_run_folder(config.out, config.features, overwrite=config.overwrite)
        work = sides_work(config) or _two_sided(config)
        if distributed.is_main_process():
            return _train(work, began)
        follow_phases(work)
        result: TrainResult = distributed.receive()
        return result


def _two_sided(config: TrainConfig) -> Work:
    """Prepare to train on images and texts."""
    tokens = find_tokens(config)
    check_networks(config, tokens)
    data = load_data(config.group(DataOptions), out=config.out, seed=config.seed)
    return Work(config, data, tokens)


def _train(work: Work | SidesWork, began: float) -> TrainResult:
    """Train, validate and write, in the main process of a command that began then."""
    config, data = work.config, work.data
    options = config.model_dump(mode="json", exclude_none=True)
    job = TrainingJob.of(config.model_dump(mode="json"), data.features, config.unpaired)
    if isinstance(work, SidesWork) and work.base is not None and work.base.info is not None:
        job = job.model_copy(update={"unpaired": [work.base.info.weights_sha256]})
    out, every, restart = config.out, config.save_every, config.overwrite
    with open_run(out, job, restart=restart, every=every, began=began) as run:
        if not run.ended and run.resumed is None:
            work.announce()
        step = run.resumed.step if run.resumed is not None and not run.ended else 0
        logs = open_logs(config.log_to or (), run.path, config.out.name, options, step)
        with logs as log_lines, run.saved_when_stopped():
            timed = replace(work, clock=lambda: run.seconds)
            trained = (
                timed.run(run, log_lines)
                if isinstance(timed, SidesWork)
                else run_phases(timed, run, log_lines)
            )
        tick("saving")
        decided, adapter = trained.decided, trained.adapter
        final = [*decided.scores.values()][-1] if decided.scores else None
        seconds = run.finish(adapter, final)
    if config.report is not None and isinstance(data, TrainingData):
        write_page(config, config.out, trained.measured, data, config.seed)
    result = TrainResult(
        run=config.out,
        steps=decided.made,
        best_step=decided.best,
        start=decided.start,
        pairs=work.counts(),
        width=adapter.shapes[adapter.names[0]].width,
        parameters=adapter.parameter_counts(),
        validation=decided.scores,
        seconds=seconds,
        names=data.features.manifest.names,
        parts=trained.parts,
        refit=trained.refit,
        sides=[*map(str, adapter.names)] if isinstance(work, SidesWork) else None,
    )
    return distributed.broadcast(lambda: result)
