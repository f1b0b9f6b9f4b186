"""Options of ``csalign extract`` and ``csalign import``."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from csalign.core.config import Count, Location, Number, OutputConfig, Share, Words


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


Name = Annotated[str, Field(min_length=1, max_length=30, pattern=r"^\w[\w -]*$")]


class ImportConfig(OutputConfig):
    """``csalign import``: embeddings somebody already has -> the same artifact."""

    source: Location | None = Field(
        None,
        description="What holds both sides: clip-retrieval's output folder; .npz, .safetensors, "
        ".pt or .h5 with arrays named images and texts; Parquet or a dataset of Hugging Face with "
        "columns image_embedding and text_embedding.",
    )
    images: Location | None = Field(
        None,
        description="(n, d) image embeddings: .npy, .npz, .safetensors, .pt, .h5, .parquet, "
        ".arrow, FILE:NAME where it holds several, or a folder of such files.",
    )
    texts: Location | None = Field(
        None, description="(m, e) or (n, k, e) text embeddings, k an image; likewise."
    )
    image_column: str | None = Field(
        None, description="Array or column of image embeddings (default: recognised)."
    )
    text_column: str | None = Field(
        None, description="Array or column of text embeddings (default: recognised)."
    )
    pairs: Location | None = Field(
        None,
        description="Table of pairs: image_id, and text_id or one row a text; may hold caption "
        "and split. Without it, rows of equal number are pairs.",
    )
    captions_per_image: Count | None = Field(
        None, description="Captions that every image has; their order must be given too."
    )
    caption_order: Literal["blocks", "copies"] | None = Field(
        None,
        description="blocks: the captions of the first image, then those of the second; copies: a "
        "caption of every image, then the next of every image.",
    )
    text_counts: Location | None = Field(
        None,
        description="Captions of each image, texts in the order of images: .npy of counts or "
        "offsets, or a table with a column count.",
    )
    image_table: Location | None = Field(
        None,
        description="Table with a row an image: id, and source or split; in place of columns "
        "beside the embeddings.",
    )
    text_table: Location | None = Field(
        None, description="Table with a row a text: id, and image_id, caption or split; likewise."
    )
    image_encoder: str = Field("unknown", description="What made the image embeddings, to record.")
    text_encoder: str = Field("unknown", description="What made the text embeddings, to record.")
    names: Annotated[tuple[Name, Name] | None, Words] = Field(
        None,
        description="What the sides are called, where images and texts are something else: "
        "audio,text or protein,description.",
    )
    dtype: Literal["float16", "float32"] | None = Field(
        None, description="Stored number format (default: that of the arrays)."
    )
