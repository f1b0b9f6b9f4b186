"""The phases of a training run: a validated network, its parts, and refits on all pairs."""

import logging
from typing import Any, NamedTuple

from csalign.adapters.model import Adapter
from csalign.core import distributed, signals
from csalign.core.errors import Stopped, TrainingError
from csalign.core.progress import tick
from csalign.core.records import Record
from csalign.training.checkpoints import UnfinishedRun
from csalign.training.closed_forms.combine import (
    Combination,
    Fold,
    TooSlow,
    assemble,
    can_combine,
    combine,
)
from csalign.training.closed_forms.initialization import announce_start, load_initialized
from csalign.training.closed_forms.settings import Setting
from csalign.training.closed_forms.unpaired import Matches
from csalign.training.moment_matching import match_again, match_outputs
from csalign.training.network.batch_loss import LEAST_SCALE
from csalign.training.network.loop import FIRST, Log, Phase, Trainer
from csalign.training.network.schedule import Timer
from csalign.training.network.validation import Score, validate
from csalign.training.work import Work

log = logging.getLogger(__name__)


class Decided(Record):
    """What the first phase has decided."""

    start: str  # name of the closed form
    setting: Setting  # of it
    steps: int  # of the schedule
    made: int  # steps
    best: int  # step
    scores: dict[str, dict[str, float]]
    weights: dict[int, float]  # see `Phase`
    batch_size: int | None = None  # that was trained with
    scale: float | None = None  # of the logits, likewise
    covariances: bool | None = None  # whether they were matched besides means; None for no match
    parts: Combination = Combination(kernel=None, share=0.0)


class Trained(NamedTuple):
    """The adapter of a run, and what is said of it."""

    adapter: Adapter
    measured: Adapter  # that its figures are of, not refitted
    decided: Decided
    parts: str  # which, in words
    refit: str  # whether the held-out pairs were learned from, in words


def train_networks(work: Any, run: UnfinishedRun, log_lines: Log) -> tuple[list[Adapter], Decided]:
    """Train all networks of a job, in the main process."""
    config = work.config
    networks = [load_initialized(own.folder, config.named_kinds)[0] for own in run.ended]
    if networks:
        decided = Decided.model_validate(run.ended[0].state)
    else:
        network, decided = _first_network(work, run, log_lines)
        networks.append(network)
    for phase in _further_phases(work, decided)[len(networks) - 1 :]:
        if phase.number > len(run.ended):
            run.end_phase(decided.model_dump(mode="json"))
        networks.append(_further_network(work, run, phase, decided))
    distributed.broadcast(lambda: None)  # no further phase
    return networks, decided


def run_phases(work: Work, run: UnfinishedRun, log_lines: Log) -> Trained:
    """Train all networks, in the main process, and put the parts of the adapter together."""
    config, data = work.config, work.data
    networks, decided = train_networks(work, run, log_lines)

    def together(chosen: list[Adapter], phase: Phase) -> Adapter:
        matches = None
        if decided.parts.kernel is not None and decided.setting.path:
            _, matches = work.fit(decided.setting, phase)
        return assemble(decided.parts, chosen, data.rows, work.sampler(phase), matches, config.seed)

    last = Phase(len(networks) - 1)
    refits = work.refits(last)
    adapter = measured = together(networks[refits:], last)
    if refits and config.report is not None:
        measured = together(networks[:1], FIRST)
    elif not refits and len(networks) > 1 and data.val is not None:
        score = validate(adapter, data.val)._asdict()
        decided = decided.model_copy(update={"scores": {**decided.scores, "parts": score}})
    kept = len(networks) - refits
    counts = data.rows.pairs, data.trained[0]
    refit = announce_refit(data, decided, *counts, log_lines, "pairs", kept)
    return Trained(adapter, measured, decided, _word_parts(decided, kept), refit)


