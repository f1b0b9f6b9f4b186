"""Options of ``csalign eval``, ``compare``, ``diagnose`` and ``inspect``."""

from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from csalign.core.config import Config, Location, NotNegative, Positive, RunSource, Words
from csalign.core.errors import ConfigError
from csalign.runs.config import LoadOptions

Protocol = Literal["all", "coco-5k", "coco-1k", "flickr-1k"]

# What `eval --images --generated` accepts.
_OF_IMAGE_SETS = {"all_figures", "images", "generated", "encoder", "split", "explain", "device"}


class AdaptedOptions(LoadOptions):
    """Rows to measure, and how they are embedded."""

    panel: ClassVar[str] = "Source"

    split: str | None = Field(
        None, description="Split(s), comma-separated, or all (default: test if any, else all)."
    )
    sides: Annotated[tuple[str, ...] | None, Words] = Field(
        None, description="Side(s), comma-separated (default: all that the set has)."
    )


class SourceOptions(AdaptedOptions):
    """Embeddings to measure."""

    features: Location | None = Field(
        None,
        title="FEATURES|RUN",
        description="Feature set, or a run, which is evaluated on the features it was trained on. "
        "Required unless --images is given.",
    )
    adapter: RunSource | None = Field(
        None,
        description="Run folder, or a baseline fitted here: mean-shift, standardised or "
        "closed-form (default: evaluate the features as they are).",
    )

    @property
    def feature_set(self) -> Path:
        """Features; ConfigError if there are none."""
        if self.features is None:
            raise ConfigError(f"missing FEATURES; for instance: {self.example}")
        return self.features


class ImageSetOptions(Config):
    """Two sets of images to compare, in place of an evaluation of features."""

    panel: ClassVar[str] = "Image sets"

    images: str | None = Field(
        None, description="Real images: a feature set, or any source that extract accepts."
    )
    generated: str | None = Field(None, description="Generated images, in either form.")
    encoder: str | None = Field(
        None, description="Encoder of --images and --generated, named as for extract."
    )


class LabelOptions(Config):
    """Columns of the images, and the one with their classes."""

    panel: ClassVar[str] = "Extra metrics"

    groups: Location | None = Field(
        None, description="Table (.csv, .tsv, .jsonl) with more columns of images, by image_id."
    )
    labels: str | None = Field(
        None,
        description="COLUMN or TABLE.csv:COLUMN with the class of each image: adds clustering and "
        "k-NN across the sides.",
    )


class ExtraOptions(LabelOptions):
    """Metrics beside retrieval and the gap."""

    relevance: str | None = Field(
        None, description="COLUMN: images that agree in it share their captions; adds mAP, nDCG."
    )
    by: str | None = Field(None, description="COLUMN: also break retrieval down by this column.")
    correct: Annotated[tuple[Literal["csls", "inverted-softmax", "centre"], ...] | None, Words] = (
        Field(None, description="Also correct retrieval for hubness, comma-separated.")
    )
    zero_shot: Location | None = Field(
        None, description="Feature set of class prompts to classify images by; requires --labels."
    )
    class_of: str | None = Field(
        None, description="TABLE.csv[:COLUMN] with each prompt's class (default: id before /)."
    )


class MeasureOptions(Config):
    """Measurement of retrieval and the gap."""

    panel: ClassVar[str] = "Measurement"

    protocol: Protocol = Field("all", description="Rows to measure, as in the literature.")
    bandwidth: Positive = Field(0.5, description="Kernel bandwidth of the CS and MMD metrics.")
    index: Literal["exact", "ivf", "hnsw"] = Field(
        "exact", description="Rank all items, or the 100 nearest by an approximate FAISS index."
    )
    subsets: bool = Field(
        True, description="Also retrieve by several sides at once, if there are three or more."
    )
    intervals: bool = Field(True, description="95 % bootstrap intervals over images.")
    resamples: int = Field(1_000, ge=100, le=100_000, description="Bootstrap resamples.")
    seed: int = Field(0, ge=0, lt=2**63, description="Seed of resampling and sampled metrics.")


class PageOptions(Config):
    """The page of a result."""

    panel: ClassVar[str] = "Page"

    report: Path | None = Field(
        None, description="Also write a page with plots and queries, as report.html."
    )
    pictures: Path | None = Field(
        None,
        description="Folder of the images, for the page (default: where they were when extracted).",
    )
    umap: bool = Field(
        False,
        description="Draw the page's pairs by UMAP too, which takes half a minute; needs "
        "csalign[umap].",
    )


