"""Options of any command: TOML files, the command line, types of values, and what is wrong."""

import re
import shlex
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self, TypeVar

import tomli_w
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    ValidationError,
    model_validator,
)
from pydantic_core import ErrorDetails

from csalign.core.errors import ConfigError
from csalign.core.paths import parse_location

C = TypeVar("C", bound="Config")

ALIASES = {
    "lr": "learning_rate",
    "pair_loss": "pairwise",
    "dist_loss": "divergence",
    "dist_weight": "cs_weight",
    "chunk_size": "sub_batch",
    "ema": "average",
    "dim": "width",
    "hidden_dim": "hidden",
    "val_count": "validations",
    "html": "report",
    "sides": "side",
    "items": "pairs",
    "plot": "report",
}
"""Other names of options, on the command line, in ``--config`` and from Python."""

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


def _parse_place(value: Any) -> Path:
    if value == "":
        raise ValueError("must not be empty")
    return parse_location(value)


def parse_number(value: Any) -> Any:
    """Parse a string from the command line as a number if it is one."""
    if isinstance(value, str):
        for kind in (int, float):
            try:
                return kind(value)
            except ValueError:
                continue
    return value


def _parse_numbers(value: Any) -> Any:
    """Parse a comma-separated string as numbers."""
    if isinstance(value, str) and "," in value:
        return tuple(parse_number(part.strip()) for part in value.split(","))
    return tuple(value) if isinstance(value, list) else value


def _parse_words(value: Any) -> Any:
    """Parse a comma-separated string as words."""
    if isinstance(value, str):
        return tuple(word.strip() for word in value.split(","))
    return tuple(value) if isinstance(value, list) else value


def _parse_named(value: Any) -> Any:
    """Parse words such as ``audio=a.npy``, one or several, as values by name."""
    if value is None or isinstance(value, Mapping):
        return value
    found: dict[str, str] = {}
    for word in (value,) if isinstance(value, str) else value:
        name, _, own = str(word).partition("=")
        if not (name.strip() and own.strip()):
            raise ValueError(f"must be NAME=VALUE, not {word!r}")
        if name.strip() in found:
            raise ValueError(f"{name.strip()} is given twice; give it once")
        found[name.strip()] = own.strip()
    return found


Number = BeforeValidator(parse_number)
Named = BeforeValidator(_parse_named)
Several = BeforeValidator(_parse_numbers)
Words = BeforeValidator(_parse_words)
Location = Annotated[Path, PlainValidator(_parse_place), PlainSerializer(str)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]