def _first_network(work: Any, run: UnfinishedRun, log_lines: Log) -> tuple[Adapter, Decided]:
    """Choose a closed form, train from it, keep the best weights, and choose the parts."""
    config, data = work.config, work.data
    matches = None
    if run.resumed is None:
        found = work.initialize()
        adapter, start, setting, matches = found.adapter, found.name, found.setting, found.matches
        announce_start(found)
    else:
        adapter, start = load_initialized(run.resumed.folder, config.named_kinds)
        setting = Setting.model_validate(run.resumed.setting)
        if setting.path:
            _, matches = work.fit(setting, FIRST)
    phase = FIRST
    if setting.form == "assignment" and data.val is None:
        log.info("no network is trained: without validation it might only harm the start")
        phase = FIRST._replace(steps=0)
    folds, began = _folds(work, adapter), work.clock()
    timer = work.timer(combines=bool(folds))
    trainer = run_phase(work, run, phase, adapter, (start, setting), log_lines, timer)
    seconds = work.seconds_left - work.further * (work.clock() - began)
    scores = {"start": trainer.start_score, "kept": trainer.best_score}
    decided = Decided(
        start=start,
        setting=setting,
        steps=trainer.schedule.steps,
        made=trainer.steps_made,
        best=trainer.step,
        scores={name: score._asdict() for name, score in scores.items() if score},
        weights=trainer.weights,
        batch_size=trainer.batch_size,
        scale=trainer.scale,
    )
    decided = _match(work, adapter, decided, log_lines)
    if folds:
        decided = _choose_parts(work, adapter, decided, matches, folds, seconds, log_lines)
    return adapter, decided


def _further_network(work: Any, run: UnfinishedRun, phase: Phase, decided: Decided) -> Adapter:
    """Train another network from the same closed form, for as many steps as did best."""
    if run.resumed is None:
        tick("refitting the closed form")
        adapter: Adapter = work.fit(decided.setting, phase)[0]
    else:
        adapter, _ = load_initialized(run.resumed.folder, work.config.named_kinds)
    start = decided.start, decided.setting
    run_phase(work, run, phase, adapter, start, lambda lines: None)
    if decided.covariances is not None:
        match_again(
            adapter,
            work.data,
            work.sampler(phase),
            covariances=decided.covariances,
            once=work.config.caption_weights,
            seed=work.config.seed,
        )
    return adapter


def run_phase(
    work: Any,
    run: UnfinishedRun,
    phase: Phase,
    adapter: Adapter,
    start: tuple[str, Setting],
    log_lines: Log,
    timer: Timer | None = None,
) -> Trainer:
    """Train one network in all processes, and save checkpoints."""
    config, state = work.config, run.resumed and run.resumed.state
    name, setting = start[0], start[1].model_dump(mode="json")
    if state is not None:
        phase = phase._replace(batch_size=state.get("batch_size"), scale=state.get("scale"))
    distributed.broadcast(lambda: (phase, adapter.shapes, adapter.state_dict(), state))
    tick("preparing")
    trainer: Trainer = work.trainer(adapter, phase, timer)
    if not phase.number and (trainer.scale or LEAST_SCALE) > LEAST_SCALE:
        log.info("logit scale: %.3g, by the recall of the start on held-out pairs", trainer.scale)
    run.begin(
        trainer,
        work.info(phase) | {"start": name},
        setting,
        features=work.data.features.path,
        config=config.to_toml(),
        seed=config.seed,
        complete=work.complete,
    )
    for validated in trainer.fit(log_lines):
        if validated and trainer.step:
            run.keep()
        if run.is_due(trainer.step):
            run.save()
    return trainer


def _further_phases(work: Any, decided: Decided) -> list[Phase]:
    """List the networks to train after the first, which is not kept if there is a refit."""
    refits, networks = work.data.refits, work.config.networks
    is_unused = decided.parts.share == 1
    if networks > 1 and (is_unused or not decided.best):  # one closed form for all seeds
        why = "the kernel CCA stands alone" if is_unused else "the start is kept as it is"
        log.warning("--networks %d: trains no further network, since %s", networks, why)
        networks = 1
    what = "refitting" if refits else "training another network"
    last = 0 if is_unused else decided.best
    numbers = range(1, networks + refits)
    common = decided.steps, last, decided.weights, decided.batch_size, decided.scale
    return [Phase(n, what, *common) for n in numbers]


