"""``csalign tune``: search the settings of training on the validation split.

The folder of a study::

    study.json      what is searched, starting from which settings, on which features
    journal.log     optuna's storage of the trials, from which a stopped search resumes
    config.toml     the best settings so far, for ``csalign train --config``
"""

import logging
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import torch
from optuna.pruners import PercentilePruner
from optuna.samplers import BaseSampler, PartialFixedSampler, TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from csalign.core import __version__, atomic, locks, outputs, signals
from csalign.core.arrays import Doubles
from csalign.core.enums import Modality
from csalign.core.errors import (
    ConfigError,
    CsalignError,
    DataError,
    OutputError,
    SchemaError,
    Stopped,
    TrainingError,
)
from csalign.core.progress import Progress, duration, reported_to, silent, tick, within
from csalign.core.records import read_object
from csalign.core.results import Trial, TuneResult
from csalign.features.join import PairedRows
from csalign.features.reader import FeatureSet
from csalign.metrics.bootstrap import Place, Resamples, resample
from csalign.metrics.retrieval import rank_both_ways
from csalign.objective.divergences import cs_divergence
from csalign.runs.load import embed_rows
from csalign.training.config import DataOptions, TrainConfig, TuneConfig
from csalign.training.data import TrainingData, load_data
from csalign.training.network.schedule import VALIDATIONS
from csalign.training.sides.train import several_sides
from csalign.training.tuning.search_space import SearchSpace, search_space
from csalign.training.work import Work, find_tokens

log = logging.getLogger(__name__)

DEFAULT_TRIALS = 50
RESAMPLES = 1_000
CS_BANDWIDTH = 0.5  # as in ``csalign eval``
CS_ROWS = 2_000  # per side
COMPARED = ("mean_recall", "centroid_distance")
MRR_WEIGHT = 1e-6  # in the objective of the search: only breaks ties of the recall
PRUNED_SHARE = 0.25  # a trial is stopped if it is in this lowest share of those before it
PRUNING_START = 0.5  # share of a trial's validations before which it is not pruned
FORMAT = "csalign-study"
STUDY, JOURNAL, CONFIG = "study.json", "journal.log", "config.toml"
FILES = (CONFIG, "trials.jsonl", JOURNAL, STUDY)  # trials.jsonl is from csalign 0.1.0
RECORD, RESAMPLED = "record", "resamples"  # attributes of trials in the journal


def tune(config: TuneConfig, progress: Progress = silent) -> TuneResult:
    """Search for settings that train better than the given ones; rerun to resume.

    Trial 0 uses the given settings, trial 1 only the closed form that they start from, unless
    `config.steps` is given; both can win. Settings that were given stay fixed, the others are
    searched.

    Raises:
        DataError: the features cannot be trained on, or there are too few rows to validate on.
        ConfigError: the settings are wrong, or there is nothing to search.
        OutputError: the folder is not a study, is another study, or is in use.
        TrainingError: all trials failed.

    >>> import csalign, numpy
    >>> images, texts = numpy.random.default_rng(0).normal(size=(2, 60, 8))
    >>> result = csalign.tune((images, texts), "study", trials=2, steps=2, search="noise")
    >>> [trial.state for trial in result.trials]
    ['complete', 'complete']
    """
    began = time.monotonic()
    _check_folder(config.out, config.features)
    base = config.base()
    if (sides := several_sides(base, FeatureSet.open(base.features))) is not None:
        raise ConfigError(
            f"{base.features}: tune searches settings of images and texts, and the sides are "
            f"{', '.join(sides)}; name two with --sides image,text, or use csalign train"
        )
    data, val = _load(base)
    space = search_space(config, data.rows)
    paths = {"out", "overwrite", "features", "memory", "pictures", "umap"}
    identity = {
        "features": data.features.manifest.fingerprint(),
        "base": space.base.model_dump(mode="json", exclude=paths),
        "search": list(space.names),
    }
    with _open_study(config, identity) as study:
        trials = _search(config, space, study, data, val, began)
    best = winner(trials, config.recall_slack)
    if best is None:
        raise TrainingError(f"{config.out}: all trials failed; the first: {trials[0].reason}")
    return TuneResult(
        study=config.out,
        config=config.out / CONFIG,
        validation={"name": val.name, "images": len(val.images), "texts": len(val.texts)},
        best=best.number,
        recall_slack=config.recall_slack,
        trials=trials,
        seconds=round(time.monotonic() - began, 3),
    )


