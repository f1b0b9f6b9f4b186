"""Say in plain words what is wrong with the values of options, and which word was meant."""

import re
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

LIKE = 0.7  # similarity, 0 to 1, from which a word may have been meant

_REQUIRED = {
    "int_parsing": "a whole number",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "int_parsing_size": "a smaller number",
    "float_parsing": "a number",
    "float_type": "a number",
    "finite_number": "finite",
    "greater_than": "greater than {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "less_than": "less than {lt:g}",
    "less_than_equal": "at most {le:g}",
    "literal_error": "{expected}",
    "enum": "{expected}",
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "string_type": "text",
    "path_type": "a path",
}
"""What a value must be, by the kind of error; those of numbers are named first."""


def closest(word: str, known: Iterable[str]) -> list[str]:
    """Return up to two known words that may have been meant, best first.

    >>> closest("gul", ["linear", "mlp", "glu"])
    ['glu']
    >>> closest("split", ["val-split", "train-split", "steps"])
    ['val-split', 'train-split']
    >>> closest("evaluate", ["eval", "train"])
    ['eval']
    """
    known = list(known)
    parts = [other for other in known if len(word) > 2 and word in other.split("-")]
    parts += [other for other in known if len(other) > 3 and word.startswith(other)]
    # Of three letters, two that are swapped leave a similarity of 2/3.
    cutoff = LIKE if len(word) > 3 else 0.6
    return list(dict.fromkeys([*parts, *get_close_matches(word, known, 2, cutoff)]))[:2]


def did_you_mean(word: str, known: Iterable[str], prefix: str = "") -> str:
    """Return "; did you mean WORD?", or nothing if no known word is similar."""
    found = [f"{prefix}{other}" for other in closest(word, known)]
    return f"; did you mean {' or '.join(found)}?" if found else ""


def explain(error: ValidationError, name_of: Callable[[str], str]) -> list[str]:
    """Explain the errors of a config, except missing values and unknown keys, a line per field.

    Args:
        error: of the validation.
        name_of: returns how the user wrote a field.
    """
    by_field: dict[str, list[ErrorDetails]] = {}
    for problem in error.errors():
        if problem["type"] not in ("missing", "extra_forbidden"):
            by_field.setdefault(field_of(problem), []).append(problem)
    return [_explain_field(name_of(field), found) for field, found in by_field.items()]


def field_of(problem: ErrorDetails) -> str:
    """Return the field of an error; pydantic appends the member of a union to it."""
    return str(problem["loc"][0]) if problem["loc"] else ""


def _explain_field(name: str, problems: list[ErrorDetails]) -> str:
    given = problems[0]["input"]
    for problem in problems:
        if problem["type"] == "value_error":  # in csalign's own words
            got = f" (got {_shown(given)})" if given != "" else ""
            reason = str(problem["ctx"]["error"])
            return f"{name}{'' if reason.startswith('must') else ':'} {reason}{got}"
    kinds = [*_REQUIRED]
    known = [problem for problem in problems if problem["type"] in kinds]
    if not known:
        return f"{name}: {problems[0]['msg']} (got {_shown(given)})"
    known.sort(key=lambda problem: kinds.index(problem["type"]))
    parts = [_requirement(problem["type"], problem.get("ctx", {})) for problem in known]
    words = list(dict.fromkeys(word for part in parts for word in re.split(", | or ", part)))
    meant = closest(str(given), words)
    hint = f"; did you mean {meant[0]}?" if len(meant) == 1 else ""
    *first, last = words
    needed = f"{', '.join(first)} or {last}" if first else last
    return f"{name} must be {needed} (got {_shown(given)}){hint}"


def _requirement(kind: str, context: Mapping[str, Any]) -> str:
    numbers = {name: value for name, value in context.items() if name != "error"}
    return _REQUIRED[kind].format(**numbers).replace("'", "")


def _shown(value: Any) -> str:
    """Show a value as the user wrote it: numbers on the command line are text too."""
    try:
        is_number = isinstance(value, str) and float(value) is not None
    except ValueError:
        is_number = False
    return f"{value if is_number else repr(value):.200}"
