"""The settings that a search tries, their ranges, and which of them matter when."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from optuna.trial import Trial

from csalign.core.enums import DivergenceName, PairwiseName
from csalign.core.errors import ConfigError
from csalign.features.join import Pairs
from csalign.objective.divergences import divergence
from csalign.training.config import TrainConfig, TuneConfig


@dataclass(frozen=True)
class Range:
    """Bounds of a number, both included, and whether it is drawn by its logarithm."""

    low: float
    high: float
    log: bool = False


RANGES = {
    "learning_rate": Range(1e-4, 1e-2, log=True),
    "logit_scale": Range(3.0, 100.0, log=True),
    "noise": Range(0.0, 1.0),
    "uniformity": Range(0.1, 4.0, log=True),
    "dropout": Range(0.0, 0.7),
    "other_captions": Range(0.0, 1.0),
    "cs_weight": Range(0.01, 3.0, log=True),
    "bandwidth": Range(0.3, 1.5),
}
# A setting comes after those that decide whether it matters.
SEARCHED = (
    *("adapter", "init", "learning_rate", "logit_scale", "uniformity", "noise", "dropout"),
    *("captions", "other_captions", "cs_weight", "bandwidth"),
)
DECIDED_BY = {"dropout": "adapter", "other_captions": "captions", "bandwidth": "cs_weight"}
WITHOUT_DROPOUT = {"linear", "identity"}
# Optuna's names of three choices: a number is drawn if the kind is "fixed".
WEIGHT_KIND, BANDWIDTH_KIND = "cs_weight_kind", "bandwidth_kind"
SCALE_KIND = "logit_scale_kind"
FIXED, GIVEN = "fixed", "given"


@dataclass(frozen=True)
class SearchSpace:
    """Settings to search; see `search_space`."""

    base: TrainConfig  # the fixed settings, and the first values of those that are searched
    names: tuple[str, ...]  # fields of it to search, in the order of `SEARCHED`
    adapters: tuple[str, ...]  # kinds to choose from

    def suggest(self, trial: Trial) -> dict[str, Any]:
        """Choose values for a trial, of those settings that matter given the earlier choices."""
        chosen: dict[str, Any] = {}
        for name in self.names:
            if _matters(name, self.base.model_copy(update=chosen)):
                chosen[name] = self._value(trial, name)
        return chosen

    def given(self) -> dict[str, Any]:
        """Return the values of `base` under optuna's names."""
        values = {name: getattr(self.base, name) for name in self.names}
        weight = self.base.cs_weight
        weight_kind = weight if weight == "auto" else FIXED if weight else "none"
        scale_kind = "auto" if self.base.logit_scale == "auto" else FIXED
        kinds = {WEIGHT_KIND: weight_kind, BANDWIDTH_KIND: self._given_bandwidth()}
        return values | kinds | {SCALE_KIND: scale_kind}

    def _value(self, trial: Trial, name: str) -> Any:
        if name == "cs_weight":
            needed = self.base.pairwise is PairwiseName.NONE  # otherwise there would be no loss
            kinds = [FIXED, "auto", *([] if needed else ["none"])]
            kind = trial.suggest_categorical(WEIGHT_KIND, kinds)
            if kind != FIXED:
                return kind if kind == "auto" else 0.0
        if name == "logit_scale":
            kind = trial.suggest_categorical(SCALE_KIND, ["auto", FIXED])
            if kind != FIXED:
                return kind
        if name == "bandwidth":
            kinds = list(dict.fromkeys(["median", FIXED, self._given_bandwidth()]))
            kind = trial.suggest_categorical(BANDWIDTH_KIND, kinds)
            if kind != FIXED:
                return self.base.bandwidth if kind == GIVEN else kind
        if name not in RANGES:
            captions = ("first", "sample", "all")[: 2 if self.base.mixing else 3]
            choices = {"adapter": self.adapters, "init": ("canonical", "random")}
            return trial.suggest_categorical(name, choices.get(name, captions))
        bounds = self._range(name)
        value = trial.suggest_float(name, bounds.low, bounds.high, log=bounds.log)
        # Three digits are enough, but rounding must not leave the bounds.
        return min(bounds.high, max(bounds.low, float(f"{value:.3g}")))

    def _given_bandwidth(self) -> str:
        if isinstance(self.base.bandwidth, float):
            return FIXED
        return "median" if self.base.bandwidth == "median" else GIVEN  # tied, or several

    def _range(self, name: str) -> Range:
        """Return the range of a number, widened to include the given value."""
        value, bounds = getattr(self.base, name), RANGES[name]
        if not isinstance(value, int | float) or (name == "cs_weight" and not value):
            return bounds
        return Range(min(bounds.low, value), max(bounds.high, value), bounds.log)


