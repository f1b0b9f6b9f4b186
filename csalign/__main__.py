"""The ``csalign`` command, and ``python -m csalign``."""

import sys

from csalign.core.errors import Stopped
from csalign.core.signals import catch_signals


def main() -> None:
    """Entry point.

    Signals are taken care of before anything else is imported, so that a stop in the first
    moments ends like any other.
    """
    catch_signals()
    try:
        from csalign.cli.app import app

        app()
    except Stopped as stopped:
        sys.exit(stopped.exit_code)


if __name__ == "__main__":
    main()
