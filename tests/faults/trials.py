"""One fault, one rerun, and what has to hold after each, for each command that writes."""

import errno
import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import safetensors.torch
import torch
from PIL import Image

from csalign.core import locks, outputs
from csalign.core.progress import CALL_KEYS
from tests.faults.disk import Done, Machine, Mode, Plan

COMMANDS = ("extract", "import", "train", "apply", "eval")
PAIRS = 60
PHOTOS = 10
TINY: dict[str, Any] = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "layers": 1, "width": 24, "head_width": 12, "patch_size": 16},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1},
}
# Of each kind of operation, with what disks, mounts and administrators refuse it.
ERRORS = {
    "open": (errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EIO),
    "write": (errno.ENOSPC, errno.EIO, errno.EDQUOT),
    "fsync": (errno.EIO, errno.ENOSPC),
    "truncate": (errno.ENOSPC, errno.EIO),
    "allocate": (errno.ENOSPC, errno.EIO),
    "mkdir": (errno.EACCES, errno.EROFS, errno.ENOSPC),
    "rename": (errno.EACCES, errno.EIO, errno.EROFS),
    "unlink": (errno.EACCES, errno.EIO, errno.EROFS),
    "rmdir": (errno.EACCES, errno.EIO, errno.EROFS),
}
VANISHED = (errno.EIO, errno.ESTALE, errno.ENOTCONN)
# What says when and where a run was, rather than what it made.
VOLATILE = "environment.json"
_DATE = re.compile(rb"\d{4}-\d\d-\d\d \d\d:\d\d UTC")  # in the head of a page


@dataclass(frozen=True)
class Inputs:
    """What the commands read: made once, and never below the root of a machine."""

    folder: Path
    photos: Path
    encoder: str
    images: Path
    texts: Path
    table: Path
    features: Path
    run: Path


def make_inputs(folder: Path, machine: Machine) -> Inputs:
    """Write tiny inputs: photos with captions, a model for them, arrays, features and a run."""
    folder = folder.resolve()
    rng = np.random.default_rng(0)
    inputs = Inputs(
        folder=folder,
        photos=folder / "photos",
        encoder=f"open_clip:{folder / 'tiny.json'}+{folder / 'tiny.safetensors'}",
        images=folder / "images.npy",
        texts=folder / "texts.npy",
        table=folder / "texts.csv",
        features=folder / "features",
        run=folder / "run",
    )
    inputs.photos.mkdir(parents=True)
    names = [f"{number}.png" for number in range(PHOTOS)]
    for name in names:
        Image.fromarray(rng.integers(0, 256, (40, 36, 3), np.uint8)).save(inputs.photos / name)
    rows = [f"{name},a drawing of {name}" for name in names]
    (inputs.photos / "captions.csv").write_text("\n".join(["image,caption", *rows]))
    (folder / "tiny.json").write_text(json.dumps(TINY))
    torch.manual_seed(0)
    network = open_clip.CLIP(**TINY)
    safetensors.torch.save_file(network.state_dict(), folder / "tiny.safetensors")
    latent = rng.normal(size=(PAIRS, 6))
    for path, width in ((inputs.images, 12), (inputs.texts, 8)):
        values = latent @ rng.normal(size=(6, width)) + 0.3 * rng.normal(size=(PAIRS, width))
        np.save(path, values.astype(np.float32))
    splits = ["train"] * 36 + ["val"] * 12 + ["test"] * 12
    lines = [f"{row},caption {row},{split}" for row, split in enumerate(splits)]
    inputs.table.write_text("\n".join(["image_id,caption,split", *lines]))
    arrays = ("--images", inputs.images, "--texts", inputs.texts)
    for arguments in (
        ("import", *arrays, "--pairs", inputs.table, "--out", inputs.features),
        ("train", inputs.features, "--out", inputs.run, "--steps", 4, "--hidden", 8),
    ):
        done = machine.run(*arguments)
        assert done.code == 0, done.errors
    return inputs


def command_line(command: str, inputs: Inputs, out: Path) -> list[object]:
    """The command that the trials run, writing to `out`."""
    pairs = ("--images", inputs.images, "--texts", inputs.texts, "--pairs", inputs.table)
    return {
        "extract": [
            *("extract", inputs.photos, "--encoder", inputs.encoder, "--out", out),
            *("--part-rows", 4, "--batch-size", 2, "--workers", 1),
        ],
        "import": ["import", *pairs, "--out", out],
        "train": [
            *("train", inputs.features, "--out", out, "--steps", 12, "--batch-size", 16),
            *("--save-every", 3, "--validations", 3, "--hidden", 8, "--captions", "sample"),
        ],
        "apply": ["apply", inputs.features, "--adapter", inputs.run, "--out", out],
        "eval": [
            *("eval", inputs.features, "--adapter", inputs.run, "--json", "--resamples", 100),
            *("--report", out),
        ],
    }[command]


