"""The options of ``csalign train`` and ``csalign tune``, in groups, and named recipes of them."""

import tomllib
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import tomli_w
from pydantic import BeforeValidator, Field, model_validator

from csalign.adapters.kinds import BASELINES, check_kind
from csalign.core.config import (
    Config,
    Count,
    Location,
    NotNegative,
    Number,
    OutputConfig,
    Positive,
    RunFolder,
    Several,
    Share,
    Words,
    did_you_mean,
)
from csalign.core.enums import DivergenceName, Modality, PairwiseName, Precision
from csalign.core.errors import ConfigError
from csalign.evaluation.config import PageOptions
from csalign.training.sides.options import SidesOptions

G = TypeVar("G", bound=Config)
Fraction = Annotated[float, Field(ge=0, lt=1)]

_RECIPES = files("csalign.training") / "recipes"


# Options of a run of a baseline, which is not trained.
_UNTRAINED: dict[str, Any] = {
    "steps": 0,
    "ensemble": "off",
    "unpaired_matches": False,
    "match_moments": False,
}


def recipe_names() -> list[str]:
    """Return the names of all recipes, sorted."""
    names = (path.name for path in _RECIPES.iterdir())
    return sorted(name.removesuffix(".toml") for name in names if name.endswith(".toml"))


def recipe_text(name: str) -> str:
    """Return a recipe's TOML file, whose comments explain each setting.

    Raises:
        ConfigError: no such recipe.
    """
    if name not in recipe_names():
        hint = did_you_mean(name, recipe_names())
        raise ConfigError(
            f"--recipe: there is no {name!r}; there are {', '.join(recipe_names())}{hint}"
        )
    return (_RECIPES / f"{name}.toml").read_text(encoding="utf-8")


def recipe_title(name: str) -> str:
    """Return what a recipe is for: the first line of its file."""
    return recipe_text(name).partition("\n")[0].lstrip("# ")


def _split_locations(value: Any) -> Any:
    """Split a comma-separated string, also as a single entry; refuse empty entries."""
    if value is None:
        return ()
    if len(value) == 1 and isinstance(value[0], str) and not Path(value[0]).exists():
        value = value[0]  # as the command line gives it
    if isinstance(value, str):
        value = [part.strip() for part in value.split(",")]
    if any(part == "" for part in value):
        raise ValueError("an entry is empty; remove the extra comma")
    return tuple(value)


class DataOptions(Config):
    """Rows to train and validate on."""

    panel: ClassVar[str] = "Data"

    features: Location = Field(description="Feature set to train on.")
    train_split: str = Field("train", description="Split(s), comma-separated; 'all' is every row.")
    val_split: str | None = Field(
        None, description="Validation split (default: val, or some of the training images)."
    )
    refit: bool = Field(
        True, description="Learn from the held-out pairs too once everything is chosen."
    )
    captions: Literal["first", "sample", "all"] = Field(
        "first", description="Captions per image: its first, a random one per epoch, or all."
    )
    caption_weights: bool = Field(
        True, description="Weight a caption shared by many images once rather than per image."
    )
    unpaired: Annotated[tuple[Location, ...], BeforeValidator(_split_locations)] = Field(
        (), description="Feature set whose rows the distribution term also uses; repeatable."
    )
    any_encoder: bool = Field(
        False,
        description="Accept --unpaired sets, or a run --into, of other encoders than FEATURES.",
    )
    memory: int | None = Field(
        None,
        ge=0,
        description="MiB of embeddings in memory (default: half of what is free); larger sets are "
        "read from a temporary file in TMPDIR or next to the run.",
    )


