"""Options of ``csalign generate``."""

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from csalign.core.config import (
    Config,
    Count,
    Location,
    Number,
    OutputConfig,
    Positive,
    RunFolder,
    RunSource,
)
from csalign.core.errors import ConfigError
from csalign.runs.config import LoadOptions


class PromptOptions(LoadOptions):
    """Texts, and the run that maps them."""

    panel: ClassVar[str] = "Prompts"

    prompts: Location | None = Field(
        None, description="Text file with one prompt per line, or a table with a caption column."
    )
    features: Location | None = Field(
        None, description="Feature set whose texts are used, instead of --prompts."
    )
    split: str = Field("all", description="Split(s) of --features, comma-separated.")
    adapter: RunSource = Field(
        description="Run trained with --image-adapter identity on the decoder's image encoder."
    )
    text_encoder: str | None = Field(
        None, description="Encoder of --prompts (default: the one that the run names)."
    )


class DecoderOptions(Config):
    """Decoder and its options."""

    panel: ClassVar[str] = "Decoder"

    decoder: str = Field(
        description="Stable unCLIP, Karlo or Kandinsky 2.2: diffusers folder or hub model."
    )
    prior: str | None = Field(
        None, description="Prior of the decoder, for its statistics and for Kandinsky's guidance."
    )
    steps: Count | None = Field(None, description="Denoising steps (default: the pipeline's).")
    guidance: Annotated[float, Field(ge=1, allow_inf_nan=False)] | None = Field(
        None, description="Guidance scale; 1 disables guidance (default: the pipeline's)."
    )
    size: Count | None = Field(None, description="Image side in pixels (default: the decoder's).")
    noise_level: int = Field(0, ge=0, description="Noise on the embeddings (Stable unCLIP).")
    precision: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Decoder precision; auto is float16 on CUDA, else float32."
    )
    device: str = Field("auto", description="Device: auto, cpu, cuda, cuda:1, mps.")


class GenerateConfig(PromptOptions, DecoderOptions, OutputConfig):
    """``csalign generate``: images from text with an unCLIP decoder.

    >>> GenerateConfig(adapter="run", decoder="folder", out="images").batch_size
    4
    """

    panel: ClassVar[str] = "Images"
    positional: ClassVar[tuple[str, ...]] = ()
    example: ClassVar[str] = (
        "csalign generate --adapter run --decoder DECODER --prompts prompts.txt --out images"
    )
    common: ClassVar[tuple[str, ...]] = (
        *("prompts", "features", "adapter", "decoder", "out", "report", "seed", "steps", "size"),
        *("device", "overwrite"),
    )

    out: RunFolder = Field(description="Output folder; rerun the same command to resume.")
    overwrite: bool = Field(
        False, description="Replace the folder on success, and discard unfinished images."
    )
    scale: Annotated[Literal["auto"] | Positive, Number] = Field(
        "auto", description="Norm of the embeddings; auto: as the decoder's or run's training data."
    )
    seed: int = Field(0, ge=0, lt=2**63, description="Seed of the first image; the next adds 1.")
    batch_size: Count = Field(4, description="Images per batch.")
    report: Path | None = Field(
        None, description="Also write a page of the first 100 images, as images.html."
    )
    sheet: bool = Field(  # before --report
        False,
        description="Also write that page as OUT/sheet.html.",
        json_schema_extra={"hidden": True},
    )

    def check(self) -> None:
        """Raise ConfigError unless there are either prompts or features."""
        if (self.prompts is None) == (self.features is None):
            raise ConfigError("--prompts and --features are both texts to draw; pass one of them")
        if self.text_encoder is not None and self.prompts is None:
            raise ConfigError("--text-encoder is for --prompts; features are embedded already")
