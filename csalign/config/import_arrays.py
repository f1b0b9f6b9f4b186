"""What ``csalign import`` can be told."""

from typing import Annotated, Literal

from pydantic import Field

from csalign.config.base import Count, Location, OutputConfig, Words

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
