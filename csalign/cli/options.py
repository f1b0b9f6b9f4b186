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

SHORT = {"out": "-o"}
_COMMON = "General"
_OFF = "no_"  # prefix of the parameter that switches a field off
_METAVAR_WIDTH = 10
_CHOICE = "CHOICE"
_TYPES = {int: "INTEGER", float: "NUMBER", Path: "PATH", str: "TEXT"}

ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config",
        help="TOML file of options; the command line overrides it.",
        show_default=False,
        rich_help_panel=_COMMON,
    ),
]
Json = Annotated[
    bool,
    typer.Option(
        "--json",
        help="Print one JSON document to stdout and nothing else.",
        rich_help_panel=_COMMON,
    ),
]
Quiet = Annotated[
    bool,
    typer.Option("--quiet", "-q", help="Errors only, no progress.", rich_help_panel=_COMMON),
]
Verbose = Annotated[
    int,
    typer.Option(
        "--verbose",
        "-v",
        count=True,
        help="More output; -vv shows tracebacks.",
        show_default=False,
        rich_help_panel=_COMMON,
    ),
]


def parameters_of(config: type[Config]) -> list[inspect.Parameter]:
    """Build the command-line parameters of a config model's fields, arguments first.

    All default to None, which says that the command line did not give them, so that a config file
    may; see `given_values`. Panels appear in the order of the groups that the config inherits from;
    that of its own fields comes last.
    """
    declared = [owner for owner in config.__mro__ if issubclass(owner, Config)]
    groups = [*declared[1:], config]
    # A field is shown with the group that declares it first; a subclass may only change its text.
    owner_of = {name: groups.index(own) for own in declared for name in own.__annotations__}
    fields = [
        (name not in config.positional, owner_of[name], name, field)
        for name, field in config.model_fields.items()
    ]
    fields.sort(key=lambda entry: entry[:2])
    parameters: list[inspect.Parameter] = []
    for is_option, group, name, field in fields:
        if not is_option:
            shown = field.title or name.upper()
            argument = typer.Argument(metavar=shown, help=_help(field), show_default=False)
            parameters.append(_parameter(name, field, argument))
        elif _plain_type(field.annotation) == (bool, False):
            parameters += _switches(name, field, groups[group].panel)
        else:
            parameters.append(_option(name, field, groups[group].panel))
    return parameters


def given_values(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values that the command line gave, by field name."""
    given = {name: value for name, value in options.items() if value not in (None, [], ())}
    off = {name.removeprefix(_OFF): False for name in given if name.startswith(_OFF)}
    return {name: value for name, value in given.items() if not name.startswith(_OFF)} | off


def _option(name: str, field: FieldInfo, panel: str) -> inspect.Parameter:
    choices = _choices(field.annotation)
    info = typer.Option(
        _flag(name),
        *([SHORT[name]] if name in SHORT else []),
        metavar=_metavar(field.annotation),
        help=_help(field),
        show_default=False,
        rich_help_panel=panel,
        autocompletion=(lambda: choices) if choices else None,
    )
    return _parameter(name, field, info)


def _switches(name: str, field: FieldInfo, panel: str) -> list[inspect.Parameter]:
    """Build ``--x`` and ``--no-x``; help shows the one that changes the default."""
    on = typer.Option(
        _flag(name),
        help=_help(field),
        show_default=False,
        rich_help_panel=panel,
        hidden=field.default is True,
    )
    off = typer.Option(
        _flag(f"no_{name}"),
        help=f"Disable this default: {field.description}",
        show_default=False,
        rich_help_panel=panel,
        hidden=field.default is not True,
    )
    return [_parameter(name, field, on), _parameter(_OFF + name, field, off)]


def _parameter(name: str, field: FieldInfo, info: Any) -> inspect.Parameter:
    kind, is_repeatable = _plain_type(field.annotation)
    annotation = list[kind] | None if is_repeatable else kind | None  # type: ignore[valid-type]
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[annotation, info],
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
    if default is None or default == () or isinstance(default, bool):
        return text  # the description says what None means; a switch shows what it changes
    return f"{text} (default: {default})"


def _plain_type(annotation: Any) -> tuple[Any, bool]:
    """Return the type that Typer parses, and whether the option may be repeated.

    Anything but a number or a switch is a string, which pydantic validates. So are paths: as a
    Path, a URL would lose one of its slashes.
    """
    members = [*_members(annotation)]
    for kind in (bool, int, float):
        if members == [kind]:
            return kind, False
    repeated = [get_args(member)[0] for member in members if get_origin(member) is tuple]
    return str, any([*_members(kind)] == [Path] for kind in repeated)


def _members(annotation: Any) -> Iterator[Any]:
    """Yield the types of a field without None, unions flattened and annotations dropped."""
    if get_origin(annotation) is Annotated:
        yield from _members(get_args(annotation)[0])
    elif get_origin(annotation) in (Union, UnionType):
        for member in get_args(annotation):
            yield from _members(member)
    elif annotation is not NoneType:
        yield annotation


def _choices(annotation: Any) -> list[str]:
    """Return the words that a field accepts, where it names them."""
    words: list[str] = []
    for member in _members(annotation):
        if get_origin(member) is Literal:
            words += [str(word) for word in get_args(member)]
        elif get_origin(member) is tuple:
            words += _choices(get_args(member)[0])
        elif isinstance(member, type) and issubclass(member, Enum):
            words += [str(word.value) for word in member]
    return words


def _metavar(annotation: Any) -> str:
    """Return short choices and types as help shows them, such as ``auto|NUMBER``."""
    words = _choices(annotation)
    for member in _members(annotation):
        parts = _members(get_args(member)[0]) if get_origin(member) is tuple else (member,)
        words += [_TYPES[part] for part in parts if part in _TYPES]
    metavar = "|".join(dict.fromkeys(words))
    return metavar if len(metavar) <= _METAVAR_WIDTH else _CHOICE
