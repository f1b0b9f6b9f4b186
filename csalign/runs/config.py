"""Options of ``csalign apply`` and ``csalign export``."""

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from csalign.core.config import Count, Location, OutputConfig, RunFolder


class ApplyConfig(OutputConfig):
    """``csalign apply``: aligned embeddings, the same artifact again."""

    features: Location = Field(description="Feature set to align.")
    adapter: RunFolder = Field(description="Run folder that holds the trained adapter.")
    allow_adapter: str | None = Field(
        None, description="A kind PACKAGE.MODULE:CLASS that the run may import."
    )
    format: Literal["parquet", "npy", "clip-retrieval"] = Field(
        "parquet",
        description="A feature set; .npy arrays with .csv tables; or the folder that "
        "clip-retrieval and autofaiss index, of pairs alone.",
    )
    tokens: bool = Field(
        False, description="Align and store the tokens too, if the run was trained with some."
    )
    dtype: Literal["float16", "float32"] = Field("float16", description="Stored number format.")
    batch_size: Count = Field(8192, description="Rows at a time.")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, mps.")


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
