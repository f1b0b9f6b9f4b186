"""The ``csalign`` command, and ``python -m csalign``."""

import os
import sys

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
    sys.stderr = sys.stderr or os.fdopen(2, "w", closefd=False)


def main() -> None:
    """Run the command line; signals are handled before anything heavy is imported."""
    catch_signals()
    open_closed_streams()
    try:
        from csalign.cli.app import app

        app()
    except Stopped as stopped:
        sys.exit(stopped.exit_code)


if __name__ == "__main__":
    main()
