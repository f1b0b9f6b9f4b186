"""What ``csalign diagnose`` can be told."""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from csalign.config.base import Config, Location, NotNegative, Positive, RunFolder


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
