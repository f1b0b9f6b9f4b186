"""What the libraries behind the encoders say, made fit for a user: one line, and no noise."""

import difflib
import logging
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from csalign.core.errors import EncoderError

logger = logging.getLogger(__name__)

# They would print a warning each time that they try again, or a report on each load.
_TALKATIVE = ("huggingface_hub", "timm", "transformers")

_CANNOT_RUN = (
    AssertionError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)


def first_line(error: BaseException) -> str:
    """The line of an error of a library that says what is wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # torch heads a list of mismatches with a line that says nothing.
    text = " ".join(lines[1:2] if lines[1:] and lines[0].endswith(":") else lines[:1])
    return textwrap.shorten(text, 160, placeholder=" ...") or type(error).__name__


def suggest(name: str, known: Sequence[str]) -> str:
    """Those of the known names that are nearest to a misspelt one, as part of a sentence."""
    by_lower = {item.lower(): item for item in known}
    close = difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=0.5)
    if close:
        return f"its nearest are {', '.join(by_lower[item] for item in close)}"
    return f"it has {', '.join(known[:8])}{' and others' if len(known) > 8 else ''}"


@contextmanager
def quiet() -> Iterator[None]:
    """Keep what libraries say to the root logger and as warnings in this module's log.

    open_clip would otherwise put a handler on the root logger of the process.
    """
    root, handler = logging.getLogger(), logging.NullHandler()
    levels = {name: logging.getLogger(name).level for name in _TALKATIVE}

    def divert(record: logging.LogRecord) -> bool:
        # Weights are loaded after the network is built, so this one would only mislead.
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
    """Turn what a network raises when it is first run into one line.

    Raises:
        EncoderError: it cannot be run.
    """
    try:
        yield
    except _CANNOT_RUN as error:
        raise EncoderError(f"{spec} cannot be run ({first_line(error)})") from error