def _match(work: Any, adapter: Adapter, decided: Decided, log_lines: Log) -> Decided:
    """Match the moments of the first network's outputs."""
    config, data = work.config, work.data
    if not (isinstance(work, Work) and config.match_moments and "kept" in decided.scores):
        return decided
    before, once = Score(**decided.scores["kept"]), config.caption_weights
    sampler = work.sampler(FIRST)
    matched = match_outputs(adapter, data, sampler, before, once=once, seed=config.seed)
    if matched is None:
        return decided
    scores = _add_score(decided, "matched", matched.score, log_lines)
    return decided.model_copy(update={"scores": scores, "covariances": matched.covariances})


def _choose_parts(
    work: Work,
    network: Adapter,
    decided: Decided,
    matches: Matches | None,
    folds: list[Fold],
    seconds: float,
    log_lines: Log,
) -> Decided:
    """Choose between the network, a kernel CCA, and both, in some seconds."""
    config, name = work.config, _name_of(decided)
    rows, joins, seed = work.data.rows, config.width is None, config.seed
    options: dict[str, Any] = {"name": name, "joins": joins, "seed": seed, "seconds": seconds}
    try:
        found = combine(network, rows, folds, matches, **options)
    except TooSlow as needed:
        text = "--minutes %g: omits the kernel CCA, which would take about %s"
        log.info(text, config.minutes, needed)
        return decided
    log.info("%s", found.summary)
    if found.combination.kernel is None:
        return decided
    scores = _add_score(decided, "parts", found.measured.score, log_lines)
    return decided.model_copy(update={"scores": scores, "parts": found.combination})


def _folds(work: Any, network: Adapter) -> list[Fold]:
    """List the folds to choose a kernel CCA by, none if no kernel is tried."""
    config, data = work.config, work.data
    tries = config.ensemble == "auto" and config.init == "canonical" and can_combine(network)
    if not (tries and isinstance(work, Work)) or data.val is None:
        return []
    further = [Fold(work.make_sampler(own), data.rows.take(own)) for own in data.folds[1:]]
    return [Fold(work.sampler(FIRST), data.val), *further]


def _add_score(
    decided: Decided, name: str, score: Score, log_lines: Log
) -> dict[str, dict[str, float]]:
    """Log a score after the last step; return it with those before."""
    # Weights & Biases ignores a step before its last one.
    log_lines([{"step": decided.made, "validation": score._asdict(), "matched": True}])
    return {**decided.scores, name: score._asdict()}


def _name_of(decided: Decided) -> str:
    """Name what the first phase has kept: where no step did better, the closed form."""
    return "network" if decided.best else "closed form"


def _word_parts(decided: Decided, networks: int) -> str:
    """Say which parts an adapter has; "" for one network."""
    parts = decided.parts
    kept = _name_of(decided) if networks == 1 else f"{networks} networks"
    if parts.kernel is None:
        return "" if networks == 1 else kept
    name, percent = parts.kernel.name, round(100 * parts.share)
    if parts.share == 1:
        return f"{name}, instead of the {_name_of(decided)}"
    return f"{kept} {100 - percent} %, {name} {percent} %"


def announce_refit(
    data: Any, decided: Decided, total: int, trained: int, log_lines: Log, what: str, networks: int
) -> str:
    """Log whether what was held out of a total was learned from; return it in words."""
    refit = f"not refitted: {data.no_refit}"
    if data.refits:
        several = f"{networks} networks " if networks > 1 else ""
        refit = (
            f"{several}refitted on all {total:,} {what}, the {total - trained:,} held out "
            "included; the figures are those before it"
        )
        log_lines([{"step": decided.made, "refit": {"pairs": total, "steps": decided.best}}])
    log.info("%s", refit)
    return refit


def follow_phases(work: Any) -> None:
    """Take the same steps as the main process in `run_phases`."""
    while (sent := distributed.receive()) is not None:
        phase, shapes, weights, state = sent
        adapter = Adapter(shapes, allow=work.config.named_kinds)
        adapter.load_state_dict(weights)
        trainer = work.trainer(adapter, phase, None if phase.number else work.timer())
        if state is not None:
            trainer.load_state_dict(state)
        follow(trainer)


def follow(trainer: Trainer) -> None:
    """Train in a process that is not the main one.

    Raises:
        ElsewhereError: training was stopped or failed, which the main process reports.
    """
    try:
        with signals.polling():
            for _ in trainer.fit(lambda lines: None):
                pass
    except (Stopped, TrainingError):
        distributed.wait_for_failure()