def winner(trials: Sequence[Trial], slack: float) -> Trial | None:
    """Choose the trial to train with, the first of equals; None if none is complete.

    With `slack`, that is the narrowest gap among those within so much of the best mean recall;
    with 0 the highest recall, and of equal ones the highest MRR.
    """
    complete = [trial for trial in trials if trial.state == "complete"]
    if not complete:
        return None
    least = max(trial.mean_recall or 0.0 for trial in complete) - slack
    near = [trial for trial in complete if (trial.mean_recall or 0.0) >= least]
    if slack:
        return min(near, key=lambda trial: trial.centroid_distance or 0.0)
    return max(near, key=lambda trial: trial.mrr or 0.0)


def _search(
    config: TuneConfig,
    space: SearchSpace,
    study: optuna.Study,
    data: TrainingData,
    val: PairedRows,
    began: float,
) -> list[Trial]:
    """Run trials until there are enough or the time is over; return all of the study."""
    total = config.trials
    if total is None and config.minutes is None:
        total = DEFAULT_TRIALS
    trials = _finished(study)
    if trials:
        log.info("%s: resuming after %d trials", config.out, len(trials))
    try:
        while True:
            _write_best(config, trials)
            tick("trials", len(trials), total)
            late = config.minutes is not None and time.monotonic() - began >= 60 * config.minutes
            if (total is not None and len(trials) >= total) or (late and trials):
                return trials
            number = len(trials)
            name = f"trial {number}" + ("" if total is None else f" ({number + 1} of {total})")
            with reported_to(within(name)):
                _run_trial(len(trials), config.seed, space, study, data, val)
            trials = _finished(study)
            _log_trial(trials[-1], winner(trials, config.recall_slack))
    except Stopped as stopped:
        if trials := _finished(study):
            _write_best(config, trials)
            log.info("%s: contains %d trials", config.out, len(trials))
            stopped.resumes = True
        raise


def _write_best(config: TuneConfig, trials: Sequence[Trial]) -> None:
    best = winner(trials, config.recall_slack)
    if best is not None:
        settings = _with(config.base(), best.settings).settings()
        atomic.write_text(config.out / CONFIG, settings)


def _run_trial(
    number: int,
    seed: int,
    space: SearchSpace,
    study: optuna.Study,
    data: TrainingData,
    val: PairedRows,
) -> None:
    """Run a trial whose choices depend on the seed, its number and the trials before it alone."""
    began, base = time.monotonic(), space.base
    derived = int(np.random.SeedSequence([seed, number]).generate_state(1)[0])
    # Some settings depend on others, which the multivariate sampler does not support.
    sampler: BaseSampler = TPESampler(seed=derived, multivariate=False, constant_liar=False)
    if number == 0:
        sampler = PartialFixedSampler(space.given(), sampler)
    study.sampler = sampler
    trial = study.ask()
    is_closed_form = number == 1 and base.init == "canonical" and base.steps is None
    # The closed form suggests nothing, so the sampler learns nothing from it.
    settings = {"steps": 0} if is_closed_form else space.suggest(trial)
    if number == 0:
        settings = {name: getattr(base, name) for name in settings}
    state, reason = "failed", None
    figures: dict[str, Any] = {}
    try:
        prunable = None if number == 0 or is_closed_form else trial
        figures, resamples = _train(_with(base, settings), data, val, prunable)
        state = "pruned" if resamples is None else "complete"
        if resamples is not None and number == 0:
            drawn = {name: resamples.figures[name,].tolist() for name in COMPARED}
            trial.set_user_attr(RESAMPLED, {"images": resamples.images, "figures": drawn})
        elif resamples is not None:
            figures["difference"] = _difference(study, figures, resamples)
    except CsalignError as error:
        if number == 0 and not isinstance(error, TrainingError):
            raise  # every trial would fail in the same way
        reason = str(error)
    seconds = round(time.monotonic() - began, 3)
    record = Trial(number, state, settings, seconds, **figures, reason=reason)
    trial.set_user_attr(RECORD, dict(record))
    _finish(study, trial.number, record)


