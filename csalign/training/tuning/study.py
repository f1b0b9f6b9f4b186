"""The folder of a search: what it is of, optuna's journal of it, and what follows from that.

::

    study.json      what the study is of; another search is refused
    journal.log     optuna's own record, from which a stopped search goes on
    trials.jsonl    a line a trial, made from the journal
    config.toml     the winner so far, for ``csalign train --config``
"""

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.pruners import PercentilePruner
from optuna.samplers import BaseSampler, PartialFixedSampler, TPESampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from csalign.core import atomic, locks
from csalign.core.errors import OutputError, SchemaError
from csalign.core.records import parse_json
from csalign.core.results import Trial
from csalign.core.version import __version__

FORMAT = "csalign-study"
STUDY, JOURNAL, TRIALS, CONFIG = "study.json", "journal.log", "trials.jsonl", "config.toml"
RECORD, DEFAULT = "record", "default"  # attributes of a trial and of the study in the journal
STATES = {
    "complete": TrialState.COMPLETE,
    "pruned": TrialState.PRUNED,
    "failed": TrialState.FAIL,
}
HOPELESS = 0.25  # a trial is ended that is as low as this share of those before it
JUDGED_FROM = 0.5  # share of a trial's validations before which it is not compared with others


class Study:
    """A search in its folder, as one process continues it; made by `open_study`."""

    def __init__(self, folder: Path, seed: int, validations: int) -> None:
        self.folder = folder
        self._seed = seed
        backend = JournalFileBackend(str(folder / JOURNAL))
        self._study = optuna.create_study(
            storage=JournalStorage(backend),
            study_name="csalign",
            direction="maximize",
            load_if_exists=True,
            pruner=PercentilePruner(
                100 * (1 - HOPELESS), n_warmup_steps=round(JUDGED_FROM * validations)
            ),
        )
        for trial in self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            # A dead process left it; unlike a failed one it has no record and so is not counted.
            self._study.tell(trial.number, state=TrialState.FAIL)

    @property
    def trials(self) -> list[Trial]:
        """The trials that came to an end."""
        attributes = [t.user_attrs for t in self._study.get_trials(deepcopy=False)]
        return [Trial(**found[RECORD]) for found in attributes if RECORD in found]

    @property
    def default(self) -> dict[str, Any] | None:
        """What was noted of the default."""
        noted: dict[str, Any] | None = self._study.user_attrs.get(DEFAULT)
        return noted

    def note_default(self, document: dict[str, Any]) -> None:
        """Note plain JSON values of the default, for processes to come."""
        self._study.set_user_attr(DEFAULT, document)

    def begin(self, number: int, given: dict[str, Any]) -> optuna.Trial:
        """Begin a trial.

        Its choices follow from the seed, its number and the trials before it, so that it does not
        matter which process makes it.

        Args:
            number: trials that came to an end before it.
            given: values that are not to be chosen.
        """
        seed = np.random.SeedSequence([self._seed, number]).generate_state(1)[0]
        # Whether a setting matters hangs on others, which the multivariate sampler has no word for.
        sampler: BaseSampler = TPESampler(seed=int(seed), multivariate=False, constant_liar=False)
        if given:
            sampler = PartialFixedSampler(given, sampler)
        self._study.sampler = sampler
        return self._study.ask()

    def end(self, trial: optuna.Trial, record: Trial, value: float | None) -> None:
        """Write how a trial ended.

        Args:
            trial: what `begin` gave.
            record: what to say of it.
            value: what is maximised, of a complete one.
        """
        trial.set_user_attr(RECORD, record.to_json())
        self._study.tell(trial, value, STATES[record.state])

    def write(self, config: str | None) -> None:
        """Bring the files beside the journal up to date.

        Args:
            config: the winner's settings; None where there is no winner yet.
        """
        lines = [json.dumps(trial.to_json(), ensure_ascii=False) for trial in self.trials]
        atomic.write_text(self.folder / TRIALS, "".join(f"{line}\n" for line in lines))
        if config is not None:
            atomic.write_text(self.folder / CONFIG, config)