class Config(BaseModel):
    """Base of the configurations: frozen; unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    panel: ClassVar[str] = "Options"
    """Title of the help panel of the fields that the class itself declares."""

    positional: ClassVar[tuple[str, ...]] = ("source", "features")
    """Fields that are arguments rather than options on the command line."""

    common: ClassVar[tuple[str, ...]] = ()
    """Fields that the short help shows, in this order; () for all. Unknown names are ignored."""

    example: ClassVar[str] = ""
    """A command line that works, for the help and for what is missing in another."""

    if not TYPE_CHECKING:  # for which the signature follows from the fields

        def __init__(self, /, **values: Any) -> None:
            """Validate the values; raises ConfigError, a line per error."""
            try:
                super().__init__(**values)
            except ValidationError as error:
                raise ConfigError("\n".join(self._mistakes(error, None, values))) from None

        __init__.__pydantic_base_init__ = True  # model_validate raises pydantic's own error

    @classmethod
    def resolve(cls, file: Path | None, given: Mapping[str, Any]) -> Self:
        """Combine defaults, a TOML file and the values of the command line.

        Args:
            file: TOML file with keys of this command, or None.
            given: values of the command line by field name; they override the file.

        Raises:
            ConfigError: the file cannot be read, or keys or values are wrong; one line per error.
        """
        written = cls.renamed(_read_toml(file)) if file else {}
        try:
            return cls.model_validate({**written, **given})
        except ValidationError as error:
            raise ConfigError("\n".join(cls._mistakes(error, file, given))) from None

    @model_validator(mode="before")
    @classmethod
    def _accept_aliases(cls, values: Any) -> Any:
        return cls.renamed(values) if isinstance(values, Mapping) else values

    @classmethod
    def renamed(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Return values with aliases (see `ALIASES`) and dashes replaced by the names of fields.

        Raises:
            ConfigError: a value is given under two names.
        """
        found: dict[str, Any] = {}
        keys: dict[str, str] = {}
        for key, value in values.items():
            name = key.replace("-", "_")
            if name not in cls.model_fields:
                name = ALIASES.get(name, name)
            name = name if name in cls.model_fields else key
            if name in found:
                raise ConfigError(f"{keys[name]} and {key} are names of one option; omit one")
            found[name], keys[name] = value, key
        return found

    @classmethod
    def aliases_of(cls, name: str) -> list[str]:
        """Return the other names of a field."""
        return [own for own, of in ALIASES.items() if of == name and own not in cls.model_fields]

    @classmethod
    def shown(cls, name: str) -> str:
        """Return a field as it is written on the command line: ``--out``, or ``FEATURES``."""
        if name in cls.positional and name in cls.model_fields:
            return cls.model_fields[name].title or name.upper()
        field = cls.model_fields.get(name)
        extra = None if field is None else field.json_schema_extra
        flag = extra.get("flag", name) if isinstance(extra, dict) else name
        return f"--{str(flag).removesuffix('_').replace('_', '-')}"

    def check(self) -> None:
        """Raise ConfigError if options are missing or do not go together."""

    @classmethod
    def _mistakes(
        cls, error: ValidationError, file: Path | None, given: Mapping[str, Any]
    ) -> Iterator[str]:
        """Yield a line for all that is missing, and one for each other mistake."""
        problems = error.errors()
        missing = [field_of(problem) for problem in problems if problem["type"] == "missing"]
        missing.sort(key=lambda name: name not in cls.positional)
        if missing:
            names = " and ".join(cls.shown(name) for name in missing)
            wrong = {field_of(problem) for problem in problems}
            right = {name: value for name, value in given.items() if name not in wrong}
            yield f"missing {names}{cls._for_instance(file, right, missing)}"
        known = [*cls.model_fields, *(own for own in ALIASES if own not in cls.model_fields)]
        for problem in problems:
            if problem["type"] == "extra_forbidden":
                key = field_of(problem)
                where = f"{file}: unknown key {key}" if file else f"{key}: unknown key"
                yield f"{where}{did_you_mean(key, known)}"
        yield from explain(
            error, lambda name: f"{file}: {name}" if file and name not in given else cls.shown(name)
        )

    @classmethod
    def _for_instance(
        cls, file: Path | None, given: Mapping[str, Any], missing: Sequence[str]
    ) -> str:
        """Complete what was given with the missing values of the example."""
        words = shlex.split(cls.example)
        if not words:
            return ""
        line, arguments = words[:2], iter(words[2:])
        for name in cls.positional:
            if name in cls.model_fields and (name in given or name in missing):
                example = next(arguments, name.upper())
                value = given.get(name, example)
                line += map(str, value) if isinstance(value, (list, tuple)) else [str(value)]
        line += [] if file is None else ["--config", str(file)]
        for name in [*given, *missing]:
            if name not in cls.positional and not isinstance(given.get(name), list):
                line += written(cls.shown(name), given.get(name, words))
        return f"; for instance: {shlex.join(line)}"

    def to_toml(self) -> str:
        """Return the configuration for ``--config``, without unset keys and ``overwrite``."""
        return tomli_w.dumps(self.model_dump(mode="json", exclude_none=True, exclude={"overwrite"}))


def written(option: str, value: Any) -> list[str]:
    """Write an option as on the command line; its value from the words of an example if missing."""
    if isinstance(value, bool):
        return [option if value else option.replace("--", "--no-", 1)]
    if isinstance(value, dict):
        return [word for name, own in value.items() for word in (option, f"{name}={own}")]
    if isinstance(value, tuple):
        value = ",".join(map(str, value))
    if isinstance(value, list):
        value = dict(pairwise(value)).get(option, option.strip("-").upper())
    return [option, str(value)]


def _read_toml(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{file}: no such config file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{file}: cannot be read as TOML: {error}") from None


def _require_local(value: Any) -> Any:
    if value == "":
        raise ValueError("must not be empty")
    if "://" in str(value):
        raise ValueError("runs and indexes must be on a local disk; only feature sets can be URLs")
    return value


RunFolder = Annotated[Path, BeforeValidator(_require_local)]


def _local_or_hub(value: Any) -> Any:
    """Return a name on the hub as it is, which commands replace by a folder; else a path."""
    if str(value).startswith("hf://"):
        return str(value)
    if not isinstance(value, str | Path):
        raise ValueError("Input should be a folder or a name on the hub")
    return Path(_require_local(value))


RunSource = Annotated[Path, PlainValidator(_local_or_hub), PlainSerializer(str)]
"""A run: a folder, ``hf://USER/REPO``, or ``USER/REPO`` if no local folder has that name."""


class OutputConfig(Config):
    """The output folder."""

    panel: ClassVar[str] = "Output"

    out: Location = Field(description="Output folder.")
    overwrite: bool = Field(
        False, description="Replace the folder if it exists, only after success."
    )


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

    `name_of` returns how the user wrote a field.
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