def _difference(
    study: optuna.Study, figures: dict[str, Any], resamples: Resamples
) -> dict[str, dict[str, Any]]:
    """Compare with trial 0, with paired bootstrap intervals; {} if that was not completed."""
    attributes = (trial.user_attrs for trial in study.get_trials(deepcopy=False))
    default = next((found for found in attributes if RESAMPLED in found and RECORD in found), None)
    if default is None:
        return {}
    drawn = default[RESAMPLED]
    places: dict[Place, Doubles] = {
        (name,): np.array(values) for name, values in drawn["figures"].items()
    }
    baseline = Resamples(places, drawn["images"])
    return {
        name: {
            "value": figures[name] - default[RECORD][name],
            "interval": list(resamples.minus(baseline, (name,))[0]),
        }
        for name in COMPARED
    }


def _log_trial(trial: Trial, best: Trial | None) -> None:
    result = f" ({trial.reason})"
    if trial.mean_recall is not None:
        result = f", mean recall {100 * trial.mean_recall:.2f} %, gap {trial.centroid_distance:.4f}"
    result += f", {duration(trial.seconds)}; best: trial {best.number if best else None}"
    log.info("trial %d: %s%s", trial.number, trial.state, result)
    settings = ", ".join(f"{k.replace('_', '-')} {v}" for k, v in trial.settings.items())
    log.debug("trial %d: %s", trial.number, settings)


def _with(base: TrainConfig, settings: dict[str, Any]) -> TrainConfig:
    length = {"epochs": None} if "steps" in settings else {}
    return TrainConfig.model_validate({**base.model_dump(), **length, **settings})


def _load(config: TrainConfig) -> tuple[TrainingData, PairedRows]:
    options = config.group(DataOptions).model_copy(update={"refit": False})  # which no trial makes
    data = load_data(options, out=config.out, seed=config.seed)
    if data.val is None:
        raise DataError(
            f"{data.rows.name}: too few pairs to hold some out for validation; add some"
        )
    return data, data.val


def _train(
    config: TrainConfig, data: TrainingData, val: PairedRows, prunable: optuna.Trial | None
) -> tuple[dict[str, Any], Resamples | None]:
    """Train, measure, and discard the weights; return the metrics, named as in `Trial`.

    Also return resamples of the compared metrics; None if the trial `prunable` was pruned.
    """
    work = Work(config, data, find_tokens(config))
    adapter, start, *_ = work.initialize()
    trainer = work.trainer(adapter)
    is_pruned, number = False, 0
    with closing(trainer.fit(lambda lines: None)) as steps:
        for validated in steps:
            if not validated or not trainer.step:
                continue
            number += 1
            if prunable is not None and trainer.best_score is not None:
                prunable.report(trainer.best_score.mean_recall, number)
                is_pruned = prunable.should_prune()
            if is_pruned:
                break
    assert trainer.best_score is not None
    figures: dict[str, Any] = {
        **trainer.best_score._asdict(),
        "start": start,
        "steps": trainer.step if is_pruned else trainer.steps_made,
        "best_step": None if is_pruned else trainer.step,
    }
    if is_pruned:
        return figures, None
    x, y = (embed_rows(adapter, side, val, data.features) for side in Modality)
    rng = np.random.default_rng(config.seed)
    few = (torch.from_numpy(z[rng.permutation(len(z))[:CS_ROWS]]).double() for z in (x, y))
    figures["cs_divergence"] = float(cs_divergence(*few, sigma=CS_BANDWIDTH))
    owners = val.text_image
    ranks = rank_both_ways(x, y, owners)
    return figures, resample(ranks, x, y, owners, resamples=RESAMPLES, seed=config.seed)


