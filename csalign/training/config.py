"""What ``csalign train`` and ``csalign tune`` can be told."""

from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import Field, model_validator

from csalign.core.config import (
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
)
from csalign.core.enums import DivergenceName, PairwiseName, Precision
from csalign.training.recipes import recipe_values


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
    recipe: str | None = Field(
        None,
        description="Named settings to start from, which --config and the command line win over: "
        "close-the-gap, few-pairs, retrieval-llm or text-to-image; see csalign recipes.",
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
    divergence_estimator: Literal["exact"] = Field(
        "exact", description="The CS divergence is computed from all pairs of a step's rows."
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
        description="Factors of the matrix products of the adapters and, from 256 rows on, of the "
        "objective: float32, or bfloat16, which is faster where the CPU or GPU has it.",
    )
    compile: bool = Field(
        False, description="Run the adapters through torch.compile, which does not pay on CPUs."
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

    @model_validator(mode="before")
    @classmethod
    def _start_from_recipe(cls, values: dict[str, Any]) -> dict[str, Any]:
        """The values of the recipe that is named, if one is, below those that are given."""
        name = values.get("recipe")
        return values if name is None else {**recipe_values(str(name)), **values}

    def settings(self) -> str:
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
