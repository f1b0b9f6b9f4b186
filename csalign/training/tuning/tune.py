"""``csalign tune``: search the settings of training on the validation split."""

import logging
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
import torch

from csalign.adapters.model import Adapter
from csalign.core.enums import Modality
from csalign.core.errors import ConfigError, CsalignError, DataError, Stopped, TrainingError
from csalign.core.progress import Progress, silent
from csalign.core.results import Trial, TuneResult
from csalign.features.join import PairedRows
from csalign.metrics.bootstrap import Floats, Place, Resamples, resample
from csalign.metrics.retrieval import rank_both_ways
from csalign.objective.divergence import cs_divergence
from csalign.runs.load import embed_rows
from csalign.training.config import AdapterOptions, DataOptions, TrainConfig, TuneConfig
from csalign.training.data import TrainingData, load_data
from csalign.training.initialization import initialize
from csalign.training.loop import Trainer
from csalign.training.sampler import make_sampler
from csalign.training.train import build_trainer, find_tokens
from csalign.training.tuning.search_space import SearchSpace, search_space
from csalign.training.tuning.study import CONFIG, Study, check_study, open_study

log = logging.getLogger(__name__)

DEFAULT_TRIALS = 50
RESAMPLES = 1_000
CS_BANDWIDTH = 0.5  # that of ``csalign eval``
CS_ROWS = 2_000  # a side
COMPARED = ("mean_recall", "centroid_distance")
MRR_SHARE = 1e-6  # so little that it only decides where the recall is the same


def tune(config: TuneConfig, progress: Progress = silent) -> TuneResult:
    """Search for settings that train better than the given ones, in a folder that can be continued.

    Trial 0 is the given settings, trial 1 the closed form that they start from; both can win.

    Args:
        config: what to search, and for how long. What was given of the settings of training stays
            as it is; the others are searched.
        progress: told how far it is.

    Raises:
        DataError: the features cannot be trained on, or too few are left to validate on.
        ConfigError: the settings are wrong, or there is nothing to search.
        OutputError: the folder is no study, is one of something else, or is in use.
        TrainingError: no trial got through.
    """
    began = time.monotonic()
    if config.report is not None or config.log_to or config.save_every:
        raise ConfigError(
            "report, log-to and save-every are for csalign train, with the config.toml of the "
            "winner"
        )
    check_study(config.out, config.features)
    base = config.base()
    data = load_data(base.group(DataOptions), out=base.out, seed=base.seed)
    rows, val = data.rows, data.val
    if val is None:
        raise DataError(f"{rows.name}: too few pairs to hold some out, so nothing can be chosen by")
    space = search_space(config, rows)
    runner = _Runner(data, val, config.seed)
    identity = {
        "features": data.features.manifest.fingerprint(),
        "base": base.model_dump(mode="json", exclude={"out", "overwrite", "features", "memory"}),
        "search": space.describe(),
    }
    with open_study(
        config.out,
        identity,
        seed=config.seed,
        validations=config.validations,
        overwrite=config.overwrite,
    ) as study:
        _Search(config, space, study, runner, began).run(progress)
        trials = study.trials
    best = winner(trials, config.recall_slack)
    if best is None:
        raise TrainingError(f"{config.out}: no trial got through; the first: {trials[0].reason}")
    return TuneResult(
        study=config.out,
        config=config.out / CONFIG,
        validation={"name": val.name, "images": len(val.images), "texts": len(val.texts)},
        best=best.number,
        recall_slack=config.recall_slack,
        trials=trials,
        seconds=round(time.monotonic() - began, 3),
    )


def winner(trials: list[Trial], slack: float) -> Trial | None:
    """The trial to train with, None if none is complete.

    Args:
        trials: in the order of their numbers; the first of equals wins.
        slack: mean recall to give, at most, for the narrowest gap; with 0 the highest recall wins,
            and of equal ones the highest MRR.
    """
    complete = [trial for trial in trials if trial.state == "complete"]
    if not complete:
        return None
    least = max(_figure(trial, "mean_recall") for trial in complete) - slack
    near = [trial for trial in complete if _figure(trial, "mean_recall") >= least]
    if slack:
        return min(near, key=lambda trial: _figure(trial, "centroid_distance"))
    return max(near, key=lambda trial: _figure(trial, "mrr"))


