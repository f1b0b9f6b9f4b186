"""Options of ``csalign apply`` and ``csalign export``."""

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from csalign.core.config import (
    Config,
    Count,
    Location,
    OutputConfig,
    RunFolder,
    RunSource,
    Words,
)

ALLOWED = "Custom kind of adapter, PACKAGE.MODULE:CLASS, that the run may import."
ANY_ENCODER = "Accept features of other encoders than the adapter was trained on."


class LoadOptions(Config):
    """How an adapter is loaded."""

    panel: ClassVar[str] = "Adapter"

    allow_adapter: str | None = Field(None, description=ALLOWED)
    any_encoder: bool = Field(False, description=ANY_ENCODER)
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, mps.")


class ApplyInput(Config):
    """Features, and the adapter to apply to them."""

    panel: ClassVar[str] = "Input"

    features: Location = Field(description="Feature set to align.")
    adapter: RunSource = Field(
        description="Run folder, or a checkpoint in it; or mean-shift, standardised or "
        "closed-form, fitted here."
    )


class ApplyFormat(Config):
    """Form of the aligned embeddings."""

    panel: ClassVar[str] = "Format"

    format: Literal["parquet", "npy", "clip-retrieval"] = Field(
        "parquet",
        description="A feature set; .npy arrays with .csv tables; or the pairs in the layout of "
        "clip-retrieval.",
    )
    sides: Annotated[tuple[str, ...] | None, Words] = Field(
        None, description="Sides to align, comma-separated (default: all of the features)."
    )
    tokens: bool = Field(False, description="Align and store tokens too, if trained with tokens.")
    dtype: Literal["float16", "float32"] = Field("float16", description="Stored number format.")


class ApplyConfig(ApplyInput, LoadOptions, OutputConfig, ApplyFormat):
    """``csalign apply``: write the aligned embeddings as a new feature set.

    >>> ApplyConfig(features="features", adapter="run", out="aligned").format
    'parquet'
    """

    panel: ClassVar[str] = "Execution"

    example: ClassVar[str] = "csalign apply features --adapter run --out aligned"

    batch_size: Count = Field(8192, description="Rows per forward pass.")


class ExportConfig(OutputConfig):
    """``csalign export``: write the adapter of a run for other programs, with a model card.

    >>> ExportConfig(run="run", out="exported", to="onnx").to
    'onnx'
    """

    panel: ClassVar[str] = "Export"
    positional: ClassVar[tuple[str, ...]] = ("run",)
    example: ClassVar[str] = "csalign export run --to onnx --out exported"

    out: RunFolder = Field(description="Output folder.")
    run: RunSource = Field(description="Run folder, or a checkpoint in it.")
    to: Literal["onnx", "safetensors", "hub-folder"] = Field(
        description="image.onnx and text.onnx; the weights with adapter.json; or those with the "
        "training log, ready to upload."
    )
    features: Location | None = Field(
        None, description="Feature set on whose rows to compare, besides random ones."
    )
    evaluation: Path | None = Field(
        None, description="Output of csalign eval --json for this run, for the model card."
    )
    license: str | None = Field(
        None, description="Licence of the adapter for the model card, such as apache-2.0."
    )
    allow_adapter: str | None = Field(None, description=ALLOWED)
    any_encoder: bool = Field(False, description=ANY_ENCODER)
