"""Options of any command: TOML files, the command line, and types of values."""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self, TypeVar

import tomli_w
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    ValidationError,
)

from csalign.core.errors import ConfigError
from csalign.core.paths import parse_location

C = TypeVar("C", bound="Config")


def _parse_number(value: Any) -> Any:
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
        return tuple(_parse_number(part.strip()) for part in value.split(","))
    return tuple(value) if isinstance(value, list) else value


def _parse_words(value: Any) -> Any:
    """Parse a comma-separated string as words."""
    if isinstance(value, str):
        return tuple(word.strip() for word in value.split(","))
    return tuple(value) if isinstance(value, list) else value


Number = BeforeValidator(_parse_number)
Several = BeforeValidator(_parse_numbers)
Words = BeforeValidator(_parse_words)
Location = Annotated[Path, PlainValidator(parse_location), PlainSerializer(str)]
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

    @classmethod
    def resolve(cls, file: Path | None, given: Mapping[str, Any]) -> Self:
        """Combine defaults, a TOML file and the values of the command line.

        Args:
            file: TOML file with keys of this command, or None.
            given: values of the command line by field name; they override the file.

        Raises:
            ConfigError: the file cannot be read, or keys or values are wrong; one line per error.
        """
        values = {**(_read_toml(file) if file else {}), **given}
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise ConfigError(_explain(error, file)) from None

    def to_toml(self) -> str:
        """Return the configuration for ``--config``, without unset keys and ``overwrite``."""
        return tomli_w.dumps(self.model_dump(mode="json", exclude_none=True, exclude={"overwrite"}))


def _read_toml(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{file}: no such config file") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{file}: cannot be read as TOML: {error}") from None


def _explain(error: ValidationError, file: Path | None) -> str:
    lines = []
    for problem in error.errors():
        name = ".".join(str(part) for part in problem["loc"] if isinstance(part, str))
        # pydantic appends the member of a union to the field; users know the field alone.
        name = name.split(".")[0].removesuffix("_").replace("_", "-")
        if problem["type"] == "missing":
            message = "is required"
        elif problem["type"] == "extra_forbidden":
            message = "unknown key" + (f" in {file}" if file else "")
        else:
            message = f"{problem['msg']} (got {problem['input']!r:.200})"
        line = f"{name}: {message}"
        if line not in lines:
            lines.append(line)
    return "\n".join(lines)


def _require_local(value: Any) -> Any:
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
"""A run: a folder, ``hf://USER/REPO``, or ``USER/REPO`` if there is no such folder."""


class OutputConfig(Config):
    """The output folder."""

    panel: ClassVar[str] = "Output"

    out: Location = Field(description="Output folder.")
    overwrite: bool = Field(
        False, description="Replace the folder if it exists, only after success."
    )