def _figure(trial: Trial, name: str) -> float:
    value = getattr(trial, name)
    assert value is not None
    return float(value)


def _with(base: TrainConfig, settings: dict[str, Any]) -> TrainConfig:
    return TrainConfig.model_validate({**base.model_dump(), **settings})


@dataclass(frozen=True)
class _Search:
    """Makes the trials of a study that are not made yet."""

    config: TuneConfig
    space: SearchSpace
    study: Study
    runner: "_Runner"
    began: float

    def run(self, progress: Progress) -> None:
        """Make trials until there are enough or the time is over."""
        trials, total = self.study.trials, self._total
        if trials:
            log.info("%s: goes on after %d trials", self.config.out, len(trials))
        self._write()
        try:
            while not self._is_over(len(trials)):
                progress("trials", len(trials), total)
                self._trial(len(trials))
                self._write()
                trials = self.study.trials
                self._tell(trials)
        except Stopped:
            trials = self.study.trials
            self._write()
            if trials:
                best = winner(trials, self.config.recall_slack)
                log.warning(
                    "%s: holds %d trials%s; the same command goes on",
                    self.config.out,
                    len(trials),
                    "" if best is None else f", the best of them, {best.number}, in {CONFIG}",
                )
            raise
        progress("trials", len(trials), total)

    @property
    def _total(self) -> int | None:
        if self.config.trials is None and self.config.minutes is None:
            return DEFAULT_TRIALS
        return self.config.trials

    def _is_over(self, made: int) -> bool:
        minutes, total = self.config.minutes, self._total
        is_late = minutes is not None and time.monotonic() - self.began >= 60 * minutes
        return (total is not None and made >= total) or (is_late and made > 0)

    def _trial(self, number: int) -> None:
        """Make one trial."""
        began, base = time.monotonic(), self.space.base
        is_closed_form = number == 1 and base.init == "canonical" and base.steps != 0
        trial = self.study.begin(number, self.space.given() if number == 0 else {})
        # The closed form chooses nothing, so the sampler draws no conclusion from it.
        settings = {"steps": 0} if is_closed_form else self.space.suggest(trial)
        if number == 0:
            settings = {name: getattr(base, name) for name in settings}
        state, outcome, reason = "complete", None, None
        try:
            prunable = None if number == 0 or is_closed_form else trial
            outcome = self.runner.run(_with(base, settings), prunable)
            state = "pruned" if outcome.is_pruned else state
        except CsalignError as error:
            if number == 0 and not isinstance(error, TrainingError):
                raise  # it would be the same in each trial
            state, reason = "failed", str(error)
        seconds = round(time.monotonic() - began, 3)
        figures = {} if outcome is None else outcome.figures
        difference = {}
        if outcome is not None and outcome.resamples is not None:
            difference = self._difference(number, figures, outcome.resamples)
        record = Trial(
            number, state, settings, seconds, **figures, difference=difference, reason=reason
        )
        value = None
        if state == "complete":
            value = _figure(record, "mean_recall") + MRR_SHARE * _figure(record, "mrr")
        self.study.end(trial, record, value)

    def _difference(
        self, number: int, figures: dict[str, Any], resamples: Resamples
    ) -> dict[str, dict[str, Any]]:
        """The figures less the default's, which a later process finds in the study."""
        if number == 0:
            drawn = {name: resamples.figures[name,].tolist() for name in COMPARED}
            self.study.note_default(
                {
                    "images": resamples.images,
                    "figures": {name: figures[name] for name in COMPARED},
                    "resamples": drawn,
                }
            )
        default = self.study.default
        if number == 0 or default is None:
            return {}
        places: dict[Place, Floats] = {
            (name,): np.array(values) for name, values in default["resamples"].items()
        }
        baseline = Resamples(places, default["images"])
        return {
            name: {
                "value": figures[name] - default["figures"][name],
                "interval": list(resamples.minus(baseline, (name,))[0]),
            }
            for name in COMPARED
        }

    def _write(self) -> None:
        best = winner(self.study.trials, self.config.recall_slack)
        config = None if best is None else _with(self.space.base, best.settings).settings()
        self.study.write(config)

    def _tell(self, trials: list[Trial]) -> None:
        """One line for the trial that was just made."""
        trial, best = trials[-1], winner(trials, self.config.recall_slack)
        of = "" if self._total is None else f" of {self._total}"
        said = ", ".join(f"{k.replace('_', '-')} {v}" for k, v in trial.settings.items())
        if trial.mean_recall is None:
            result = f"failed: {trial.reason}"
        else:
            ended = " (pruned)" if trial.state == "pruned" else ""
            result = (
                f"mean recall {100 * trial.mean_recall:.2f} %{ended}, centroid distance "
                f"{trial.centroid_distance:.4f}"
            )
        kept = "" if best is None else f"; best: trial {best.number}"
        log.info(
            "trial %d%s, %.0f s: %s%s [%s]", trial.number, of, trial.seconds, result, kept, said
        )


