"""What ``csalign export`` can be told."""

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from csalign.config.base import Location, OutputConfig, RunFolder


class ExportConfig(OutputConfig):
    """``csalign export``: a run's adapter for other people's programs."""

    positional: ClassVar[tuple[str, ...]] = ("run",)

    out: RunFolder = Field(description="Folder to make.")
    run: RunFolder = Field(description="Run folder, or a checkpoint in it.")
    to: Literal["onnx", "torch-export", "safetensors", "hub-folder"] = Field(
        description="image.onnx and text.onnx; image.pt2 and text.pt2, by torch.export; the "
        "weights with their description; or the same with what the run wrote, to upload."
    )
    features: Location | None = Field(
        None, description="Feature set whose rows the export is checked on too."
    )
    evaluation: Path | None = Field(
        None, description="What csalign eval --json printed of the run, for the model card."
    )
    allow_adapter: str | None = Field(
        None, description="A kind PACKAGE.MODULE:CLASS that the run may import."
    )
