"""The options of ``csalign bind``."""

from collections.abc import Mapping
from typing import Annotated, ClassVar

from pydantic import Field, field_validator

from csalign.core.config import Location, OutputConfig, RunFolder, RunSource, Words
from csalign.runs.config import ALLOWED


class BindConfig(OutputConfig):
    """``csalign bind``: two runs that share a side as one run, in the space of the first.

    >>> BindConfig(first="image-text", second="audio-text", out="bound").share is None
    True
    """

    panel: ClassVar[str] = "Binding"
    positional: ClassVar[tuple[str, ...]] = ("first", "second")
    example: ClassVar[str] = "csalign bind image-text audio-text --out bound"

    out: RunFolder = Field(description="Output folder.")
    first: RunSource = Field(title="RUN", description="Run whose space stays as it is.")
    second: RunSource = Field(
        title="RUN", description="Run whose other sides are mapped into that space."
    )
    share: str | None = Field(
        None, description="Side that both runs have (default: the one of equal name)."
    )
    rename: Annotated[tuple[str, ...], Words] = Field(
        (), description="New names of sides of the second run, as image=photo,text=caption."
    )
    features: Annotated[tuple[Location, ...], Words] = Field(
        (),
        description="Feature sets, comma-separated, with rows of the shared side (default: those "
        "that the runs were trained on).",
    )
    any_encoder: bool = Field(
        False, description="Accept features of other encoders than the runs were trained on."
    )
    allow_adapter: str | None = Field(None, description=ALLOWED)

    @field_validator("rename")
    @classmethod
    def _check_rename(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        for value in values:
            if not all(value.partition("=")):
                raise ValueError(f"{value!r} is not OLD=NEW, such as image=photo")
        return values

    @property
    def renamed_sides(self) -> Mapping[str, str]:
        """The new name of each side of the second run that gets one."""
        return {old: new for old, _, new in (value.partition("=") for value in self.rename)}