def search_space(config: TuneConfig, rows: Pairs) -> SearchSpace:
    """Choose what to search: the settings of ``--search``, or all that were not given.

    Args:
        config: settings, and which of them were given.
        rows: training rows, which decide whether some settings matter.

    Raises:
        ConfigError: a name is not in `SEARCHED` or has no effect here, or none is left.
    """
    base = config.base()
    if config.search is None:
        asked = [name for name in SEARCHED if name not in config.model_fields_set]
    else:
        asked = [name.strip().replace("-", "_") for name in config.search.split(",")]
    known = ", ".join(name.replace("_", "-") for name in SEARCHED)
    for name in asked:
        if name not in SEARCHED:
            raise ConfigError(f"--search: {name!r} is not searched; there are {known}")
        reason = _no_effect(name, asked, base, rows)
        if reason and config.search is not None:
            raise ConfigError(f"--search: {name.replace('_', '-')} changes nothing here: {reason}")
    names = tuple(n for n in SEARCHED if n in asked and not _no_effect(n, asked, base, rows))
    if not names:
        raise ConfigError(
            f"--search: no setting is left, since all are given; name some with --search ({known})"
        )
    kinds = ["linear", "mlp", "glu"]
    widths = {rows.images.shape[1], rows.texts.shape[1]}
    if len(widths) == 1 and base.width in (None, *widths):
        kinds.append("low-rank")
    return SearchSpace(base, names, tuple(dict.fromkeys([*kinds, base.adapter])))


def _matters(name: str, config: TrainConfig) -> bool:
    """Return whether a setting has an effect, given the others."""
    if name == "dropout":
        return not set(config.kinds.values()) <= WITHOUT_DROPOUT
    if name == "other_captions":
        return config.captions != "all"
    if name == "bandwidth":
        return config.cs_weight != 0 and divergence(config.divergence).has_bandwidth
    return True


def _no_effect(name: str, asked: Sequence[str], base: TrainConfig, rows: Pairs) -> str | None:
    """Explain why a setting has no effect in any trial; None if it has one."""
    if name == "adapter" and base.image_adapter and base.text_adapter:
        return "both sides have kinds of their own"
    if name in ("captions", "other_captions") and rows.caption_counts.max() < 2:
        return "no image to train on has several captions"
    if name in ("cs_weight", "bandwidth") and base.divergence is DivergenceName.NONE:
        return "the divergence is none"
    is_rival = base.pairwise is PairwiseName.ALIGN_UNIFORM
    has_logits = base.pairwise is not PairwiseName.NONE and not is_rival
    is_tied = base.bandwidth == "tied" and "bandwidth" not in asked
    if (name == "logit_scale" and not (has_logits or is_tied)) or (
        name == "uniformity" and not is_rival
    ):
        return f"the pairwise loss is {base.pairwise}"
    if name == "bandwidth" and not divergence(base.divergence).has_bandwidth:
        return f"{base.divergence} has none"
    decides = DECIDED_BY.get(name)
    if decides and decides not in asked and not _matters(name, base):
        return f"{decides.replace('_', '-')} is {getattr(base, decides)}"
    return None
