"""Runs commands in forks of one process that has imported everything, so that each is quick.

It reads a request a line on stdin and answers each with a line on stdout, in JSON. Each fork is
what ``python -m csalign`` is but for the imports, and has a plan of its own for the disk.
"""

import ctypes
import json
import os
import pkgutil
import resource
import signal
import sys
import time
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

# pyarrow looks for pandas at the first array, and plotly writes its figures with it.
BESIDE = ("faiss", "pandas", "pyarrow.pandas_compat", "plotly.graph_objects", "torch._dynamo")


def import_all() -> None:
    """Import what the commands import when they run."""
    import csalign

    for found in pkgutil.walk_packages(csalign.__path__, "csalign."):
        if not found.name.endswith("__main__"):
            import_module(found.name)
    for name in BESIDE:
        import_module(name)


def run(request: dict[str, Any]) -> None:
    """Become the command; does not return."""
    os.setpgid(0, 0)
    for number, name in ((0, os.devnull), (1, request["stdout"]), (2, request["stderr"])):
        flags = os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        os.dup2(os.open(name, flags), number)
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(n, mode) for n, mode in enumerate("rww"))
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    plan = request["plan"]
    ctypes.CDLL(None).faults_arm(
        os.fsencode(request["root"]),
        plan["mode"],
        ctypes.c_long(plan["at"]),
        plan["errno"],
        os.fsencode(request["log"]),
    )
    sys.argv = ["csalign", *request["arguments"]]
    code = 1
    try:
        from csalign.__main__ import main

        main()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except OSError:
                code = code or 1
        os._exit(code)


def wait_for(process: int, request: dict[str, Any]) -> tuple[int, Any]:
    """Wait for a fork, killing it so long after a path appears, or after the limit."""
    began = time.monotonic()
    seen = None if request["kill_when"] else began
    while True:
        done, status, used = os.wait4(process, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), used
        now = time.monotonic()
        if seen is None and Path(request["kill_when"]).exists():
            seen = now
        after = request["kill_after"]
        due = after is not None and seen is not None and now - seen >= after
        if due or now - began > request["limit"]:
            os.killpg(process, signal.SIGKILL)
        time.sleep(0.001)


def main() -> None:
    """Serve until stdin ends."""
    import_all()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        began = time.monotonic()
        process = os.fork()
        if process == 0:
            run(request)
        with suppress(OSError):  # the child may have done it, and may have ended
            os.setpgid(process, process)
        code, used = wait_for(process, request)
        answer = {"code": code, "seconds": time.monotonic() - began, "max_rss": used.ru_maxrss}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    main()
