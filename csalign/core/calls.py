"""The call of a command: as what and when, its warnings; and commands as Python functions."""

import inspect
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import wraps
from pathlib import Path
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    Protocol,
    TypeVar,
    Union,
    get_args,
    get_origin,
)

from pydantic.fields import FieldInfo

from csalign.core import __version__
from csalign.core.config import Config
from csalign.core.errors import ConfigError, CsalignError
from csalign.core.mistakes import did_you_mean
from csalign.core.progress import Progress, reported_to

C = TypeVar("C", bound=Config)
R = TypeVar("R")

_FLAG = re.compile(r"(?<![\w-])--([a-z][a-z-]*[a-z])")

CALL_KEYS = ("csalign_version", "date", "command", "warnings")
"""Keys of `Call.to_json`, the last ones of every JSON document."""


@dataclass
class Call:
    """One call of a command, from the shell or from Python.

    Attributes:
        command: the command line, or the call in Python.
        date: when it began.
        warnings: messages logged as warnings so far, each once.
    """

    command: str
    date: datetime = field(default_factory=lambda: datetime.now(UTC))
    warnings: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Return the keys that every JSON document has, plain values."""
        return {
            "csalign_version": __version__,
            "date": self.date.isoformat(timespec="seconds"),
            "command": self.command,
            "warnings": list(self.warnings),
        }


_CURRENT: ContextVar[Call | None] = ContextVar("call", default=None)


def current_call() -> Call:
    """Return the call that is running; an empty one outside of any."""
    return _CURRENT.get() or Call("")


@contextmanager
def recorded_call(command: str) -> Iterator[Call]:
    """Record a call and the warnings of csalign's loggers while it runs.

    A call within a call keeps the command and the date of the outer one, and both have its
    warnings. Where no logging is set up they are printed to stderr, as Python does.
    """
    outer = _CURRENT.get()
    call = Call(command) if outer is None else Call(outer.command, outer.date)
    logger = logging.getLogger("csalign")
    handlers: list[logging.Handler] = [_Collector(call)]
    if not logger.hasHandlers() and logging.lastResort is not None:
        handlers.append(logging.lastResort)  # which Python uses only where there is no handler
    for handler in handlers:
        logger.addHandler(handler)
    token = _CURRENT.set(call)
    try:
        yield call
    finally:
        _CURRENT.reset(token)
        for handler in handlers:
            logger.removeHandler(handler)


class _Collector(logging.Handler):
    def __init__(self, call: Call) -> None:
        super().__init__(logging.WARNING)
        self._call = call

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if message not in self._call.warnings:
            self._call.warnings.append(message)


class Inputs(Protocol):
    """Values of options that stand for paths, put on disk while a command runs."""

    @property
    def names(self) -> Mapping[str, str]:
        """What messages and results call each of those paths."""

    def place(self, option: str, value: Any) -> Any:
        """Return the value of an option with paths for what is not one."""


class PathsOnly:
    """The `Inputs` of a command that only takes paths."""

    names: Mapping[str, str] = {}

    def place(self, option: str, value: Any) -> Any:
        """Return the value."""
        return value


def no_progress() -> AbstractContextManager[Progress]:
    """Return a progress callback that shows nothing."""
    return nullcontext(lambda what, done, total: None)


default_progress: Callable[[], AbstractContextManager[Progress]] = no_progress
"""Makes the callback of a call from Python that names none; the package sets it."""


def command(
    config: type[C],
    *positional: str,
    example: str,
    inputs: Callable[[], AbstractContextManager[Inputs]] = lambda: nullcontext(PathsOnly()),
) -> Callable[[Callable[[C, Progress], R]], Callable[..., R]]:
    """Decorate a function of a config and a progress callback, making it a public function.

    It can then be called with a config or with the options as keywords, the first of them also by
    position. Its result gets the keys of the call, its signature and docstring list the options.

    Args:
        config: the options.
        positional: names of options that may be given by position; ``*name`` takes all that are
            given.
        example: a call that works, for messages.
        inputs: places what stands for a path.
    """

    def decorate(function: Callable[[C, Progress], R]) -> Callable[..., R]:
        name = function.__name__

        @wraps(function)
        def call(*args: Any, progress: Progress | None = None, **options: Any) -> R:
            with inputs() as placed:
                if args and isinstance(args[0], Config):
                    settings, progress = _checked(name, config, args, options, progress)
                    settings = _placed(settings, placed)
                else:
                    given = _named(name, config, positional, args, options, example)
                    given = {key: placed.place(key, value) for key, value in given.items()}
                    settings = _resolved(name, config, given, example)
                shown = default_progress() if progress is None else nullcontext(progress)
                text = _renamed(_call_text(name, settings, positional), placed.names)
                with recorded_call(text) as recorded, _in_python(recorded, config, placed):
                    settings.check()
                    with shown as callback, reported_to(callback):
                        result = function(settings, callback)
                    if isinstance(result, dict):
                        _finish(result, recorded, placed.names)
                    return result

        call.__signature__ = _signature(function, config, positional)  # type: ignore[attr-defined]
        call.__doc__ = f"{inspect.getdoc(function)}\n\n{_options_text(config)}"
        return call

    return decorate


def is_array(value: Any) -> bool:
    """Return whether a value is an array or tensor of at least one dimension, or rows in lists."""
    if isinstance(value, list):
        return bool(value) and all(
            isinstance(row, list | tuple) and all(isinstance(x, int | float) for x in row)
            for row in value[:1]
        )
    return hasattr(value, "__array__") and getattr(value, "ndim", 0) > 0


def is_pair_of_arrays(value: Any) -> bool:
    """Return whether a value is ``(images, texts)`` or ``(images, texts, image_of_text)``."""
    return (
        isinstance(value, list | tuple) and len(value) in (2, 3) and all(map(is_array, value[:2]))
    )


def _checked(
    name: str,
    config: type[C],
    args: Sequence[Any],
    options: Mapping[str, Any],
    progress: Progress | None,
) -> tuple[C, Progress | None]:
    """Return the config and the progress callback of a call with a config."""
    settings, *rest = args
    if not isinstance(settings, config):
        raise ConfigError(f"csalign.{name}: takes {config.__name__}, not {type(settings).__name__}")
    if options or len(rest) > 1:
        raise ConfigError(
            f"csalign.{name}: takes {config.__name__} and a progress callback, or the options as "
            "keywords; do not mix them"
        )
    return settings, rest[0] if rest else progress


def _placed(settings: C, inputs: Inputs) -> C:
    """Return a config with paths for what stands for one."""
    given = {name: getattr(settings, name) for name in settings.model_fields_set}
    placed = {name: inputs.place(name, value) for name, value in given.items()}
    changed = {name: value for name, value in placed.items() if value is not given[name]}
    return settings.model_copy(update=changed) if changed else settings


def _named(
    name: str,
    config: type[Config],
    positional: Sequence[str],
    args: Sequence[Any],
    options: Mapping[str, Any],
    example: str,
) -> dict[str, Any]:
    """Return the values that a call gives by the names of the options, None left out."""
    values, places = list(args), list(positional)
    if places[:1] == ["features"] and len(values) > 1 and is_pair_of_arrays(values[:2]):
        size = 3 if len(values) > 2 and is_array(values[2]) else 2
        values[:size] = [tuple(values[:size])]
    given: dict[str, Any] = {}
    if places and places[-1].startswith("*"):
        last = places.pop()[1:]
        if rest := values[len(places) :]:
            given[last] = tuple(rest)
            del values[len(places) :]
    if len(values) > len(places):
        takes = f"at most {len(places)} values by position" if places else "keywords only"
        raise ConfigError(
            f"csalign.{name}: takes {takes}, got {len(values)}; for instance {example}"
        )
    given |= dict(zip(places, values, strict=False))
    for option in options:
        if option in given:
            raise ConfigError(f"csalign.{name}: {option} is given twice; for instance {example}")
    return {key: value for key, value in (given | dict(options)).items() if value is not None}


def _resolved(name: str, config: type[C], given: Mapping[str, Any], example: str) -> C:
    """Build a config; raises ConfigError with the options spelled as in Python."""
    missing = [
        option
        for option, field in config.model_fields.items()
        if field.is_required() and option not in given
    ]
    if missing:
        raise ConfigError(
            f"csalign.{name}: {' and '.join(missing)}: required; for instance {example}"
        )
    try:
        return config.resolve(None, given)
    except ConfigError as error:
        for option in given:
            if re.search(rf"^{option}: unknown key", str(error), re.MULTILINE):
                hint = did_you_mean(option, config.model_fields) or "."
                raise ConfigError(
                    f"csalign.{name}: has no option {option}{hint} help(csalign.{name}) lists "
                    f"them; for instance {example}"
                ) from None
        lines = str(error).splitlines()
        for option in config.positional:
            lines = [re.sub(rf"^{re.escape(config.shown(option))}\b", option, own) for own in lines]
        message = "\n".join(f"csalign.{name}: {_spelled(line)}" for line in lines)
        raise ConfigError(message) from None


def _spelled(text: str) -> str:
    """Spell options as in Python, ``--cs-weight`` as ``cs_weight``."""
    return _FLAG.sub(lambda found: found[1].replace("-", "_"), text)


def _call_text(name: str, settings: Config, first: Sequence[str]) -> str:
    """Return a call as it could be typed: the options that were given, some of them first."""
    given = settings.model_fields_set
    names = [option for option in type(settings).model_fields if option in given]
    names.sort(key=[*first, *names].index)
    values = {option: getattr(settings, option) for option in names}
    shown = ", ".join(
        f"{option}={_plain(value)!r}" for option, value in values.items() if value is not None
    )
    return f"csalign.{name}({shown})"


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(own) for own in value]
    is_plain = isinstance(value, bool | int | float)
    return value if is_plain else str(value)


def _renamed(text: str, names: Mapping[str, str]) -> str:
    for path, name in names.items():
        text = text.replace(path, name)
    return text


@contextmanager
def _in_python(call: Call, config: type[Config], inputs: Inputs) -> Iterator[None]:
    """Name placed inputs in expected errors, and note how Python spells the options they name."""
    try:
        yield
    except CsalignError as error:
        error.args = tuple(
            _renamed(arg, inputs.names) if isinstance(arg, str) else arg for arg in error.args
        )
        if call.command.startswith("csalign."):
            named = dict.fromkeys(flag.replace("-", "_") for flag in _FLAG.findall(str(error)))
            spelled = [
                f"{flag}={'True' if config.model_fields[flag].annotation is bool else '...'}"
                for flag in named
                if flag in config.model_fields
            ]
            if spelled and not getattr(error, "__notes__", None):
                error.add_note(f"In Python options are keywords: {', '.join(spelled)}.")
        raise


def _finish(result: dict[str, Any], call: Call, names: Mapping[str, str]) -> None:
    """Add the keys of the call to a result; name placed inputs in it."""
    for key, value in result.items():
        if isinstance(value, str):
            result[key] = _renamed(value, names)
    about = call.to_json()
    about["warnings"] = [_renamed(text, names) for text in about["warnings"]]
    for key, value in about.items():  # at the end, also of an inner call's result
        result.pop(key, None)
        result[key] = value


def _signature(
    function: Callable[..., Any], config: type[Config], positional: Sequence[str]
) -> inspect.Signature:
    own, empty = inspect.Parameter, inspect.Parameter.empty
    parameters = [
        own(name[1:], own.VAR_POSITIONAL)
        if name.startswith("*")
        else own(name, own.POSITIONAL_OR_KEYWORD, default=_default(config, name, empty))
        for name in positional
    ]
    names = {name.lstrip("*") for name in positional}
    parameters += [
        own(name, own.KEYWORD_ONLY, default=_default(config, name, empty))
        for name in config.model_fields
        if name not in names
    ]
    progress = own("progress", own.KEYWORD_ONLY, default=None)
    returns = inspect.signature(function).return_annotation
    return inspect.Signature([*parameters, progress], return_annotation=returns)


def _default(config: type[Config], name: str, required: Any) -> Any:
    """Return the default of an option, or `required`."""
    own = config.model_fields[name]
    return required if own.is_required() else own.get_default(call_default_factory=True)


def _options_text(config: type[Config]) -> str:
    """Return the section of a docstring that lists all options."""
    lines = [
        f"Options, as keywords or as the fields of a `{config.__name__}`:",
        *(_option_text(name, field) for name, field in config.model_fields.items()),
        "    progress: ``progress(what, done, total)``, called often; a bar for people by default.",
    ]
    return "\n".join(lines)


def _option_text(name: str, field: FieldInfo) -> str:
    value = field.get_default(call_default_factory=True)
    default = "optional" if value is None else f"default {_plain(value)!r}"
    default = "required" if field.is_required() else default
    kind = _type_text(field.annotation)
    return f"    {name} ({kind}, {default}): {_spelled(field.description or '')}"


def _type_text(annotation: Any) -> str:
    """Return a type as a person writes it."""
    origin, members = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type_text(members[0])
    if origin is Literal:
        return " | ".join(map(repr, members))
    if origin in (Union, UnionType):
        return " | ".join(_type_text(member) for member in members if member is not NoneType)
    if origin is tuple:
        return f"several {_type_text(members[0])}"
    if isinstance(annotation, type) and issubclass(annotation, str) and annotation is not str:
        return " | ".join(repr(str(member)) for member in annotation)  # type: ignore[attr-defined]
    return "path" if annotation is Path else getattr(annotation, "__name__", str(annotation))
