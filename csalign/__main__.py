"""The ``csalign`` command, and ``python -m csalign``."""

import signal
import sys
from types import FrameType

from csalign.errors import Stopped


def main() -> None:
    """Entry point.

    Signals are taken care of before anything else is imported, so that a stop in the first
    moments ends like any other.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    try:
        from csalign.cli.app import app

        app()
    except Stopped as stopped:
        sys.exit(stopped.exit_code)


def _stop(signum: int, frame: FrameType | None) -> None:
    raise Stopped(signum)


if __name__ == "__main__":
    main()
