"""The few words that are spelled once and compared with ``is``."""

from enum import StrEnum


class Modality(StrEnum):
    """One side of a feature set."""

    IMAGE = "image"
    TEXT = "text"

    @property
    def plural(self) -> str:
        """Name of this side's folder in a feature set and of its counts."""
        return f"{self.value}s"


class PairwiseName(StrEnum):
    """A loss on matched rows."""

    INFONCE = "infonce"
    SIGMOID = "sigmoid"
    NONE = "none"


class DivergenceName(StrEnum):
    """A measure of how far apart two sets of rows lie as distributions."""

    CS = "cs"
    MMD = "mmd"
    GAUSSIAN_KL = "gaussian-kl"
    SINKHORN = "sinkhorn"
    PAIRS_MSE = "pairs-mse"
    NONE = "none"


class Precision(StrEnum):
    """What factors of matrix products are rounded to."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
