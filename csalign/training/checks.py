"""Which terms of the loss make sense together, asked before training begins."""

from csalign.core.enums import DivergenceName, PairwiseName
from csalign.core.errors import ConfigError
from csalign.objective.divergences import divergence
from csalign.training.config import TrainConfig

LEAST_ROWS = 8  # a distribution that is guessed from fewer rows pulls in random directions


def check_terms(config: TrainConfig, images: int) -> None:
    """Refuse terms that would be ignored, cannot be computed, or mean nothing.

    Args:
        config: the terms and their weights.
        images: captioned training images.

    Raises:
        ConfigError: names the options and the remedy.
    """
    has_divergence = bool(config.cs_weight) and config.divergence is not DivergenceName.NONE
    compares_sets = has_divergence and not divergence(config.divergence).matched
    has_another = has_divergence or bool(config.token_weight)
    if config.pairwise is PairwiseName.NONE and not has_another and config.steps != 0:
        raise ConfigError(
            "pairwise none leaves nothing to train on without a distribution term; give a "
            "--cs-weight and a --divergence, or --steps 0 for the start alone"
        )
    if config.label_smoothing and config.pairwise is not PairwiseName.INFONCE:
        raise ConfigError(
            f"label-smoothing: is InfoNCE's, the pairwise loss is {config.pairwise}; leave it at 0"
        )
    if config.mixing and config.captions == "all":
        raise ConfigError(
            "mixing: mixes an image and one caption with another pair; use --captions first or "
            "sample"
        )
    rows = min(config.batch_size, images)
    if compares_sets and rows < LEAST_ROWS and config.steps != 0:
        raise ConfigError(
            f"divergence {config.divergence}: is estimated from the {rows} pairs of a step, which "
            f"are too few; use a --batch-size and a set of {LEAST_ROWS} or more, or --cs-weight 0"
        )