class AdapterOptions(Config):
    """Adapters and their initialization."""

    panel: ClassVar[str] = "Adapters"

    adapter: str = Field(
        "glu",
        description="Adapter of both sides: linear; mlp or glu (linear plus a residual branch); "
        "low-rank (identity plus a low-rank update); identity (frozen); transformer (over "
        "tokens); your own, PACKAGE.MODULE:CLASS; or a baseline without training: mean-shift, "
        "standardised or closed-form.",
    )
    image_adapter: str | None = Field(None, description="Adapter for images (default: --adapter).")
    text_adapter: str | None = Field(None, description="Adapter for texts (default: --adapter).")
    ensemble: Literal["auto", "off"] = Field(
        "auto",
        description="auto also fits a kernel CCA, and uses it beside or instead of the network if "
        "validation recall gains; off trains the network alone.",
    )
    networks: Count = Field(
        1,
        description="Networks of this seed and the next ones, side by side in the adapter; each is "
        "--width wide.",
    )
    init: Literal["canonical", "random"] = Field(
        "canonical", description="Start from the best closed form, or from random weights."
    )
    unpaired_matches: bool = Field(
        True, description="Fit the closed form on matches of unpaired rows too if that helps."
    )
    width: int | None = Field(
        None,
        ge=1,
        description="Width of the shared space (default: at most 256, or as it is). If given, "
        "network and kernel do not stand side by side, which doubles it.",
    )
    hidden: Count = Field(1024, description="Hidden width of mlp, glu and transformer.")
    rank: Count = Field(8, description="Rank of the low-rank update.")
    layers: Count = Field(2, description="Blocks of transformer.")
    dropout: Fraction = Field(0.3, description="Dropout in the residual branch.")

    @property
    def kinds(self) -> dict[Modality, str]:
        """Kind of each side's adapter; a baseline is linear."""
        plain = "linear" if self.adapter in BASELINES else self.adapter
        image, text = self.image_adapter or plain, self.text_adapter or plain
        return {Modality.IMAGE: image, Modality.TEXT: text}

    @property
    def named_kinds(self) -> set[str]:
        """All kinds that are named, which may be imported."""
        return {self.adapter, *self.kinds.values()}


class ObjectiveOptions(Config):
    """Terms of the loss."""

    panel: ClassVar[str] = "Objective"

    pairwise: PairwiseName = Field(
        PairwiseName.INFONCE,
        description="Loss on matched pairs; sigmoid is SigLIP's, align-uniform UniAlign's: squared "
        "distances, and rows of one side apart.",
    )
    uniformity: NotNegative = Field(
        2.0, description="Weight of the uniformity of each side in align-uniform."
    )
    other_captions: NotNegative = Field(
        0.3,
        description="Weight of the pairwise loss on a second caption; ignored with --captions all.",
    )
    logit_scale: Annotated[Literal["auto"] | Positive, Number] = Field(
        "auto",
        description="Scale of cosines in InfoNCE (1/temperature), 7 to 40; auto is higher the "
        "better the recall of the start on held-out pairs.",
    )
    learn_scale: bool = Field(False, description="Learn the logit scale, from its given value.")
    label_smoothing: Fraction = Field(0.0, description="Label smoothing of InfoNCE.")
    noise: NotNegative = Field(
        0.5, description="Gaussian noise added to unit-norm inputs in training (expected norm)."
    )
    mixing: NotNegative = Field(
        0.0, description="Beta(a, a) mixup coefficient of pairs (FuseMix); 0 disables."
    )
    divergence: DivergenceName = Field(DivergenceName.CS, description="Distribution term.")
    cs_weight: Annotated[Literal["auto"] | NotNegative, Number] = Field(
        0.1,
        description="Weight (lambda) of the distribution term; auto raises it while validation "
        "recall holds.",
    )
    cs_captions: Literal["all", "paired"] = Field(
        "all", description="Captions in the distribution term: all, or those of the pairwise loss."
    )
    bandwidth: Annotated[
        Literal["median", "tied"] | Positive | tuple[Positive, ...], Number, Several
    ] = Field(
        "median",
        description="Kernel bandwidth (sigma), or several, comma-separated; median is that of the "
        "batch's distances; tied is 1/sqrt(logit scale).",
    )
    token_weight: NotNegative = Field(
        0.0,
        description="Weight (mu) of the token term, the CS divergence between the tokens of an "
        "image and those of its text; 0 disables.",
    )
    unpaired_ratio: NotNegative = Field(
        1.0, description="Unpaired rows per side and step, as a multiple of the batch size."
    )
    unpaired_negatives: bool = Field(
        False, description="Use unpaired rows as extra negatives of InfoNCE, or in the uniformity."
    )
    match_moments: bool = Field(
        True, description="With unpaired rows, match the outputs' moments if recall holds."
    )


