"""Standard streams that were closed, as services and hooks start programs."""

import os
import sys


def open_closed_streams() -> None:
    """Put the null device in the place of standard streams that were closed.

    Else the next file that is opened gets the number of a closed stream, and what a library
    prints. A closed stdin stays None, since commands report it.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    if sys.stdout is None:
        sys.stdout = os.fdopen(1, "w", closefd=False)
    if sys.stderr is None:
        sys.stderr = os.fdopen(2, "w", closefd=False)
