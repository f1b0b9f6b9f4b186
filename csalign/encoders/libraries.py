"""Messages of the libraries behind the encoders: one line each, and no noise."""

import difflib
import logging
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from csalign.core.errors import EncoderError

logger = logging.getLogger(__name__)

# They print a warning at each retry, or a report at each load.
_VERBOSE = ("huggingface_hub", "timm", "transformers")

_CANNOT_RUN = (
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)


def first_line(error: BaseException) -> str:
    """Return the line of a library's error that says what is wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # torch starts a list of mismatches with a line that names none.
    text = " ".join(lines[1:2] if lines[1:] and lines[0].endswith(":") else lines[:1])
    return textwrap.shorten(text, 160, placeholder=" ...") or type(error).__name__


def suggest(name: str, known: Sequence[str]) -> str:
    """Word which known names are closest to a misspelt one."""
    by_lower = {item.lower(): item for item in known}
    close = difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=0.5)
    if close:
        return f"the closest are {', '.join(by_lower[item] for item in close)}"
    return f"there are {', '.join(known[:8])}{' and others' if len(known) > 8 else ''}"


@contextmanager
def quiet() -> Iterator[None]:
    """Redirect root-logger messages and warnings of libraries to this module's logger.

    Without a handler on the root logger, open_clip would install one.
    """
    root, handler = logging.getLogger(), logging.NullHandler()
    levels = {name: logging.getLogger(name).level for name in _VERBOSE}

    def divert(record: logging.LogRecord) -> bool:
        # Misleading: csalign loads the weights after building the network.
        if "No pretrained weights" not in record.getMessage():
            logger.debug("%s", record.getMessage())
        return False

    root.addFilter(divert)
    root.addHandler(handler)
    for name in levels:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        root.removeHandler(handler)
        root.removeFilter(divert)
        for warning in caught:
            logger.info("%s", warning.message)


@contextmanager
def first_run(spec: str) -> Iterator[None]:
    """Turn the error of a network's first run into one line.

    Raises:
        EncoderError: it cannot be run.
    """
    try:
        yield
    except _CANNOT_RUN as error:
        raise EncoderError(f"{spec} cannot be run ({first_line(error)})") from error
