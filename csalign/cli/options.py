"""Turns a config model into a command's options, so that each is spelled once."""

import inspect
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from csalign.core.config import Config, Location

SHORT = {"out": "-o"}

ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", help="TOML file with values for these options.", show_default=False),
]
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON document to stdout, and nothing else.")
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Errors only, no progress.")]
Verbose = Annotated[
    int,
    typer.Option(
        "--verbose", "-v", count=True, help="Tell more; -vv adds tracebacks.", show_default=False
    ),
]


def parameters_of(config: type[Config]) -> list[inspect.Parameter]:
    """One command-line parameter for each field of a config model, positional ones first.

    All default to None, which says that the command line did not give them, so that a config file
    may.
    """
    first = config.positional
    parameters = [
        _parameter(name, field, positional=name in first)
        for name, field in config.model_fields.items()
    ]
    return sorted(parameters, key=lambda parameter: parameter.name not in first)


def _parameter(name: str, field: FieldInfo, *, positional: bool) -> inspect.Parameter:
    kind = _plain_type(field.annotation)
    help_text = f"{field.description}{_default(field)}"
    if positional:
        info: Any = typer.Argument(help=help_text, show_default=False, metavar=name.upper())
    else:
        flag = name.replace("_", "-")
        flags = [f"--{flag}/--no-{flag}" if kind is bool else f"--{flag}"]
        flags += [SHORT[name]] if name in SHORT else []
        metavar = None if kind is bool else _metavar(field.annotation, kind)
        info = typer.Option(*flags, help=help_text, show_default=False, metavar=metavar)
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[kind | None, info],
    )


def _default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return " Required."
    if field.default is None:
        return ""  # the description says what happens then
    if field.default == ():
        return ""
    if isinstance(field.default, bool):
        return f" (default: {'on' if field.default else 'off'})"
    return f" (default: {field.default})"


def _plain_type(annotation: Any) -> Any:
    """The type that Typer parses; pydantic does the rest, so anything unusual is a string.

    So are paths: as a Path, a URL would lose one of its slashes.
    """
    members = _members(annotation)
    for kind in (bool, int, float):
        if members == [kind]:
            return kind
    if members == [tuple[Location, ...]]:
        return list[str]  # repeatable
    return str


def _members(annotation: Any) -> list[Any]:
    """Types of a field without None, unions flattened and annotations dropped."""
    if get_origin(annotation) is Annotated:
        return _members(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return [part for member in get_args(annotation) for part in _members(member)]
    return [] if annotation is NoneType else [annotation]


def _metavar(annotation: Any, kind: Any) -> str:
    words = []
    for member in _members(annotation):
        if get_origin(member) is Literal:
            words += [str(word) for word in get_args(member)]
        else:
            words.append({int: "INTEGER", float: "NUMBER", Path: "PATH"}.get(member, "TEXT"))
    return "|".join(words) if words else str(kind)
