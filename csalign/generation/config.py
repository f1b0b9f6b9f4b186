"""What ``csalign generate`` can be told."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from csalign.core.config import Count, Location, Number, OutputConfig, Positive, RunFolder


class GenerateConfig(OutputConfig):
    """``csalign generate``: images of texts, by an unCLIP decoder."""

    positional: ClassVar[tuple[str, ...]] = ()

    out: RunFolder = Field(
        description="Folder to make; a rerun with the same options goes on with what was stopped."
    )
    overwrite: bool = Field(
        False,
        description="Replace the folder if it exists, only after success; and start anew where "
        "other options were stopped.",
    )
    prompts: Location | None = Field(
        None, description="Text file with a prompt a line, or a table with a column of captions."
    )
    features: Location | None = Field(
        None,
        description="Feature set whose texts are embedded already, in place of prompts.",
    )
    split: str = Field("all", description="Split(s) of the features, comma-separated.")
    adapter: RunFolder = Field(
        description="Run folder, trained with --image-adapter identity on embeddings of the "
        "decoder's image encoder."
    )
    allow_adapter: str | None = Field(
        None, description="A kind PACKAGE.MODULE:CLASS that the run may import."
    )
    text_encoder: str | None = Field(
        None, description="Encoder of the prompts (default: the one that the run names)."
    )
    decoder: str = Field(
        description="Folder in diffusers' format or model of the hub: Stable unCLIP, Karlo or "
        "Kandinsky 2.2."
    )
    prior: str | None = Field(
        None,
        description="Folder or model of the decoder's prior: needed by Kandinsky, for the "
        "embedding of an empty image; its statistics tell the scale.",
    )
    scale: Annotated[Literal["auto"] | Positive, Number] = Field(
        "auto",
        description="Norm to give the embeddings, which adapters give as unit rows; auto is that "
        "of the embeddings the decoder was trained on, else of those that the run was.",
    )
    seed: int = Field(
        0, ge=0, lt=2**63, description="Seed of the first prompt; those after it count up."
    )
    steps: Count | None = Field(None, description="Steps of denoising (default: the pipeline's).")
    guidance: Annotated[float, Field(ge=1, allow_inf_nan=False)] | None = Field(
        None, description="Scale of guidance, 1 for none (default: the pipeline's)."
    )
    size: Count | None = Field(
        None, description="Side of the images in pixels (default: the decoder's own)."
    )
    noise_level: int = Field(
        0, ge=0, description="Noise that Stable unCLIP adds to the embeddings; more varies more."
    )
    batch_size: Count = Field(4, description="Images at a time.")
    sheet: bool = Field(False, description="Also draw a contact sheet of the first 100 images.")
    precision: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Of the decoder; auto is float32 on CPU, float16 on CUDA."
    )
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, mps.")
