"""What ``csalign apply`` can be told."""

from typing import Literal

from pydantic import Field

from csalign.config.base import Count, Location, OutputConfig, RunFolder


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