@contextmanager
def open_study(
    folder: Path, identity: dict[str, Any], *, seed: int, validations: int, overwrite: bool
) -> Iterator[Study]:
    """Make a study, or continue one, while no other process does.

    Args:
        folder: of the study.
        identity: plain JSON values that tell this search from others: "features", their
            fingerprint; "base", settings by name; "search", what is searched.
        seed: of the search.
        validations: that a trial makes.
        overwrite: whether to begin anew in place of a study that is there.

    Raises:
        OutputError: another process continues it, or the study is of something else.
        SchemaError: its files are damaged.
    """
    with locks.lock_folder(folder), _quiet_optuna():
        if overwrite or not _is_begun(folder):
            _clear(folder)
            document = {"format": FORMAT, "csalign_version": __version__, **identity}
            atomic.write_json(folder / STUDY, document)
        else:
            _check_same(folder, identity)
        _mend(folder / JOURNAL)
        try:
            study = Study(folder, seed, validations)
            _ = study.trials
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise SchemaError(
                f"{folder / JOURNAL}: is damaged ({error}); begin anew with --overwrite"
            ) from None
        try:
            yield study
        finally:
            if not _is_begun(folder):  # the settings are wrong, or there was no time
                _clear(folder)
                (folder / locks.LOCK).unlink()
                with suppress(OSError):
                    folder.rmdir()


def check_study(folder: Path, features: Path) -> None:
    """Refuse a folder that is no place for a study, before any work is done.

    Raises:
        OutputError: it holds something other than a study, or is no folder, or lies in `features`.
    """
    if not folder.is_dir():
        atomic.check_output(folder, overwrite=False, inputs=(features,))
        return
    names = {path.name for path in folder.iterdir()} - {locks.LOCK}
    if names and STUDY not in names:
        raise OutputError(
            f"{folder}: holds files but no study ({min(names)}); choose another --out"
        )


def _is_begun(folder: Path) -> bool:
    """Whether a trial came to an end."""
    trials = folder / TRIALS
    return trials.is_file() and trials.stat().st_size > 0


def _clear(folder: Path) -> None:
    for name in (CONFIG, TRIALS, JOURNAL, STUDY):  # what marks it as a study goes last
        (folder / name).unlink(missing_ok=True)


def _check_same(folder: Path, identity: dict[str, Any]) -> None:
    path = folder / STUDY
    remedy = "choose another --out, or begin anew with --overwrite"
    try:
        there = parse_json(path.read_text(encoding="utf-8"))
        if there["format"] != FORMAT:
            raise ValueError(f"its format is {there['format']!r}")
        differing = next((key for key in identity if there[key] != identity[key]), None)
        base = {**there["base"]}
    except (ValueError, KeyError, TypeError) as error:
        raise SchemaError(f"{path}: is damaged ({error}); {remedy}") from None
    if differing == "features":
        raise OutputError(f"{folder}: is a study of other features; {remedy}")
    for name, value in identity["base"].items():
        if base.get(name) != value:
            raise OutputError(
                f"{folder}: was begun with {name.replace('_', '-')} {base.get(name)}, not {value}; "
                f"give the same, {remedy}"
            )
    if differing:
        names = ",".join(name.replace("_", "-") for name in there["search"])
        raise OutputError(
            f"{folder}: searches {names}, or between other bounds; give --search {names}, {remedy}"
        )


def _mend(journal: Path) -> None:
    """Remove what a process that died while it wrote leaves: a lock, and half a line."""
    journal.with_name(f"{journal.name}.lock").unlink(missing_ok=True)
    if journal.exists():
        text = journal.read_bytes()
        whole = text.rfind(b"\n") + 1
        if whole < len(text):
            with journal.open("r+b") as file:
                file.truncate(whole)


@contextmanager
def _quiet_optuna() -> Iterator[None]:
    """Keep optuna's log, and its warnings of experimental parts, to itself."""
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(level)
