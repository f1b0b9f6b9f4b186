"""``csalign train``: adapters on cached features, with the CS-Aligner objective."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

from csalign.adapters.model import Adapter
from csalign.core import devices, distributed
from csalign.core.progress import Progress, reported_to, silent, tick
from csalign.core.results import TrainResult
from csalign.training.checkpoints import TrainingJob, UnfinishedRun, check_run_folder, open_run
from csalign.training.config import (
    AdapterOptions,
    DataOptions,
    ObjectiveOptions,
    OptimizerOptions,
    TokenOptions,
    TrainConfig,
)
from csalign.training.data import (
    Score,
    StoredTokens,
    TrainingData,
    announce_rows,
    load_data,
    open_tokens,
    validate,
)
from csalign.training.initialization import fit_setting, initialize, load_initialized
from csalign.training.loggers import check_logs, open_logs, write_page
from csalign.training.loop import FIRST, Log, Phase, Trainer, follow
from csalign.training.moment_matching import match_again, match_outputs
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
        work = _Work(config, data, tokens)
        return _train(work) if distributed.is_main_process() else _follow(work)


@dataclass(frozen=True)
class _Work:
    """What all processes of a job train from."""

    config: TrainConfig
    data: TrainingData
    tokens: StoredTokens | None
    _samplers: dict[bool, PairSampler] = field(default_factory=dict)

    def sampler(self, phase: Phase) -> PairSampler:
        """Return the sampler of the pairs that a phase learns from."""
        refits = phase.number > 0 and self.data.refit_split is not None
        if refits not in self._samplers:
            self._samplers[refits] = self.make_sampler(None if refits else self.data.held_out)
        return self._samplers[refits]

    @property
    def make_sampler(self) -> Callable[..., PairSampler]:
        """Function that builds the sampler of all pairs but those of some images."""
        options, other_weight = self.config.group(DataOptions), self.config.other_captions
        return partial(make_sampler, options, other_weight, self.data.rows, self.tokens)

    def trainer(self, phase: Phase, adapter: Adapter) -> Trainer:
        """Build the trainer of a phase."""
        sampler = self.sampler(phase)
        return build_trainer(self.config, self.data, self.tokens, sampler, adapter, phase)


class _Decided(NamedTuple):
    """What the first phase has decided, as JSON values."""

    start: str  # name of the closed form
    steps: int  # of the schedule
    made: int  # steps
    best: int  # step
    scores: dict[str, dict[str, float]]
    covariances: bool | None = None  # whether they were matched besides means; None for no match


def _train(work: _Work) -> TrainResult:
    """Train, validate and write, in the main process."""
    config, data = work.config, work.data
    options = config.model_dump(mode="json", exclude_none=True)
    job = TrainingJob.of(config.model_dump(mode="json"), data.features, config.unpaired)
    with open_run(config.out, job, restart=config.overwrite, every=config.save_every) as run:
        if not run.ended and run.resumed is None:
            announce_rows(data)
        step = run.resumed.step if run.resumed is not None and not run.ended else 0
        logs = open_logs(config.log_to or (), run.path, config.out.name, options, step)
        with logs as log_line, run.saved_when_stopped():
            ended = [load_initialized(own.folder, config.kinds)[0] for own in run.ended]
            decided = _Decided(**run.ended[0].state) if ended else None
            setting = run.ended[0].setting if ended else None
            if decided is None:
                adapter, decided, setting = _train_first(work, run, log_line)
                ended.append(adapter)
            further = _further_phases(work, decided)
            for phase in further[len(ended) - 1 :]:
                if phase.number > len(run.ended):
                    run.end_phase(decided._asdict())
                ended.append(_train_further(work, run, phase, decided, setting))
            distributed.broadcast(lambda: None)  # no further phase
            measured = ended[0]
            adapter = _assemble(ended[1:] if data.refit_split else ended)
            sampler = work.sampler(Phase(len(ended) - 1))
            once, seed = config.caption_weights, config.seed
            if data.refit_split is None:
                if len(ended) > 1 and data.val is not None:
                    decided.scores["kept"] = validate(adapter, data.val)._asdict()
                measured = adapter
                decided = _match(work, adapter, decided, log_line)
            elif decided.covariances is not None:
                how = decided.covariances
                match_again(adapter, data, sampler, covariances=how, once=once, seed=seed)
            refit = _word_refit(data, config.networks if decided.best else 1)
            log.info("%s", refit)
            if len(ended) > 1:
                learned = data.rows.pairs if data.refit_split else data.trained[0]
                log_line({"step": decided.made, "refit": {"pairs": learned, "steps": decided.best}})
        tick("saving")
        seconds = run.finish(adapter, [*decided.scores.values()][-1] if decided.scores else None)
    if config.report is not None:
        write_page(config, config.out, measured, data, config.seed)
    result = TrainResult(
        run=config.out,
        steps=decided.made,
        best_step=decided.best,
        start=decided.start,
        pairs={"train": data.trained[0], "validation": data.val.pairs if data.val else 0},
        parameters=adapter.parameter_counts(),
        validation=decided.scores,
        seconds=seconds,
        names=data.features.manifest.names,
        refit=refit,
    )
    return distributed.broadcast(lambda: result)


def _train_first(work: _Work, run: UnfinishedRun, log_line: Log) -> tuple[Adapter, _Decided, Any]:
    """Choose a closed form, train from it, and keep the weights that do best on validation.

    Returns:
        The adapter, what was decided, and the setting of its start.
    """
    config, data = work.config, work.data
    if run.resumed is None:
        found = initialize(
            config.group(AdapterOptions),
            data,
            work.make_sampler,
            work.tokens.widths if work.tokens else {},
            config.seed,
            unpaired_matches=config.unpaired_matches,
        )
        adapter, start = found.adapter, found.name
        setting = found.setting.model_dump(mode="json")
        log.info("%s", found.summary)
    else:
        adapter, start = load_initialized(run.resumed.folder, config.kinds)
        setting = run.resumed.setting
    trainer = _run_phase(work, run, FIRST, adapter, (start, setting), log_line)
    scores = {"start": trainer.start_score, "kept": trainer.best_score}
    found_scores = {name: score._asdict() for name, score in scores.items() if score}
    decided = _Decided(start, trainer.steps, trainer.steps_made, trainer.step, found_scores)
    if data.refit_split is not None:
        decided = _match(work, adapter, decided, log_line)
    return adapter, decided, setting


def _train_further(
    work: _Work, run: UnfinishedRun, phase: Phase, decided: _Decided, setting: Any
) -> Adapter:
    """Train another network from the same closed form, for as many steps as did best."""
    if run.resumed is None:
        options = work.config.group(AdapterOptions)
        widths, seed = work.tokens.widths if work.tokens else {}, work.config.seed + phase.number
        tick("refitting: closed form")
        sampler = work.sampler(phase)
        adapter, _ = fit_setting(setting, options, work.data, sampler, widths, seed)
    else:
        adapter, _ = load_initialized(run.resumed.folder, work.config.kinds)
    _run_phase(work, run, phase, adapter, (decided.start, setting), lambda line: None)
    return adapter


def _run_phase(
    work: _Work,
    run: UnfinishedRun,
    phase: Phase,
    adapter: Adapter,
    start: tuple[str, Any],
    log_line: Log,
) -> Trainer:
    """Train one network in all processes, and save checkpoints."""
    config, state = work.config, run.resumed and run.resumed.state
    distributed.broadcast(lambda: (phase, adapter.shapes, adapter.state_dict(), state))
    tick("preparing")
    trainer = work.trainer(phase, adapter)
    run.begin(trainer, work.data, *start, config=config.to_toml(), seed=config.seed)
    if not phase.number:
        pairs = min(config.batch_size, len(work.sampler(phase)))
        log.info("training on %s: %d steps of %d pairs", trainer.device, trainer.steps, pairs)
    for validated in trainer.fit(log_line):
        if validated and trainer.step:
            run.keep()
        if run.is_due(trainer.step):
            run.save()
    return trainer


def _further_phases(work: _Work, decided: _Decided) -> list[Phase]:
    """List the networks to train after the first, which is not kept if there is a refit."""
    refits = work.data.refit_split is not None
    count = work.config.networks - (not refits)
    if not decided.best:  # closed forms of all seeds are the same
        count = min(count, refits)
    what = "refitting" if refits else "training another network"
    return [Phase(n, what, decided.steps, decided.best) for n in range(1, count + 1)]


def _match(work: _Work, adapter: Adapter, decided: _Decided, log_line: Log) -> _Decided:
    """Match the moments of an adapter that was not trained on the validation rows."""
    config, data = work.config, work.data
    if not config.match_moments or "kept" not in decided.scores:
        return decided
    before, once = Score(**decided.scores["kept"]), config.caption_weights
    sampler = work.sampler(FIRST)
    matched = match_outputs(adapter, data, sampler, before, once=once, seed=config.seed)
    if matched is None:
        return decided
    figures = matched.score._asdict()
    # Weights & Biases ignores a step before its last one.
    log_line({"step": decided.made, "validation": figures, "matched": True})
    scores = {**decided.scores, "matched": figures}
    return decided._replace(scores=scores, covariances=matched.covariances)


def _assemble(networks: list[Adapter]) -> Adapter:
    """Put networks together."""
    return networks[-1]


def _word_refit(data: TrainingData, networks: int) -> str:
    """Say whether the held-out pairs were learned from."""
    if data.refit_split is None:
        return f"not refitted: {data.no_refit}"
    pairs = data.rows.pairs
    held_out = f"the {pairs - data.trained[0]:,} held out included"
    several = f"{networks} networks " if networks > 1 else ""
    return f"{several}refitted on all {pairs:,} pairs, {held_out}; the figures are those before it"


def _follow(work: _Work) -> TrainResult:
    """Take the same steps as the main process; write nothing."""
    while (phase := distributed.broadcast(_nothing)) is not None:
        phase, shapes, weights, state = phase
        adapter = Adapter(shapes, allow=set(work.config.kinds.values()))
        adapter.load_state_dict(weights)
        trainer = work.trainer(phase, adapter)
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
    phase: Phase = FIRST,
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
        phase=phase,
    )
