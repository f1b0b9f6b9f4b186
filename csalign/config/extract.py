"""What ``csalign extract`` can be told."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from csalign.config.base import Count, Location, Number, OutputConfig, Share


class ExtractConfig(OutputConfig):
    """``csalign extract``: frozen encoders -> CLS and token embeddings in Parquet."""

    source: Annotated[str, BeforeValidator(str)] = Field(
        description="What to embed: a folder of images, a table, COCO or Karpathy JSON, WebDataset "
        "tars ({00000..00012}.tar), Parquet, a text file of captions, or - for a list of images on "
        "stdin; local or a URL."
    )
    kind: Literal[
        "auto", "folder", "table", "coco", "karpathy", "webdataset", "parquet", "captions", "list"
    ] = Field("auto", description="What SOURCE is, where it is not recognised.")
    captions: Location | None = Field(
        None, description="Captions table, when SOURCE is a folder and the table lies elsewhere."
    )
    images: Location | None = Field(
        None, description="Folder that image paths start from (default: recognised)."
    )
    image_column: str | None = Field(
        None, description="Column of images: paths, bytes or base64 (default: recognised)."
    )
    caption_column: str | None = Field(
        None, description="Column of captions (default: recognised)."
    )
    split_column: str = Field("split", description="Column of splits, used if the source has it.")
    id_column: str | None = Field(
        None, description="Column of image ids (default: paths, keys or row numbers)."
    )
    caption_lines: bool | None = Field(
        None,
        description="Each line of a .txt beside an image is a caption, rather than the whole of it "
        "(default: in folders, but not in tars).",
    )
    encoder: str | None = Field(
        None,
        description="Encoder of both sides: open_clip:MODEL/TAG or open_clip:MODEL+WEIGHTS, where "
        "MODEL may be a JSON file of its config.",
    )
    image_encoder: str | None = Field(
        None,
        description="Encoder of the images alone: like --encoder, timm:MODEL[+WEIGHTS], "
        "PACKAGE.MODULE:CALLABLE, or none.",
    )
    text_encoder: str | None = Field(
        None,
        description="Encoder of the texts alone: like --encoder, "
        "hf:MODEL-OR-FOLDER[?pooling=mean&prefix=...], PACKAGE.MODULE:CALLABLE, or none.",
    )
    tokens: Literal["none", "image", "text", "both"] = Field(
        "none", description="Store last-layer tokens too."
    )
    token_space: Literal["hidden", "projected"] = Field(
        "projected", description="Tokens before or after the encoder's projection."
    )
    max_tokens: int | None = Field(
        None,
        ge=1,
        description="Tokens an item: image grids are pooled to k x k, texts cut (default: all).",
    )
    dtype: Literal["float16", "float32"] = Field("float16", description="Stored number format.")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, mps.")
    precision: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Of the forward pass; auto is float32 on CPU, float16 on CUDA."
    )
    batch_size: Annotated[Literal["auto"] | Count, Number] = Field(
        "auto", description="Items a forward pass; auto is 32 on CPU, 256 on an accelerator."
    )
    workers: int | None = Field(
        None, ge=1, description="Threads that decode images (default: the cores, at most 16)."
    )
    compile: bool = Field(False, description="Run the encoders through torch.compile.")
    shard: str = Field(
        "auto",
        description="Do share I of N, counted from 0: I/N; auto reads torchrun's and SLURM's array "
        "variables.",
    )
    part_rows: Count = Field(
        4096, description="Records a file, which is what a rerun need not do again."
    )
    max_failures: Share = Field(
        0.01, description="Share of records that may be unusable before the command fails."
    )
    retry_failures: bool = Field(
        False,
        description="Make those finished parts anew that left something out, or whose images or "
        "captions changed since.",
    )
    strict: bool = Field(False, description="Fail if anything was left out.")

    def to_toml(self) -> str:
        """The same for every process of a job; see `Config.to_toml`."""
        unshared: dict[str, Any] = {"shard": "auto", "retry_failures": False}
        return super(ExtractConfig, self.model_copy(update=unshared)).to_toml()
