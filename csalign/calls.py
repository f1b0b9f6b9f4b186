"""Commands as Python functions: options as keywords, and arrays where a path may stand."""

import inspect
import json
import re
import shlex
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from enum import EnumType
from functools import wraps
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from csalign.adapters.hub import with_local_runs
from csalign.core.config import Config, did_you_mean, explain, field_of, parse_number
from csalign.core.errors import ConfigError, CsalignError, ShapeError
from csalign.core.progress import Call, Progress, recorded_call, reported_to, silent
from csalign.features.arrays import IN_MEMORY, as_array, is_array, is_pair_of_arrays, write_arrays

if TYPE_CHECKING:
    from csalign.adapters.model import Adapter

C = TypeVar("C", bound=Config)
R = TypeVar("R")

_FLAG = re.compile(r"(?<![\w-])--([a-z][a-z-]*[a-z])")


def as_function(work: Callable[[C, Progress], R]) -> Callable[..., R]:
    """Return a command as the function that ``csalign.NAME`` is.

    It takes the config, or the options as keywords; by position too those that are arguments on the
    command line, an adapter that is required, and `out`. Two arrays stand for a feature set, one
    for a file, an adapter in memory for a run. Its signature and docstring list the options.
    """
    name = work.__name__
    signature = inspect.signature(work)
    config: type[C] = signature.parameters["config"].annotation

    @wraps(work)
    def call(*args: Any, progress: Progress | None = None, **options: Any) -> R:
        with recorded_call("") as current, _Inputs(current) as inputs, _noted(name, config):
            if args and isinstance(args[0], Config):
                settings, *more = args
                if not isinstance(settings, config):
                    wrong = type(settings).__name__
                    raise ConfigError(f"csalign.{name}: takes {config.__name__}, not {wrong}")
                if options or len(more) > 1:
                    raise ConfigError(
                        f"csalign.{name}: takes {config.__name__} and a progress callback, or the "
                        "options as keywords; do not mix them"
                    )
                progress = more[0] if more else progress
            else:
                given = inputs.with_table(_named(name, config, args, options))
                given = {key: inputs.place(key, value) for key, value in given.items()}
                systems = given.get("systems", ())
                arrays = [own for own in systems if getattr(own, "name", "") == IN_MEMORY]
                if len(arrays) == 1:
                    given.setdefault("features", arrays[0])  # what the runs are measured on
                settings = _resolved(name, config, given)
            current.command = current.renamed(_call_text(name, settings))
            settings = with_local_runs(settings, current.names)
            shown = _progress_for_people() if progress is None else nullcontext(progress)
            with shown as callback, reported_to(callback):
                return current.complete(work(settings, callback))

    call.__module__ = "csalign"
    call.__signature__ = _signature(config, signature)  # type: ignore[attr-defined]
    call.__doc__ = f"{inspect.getdoc(work)}\n\n{_options_text(config)}"
    return call


class _Inputs(ExitStack):
    """Values that stand for paths, in temporary files until the block ends."""

    def __init__(self, call: Call) -> None:
        super().__init__()
        self._names = call.names

    def place(self, option: str, value: Any) -> Any:
        """Write two arrays as a feature set, one as .npy, an adapter as a run.

        Raises:
            DataError, ShapeError: as `write_arrays` does.
        """
        if is_pair_of_arrays(value):
            folder = self._new(IN_MEMORY, "arrays")
            write_arrays(folder, *value)
            return folder
        if option in ("pairs", "items") and hasattr(value, "keys"):  # columns, as of a table
            path = self._new("items.json", "items")
            columns = {str(name): _cells(value[name]) for name in value.keys()}  # noqa: SIM118
            lengths = {name: len(cells) for name, cells in columns.items()}
            if len({*lengths.values()}) > 1:
                listed = ", ".join(f"{name} {length:,}" for name, length in lengths.items())
                raise ShapeError(
                    f"{option}: columns have different lengths ({listed}); give one value per "
                    "line in each, None for none"
                )
            path.write_text(json.dumps(columns))
            return path
        if is_array(value) or (option == "embedding" and isinstance(value, list)):
            import numpy as np

            path = self._new(f"{option}.npy", option)
            np.save(path, as_array(value, option))
            return path
        if isinstance(value, Mapping):
            return {name: self.place(name, own) for name, own in value.items()}
        if hasattr(value, "embed_images"):
            folder = self._new("adapter", "adapter")
            value.save(folder)
            return folder
        if isinstance(value, list | tuple):
            return type(value)(self.place(option, own) for own in value)
        return value

    def with_table(self, given: dict[str, Any]) -> dict[str, Any]:
        """Write labels, one per image of the arrays, as a table by row number."""
        labels, inputs = given.get("labels"), (given.get("features"), *given.get("systems", ()))
        sets = [*filter(is_pair_of_arrays, inputs)]
        if isinstance(labels, str | None) or len(sets) != 1:
            return given
        if len(labels) != (count := len(sets[0][0])):
            raise ShapeError(f"labels: has {len(labels):,} values, for {count:,} images")
        path = self._new("labels.jsonl", "labels")
        values = [None if own is None else str(own) for own in labels]
        rows = ({"id": str(row), "label": value} for row, value in enumerate(values))
        path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
        return {**given, "labels": f"{path}:label"}

    def _new(self, file: str, name: str) -> Path:
        folder = self.enter_context(tempfile.TemporaryDirectory(prefix="csalign-"))
        path = Path(folder, file)
        self._names[str(path)] = name
        return path


