"""What every command's options share: where they come from, and the kinds of their values."""

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


def _number_if_it_is_one(value: Any) -> Any:
    """Let ``--bandwidth 0.5``, a string on the command line, become the number that it says."""
    if isinstance(value, str):
        for kind in (int, float):
            try:
                return kind(value)
            except ValueError:
                continue
    return value


def _several_if_by_comma(value: Any) -> Any:
    """Let ``--bandwidth 0.5,1`` become the numbers that it says."""
    if isinstance(value, str) and "," in value:
        return tuple(_number_if_it_is_one(part.strip()) for part in value.split(","))
    return tuple(value) if isinstance(value, list) else value


def _words_by_comma(value: Any) -> Any:
    """Let ``--correct csls,centre`` become the words that it says."""
    if isinstance(value, str):
        return tuple(word.strip() for word in value.split(","))
    return tuple(value) if isinstance(value, list) else value


Number = BeforeValidator(_number_if_it_is_one)
Several = BeforeValidator(_several_if_by_comma)
Words = BeforeValidator(_words_by_comma)
# A `Path`, or for a URL what has the methods of one; see `locations`.
Location = Annotated[Path, PlainValidator(parse_location), PlainSerializer(str)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]


class Config(BaseModel):
    """Base of all: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    panel: ClassVar[str] = "Options"
    """Title of the help panel of the fields that a class declares itself."""

    positional: ClassVar[tuple[str, ...]] = ("source", "features")
    """Fields that the command line gives without a flag, where the command has them."""

    @classmethod
    def resolve(cls, file: Path | None, given: Mapping[str, Any]) -> Self:
        """Join defaults, a TOML file and the values that the command line gave.

        Args:
            file: TOML file of this command's keys, or None.
            given: values by field name, those of the command line; they win over the file.

        Raises:
            ConfigError: the file cannot be read, or keys or values are wrong; all of them are
                named, one a line.
        """
        values = {**(_read_toml(file) if file else {}), **given}
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise ConfigError(_explain(error, file)) from None

    def to_toml(self) -> str:
        """The resolved configuration, ready for ``--config``.

        Unset keys are left out, and so is the leave to overwrite, which is given once and not for
        every repetition.
        """
        values = self.model_dump(mode="json", exclude_none=True, exclude={"overwrite"})
        return tomli_w.dumps(values)


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
        # pydantic names the member of a union after the field; the field alone is what users know.
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


def _local(value: Any) -> Any:
    if "://" in str(value):
        raise ValueError("runs are kept on a local disk, as indexes are; URLs are for feature sets")
    return value


RunFolder = Annotated[Path, BeforeValidator(_local)]


class OutputConfig(Config):
    """What every command that makes a folder can be told about it."""

    out: Location = Field(description="Folder to make.")
    overwrite: bool = Field(
        False, description="Replace the folder if it exists, only after success."
    )