class TokenOptions(Config):
    """Training with stored tokens."""

    panel: ClassVar[str] = "Tokens"

    tokens: bool = Field(
        False, description="Embed with stored tokens (transformer); implied by --token-weight."
    )
    token_samples: Count = Field(16, description="Tokens sampled per row and step.")
    token_pairs: Count = Field(64, description="Pairs per step that the token term uses.")
    token_memory: Count = Field(
        1024, description="MiB of tokens in memory; larger sets are read and shuffled in windows."
    )


class OptimizerOptions(Config):
    """Optimization."""

    panel: ClassVar[str] = "Optimization"

    steps: int | None = Field(
        None,
        ge=0,
        description="Optimizer steps (default: at least 200; 15 epochs, more of several "
        "sides, fewer beyond a million pairs).",
    )
    epochs: Positive | None = Field(
        None, description="Passes over the captioned training images, instead of --steps."
    )
    minutes: Positive | None = Field(
        None, description="Time for the command to fill, instead of --steps; at most 40 epochs."
    )
    batch_size: Annotated[Literal["auto"] | Annotated[int, Field(ge=2)], Number] = Field(
        512,
        description="Pairs per step; auto is the largest power of two that fits into memory, at "
        "most a 16th of the pairs.",
    )
    sub_batch: Count | None = Field(
        None,
        description="Rows per adapter pass (default: 8192); larger batches recompute activations "
        "(gradient caching). Not with tokens.",
    )
    learning_rate: Positive = Field(1e-3, description="Peak learning rate of AdamW.")
    weight_decay: NotNegative = Field(0.01, description="Weight decay of AdamW.")
    warmup: Share = Field(0.05, description="Warm-up fraction; then cosine decay.")
    average: Fraction = Field(0.0, description="EMA decay of the weights; 0 disables.")
    clip_norm: Positive = Field(1.0, description="Gradients are clipped to this norm.")
    patience: Count | None = Field(
        None,
        description="Stop after this many validations without improvement (default: 10, at least "
        "half of the steps, or at once at a recall of 100 % on 100 or more validation images).",
    )
    validations: Count | None = Field(
        None, description="Validations, spread over the steps (default: 20, or each 1,000 steps)."
    )
    precision: Precision = Field(
        Precision.FLOAT32, description="Precision of matrix multiplications."
    )
    log_every: Count = Field(
        50, description="Steps between reads of the loss from the device, and writes of the log."
    )
    compile: bool = Field(
        False,
        description="Compile adapters and loss, and record steps as CUDA graphs; no gain on CPUs.",
    )


class RunOptions(Config):
    """Recipe, checkpoints, logs, and device."""

    panel: ClassVar[str] = "Run"

    recipe: str | None = Field(
        None, description="Preset: close-the-gap, few-pairs, paper, retrieval-llm or text-to-image."
    )
    save_every: Count | None = Field(
        None, description="Steps between resumable checkpoints (default: one per minute)."
    )
    log_to: Annotated[tuple[Literal["csv", "tensorboard", "wandb"], ...] | None, Words] = Field(
        None, description="Loggers besides metrics.jsonl, comma-separated."
    )
    seed: int = Field(0, ge=0, lt=2**63, description="Random seed.")
    device: str = Field("auto", description="auto, cpu, cuda, cuda:1, mps.")