def _cells(values: Any) -> list[str | None]:
    """Return the values of a column as texts, None for what is missing."""
    values = values.tolist() if hasattr(values, "tolist") else list(values)
    return [None if own is None else str(own) for own in values]  # "nan" is missing there too


def _positional(config: type[Config]) -> list[str]:
    """Return the options that may be given by position."""
    fields = config.model_fields
    names = [name for name in config.positional if name in fields]
    if names and not _is_several(fields[names[0]]):
        names += [
            name for name in ("adapter", "out") if name in fields and fields[name].is_required()
        ]
    return names


def _ordered(config: type[Config]) -> list[str]:
    """Return all options: those by position, then those that are required, then the others."""
    places, fields = _positional(config), config.model_fields
    others = [name for name in fields if name not in places]
    return [*places, *sorted(others, key=lambda name: not fields[name].is_required())]


def _is_several(field: FieldInfo) -> bool:
    return get_origin(field.annotation) is tuple


def _named(
    name: str, config: type[Config], args: Sequence[Any], options: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the values that a call gives, by the names of the options, None left out."""
    places, values, given = _positional(config), list(args), dict(options)
    if "features" in places and "texts" in given and "texts" not in config.model_fields:
        given["features"] = tuple(
            given.pop(side) for side in ("images", "texts", "image_of_text") if side in given
        )
    if places[:1] == ["features"] and is_pair_of_arrays(values[:2]):
        size = 3 if len(values) > 2 and is_array(values[2]) else 2
        values[:size] = [tuple(values[:size])]
    if values and places and _is_several(config.model_fields[places[0]]):
        is_list = len(values) == 1 and isinstance(values[0], list | tuple)
        # Two arrays are one feature set, but two sources.
        is_one = places[0] != "source" and is_pair_of_arrays(values[0])
        values = [tuple(values[0] if is_list and not is_one else values)]
    if len(values) > len(places):
        takes = f"at most {len(places)} values by position" if places else "keywords only"
        example = _example(name, config)
        raise ConfigError(
            f"csalign.{name}: takes {takes}, got {len(values)}; for instance {example}"
        )
    for option, value in zip(places, values, strict=False):
        if option in given:
            raise ConfigError(f"csalign.{name}: {option} is given twice")
        given[option] = value
    if (sides := given.get("source")) is not None and is_pair_of_arrays(sides):
        if len(sides) > 2:
            raise ConfigError(f"csalign.{name}: takes two arrays; name their pairs with pairs=")
        given |= {"source": None, "images": sides[0], "texts": sides[1]}
    return {key: value for key, value in given.items() if value is not None}


def _resolved(name: str, config: type[C], given: Mapping[str, Any]) -> C:
    """Build a config.

    Raises:
        ConfigError: options are wrong or missing, a line for each, as Python spells them.
    """
    try:
        return config.model_validate(given)
    except ValidationError as error:
        found: dict[str, list[str]] = {"missing": [], "extra_forbidden": []}
        for problem in error.errors():
            found.setdefault(problem["type"], []).append(field_of(problem))
        example = f"; for instance {_example(name, config)}"
        lines = [
            f"has no option {option}{did_you_mean(option, config.model_fields) or '.'} "
            f"help(csalign.{name}) lists them{example}"
            for option in found["extra_forbidden"]
        ]
        if found["missing"]:
            lines.append(f"missing {' and '.join(found['missing'])}{example}")
        lines += explain(error, str)
        raise ConfigError("\n".join(f"csalign.{name}: {line}" for line in lines)) from None


def _example(name: str, config: type[Config]) -> str:
    """Return the example of the command line as a call."""
    words, parts = shlex.split(config.example)[2:], []
    while words:
        word = words.pop(0)
        if word.startswith("--"):
            parts.append(f"{_spelled(word)}={parse_number(words.pop(0))!r}")
        else:
            parts.append(repr(word))
    return f"csalign.{name}({', '.join(parts)})"


def _call_text(name: str, settings: Config) -> str:
    """Return a call as it could be typed: the options that were given, those by position first."""
    given = [own for own in _ordered(type(settings)) if own in settings.model_fields_set]
    shown = (f"{option}={_plain(getattr(settings, option))!r}" for option in given)
    return f"csalign.{name}({', '.join(shown)})"


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _plain(own) for name, own in value.items()}
    if isinstance(value, tuple):
        return [_plain(own) for own in value]
    return value if value is None or isinstance(value, bool | int | float) else str(value)


@contextmanager
def _noted(name: str, config: type[Config]) -> Iterator[None]:
    """Note on an expected error how Python spells the options that it names."""
    try:
        yield
    except CsalignError as error:
        error.args = tuple(
            arg.replace(config.example, _example(name, config)) for arg in map(str, error.args)
        )
        named = dict.fromkeys(_spelled(flag[0]) for flag in _FLAG.finditer(str(error)))
        spelled = [
            f"{option}={'True' if config.model_fields[option].annotation is bool else '...'}"
            for option in named
            if option in config.model_fields
        ]
        if spelled:
            error.add_note(f"In Python options are keywords: {', '.join(spelled)}")
        raise


def _spelled(text: str) -> str:
    """Spell options as in Python, ``--cs-weight`` as ``cs_weight``."""
    return _FLAG.sub(lambda found: found[1].replace("-", "_"), text)


def _signature(config: type[Config], of: inspect.Signature) -> inspect.Signature:
    own, places, parameters = inspect.Parameter, _positional(config), []
    for name in _ordered(config):
        field = config.model_fields[name]
        default = own.empty if field.is_required() else field.get_default(call_default_factory=True)
        if name in places and _is_several(field):
            parameters.append(own(name, own.VAR_POSITIONAL))
        else:
            kind = own.POSITIONAL_OR_KEYWORD if name in places else own.KEYWORD_ONLY
            parameters.append(own(name, kind, default=default))
    parameters.append(own("progress", own.KEYWORD_ONLY, default=None))
    return inspect.Signature(parameters, return_annotation=of.return_annotation)


def _options_text(config: type[Config]) -> str:
    """Return the section of a docstring that lists all options."""
    lines = [f"Options, as keywords or as the fields of a `{config.__name__}`:"]
    for name, field in config.model_fields.items():
        value = field.get_default(call_default_factory=True)
        default = "optional" if value is None else f"default {_plain(value)!r}"
        default = "required" if field.is_required() else default
        text = _spelled(field.description or "")
        lines.append(f"    {name} ({_type_text(field.annotation)}, {default}): {text}")
    shown = "``progress(what, done, total)``, called often; a bar for people by default."
    return "\n".join([*lines, f"    progress: {shown}"])


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
    if isinstance(annotation, EnumType):
        return " | ".join(repr(str(member)) for member in list[Any](annotation))
    return "path" if annotation is Path else getattr(annotation, "__name__", str(annotation))


def _progress_for_people() -> AbstractContextManager[Progress]:
    """Return a callback that shows progress on a terminal or in a notebook, and nothing else."""
    from rich.console import Console

    console = Console(stderr=True)
    if not (console.is_terminal or console.is_jupyter):
        return nullcontext(silent)
    from csalign.cli.progress import shown_progress

    return shown_progress(console, quiet=False)


def fit(
    images: Any,
    texts: Any,
    image_of_text: Any = None,
    *,
    out: Path | str | None = None,
    **options: Any,
) -> "Adapter":
    """Train adapters on two arrays.

    Args:
        images: (n, d) embeddings of any float dtype, finite, no row of norm 0: a NumPy array, a
            torch tensor, a DataFrame or its column of vectors, or lists of lists.
        texts: (m, e), likewise, or (n, k, e) for k texts of each image.
        image_of_text: (m,) integers, the row of the image of each text, -1 for none. By default
            row i of one side belongs to row i of the other.
        out: folder of the run to keep, without the arrays; by default none is.
        options: of `train`, such as ``steps=200``.

    Returns:
        The `Adapter`, on the CPU: ``adapter.embed_images(images)`` are unit rows (n, width)
        float32.

    Raises:
        ConfigError: an option does not exist, or has a value that it cannot have.
        ShapeError: the shapes do not fit together.
        DataError: a row has no direction, or there are too few rows.
        OutputError: `out` exists and is not to be replaced.

    >>> import csalign, numpy
    >>> rng = numpy.random.default_rng(0)
    >>> images, texts = rng.normal(size=(100, 16)), rng.normal(size=(100, 12))
    >>> adapter = csalign.fit(images, texts, steps=10)
    >>> adapter.embed_images(images).shape, adapter.embed_texts(texts).shape
    ((100, 12), (100, 12))
    """
    from csalign.adapters.checkpoint import load_adapter
    from csalign.training.train import train

    pairs = [as_array(images, "images"), as_array(texts, "texts")]
    pairs += [] if image_of_text is None else [image_of_text]
    with tempfile.TemporaryDirectory(prefix="csalign-") as folder:
        run = Path(folder, "run") if out is None else Path(out)
        as_function(train)(features=pairs, out=run, **options)
        kinds = {options.get(name) for name in ("adapter", "image_adapter", "text_adapter")}
        return load_adapter(run, hub=False, allow={kind for kind in kinds if kind})
