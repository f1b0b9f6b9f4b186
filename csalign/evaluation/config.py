"""Options of ``csalign eval``, ``compare``, ``diagnose`` and ``inspect``."""

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from csalign.core.config import Config, Location, NotNegative, Positive, RunFolder, Words
from csalign.core.errors import ConfigError

Protocol = Literal["all", "coco-5k", "coco-1k", "flickr-1k"]
Index = Literal["exact", "ivf", "hnsw"]

# What `eval --images --generated` accepts.
_OF_IMAGE_SETS = {"images", "generated", "encoder", "split", "explain", "device"}


class AdaptedOptions(Config):
    """The rows to measure, and what embeds them."""

    panel: ClassVar[str] = "Source"

    split: str | None = Field(
        None,
        description="Split(s), comma-separated; 'all' for every row (default: test if there is "
        "one, else all).",
    )
    allow_adapter: str | None = Field(
        None, description="Adapter class PACKAGE.MODULE:CLASS that a run may import."
    )
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1 or mps.")


class SourceOptions(AdaptedOptions):
    """The embeddings to measure."""

    panel: ClassVar[str] = "Source"

    features: Location | None = Field(
        None, description="Feature set to evaluate. Required unless --images is given."
    )
    adapter: RunFolder | None = Field(
        None, description="Run folder (default: evaluate the features as they are)."
    )

    @property
    def feature_set(self) -> Path:
        """The features.

        Raises:
            ConfigError: there are none.
        """
        if self.features is None:
            raise ConfigError("features: is required")
        return self.features


class ImageSetOptions(Config):
    """Two sets of images to compare, in place of an evaluation of features."""

    panel: ClassVar[str] = "Image sets"

    images: str | None = Field(
        None,
        description="Real images to compare with --generated: a folder, any source that extract "
        "accepts, or a feature set.",
    )
    generated: str | None = Field(None, description="Generated images, in any of these forms.")
    encoder: str | None = Field(
        None, description="Encoder of --images and --generated, named as for extract."
    )


class ExtraOptions(Config):
    """Metrics beside retrieval and the gap."""

    panel: ClassVar[str] = "Extra metrics"

    groups: Location | None = Field(
        None,
        description="Table (.csv, .tsv, .jsonl) with columns of the images, joined by image_id or "
        "id, for --relevance, --by and --labels; the features' own columns need none.",
    )
    relevance: str | None = Field(
        None,
        description="COLUMN: images with the same value are relevant to each other's captions "
        "too; adds mAP and nDCG@10.",
    )
    by: str | None = Field(None, description="COLUMN: also break retrieval down by this column.")
    correct: Annotated[tuple[Literal["csls", "inverted-softmax", "centre"], ...] | None, Words] = (
        Field(
            None,
            description="Also report retrieval with hubness corrected, comma-separated: csls, "
            "inverted-softmax, centre.",
        )
    )
    zero_shot: Location | None = Field(
        None,
        description="Feature set of class prompts (texts), to classify the images by; requires "
        "--labels.",
    )
    labels: str | None = Field(
        None, description="COLUMN or TABLE.csv:COLUMN with the class of each image."
    )
    class_of: str | None = Field(
        None,
        description="TABLE.csv or TABLE.csv:COLUMN with the class of each prompt, by its id or "
        "caption (default: its id up to the last slash, as in cat/0).",
    )


class MeasureOptions(Config):
    """How retrieval and the gap are measured."""

    panel: ClassVar[str] = "Measurement"

    protocol: Protocol = Field(
        "all",
        description="Rows to measure: all; coco-5k, 5,000 images with all captions; coco-1k, the "
        "mean over five folds of 1,000 images with five captions each; flickr-1k, 1,000 images.",
    )
    bandwidth: Positive = Field(0.5, description="Kernel bandwidth of the CS and MMD metrics.")
    index: Index = Field(
        "exact",
        description="Rank all items, or only the 100 nearest by an approximate FAISS index, whose "
        "own recall is then reported.",
    )
    intervals: bool = Field(True, description="95 % bootstrap intervals over images.")
    resamples: int = Field(1_000, ge=100, le=100_000, description="Bootstrap resamples.")
    seed: int = Field(0, ge=0, lt=2**63, description="Seed of resampling and sampled metrics.")


class EvalConfig(SourceOptions, MeasureOptions, ExtraOptions, ImageSetOptions):
    """``csalign eval``: retrieval and modality gap, or the distance of two image sets."""

    panel: ClassVar[str] = "Output"

    explain: bool = Field(False, description="Print the formula and source of each metric.")
    report: Path | None = Field(
        None, description="Also write a page with plots and queries, such as evaluation.html."
    )

    def check(self) -> None:
        """Raise ConfigError if options are missing or do not go together."""
        if self.images is not None or self.generated is not None:
            if self.images is None or self.generated is None:
                raise ConfigError("images, generated: are compared with each other; pass both")
            if others := sorted(self.model_fields_set - _OF_IMAGE_SETS):
                names = ", ".join(name.replace("_", "-") for name in others)
                raise ConfigError(f"{names}: cannot be used with --images and --generated; omit")
            return
        if self.features is None:
            raise ConfigError("features: is required")
        if (self.zero_shot is None) != (self.labels is None):
            raise ConfigError("--zero-shot CLASSES and --labels COLUMN go together; pass both")
        if self.class_of is not None and self.zero_shot is None:
            raise ConfigError("--class-of describes the prompts of --zero-shot; pass both")
        if self.groups is not None and not (self.relevance or self.by or self.labels):
            raise ConfigError(
                "--groups names a table; name its column by --relevance, --by or --labels"
            )


class DiagnoseConfig(SourceOptions):
    """``csalign diagnose``: the conflict between alignment and uniformity."""

    features: Location = Field(description="Feature set to analyse.")
    logit_scale: Positive | None = Field(
        None, description="Scale of cosines in InfoNCE (default: the run's, else CLIP's 100)."
    )
    cs_weight: NotNegative = Field(1.0, description="Weight (lambda) of the CS divergence.")
    bandwidth: Positive = Field(0.5, description="Kernel bandwidth of the CS divergence.")
    pairs: Annotated[int, Field(ge=2)] = Field(1_000, description="Pairs to sample, at most.")
    plot: Path | None = Field(
        None, description="Also write a page with plots, such as diagnosis.html."
    )
    seed: int = Field(0, ge=0, lt=2**63, description="Seed of the sampled rows.")


class CompareConfig(AdaptedOptions):
    """``csalign compare``: runs and evaluations, each against a baseline."""

    positional: ClassVar[tuple[str, ...]] = ("systems",)

    systems: tuple[Path, ...] = Field(
        min_length=1,
        description="Runs, evaluated on the features they were trained on, and documents that "
        "csalign eval --json printed.",
    )
    baseline: str | None = Field(
        None, description="Name, path or number (from 1) of the baseline (default: the first)."
    )


class InspectConfig(Config):
    """``csalign inspect``: the content of an artifact."""

    positional: ClassVar[tuple[str, ...]] = ("path",)

    path: Location = Field(description="A feature set, a run, an index, or a file in one.")
    merge: bool = Field(
        False, description="First build the feature set from the parts in PATH.partial."
    )