class TrainConfig(
    DataOptions,
    OutputConfig,
    RunOptions,
    AdapterOptions,
    ObjectiveOptions,
    OptimizerOptions,
    TokenOptions,
    SidesOptions,
    PageOptions,
):
    """``csalign train``: adapters on cached features, with the CS-Aligner objective.

    >>> TrainConfig(features="features", out="run").learning_rate
    0.001
    """

    example: ClassVar[str] = "csalign train features --out run --report training.html"
    common: ClassVar[tuple[str, ...]] = (
        *("out", "recipe", "steps", "epochs", "minutes", "batch_size", "learning_rate"),
        *("train_split", "val_split", "seed", "device", "report", "overwrite"),
    )

    out: RunFolder = Field(description="Output folder; rerun the same command to resume.")
    overwrite: bool = Field(
        False, description="Replace a finished run, after success, or an unfinished one."
    )

    @model_validator(mode="before")
    @classmethod
    def _start_from_recipe(cls, values: Mapping[str, Any]) -> dict[str, Any]:
        """Fill in the recipe's values below the given ones; drop the option that 0.1 had."""
        given = cls.renamed(values)
        if given.get("divergence_estimator") == "exact":  # in every config.toml of 0.1
            del given["divergence_estimator"]
        elif "divergence_estimator" in given:
            raise ConfigError(
                "divergence-estimator: was removed, and the divergence is always exact; remove it"
            )
        name = given.get("recipe")
        recipe = {} if name is None else tomllib.loads(recipe_text(str(name)))
        fixed = _UNTRAINED if given.get("adapter") in BASELINES else {}
        return {**recipe, **fixed, **given}

    def check(self) -> None:
        """Raise ConfigError if options do not go together."""
        if self.adapter in BASELINES:
            kept = {*AdapterOptions.model_fields, "epochs", "minutes", "tokens", "token_weight"} - {
                "adapter"
            }
            needed = {name: type(self).model_fields[name].default for name in kept} | _UNTRAINED
            for option, value in needed.items():
                if getattr(self, option) != value:
                    raise ConfigError(
                        f"{self.shown(option)} {getattr(self, option)}: {self.adapter} is fitted "
                        "without training; omit the option, or use another --adapter"
                    )
        lengths = [f"--{n}" for n in ("steps", "epochs", "minutes") if getattr(self, n) is not None]
        if len(lengths) > 1:
            both = " and ".join(lengths)
            raise ConfigError(f"{both} both say how long to train; pass one of them")
        for kind in self.kinds.values():
            check_kind(kind)

    def group(self, kind: type[G]) -> G:
        """Return the options of one group alone."""
        values = {name: getattr(self, name) for name in kind.model_fields}
        return kind(**values)

    def settings(self) -> str:
        """Return everything but the output folder as TOML, for ``train --config``."""
        excluded = set(OutputConfig.model_fields)
        return tomli_w.dumps(self.model_dump(mode="json", exclude_none=True, exclude=excluded))


class SearchOptions(Config):
    """The search for settings."""

    panel: ClassVar[str] = "Search"

    trials: Count | None = Field(
        None,
        description="Trials in total, including those of a continued study (default: 50, or "
        "unlimited with --minutes).",
    )
    minutes: NotNegative | None = Field(
        None, description="Start no trial after this many minutes; the first always runs."
    )
    search: str | None = Field(
        None,
        description="Settings to search, comma-separated (default: those of adapter, init, "
        "learning-rate, logit-scale, uniformity, noise, dropout, captions, other-captions, "
        "cs-weight and bandwidth that are not set).",
    )
    recall_slack: Share = Field(
        0.0,
        description="Mean recall to trade for a smaller gap: of the trials within this distance "
        "of the best (0.01 is one point), the smallest centroid distance wins.",
    )


class TuneConfig(SearchOptions, TrainConfig):
    """``csalign tune``: a search for settings of ``csalign train``; given ones stay fixed.

    >>> TuneConfig(features="features", out="study", trials=5).trials
    5
    """

    example: ClassVar[str] = "csalign tune features --out study --minutes 30"
    common: ClassVar[tuple[str, ...]] = (
        *("out", "trials", "minutes", "search", "recall_slack", "recipe", "steps"),
        *("train_split", "val_split", "seed", "device", "overwrite"),
    )

    out: RunFolder = Field(description="Folder of the study; an existing one is continued.")
    overwrite: bool = Field(False, description="Replace the study that is there.")

    def check(self) -> None:
        """Raise ConfigError if options do not go together."""
        self.base().check()
        if self.adapter in BASELINES:
            raise ConfigError(
                f"--adapter {self.adapter}: has no settings to tune; fit it with csalign train"
            )

    def base(self) -> TrainConfig:
        """Return the settings that every trial starts from; its minutes are the search's."""
        names = TrainConfig.model_fields.keys() - {"minutes"}
        return TrainConfig(**{name: getattr(self, name) for name in names})
