"""The ``csalign`` command, and ``python -m csalign``."""

import os
import sys

from csalign.core.errors import Stopped
from csalign.core.signals import catch_signals
from csalign.core.streams import open_closed_streams


def main() -> None:
    """Run the command line; signals are handled before anything heavy is imported."""
    catch_signals()
    open_closed_streams()
    # Threads that spin at every barrier make a step several times slower on a shared machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        from csalign.cli.app import app

        app()
    except Stopped as stopped:
        sys.exit(stopped.exit_code)


if __name__ == "__main__":
    main()
