"""Commands on a disk that fails by plan: killed or refused at the n-th operation on a file."""

import enum
import errno
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

HERE = Path(__file__).parent
LIMIT = 900.0  # seconds that no command on tiny data takes, however loaded the machine is


class Mode(enum.IntEnum):
    """What happens at the operation that is planned; the numbers are those of disk.c."""

    LOG = 1
    KILL_BEFORE = 2
    KILL_AFTER = 3
    TORN = 4  # half of a write, then killed
    FAIL_ONCE = 5
    FAIL_ON = 6  # all from there on, reads too: a mount that vanished
    FULL = 7  # all that takes room from there on, of which alone are counted


@dataclass(frozen=True)
class Plan:
    """Which operation, counted from 1, and what happens there; by default nothing does."""

    mode: Mode = Mode.LOG
    at: int = 0
    errno: int = 0

    def __str__(self) -> str:
        what = errno.errorcode.get(self.errno, "")
        return f"{self.mode.name.lower().replace('_', ' ')} {what} at {self.at}".replace("  ", " ")


@dataclass(frozen=True)
class Done:
    """How a command ended.

    Attributes:
        code: its exit code, -9 if it was killed.
        out: what it printed.
        errors: what it printed on stderr.
        seconds: that it took.
        operations: kind and path of what it did on the disk.
    """

    code: int
    out: str
    errors: str
    seconds: float
    operations: list[tuple[str, str]]


def build(folder: Path) -> Path:
    """Compile disk.c; raises FileNotFoundError where there is no C compiler."""
    library = folder / "disk.so"
    subprocess.run(
        ["cc", "-shared", "-fPIC", "-O1", "-o", library, HERE / "disk.c", "-ldl"], check=True
    )
    return library


class Machine:
    """Runs commands under plans; a context manager.

    Args:
        folder: for its own files.
        root: folder whose files the plans are about.
    """

    def __init__(self, folder: Path, root: Path) -> None:
        self.folder, self.root = folder.resolve(), root.resolve()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._library = build(self.folder)
        self.environment = {
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
            "COLUMNS": "200",
            "PYTHONPATH": os.pathsep.join(sys.path),
        }

    def __enter__(self) -> Self:
        self._start()
        return self

    def _start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, HERE / "server.py"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **self.environment, "LD_PRELOAD": str(self._library)},
        )
        assert self._process.stdout is not None
        assert json.loads(self._process.stdout.readline()) == {"ready": True}

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=LIMIT)
        self._process.stdout.close()

    def run(
        self,
        *arguments: object,
        plan: Plan | None = None,
        kill_when: Path | None = None,
        kill_after: float | None = None,
        alone: bool = False,
    ) -> Done:
        """Run a command.

        Args:
            arguments: of ``csalign``.
            plan: for the disk.
            kill_when: a path; the seconds of `kill_after` begin when it appears.
            kill_after: seconds after which it is killed.
            alone: whether in a new interpreter, ``python -m csalign``, rather than a fork.
        """
        plan = plan or Plan()
        files = {name: self.folder / name for name in ("stdout", "stderr", "log")}
        files["log"].write_text("")
        given = [str(argument) for argument in arguments]
        if alone:
            answer = self._run_alone(given, plan, files)
        else:
            answer = self._ask(given, plan, files, kill_when, kill_after)
        lines = files["log"].read_text(errors="replace").splitlines()
        return Done(
            code=answer["code"],
            out=files["stdout"].read_text(errors="replace"),
            errors=files["stderr"].read_text(errors="replace"),
            seconds=answer["seconds"],
            operations=[(line.split(" ", 2)[1], line.split(" ", 2)[2]) for line in lines],
        )

    def _ask(
        self,
        arguments: list[str],
        plan: Plan,
        files: dict[str, Path],
        kill_when: Path | None,
        kill_after: float | None,
    ) -> dict[str, Any]:
        request = {
            "arguments": arguments,
            "folder": str(self.folder),
            "root": str(self.root),
            "environment": {"TMPDIR": str(self.root)},
            "plan": {"mode": plan.mode, "at": plan.at, "errno": plan.errno},
            "kill_when": None if kill_when is None else str(kill_when),
            "kill_after": kill_after,
            "limit": LIMIT,
            **{name: str(path) for name, path in files.items()},
        }
        line = self._answer(request)
        if not line:  # on a machine that others use too, somebody killed the server
            self._process.wait()
            self._start()
            line = self._answer(request)
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _answer(self, request: dict[str, Any]) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            print(json.dumps(request), file=self._process.stdin, flush=True)
        except BrokenPipeError:
            return ""
        return self._process.stdout.readline()

    def _run_alone(
        self, arguments: list[str], plan: Plan, files: dict[str, Path]
    ) -> dict[str, Any]:
        variables = {
            "FAULTS_ROOT": str(self.root),
            "FAULTS_MODE": str(int(plan.mode)),
            "FAULTS_AT": str(plan.at),
            "FAULTS_ERRNO": str(plan.errno),
            "FAULTS_LOG": str(files["log"]),
            "LD_PRELOAD": str(self._library),
            "TMPDIR": str(self.root),
        }
        with files["stdout"].open("w") as out, files["stderr"].open("w") as errors:
            done = subprocess.run(
                [sys.executable, "-m", "csalign", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=errors,
                cwd=self.folder,
                env={**os.environ, **self.environment, **variables},
                timeout=LIMIT,
                check=False,
            )
        return {"code": done.returncode, "seconds": 0.0}
