"""What each command can be told: one frozen model a command.

A field is a flag with dashes and a key of ``--config FILE.toml``; its description is the flag's
help. Values come from, weakest first: the defaults here, the TOML file, the command line.
"""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import tomli_w
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    ValidationError,
)

from csalign.enums import DivergenceName, PairwiseName, Precision
from csalign.errors import ConfigError
from csalign.locations import parse_location

C = TypeVar("C", bound="Config")


def _number_if_it_is_one(value: Any) -> Any:
    """Let ``--bandwidth 0.5``, a string on the command line, become the number that it says."""
    if isinstance(value, str):
        for kind in (int, float):
            try:
                return kind(value)
            except ValueError:
                continue
    return value


def _several_if_by_comma(value: Any) -> Any:
    """Let ``--bandwidth 0.5,1`` become the numbers that it says."""
    if isinstance(value, str) and "," in value:
        return tuple(_number_if_it_is_one(part.strip()) for part in value.split(","))
    return tuple(value) if isinstance(value, list) else value


def _words_by_comma(value: Any) -> Any:
    """Let ``--correct csls,centre`` become the words that it says."""
    if isinstance(value, str):
        return tuple(word.strip() for word in value.split(","))
    return tuple(value) if isinstance(value, list) else value


Number = BeforeValidator(_number_if_it_is_one)
Several = BeforeValidator(_several_if_by_comma)
Words = BeforeValidator(_words_by_comma)
# A `Path`, or for a URL what has the methods of one; see `locations`.
Location = Annotated[Path, PlainValidator(parse_location), PlainSerializer(str)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]