@dataclass(frozen=True)
class _Outcome:
    """What a training run came to.

    Attributes:
        figures: by the names that `Trial` has for them.
        resamples: of the validation, None where it was ended early.
        is_pruned: whether it was.
    """

    figures: dict[str, Any]
    resamples: Resamples | None
    is_pruned: bool


@dataclass(frozen=True)
class _Runner:
    """Trains on rows that are loaded once and leaves nothing on the disk."""

    data: TrainingData
    val: PairedRows
    seed: int

    def run(self, config: TrainConfig, prunable: optuna.Trial | None) -> _Outcome:
        """Train and measure.

        Args:
            config: how.
            prunable: told of each validation, and asked whether to go on; None goes on.
        """
        tokens, rows = find_tokens(config), self.data.rows
        given, other = config.group(DataOptions), config.other_captions
        with closing(make_sampler(given, other, rows, tokens)) as sampler:
            widths = tokens.widths if tokens else {}
            options = config.group(AdapterOptions)
            adapter, start = initialize(options, rows, sampler, self.val, widths, config.seed)
            log.debug("start: %s", start)
            trainer = build_trainer(config, self.data, tokens, sampler, adapter)
            with _one_line_a_trial():
                is_pruned = self._fit(trainer, prunable)
        score = trainer.best_score
        assert score is not None
        figures: dict[str, Any] = {
            **score.to_json(),
            "start": start,
            "steps": trainer.step if is_pruned else trainer.steps_made,
            "best_step": None if is_pruned else trainer.step,
        }
        if is_pruned:
            return _Outcome(figures, None, is_pruned)
        divergence, resamples = self._measure(adapter)
        return _Outcome({**figures, "cs_divergence": divergence}, resamples, is_pruned)

    def _fit(self, trainer: Trainer, prunable: optuna.Trial | None) -> bool:
        """Train; says whether it was ended early."""
        number = 0
        with closing(trainer.fit(lambda line: None)) as steps:
            for validated in steps:
                if prunable is None or not validated or not trainer.step:
                    continue
                assert trainer.best_score is not None
                number += 1
                prunable.report(trainer.best_score.mean_recall, number)
                if prunable.should_prune():
                    return True
        return False

    def _measure(self, adapter: Adapter) -> tuple[float, Resamples]:
        """The CS divergence of the validation rows, and resamples of the other figures."""
        images, texts = (
            embed_rows(adapter, side, self.val, self.data.features) for side in Modality
        )
        rng = np.random.default_rng(self.seed)
        few_x, few_y = (
            torch.from_numpy(side[rng.permutation(len(side))[:CS_ROWS]]).double()
            for side in (images, texts)
        )
        ranks = rank_both_ways(images, texts, self.val.text_image)
        resamples = resample(
            ranks, images, texts, self.val.text_image, resamples=RESAMPLES, seed=self.seed
        )
        return float(cs_divergence(few_x, few_y, sigma=CS_BANDWIDTH)), resamples


@contextmanager
def _one_line_a_trial() -> Iterator[None]:
    """Keep the training loop from telling what is no news in a search."""
    logger = logging.getLogger(Trainer.__module__)
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)
