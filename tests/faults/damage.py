"""Bytes flipped and bytes missing, in what a command reads and in what it goes on from."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

from csalign.core.progress import CALL_KEYS
from tests.faults.disk import Done, Mode, Plan
from tests.faults.trials import Trials

# Text for people, and what says when and where a run was; no figure comes from them.
HARMLESS = ("config.toml", "failures.jsonl")


class Damage:
    """Damages one file at a time, for one command.

    Args:
        trials: of the command; the counts go there.
        chance: what draws.
    """

    def __init__(self, trials: Trials, chance: random.Random) -> None:
        self.trials, self.chance = trials, chance
        self.clean = self._told()

    def run(self, count: int) -> None:
        """Make so many trials."""
        for number in range(count):
            unfinished = self.trials.command in ("extract", "train") and number % 2
            (self._unfinished if unfinished else self._finished)()

    def _finished(self) -> None:
        """Damage an artifact, and let a command read it that has to notice."""
        folder = self._artifact()
        path = self.chance.choice(_files(folder))
        name = self._damage(path)
        done = self._read(folder)
        wrong = self._judge(done, path)
        self._tell(name, done, wrong)

    def _unfinished(self) -> None:
        """Damage what a killed command left, and run it again."""
        trials = self.trials
        trials._prepare(over=False)
        at = self.chance.randint(len(trials.operations) // 3, len(trials.operations) - 3)
        trials._run(plan=Plan(Mode.KILL_AFTER, at))
        there = _files(trials.partial)
        if not there:
            return
        path = self.chance.choice(there)
        name = self._damage(path)
        done = trials._run()
        wrong = []
        if done.code == 0:
            again = trials.machine.run("inspect", trials.out)
            differing = trials._differing(done) - {*HARMLESS}
            if path.parent.parent.name == "checkpoints":
                # No command goes on from it; who reads it has to notice.
                relative = path.relative_to(trials.partial).as_posix()
                again = trials.machine.run("inspect", (trials.out / relative).parent)
                if path.name in again.errors:
                    differing.discard(relative)
            if differing and again.code == 0:
                wrong.append("another result")
            elif again.code != 0 and path.name not in again.errors:
                wrong.append(f"inspect does not name the file: {again.errors}")
        else:
            wrong += _message(done, path)
            again = trials._run(overwrite=True)
            if again.code != 0 or trials._differing(again):
                wrong.append(f"--overwrite does not begin anew {again.errors}")
        self._tell(name, done, wrong)

    def _artifact(self) -> Path:
        """A copy of one that the command made, or reads."""
        trials, inputs = self.trials, self.trials.inputs
        trials._clear()
        if trials.command in ("extract", "import", "train"):
            done = trials._run()
            assert done.code == 0, done.errors
            return trials.out
        source = self.chance.choice([inputs.features, inputs.run])
        shutil.copytree(source, trials.root / source.name)
        return trials.root / source.name

    def _read(self, folder: Path) -> Done:
        trials, inputs = self.trials, self.trials.inputs
        if trials.command in ("extract", "import", "train"):
            return trials.machine.run("inspect", folder, "--json")
        features, run = inputs.features, inputs.run
        if folder.name == features.name:
            features = folder
        else:
            run = folder
        return trials.machine.run(*self._reading(features, run))

    def _reading(self, features: Path, run: Path) -> list[object]:
        out = self.trials.root / "read"
        if self.trials.command == "apply":
            return ["apply", features, "--adapter", run, "--out", out]
        page = ("--report", self.trials.root / "page.html")
        return ["eval", features, "--adapter", run, "--json", "--resamples", 100, *page]

    def _told(self) -> Any:
        """What the reader gives without damage."""
        if self.trials.command in ("extract", "import", "train"):
            return self._figures(self._read(self._artifact()))
        inputs = self.trials.inputs
        self.trials._clear()
        return self._figures(self.trials.machine.run(*self._reading(inputs.features, inputs.run)))

    def _figures(self, done: Done) -> Any:
        assert done.code == 0, done.errors
        if self.trials.command == "apply":
            out = self.trials.root / "read"
            return {path.relative_to(out): path.read_bytes() for path in out.rglob("*.parquet")}
        document = json.loads(done.out)
        return {key: document[key] for key in document if key not in _PATHS}

    def _judge(self, done: Done, path: Path) -> list[str]:
        if done.code != 0:
            return _message(done, path)
        is_named = path.name in done.errors  # a warning says what is left out of the document
        if self._figures(done) != self.clean and not is_named:
            return ["a wrong number"]
        return []

    def _damage(self, path: Path) -> str:
        """Flip a bit, cut the end, or take bytes out of the middle; says what was done."""
        content = bytearray(path.read_bytes())
        how = self.chance.choice(["flip", "flip", "cut", "hole", "empty"])
        at = self.chance.randrange(len(content))
        if how == "flip":
            content[at] ^= 1 << self.chance.randrange(8)
        elif how == "cut":
            del content[at:]
        elif how == "hole":
            del content[at : at + self.chance.randint(1, 64)]
        else:
            content.clear()
        path.write_bytes(content)
        return f"{how} of {path.relative_to(self.trials.root)} at {at}"

    def _tell(self, name: str, done: Done, wrong: list[str]) -> None:
        if "Traceback" in done.errors:
            wrong = [*wrong, "a traceback"]
        self.trials._tell("damage", name, done, wrong, [])


# Paths, and what differs from run to run.
_PATHS = ("path", "features", "adapter", "seconds", "bytes", *CALL_KEYS)


def _message(done: Done, path: Path) -> list[str]:
    wrong = []
    if done.code != 1:
        wrong.append(f"exit code {done.code}")
    if path.name not in done.errors and path.parent.name not in done.errors:
        wrong.append("the message does not name the file")
    return wrong


def _files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file() and path.stat().st_size]