class EvalConfig(SourceOptions, MeasureOptions, ExtraOptions, ImageSetOptions, PageOptions):
    """``csalign eval``: retrieval and modality gap, or the distance of two image sets.

    >>> EvalConfig(features="features", split="test").resamples
    1000
    """

    panel: ClassVar[str] = "Output"

    example: ClassVar[str] = "csalign eval features --adapter run --split test --report eval.html"
    common: ClassVar[tuple[str, ...]] = (
        *("adapter", "split", "report", "baselines", "all_figures", "explain", "labels"),
        *("by", "correct", "protocol", "intervals", "seed", "device"),
    )

    baselines: bool = Field(
        False,
        description="Also measure what needs no training: raw, mean-shift, standardised and "
        "closed-form.",
    )
    all_figures: bool = Field(False, description="Print all figures, as --json does.")
    explain: bool = Field(False, description="Print the formula and source of each metric.")

    def check(self) -> None:
        """Raise ConfigError if options are missing or do not go together."""
        if self.images is not None or self.generated is not None:
            if self.images is None or self.generated is None:
                raise ConfigError("--images and --generated are compared; pass both")
            if others := sorted(self.model_fields_set - _OF_IMAGE_SETS):
                names = ", ".join(self.shown(name) for name in others)
                raise ConfigError(f"{names}: cannot be used with --images and --generated; omit it")
            return
        _ = self.feature_set
        if self.zero_shot is not None and self.labels is None:
            raise ConfigError("--zero-shot CLASSES requires --labels COLUMN; pass both")
        if self.class_of is not None and self.zero_shot is None:
            raise ConfigError("--class-of describes the prompts of --zero-shot; pass both")
        if self.groups is not None and not (self.relevance or self.by or self.labels):
            raise ConfigError("--groups: name its column by --relevance, --by or --labels")


class DiagnoseConfig(SourceOptions):
    """``csalign diagnose``: what can be foretold, and the conflict within the loss.

    >>> DiagnoseConfig(features="features").pairs
    1000
    """

    panel: ClassVar[str] = "Analysis"

    example: ClassVar[str] = "csalign diagnose features --report diagnosis.html"

    features: Location = Field(
        title="FEATURES|RUN", description="Feature set, or a run with its own features."
    )
    logit_scale: Positive | None = Field(
        None, description="Scale of cosines in InfoNCE (default: the run's, else CLIP's 100)."
    )
    cs_weight: NotNegative | None = Field(
        None, description="Weight (lambda) of the CS divergence (default: the run's, else 1)."
    )
    bandwidth: Positive = Field(0.5, description="Kernel bandwidth of the CS divergence.")
    pairs: Annotated[int, Field(ge=2)] = Field(1_000, description="Pairs to sample, at most.")
    report: Path | None = Field(
        None, description="Also write a page with plots, as diagnosis.html."
    )
    seed: int = Field(0, ge=0, lt=2**63, description="Seed of the sampled rows.")


class CompareConfig(AdaptedOptions, LabelOptions):
    """``csalign compare``: runs and evaluations, each against a baseline.

    >>> CompareConfig(systems=["run-a", "run-b"]).device
    'auto'
    """

    panel: ClassVar[str] = "Comparison"
    positional: ClassVar[tuple[str, ...]] = ("systems",)
    example: ClassVar[str] = "csalign compare run-a run-b eval.json --split test"

    systems: tuple[Location, ...] = Field(
        min_length=1,
        title="FEATURES|RUN|EVAL.json",
        description="Feature sets without an adapter, runs, evaluated on the features they were "
        "trained on, documents of csalign eval --json, and mean-shift, standardised or "
        "closed-form, fitted on --features or the first feature set; or sets of one side each, "
        "of the same ids by several models.",
    )
    features: Location | None = Field(
        None, description="Feature set to evaluate all runs on (default: those of each)."
    )
    baseline: str | None = Field(
        None, description="Name, path or number (from 1) of the baseline (default: the first)."
    )

    def check(self) -> None:
        """Raise ConfigError if options are missing."""
        if self.groups is not None and self.labels is None:
            raise ConfigError("--groups: name its column by --labels")


class InspectConfig(Config):
    """``csalign inspect``: the content of an artifact.

    >>> InspectConfig(path="features").merge
    False
    """

    panel: ClassVar[str] = "Completion"
    positional: ClassVar[tuple[str, ...]] = ("path",)
    example: ClassVar[str] = "csalign inspect features"

    path: Location = Field(
        description="A feature set (finished or not), run, index, export, study, document or page."
    )
    merge: bool = Field(
        False, description="First build the feature set from the parts in PATH.partial."
    )