class Config(BaseModel):
    """Base of all: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @classmethod
    def resolve(cls, file: Path | None, given: Mapping[str, Any]) -> Self:
        """Join defaults, a TOML file and the values that the command line gave.

        Args:
            file: TOML file of this command's keys, or None.
            given: values by field name, those of the command line; they win over the file.

        Raises:
            ConfigError: the file cannot be read, or keys or values are wrong; all of them are
                named, one a line.
        """
        values = {**(_read_toml(file) if file else {}), **given}
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise ConfigError(_explain(error, file)) from None

    def to_toml(self) -> str:
        """The resolved configuration, ready for ``--config``.

        Unset keys are left out, and so is the leave to overwrite, which is given once and not for
        every repetition.
        """
        values = self.model_dump(mode="json", exclude_none=True, exclude={"overwrite"})
        return tomli_w.dumps(values)


def _read_toml(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"{file}: no such config file") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read as TOML: {error}") from None


def _explain(error: ValidationError, file: Path | None) -> str:
    lines = []
    for problem in error.errors():
        name = ".".join(str(part) for part in problem["loc"] if isinstance(part, str))
        # pydantic names the member of a union after the field; the field alone is what users know.
        name = name.split(".")[0].removesuffix("_").replace("_", "-")
        if problem["type"] == "missing":
            message = "is required"
        elif problem["type"] == "extra_forbidden":
            message = "unknown key" + (f" in {file}" if file else "")
        else:
            message = f"{problem['msg']} (got {problem['input']!r:.200})"
        line = f"{name}: {message}"
        if line not in lines:
            lines.append(line)
    return "\n".join(lines)


def _local(value: Any) -> Any:
    if "://" in str(value):
        raise ValueError("runs are kept on a local disk, URLs are for feature sets")
    return value


RunFolder = Annotated[Path, BeforeValidator(_local)]


class OutputConfig(Config):
    """What every command that makes a folder can be told about it."""

    out: Location = Field(description="Folder to make.")
    overwrite: bool = Field(
        False, description="Replace the folder if it exists, only after success."
    )


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
    dtype: Literal["float16", "float32"] | None = Field(
        None, description="Stored number format (default: that of the arrays)."
    )


class TrainConfig(OutputConfig):
    """``csalign train``: adapters on cached features, with the CS-Aligner objective."""

    out: RunFolder = Field(
        description="Folder to make; a rerun with the same options goes on with what was stopped."
    )
    overwrite: bool = Field(
        False,
        description="Replace the folder if it exists, only after success; and start anew where a "
        "run with other options was stopped.",
    )
    features: Location = Field(description="Feature set to train on.")
    train_split: str = Field(
        "train", description="Split(s) to train on, comma-separated; 'all' takes every row."
    )
    val_split: str | None = Field(
        None,
        description="Split to validate on (default: val if there is one, else a tenth of the "
        "training images, but 100 to 1,000 of them, or a quarter of fewer than 400).",
    )
    adapter: str = Field(
        "glu",
        description="Kind of both sides: linear; mlp or glu, the same plus a residual; low-rank, "
        "near the identity; identity, frozen; transformer, over tokens; or your own, "
        "PACKAGE.MODULE:CLASS.",
    )
    image_adapter: str | None = Field(None, description="Kind of the image side, if another.")
    text_adapter: str | None = Field(None, description="Kind of the text side, if another.")
    init: Literal["canonical", "random"] = Field(
        "canonical", description="Start from the closed form, or from random weights."
    )
    width: int | None = Field(
        None,
        ge=1,
        description="Width of the shared space (default: at most 256, or the encoders' own where "
        "they share one and its centred features do best).",
    )
    hidden: Count = Field(1024, description="Hidden width of mlp, glu and transformer.")
    rank: Count = Field(8, description="Rank of the change that low-rank makes.")
    layers: Count = Field(2, description="Blocks of transformer.")
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.3, description="Dropout in what is added to the linear map."
    )
    noise: NotNegative = Field(
        0.5, description="Norm of the Gaussian noise on the unit training inputs."
    )
    captions: Literal["first", "sample", "all"] = Field(
        "first",
        description="Learn from an image's first caption, from one of them, drawn anew each epoch, "
        "or from all of them at once.",
    )
    other_captions: NotNegative = Field(
        0.3,
        description="Weight of a second InfoNCE term, on another caption of the image; not for "
        "captions all.",
    )
    caption_weights: bool = Field(
        True, description="Count a caption that many images share once, not once an image."
    )
    logit_scale: Positive = Field(7.0, description="Scale of cosines in InfoNCE (1/temperature).")
    learn_scale: bool = Field(False, description="Learn the logit scale, from its given value.")
    pairwise: PairwiseName = Field(
        PairwiseName.INFONCE, description="Loss of the pairs: infonce, sigmoid (SigLIP) or none."
    )
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="Label smoothing of InfoNCE."
    )
    mixing: NotNegative = Field(
        0.0, description="Mix pairs with each other (FuseMix), by Beta(mixing, mixing); 0 does not."
    )
    divergence: DivergenceName = Field(
        DivergenceName.CS,
        description="Distribution term: cs, mmd, gaussian-kl, sinkhorn, pairs-mse or none.",
    )
    cs_weight: Annotated[Literal["auto"] | NotNegative, Number] = Field(
        0.1,
        description="Weight (lambda) of the distribution term; 0 is the pairwise loss alone; auto "
        "raises it while validation recall holds.",
    )
    cs_captions: Literal["all", "paired"] = Field(
        "all",
        description="The distribution term sees all captions of a step's images, or the one that "
        "the pairwise loss learns from.",
    )
    bandwidth: Annotated[
        Literal["median", "tied"] | Positive | tuple[Positive, ...], Number, Several
    ] = Field(
        "median",
        description="Kernel bandwidth (sigma), a distance between unit rows, or several by comma; "
        "median is that of the batch's distances, refreshed; tied is 1/sqrt(logit scale).",
    )
    divergence_estimator: Literal["exact", "rff"] = Field(
        "exact",
        description="The CS divergence of a step's rows by all their pairs, or of the last 16 "
        "steps' rows by random Fourier features (rff).",
    )
    unpaired: str | None = Field(
        None,
        description="Further feature sets, by comma, whose rows the distribution term sees too, as "
        "it sees the training rows without a partner.",
    )
    unpaired_ratio: NotNegative = Field(
        1.0, description="Unpaired rows a side and step, as a multiple of the batch size."
    )
    unpaired_negatives: bool = Field(
        False, description="Let InfoNCE tell its pairs from the unpaired rows too."
    )
    match_moments: bool = Field(
        True,
        description="With unpaired rows, move and stretch the outputs after training, so that all "
        "rows of both sides have like means and covariances, where validation recall holds.",
    )
    token_weight: NotNegative = Field(
        0.0,
        description="Weight (mu) of the token term, the CS divergence between the tokens of an "
        "image and those of its text; 0 leaves it out.",
    )
    tokens: bool = Field(
        False,
        description="Embed with the stored tokens where the kind mixes them in (transformer); "
        "--token-weight does so too.",
    )
    token_samples: Count = Field(
        16, description="Tokens a row and step, drawn anew where a row has more."
    )
    token_pairs: Count = Field(64, description="Pairs of a step that the token term sees.")
    token_memory: Count = Field(
        1024,
        description="MiB of tokens to keep in memory; a set that needs more is read block by "
        "block, and shuffled within some blocks at a time.",
    )
    memory: int | None = Field(
        None,
        ge=0,
        description="MiB of embeddings to keep in memory (default: half of what is free); a set "
        "that needs more is read from a temporary file in TMPDIR, or beside the run where that is "
        "not set. The result is the same.",
    )
    steps: int | None = Field(
        None,
        ge=0,
        description="Optimiser steps (default: 40 epochs, at least 200); 0 is the start alone.",
    )
    batch_size: Annotated[int, Field(ge=2)] = Field(512, description="Pairs a step.")
    sub_batch: Count | None = Field(
        None,
        description="Rows that go through an adapter at a time (default: 8192); of more, the "
        "embeddings alone are kept and the rest is computed twice. Not with tokens.",
    )
    precision: Precision = Field(
        Precision.FLOAT32,
        description="Factors of the objective's matrix products, from 256 rows on: float32, or "
        "bfloat16, which is faster where the CPU or GPU has it.",
    )
    learning_rate: Positive = Field(1e-3, description="Peak learning rate of AdamW.")
    weight_decay: NotNegative = Field(0.01, description="Weight decay of AdamW.")
    warmup: Share = Field(
        0.05, description="Share of the steps over which the rate rises; it falls by a cosine."
    )
    average: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="Decay of a running average of the weights, which is kept instead; 0 off."
    )
    clip_norm: Positive = Field(1.0, description="Gradients are clipped to this norm.")
    patience: Count = Field(10, description="Stop after so many validations without a better one.")
    validations: Count = Field(20, description="How often to validate, spread over the steps.")
    save_every: Count | None = Field(
        None,
        description="Steps between the saves that a rerun goes on from (default: a minute; a "
        "signal saves in any case).",
    )
    log_to: Annotated[tuple[Literal["csv", "tensorboard", "wandb"], ...] | None, Words] = Field(
        None,
        description="Where figures go besides metrics.jsonl, by comma: csv (metrics.csv), "
        "tensorboard, wandb.",
    )
    report: Path | None = Field(
        None, description="Also write a page with curves and validation, such as training.html."
    )
    seed: int = Field(0, ge=0, lt=2**63, description="Seed of everything random.")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, mps.")

    def recipe(self) -> str:
        """Everything but the folder to make as TOML, for ``train --config FILE --out RUN``."""
        left_out = set(OutputConfig.model_fields)
        values = self.model_dump(mode="json", exclude_none=True, exclude=left_out)
        return tomli_w.dumps(values)


class TuneConfig(TrainConfig):
    """``csalign tune``: a search for settings of ``csalign train``; those that are given stay."""

    out: RunFolder = Field(description="Folder of the study; one that is there is continued.")
    overwrite: bool = Field(False, description="Begin anew in place of the study that is there.")
    trials: Count | None = Field(
        None,
        description="Trials in all, those of a continued study included (default: 50, or without "
        "end where --minutes is given).",
    )
    minutes: NotNegative | None = Field(
        None, description="Begin no trial after so many minutes; the first is always made."
    )
    search: str | None = Field(
        None,
        description="Settings to search, by comma (default: those of adapter, init, learning-rate, "
        "logit-scale, noise, dropout, captions, other-captions, cs-weight and bandwidth that "
        "neither the command line nor --config gives).",
    )
    recall_slack: Share = Field(
        0.0,
        description="Recall to give for a narrower gap: of the trials within so much of the best "
        "mean recall, 0.01 being a point, the narrowest centroid distance wins.",
    )

    def base(self) -> TrainConfig:
        """What every trial starts from, and the first trial is."""
        return TrainConfig(**{name: getattr(self, name) for name in TrainConfig.model_fields})


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


class EvalConfig(Config):
    """``csalign eval``: retrieval and modality gap."""

    features: Location = Field(description="Feature set to evaluate on.")
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