def _check_folder(folder: Path, features: Path) -> None:
    """Refuse a folder that contains anything but a study, before any work is done."""
    if not folder.is_dir():
        outputs.check_output(folder, FILES, overwrite=False, inputs=(features,))
        return
    names = {path.name for path in folder.iterdir()} - {locks.LOCK}
    if names and STUDY not in names:
        raise OutputError(
            f"{folder}: contains files but no study ({min(names)}); choose another --out"
        )


@contextmanager
def _open_study(config: TuneConfig, identity: dict[str, Any]) -> Iterator[optuna.Study]:
    """Create or resume a study, locked; one without a finished trial is removed at the end."""
    folder = config.out
    with locks.lock_folder(folder), _quiet_optuna():
        if config.overwrite:
            _clear(folder)
        study = _load_study(folder, config.validations or VALIDATIONS)
        if _finished(study):
            _check_same(folder, identity)
        else:
            _clear(folder)
            document = {"format": FORMAT, "csalign_version": __version__, **identity}
            atomic.write_json(folder / STUDY, document)
            study = _load_study(folder, config.validations or VALIDATIONS)
        try:
            yield study
        finally:
            if not _finished(study):
                _clear(folder)
                (folder / locks.LOCK).unlink()
                with suppress(OSError):
                    folder.rmdir()


class _Journal(JournalFileBackend):
    """Optuna's journal, in which a signal waits until its lock is released."""

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        with signals.delayed():
            super().append_logs(logs)


def _load_study(folder: Path, validations: int) -> optuna.Study:
    """Open optuna's journal; a process that died may have left half a line, a lock and a trial."""
    journal = folder / JOURNAL
    journal.with_name(f"{JOURNAL}.lock").unlink(missing_ok=True)
    if journal.exists():
        text = journal.read_bytes()
        with journal.open("r+b") as file:
            file.truncate(text.rfind(b"\n") + 1)
    warmup = round(PRUNING_START * validations)
    try:
        study = optuna.create_study(
            storage=JournalStorage(_Journal(str(journal))),
            study_name="csalign",
            direction="maximize",
            load_if_exists=True,
            pruner=PercentilePruner(100 * (1 - PRUNED_SHARE), n_warmup_steps=warmup),
        )
        for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            record = trial.user_attrs.get(RECORD)
            if record is None:  # it is run again, under the same number
                study.tell(trial.number, state=TrialState.FAIL)
            else:
                _finish(study, trial.number, Trial(**record))
        _finished(study)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise SchemaError(
            f"{journal}: is damaged ({error}); start again with --overwrite"
        ) from None
    return study


def _finished(study: optuna.Study) -> list[Trial]:
    attributes = [trial.user_attrs for trial in study.get_trials(deepcopy=False)]
    return [Trial(**found[RECORD]) for found in attributes if RECORD in found]


def _finish(study: optuna.Study, number: int, record: Trial) -> None:
    if record.state == "complete":
        study.tell(number, (record.mean_recall or 0.0) + MRR_WEIGHT * (record.mrr or 0.0))
    else:
        state = TrialState.PRUNED if record.state == "pruned" else TrialState.FAIL
        study.tell(number, state=state)


def _clear(folder: Path) -> None:
    for name in FILES:
        (folder / name).unlink(missing_ok=True)


def _check_same(folder: Path, identity: dict[str, Any]) -> None:
    remedy = "choose another --out, or start again with --overwrite"
    there = read_object(folder / STUDY, remedy)
    base, names = there.get("base"), there.get("search")  # 0.1.0 mapped names to their ranges
    if not (isinstance(base, dict) and isinstance(names, dict | list)):
        raise SchemaError(f"{folder / STUDY}: is damaged (not a study); {remedy}")
    before, now = (
        {**found, **found["base"], "search": ", ".join(map(str, found["search"]))}
        for found in (there, identity)
    )
    for name in ("features", *identity["base"], "search"):
        if before.get(name) != now[name]:
            raise OutputError(
                f"{folder}: was started with {name.replace('_', '-')} {before.get(name)}, not "
                f"{now[name]}; pass the same, {remedy}"
            )


@contextmanager
def _quiet_optuna() -> Iterator[None]:
    """Suppress optuna's own log, and its warnings about experimental parts."""
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(level)
