"""The ``csalign`` command, and ``python -m csalign``."""

import gc
import io
import os
import sys
from contextlib import suppress
from typing import Any

from csalign.core.errors import Stopped
from csalign.core.signals import catch_signals


def open_closed_streams() -> None:
    """Put the null device in the place of standard streams that were closed.

    Services and hooks start programs so. Else the next file that is opened would get the number of
    a closed stream, and with it what a library prints.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    sys.stdin = sys.stdin or os.fdopen(0, closefd=False)
    sys.stdout = sys.stdout or os.fdopen(1, "w", closefd=False)
    raw, encoding = _Lossy(2, "w", closefd=False), getattr(sys.stderr, "encoding", None)
    raw.instead_of = sys.stderr  # which might close the descriptor at its end
    sys.stderr = io.TextIOWrapper(io.BufferedWriter(raw), encoding, "backslashreplace", None, True)


class _Lossy(io.FileIO):
    """A stream that drops what cannot be written, as messages must not end the work."""

    instead_of: Any = None

    def write(self, data: Any) -> int:
        with suppress(OSError):
            return super().write(data)
        return len(data)


def repair_environment() -> None:
    """Undo settings under which libraries fail, or names of files would be read wrongly.

    A locale other than UTF-8 makes Python start again in its UTF-8 mode, with the same streams.
    """
    if sys.getfilesystemencoding() != "utf-8" and sys.executable:
        os.environ.setdefault("PYTHONIOENCODING", getattr(sys.stdout, "encoding", "utf-8"))
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
    for name in ("COLUMNS", "LINES"):
        if not os.environ.get(name, "").strip("0").isdecimal():
            os.environ.pop(name, None)
    if os.path.expanduser("~") == "~":  # noqa: PTH111  # Path raises for a user without account
        os.environ["HOME"] = "/"


def main() -> None:
    """Run the command line; signals are handled before anything heavy is imported."""
    repair_environment()
    catch_signals()
    open_closed_streams()
    gc.disable()  # until all is imported: of what that makes nothing is ever garbage
    try:
        from csalign.cli.app import app

        app()
    except Stopped as stopped:
        sys.exit(stopped.exit_code)


if __name__ == "__main__":
    main()
