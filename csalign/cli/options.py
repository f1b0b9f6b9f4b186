"""Turns a config model into a command's options, so that each is spelled once."""

import inspect
from collections.abc import Callable
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from csalign.config import Config

POSITIONAL = ("source", "features")
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


def options_of(config: type[Config]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorate a command with one option for each field of a config model.

    The command is called with the values that the command line gave, by field name, as its first
    argument; fields that were not given are absent, so that a config file may set them. Its other
    parameters are options as Typer reads them.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = list(inspect.signature(command).parameters.values())[1:]
        fields = config.model_fields

        def wrapper(**values: Any) -> None:
            given = {name: values.pop(name) for name in fields}
            command({k: v for k, v in given.items() if v is not None}, **values)

        parameters = [_parameter(name, field) for name, field in fields.items()]
        parameters.sort(key=lambda parameter: parameter.name not in POSITIONAL)
        parameters += [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
        wrapper.__name__ = command.__name__
        wrapper.__doc__ = command.__doc__
        wrapper.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        wrapper.__annotations__ = {p.name: p.annotation for p in parameters}
        return wrapper

    return decorate


def _parameter(name: str, field: FieldInfo) -> inspect.Parameter:
    kind = _plain_type(field.annotation)
    required = field.default is PydanticUndefined
    shown: bool | str = False if required or field.default is None else _shown(field.default)
    help_text = (field.description or "") + (" [required]" if required else "")
    if name in POSITIONAL:
        info: Any = typer.Argument(help=help_text, show_default=False, metavar=name.upper())
    else:
        flag = name.replace("_", "-")
        flags = [f"--{flag}/--no-{flag}" if kind is bool and field.default else f"--{flag}"]
        flags += [SHORT[name]] if name in SHORT else []
        metavar = None if kind is bool else _metavar(field.annotation, kind)
        info = typer.Option(*flags, help=help_text, show_default=shown, metavar=metavar)
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[kind | None, info],
    )


def _shown(default: Any) -> str:
    if isinstance(default, bool):
        return "on" if default else "off"
    return str(default)


def _plain_type(annotation: Any) -> Any:
    """The type that Typer parses; pydantic does the rest, so anything unusual is a string."""
    members = _members(annotation)
    for kind in (bool, int, float, Path):
        if members == [kind]:
            return kind
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