@dataclass
class Trials:
    """The trials of one command.

    Attributes:
        machine: that runs it.
        inputs: that it reads.
        command: which.
        counts: of trials, and of what did not hold, by kind of fault.
        troubles: what did not hold, in words.
    """

    machine: Machine
    inputs: Inputs
    command: str
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    troubles: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.root = self.machine.root
        self.old = self._reference()
        done = self._run(overwrite=True)  # in place of the old
        assert done.code == 0, done.errors
        over = self._content(done)
        self.operations_over, self.seconds = done.operations, done.seconds
        self._clear()
        done = self._run()
        assert done.code == 0, done.errors
        self.operations, self.whole = done.operations, self._content(done)
        assert not self._left()
        assert self.whole == over, "not the same twice, without any fault"

    def steps(self, *, over: bool, room: bool = False) -> list[tuple[str, str]]:
        """What the command does on the disk: kind and path.

        Args:
            over: whether in place of an older output.
            room: whether of that only what takes room.
        """
        operations = self.operations_over if over else self.operations
        return [one for one in operations if not (room and one[0] in _ROOMLESS)]

    @property
    def out(self) -> Path:
        """What the command writes: a folder, or a page."""
        return self.root / ("page.html" if self.command == "eval" else "out")

    @property
    def partial(self) -> Path:
        """Where it does so."""
        return self.root / "out.partial"

    def kill(self, plan: Plan, *, over: bool, alone: bool = False) -> None:
        """Kill at an operation, and run again.

        Args:
            plan: where.
            over: whether an older output is to be replaced.
            alone: whether in an interpreter of its own.
        """
        self._prepare(over=over)
        done = self._run(overwrite=over, plan=plan, alone=alone)
        self._after_kill(done, f"kill, {plan}", over=over)

    def kill_after(self, seconds: float, *, over: bool) -> None:
        """Kill so long after the work began, and run again."""
        self._prepare(over=over)
        begun = None if self.command == "eval" else self.partial
        done = self._run(overwrite=over, kill_when=begun, kill_after=seconds)
        self._after_kill(done, f"kill after {seconds:.3f} s", over=over)

    def refuse(self, plan: Plan, *, over: bool, alone: bool = False) -> None:
        """Let an operation fail, and run again."""
        self._prepare(over=over)
        done = self._run(overwrite=over, plan=plan, alone=alone)
        name = f"write error, {plan}"
        steps = self.steps(over=over)
        if 0 < plan.at <= len(steps) and plan.mode is Mode.FAIL_ONCE:
            name += " ({} {})".format(*steps[plan.at - 1])
        if done.code == 0:
            self._check_result("write error", name, done)
            return
        wrong = []
        if done.code != 1:
            wrong.append(f"exit code {done.code}")
        if "Traceback" in done.errors:
            wrong.append("a traceback")
        said = [line for line in done.errors.splitlines() if line.startswith("csalign: ")]
        if not said or len(said[-1]) < len("csalign: "):
            wrong.append("no message")
        elif str(self.root) not in said[-1]:
            wrong.append("the message names no file")
        elif ";" not in said[-1]:
            wrong.append("the message has no remedy")
        self._rerun("write error", name, done, wrong, over=over)

    def _after_kill(self, done: Done, name: str, *, over: bool) -> None:
        wrong = [] if done.code in (-9, 0) else [f"exit code {done.code}"]
        self._rerun("kill", name, done, wrong, over=over)

    def _rerun(self, kind: str, name: str, done: Done, wrong: list[str], *, over: bool) -> None:
        lost = []
        standing = self._content(done)
        known = [self.whole["files"], self.old["files"] if over else {}]
        there = {name: content for name, content in standing["files"].items() if not _of_job(name)}
        if there not in known and not self._is_swapped_out(over=over):
            lost.append("what stands there is neither the old nor the new")
        if over and not standing["files"] and not self._is_swapped_out(over=over):
            lost.append("the old is gone")
        if there == self.whole["files"] and not self._left() and not over:
            self._tell(kind, name, done, wrong, lost)  # it was done, and need not run again
            return
        again = self._run(overwrite=over)
        if again.code != 0:
            lost.append(f"the rerun fails: {again.errors.strip().splitlines()[-1:]}")
        elif self._content(again) != self.whole:
            wrong.append("the rerun gives something else")
        if again.code == 0 and (left := self._left()):
            wrong.append(f"left behind: {left}")
        self._tell(kind, name, done, wrong, lost)

    def _is_swapped_out(self, *, over: bool) -> bool:
        """Whether it was killed between the two renames: the old is whole, under another name."""
        aside = self.root / f".{self.out.name}.csalign-previous"
        return over and not self.out.exists() and _files(aside, self.root) == self.old["files"]

    def _check_result(self, kind: str, name: str, done: Done) -> None:
        wrong = []
        found = self._content(done)
        # The removal of a lock file may fail after the commit; it does no harm there.
        kept = {name: own for name, own in found["files"].items() if not _of_job(name)}
        if {**found, "files": kept} != self.whole:
            wrong.append("exit code 0, but something else than without the fault")
        left = self._left()
        again = self._run(overwrite=True)
        if again.code != 0 or self._content(again) != self.whole or self._left():
            wrong.append(f"not clean after the rerun ({again.code}; {left}; {self._left()})")
        self._tell(kind, name, done, wrong, [])

    def _tell(
        self, kind: str, name: str, done: Done, wrong: Sequence[str], lost: Sequence[str]
    ) -> None:
        counts = self.counts.setdefault(kind, {"trials": 0, "recovered": 0, "lost": 0, "wrong": 0})
        counts["trials"] += 1
        counts["recovered"] += not (wrong or lost)
        counts["lost"] += bool(lost)
        counts["wrong"] += bool(wrong)
        if wrong or lost:
            last = done.errors.strip().splitlines()[-1:]
            self.troubles.append(f"{self.command}, {name}: {'; '.join([*wrong, *lost])} {last}")

    def _prepare(self, *, over: bool) -> None:
        self._clear()
        if over:
            done = self._run(old=True)
            assert done.code == 0, done.errors

    def _clear(self) -> None:
        shutil.rmtree(self.root, ignore_errors=True)
        self.root.mkdir()

    def _left(self) -> list[str]:
        # wandb makes folders as it is imported, which timm does wherever it is installed.
        there = sorted(path.name for path in self.root.iterdir() if path != self.out)
        return [name for name in there if not name.endswith(("wandb-media", "wandb-artifacts"))]

    def _reference(self) -> dict[str, Any]:
        self._clear()
        done = self._run(old=True)
        assert done.code == 0, done.errors
        assert not self._left()
        return self._content(done)

    def _run(self, *, overwrite: bool = False, old: bool = False, **how: Any) -> Done:
        """The command; `old` gives the output that stands in its way."""
        arguments = command_line(self.command, self.inputs, self.out)
        if old:
            arguments = _another(self.command, self.inputs, self.out)
        if overwrite and self.command != "eval":
            arguments.append("--overwrite")
        return self.machine.run(*arguments, **how)

    def _differing(self, done: Done) -> set[str]:
        """Names of files that are not as without faults."""
        found, whole = self._content(done)["files"], self.whole["files"]
        return {name for name in found | whole if found.get(name) != whole.get(name)}

    def _content(self, done: Done) -> dict[str, Any]:
        is_document = self.command == "eval" and done.code == 0 and done.out.startswith("{")
        printed = json.loads(done.out) if is_document else {}
        printed = {key: value for key, value in printed.items() if key not in CALL_KEYS}
        return {"files": _files(self.out, self.root), "printed": printed}


_ROOMLESS = ("fsync", "unlink", "rmdir", "rename", "read")


def _of_job(name: str) -> bool:
    """Whether a file is removed from an output after it is whole; readers pass it over."""
    return name in (outputs.JOB, locks.LOCK) or name.startswith(f"{outputs.RESUME}/")


def _another(command: str, inputs: Inputs, out: Path) -> list[object]:
    """A command that writes the same kind of artifact, of another content."""
    if command == "train":
        return ["train", inputs.features, "--out", out, "--steps", 2, "--hidden", 4]
    if command == "eval":
        return ["eval", inputs.features, "--split", "val", "--adapter", inputs.run, "--report", out]
    return ["import", "--images", inputs.images, "--out", out]


def _files(out: Path, root: Path) -> dict[str, bytes]:
    """Content of each file, without what tells times and with all outputs under one name."""
    paths = [out] if out.is_file() else sorted(out.rglob("*"))
    return {
        path.relative_to(root).as_posix().partition("/")[2] or "page": _DATE.sub(
            b"", path.read_bytes()
        )
        for path in paths
        if path.is_file() and path.name != VOLATILE
    }
