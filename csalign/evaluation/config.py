"""Options of ``csalign eval`` and ``csalign diagnose``."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from csalign.core.config import Config, Location, NotNegative, Positive, RunFolder, Words
from csalign.core.errors import ConfigError


class DiagnoseConfig(Config):
    """``csalign diagnose``: where the objective works against itself."""

    features: Location = Field(description="Feature set to look at.")
    adapter: RunFolder | None = Field(
        None, description="Run folder; without it the features are taken as they are."
    )
    allow_adapter: str | None = Field(
        None, description="A kind PACKAGE.MODULE:CLASS that the run may import."
    )
    split: str | None = Field(
        None, description="Split(s), comma-separated (default: test if there is one, else all)."
    )
    logit_scale: Positive | None = Field(
        None, description="Scale of cosines in InfoNCE (default: the run's, else CLIP's 100)."
    )
    cs_weight: NotNegative = Field(1.0, description="Weight (lambda) of the divergence.")
    bandwidth: Positive = Field(0.5, description="Bandwidth of the divergence.")
    pairs: Annotated[int, Field(ge=2)] = Field(1_000, description="Pairs to look at, at most.")
    plot: Path | None = Field(
        None, description="Also write a page with plots, such as diagnosis.html."
    )
    seed: int = Field(0, ge=0, lt=2**63, description="Seed of which pairs are taken.")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, mps.")


class EvalConfig(Config):
    """``csalign eval``: retrieval and modality gap, or two sets of images."""

    features: Location | None = Field(
        None, description="Feature set to evaluate on. Required, but for --images."
    )
    images: str | None = Field(
        None,
        description="Real images, to compare with --generated in place of an evaluation of "
        "features: a folder or what else extract reads, or a feature set.",
    )
    generated: str | None = Field(None, description="Generated images, likewise.")
    encoder: str | None = Field(
        None, description="Encoder that embeds --images and --generated, as extract names it."
    )
    adapter: RunFolder | None = Field(
        None, description="Run folder; without it the features are evaluated as they are."
    )
    allow_adapter: str | None = Field(
        None, description="A kind PACKAGE.MODULE:CLASS that the run may import."
    )
    split: str | None = Field(
        None,
        description="Split(s), comma-separated; 'all' takes every row (default: test if "
        "there is one, else all).",
    )
    protocol: Literal["all", "coco-5k", "coco-1k", "flickr-1k"] = Field(
        "all",
        description="Rows to measure: coco-5k, 5,000 images with all captions; coco-1k, the mean "
        "over five folds of 1,000 images with five captions each; flickr-1k, 1,000 images.",
    )
    groups: Location | None = Field(
        None,
        description="Table (.csv, .tsv, .jsonl) that tells of images by image_id or id, for "
        "--relevance, --by and --labels; columns of the set itself, as source, need none.",
    )
    relevance: str | None = Field(
        None,
        description="COLUMN: images that agree in it are right for each other's captions too; "
        "gives mAP and nDCG@10.",
    )
    by: str | None = Field(
        None, description="COLUMN: retrieval also by what it says of the query's image."
    )
    correct: Annotated[tuple[Literal["csls", "inverted-softmax", "centre"], ...] | None, Words] = (
        Field(
            None,
            description="Retrieval also with hubs corrected for: csls, inverted-softmax, centre, "
            "several by comma.",
        )
    )
    zero_shot: Location | None = Field(
        None,
        description="Feature set of class prompts (texts), to classify the images by; needs "
        "--labels.",
    )
    labels: str | None = Field(
        None, description="COLUMN or TABLE.csv:COLUMN that tells the class of each image."
    )
    class_of: str | None = Field(
        None,
        description="TABLE.csv or TABLE.csv:COLUMN that tells the class of each prompt by its id "
        "or caption (default: what is before the last slash of its id, as in cat/0).",
    )
    explain: bool = Field(False, description="Tell the formula and source of each figure.")
    bandwidth: Positive = Field(0.5, description="Bandwidth of the CS and MMD figures.")
    index: Literal["exact", "ivf", "hnsw"] = Field(
        "exact",
        description="Rank among all items, or among the 100 that an approximate index of FAISS "
        "lists, whose own recall is then measured too.",
    )
    intervals: bool = Field(True, description="Bootstrap intervals (95 %) over images.")
    resamples: int = Field(1_000, ge=100, le=100_000, description="Resamples of the intervals.")
    report: Path | None = Field(
        None, description="Also write a page with plots and queries, such as evaluation.html."
    )
    seed: int = Field(0, ge=0, lt=2**63, description="Seed of the figures that sample.")
    device: str = Field(
        "auto", description="auto, cpu, cuda, cuda:1, mps; of the adapter and, on CUDA, the ranks."
    )

    @property
    def feature_set(self) -> Path:
        """The features, where it is them that are evaluated.

        Raises:
            ConfigError: none are named.
        """
        if self.features is None:
            raise ConfigError("features: is required")
        return self.features
