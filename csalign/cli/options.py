"""Command-line options from a config model, so that each option is spelled once."""

import inspect
from collections.abc import Iterator, Mapping
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from csalign.core.config import Config

SHORT = {"out": "-o", "top": "-k"}
GENERAL = "General"
COMMON = "Common options"
_OFF = "no_"  # prefix of the parameter that switches a field off
_METAVAR_WIDTH = 18
_CHOICE = "CHOICE"
_TYPES = {int: "INTEGER", float: "NUMBER", Path: "PATH", str: "TEXT"}


def _general(*names: str, help: str, **more: Any) -> Any:
    return typer.Option(*names, help=help, show_default=False, rich_help_panel=GENERAL, **more)


ConfigFile = Annotated[
    str | None,
    _general("--config", metavar="PATH", help="TOML file; the command line overrides it."),
]
Json = Annotated[bool, _general("--json", help="Print one JSON document and nothing else.")]
Quiet = Annotated[bool, _general("--quiet", "-q", help="Errors only, no progress.")]
Verbose = Annotated[
    int, _general("--verbose", "-v", count=True, help="More output; -vv shows tracebacks.")
]


def parameters_of(config: type[Config]) -> list[inspect.Parameter]:
    """Build the command-line parameters of a config model's fields, arguments first.

    All default to None, which says that the command line did not give them, so that a config file
    may; see `given_values`. The common fields come first; then panels appear in the order of the
    groups that the config inherits from; that of its own fields comes last.
    """
    declared = [owner for owner in config.__mro__ if issubclass(owner, Config)]
    groups = [*declared[1:], config]
    # A field is shown with the group that declares it first; a subclass may only change its text.
    owner_of = {name: groups.index(own) for own in declared for name in own.__annotations__}
    names = [name for name in config.positional if name in config.model_fields]
    names += [name for name in config.common if name in config.model_fields]
    rest = [name for name in config.model_fields if name not in names]
    parameters: list[inspect.Parameter] = []
    for name in [*names, *sorted(rest, key=owner_of.__getitem__)]:
        field = config.model_fields[name]
        panel = COMMON if name in config.common else groups[owner_of[name]].panel
        if name in config.positional:
            shown = config.shown(name) if field.is_required() else f"[{config.shown(name)}]"
            shown += "..." if _plain_type(field.annotation)[1] else ""
            argument = typer.Argument(metavar=shown, help=_help(field), show_default=False)
            parameters.append(_parameter(name, field, argument))
            continue
        flags = [config.shown(name), *map(_flag, config.aliases_of(name))]
        extra = field.json_schema_extra
        hidden = isinstance(extra, dict) and bool(extra.get("hidden"))  # an older form
        if _plain_type(field.annotation) == (bool, False):
            # Help shows the one of --x and --no-x that changes the default.
            is_on, text = field.default is True, field.description or ""
            off = [flag.replace("--", "--no-", 1) for flag in flags]
            parameters.append(_option(name, field, flags, panel, text, hidden=hidden or is_on))
            text = f"Disable this default: {text}"
            parameters.append(_option(_OFF + name, field, off, panel, text, hidden=not is_on))
        else:
            flags += [SHORT[name]] if name in SHORT else []
            parameters.append(_option(name, field, flags, panel, _help(field), hidden=hidden))
    return parameters


def given_values(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values that the command line gave, by field name."""
    given = {name: value for name, value in options.items() if value not in (None, [], ())}
    off = {name.removeprefix(_OFF): False for name in given if name.startswith(_OFF)}
    return {name: value for name, value in given.items() if not name.startswith(_OFF)} | off


def _option(
    name: str, field: FieldInfo, flags: list[str], panel: str, text: str, *, hidden: bool
) -> inspect.Parameter:
    choices = _choices(field.annotation)
    info = typer.Option(
        *flags,
        metavar=_metavar(field.annotation) or None,
        help=text,
        show_default=False,
        rich_help_panel=panel,
        hidden=hidden,
        autocompletion=(lambda: choices) if choices else None,
    )
    return _parameter(name, field, info)


def _parameter(name: str, field: FieldInfo, info: Any) -> inspect.Parameter:
    kind, is_repeatable = _plain_type(field.annotation)
    annotation = list[kind] | None if is_repeatable else kind | None  # type: ignore[valid-type]
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[annotation, info]
    )


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _help(field: FieldInfo) -> str:
    """Return a description with the choices that its metavar has no room for, and the default."""
    text = field.description or ""
    choices = _choices(field.annotation)
    if choices and _metavar(field.annotation) == _CHOICE:
        text = f"{text.rstrip('.')}: {', '.join(choices)}."
    default = field.get_default(call_default_factory=True)
    if default is PydanticUndefined:
        return f"{text} (required)"
    if default in (None, (), {}) or isinstance(default, bool):
        return text  # the description says what None means; a switch shows what it changes
    return f"{text} (default: {default})"


def _plain_type(annotation: Any) -> tuple[Any, bool]:
    """Return the type that Typer parses, and whether the option may be repeated.

    Anything but a switch is a string, which pydantic validates. So are paths: as a Path, a URL
    would lose one of its slashes.
    """
    kinds = [*_kinds(annotation)]
    is_several = (kinds == [Path] and "tuple" in str(annotation)) or _are_named(kinds)
    return bool if kinds == [bool] else str, is_several


def _are_named(kinds: list[Any]) -> bool:
    """Return whether a field takes values by name, ``NAME=VALUE`` each."""
    return [get_origin(kind) for kind in kinds] == [dict]


def _kinds(annotation: Any) -> Iterator[Any]:
    """Yield the types of a field, without None; those of values, of which it may take several."""
    origin, members = get_origin(annotation), get_args(annotation)
    if origin in (Annotated, tuple):
        yield from _kinds(members[0])
    elif origin in (Union, UnionType):
        for member in members:
            yield from _kinds(member)
    elif annotation is not NoneType:
        yield annotation


def _choices(annotation: Any) -> list[str]:
    """Return the words that a field accepts, where it names them."""
    words: list[Any] = []
    for kind in _kinds(annotation):
        if get_origin(kind) is Literal:
            words += get_args(kind)
        elif isinstance(kind, type) and issubclass(kind, Enum):
            words += [word.value for word in kind]
    return [str(word) for word in words]


def _metavar(annotation: Any) -> str:
    """Return short choices and types as help shows them, such as ``auto|NUMBER``."""
    words = [*_choices(annotation), *(_TYPES[k] for k in _kinds(annotation) if k in _TYPES)]
    words += ["NAME=VALUE"] if _are_named([*_kinds(annotation)]) else []
    metavar = "|".join(dict.fromkeys(words))
    return metavar if len(metavar) <= _METAVAR_WIDTH else _CHOICE
