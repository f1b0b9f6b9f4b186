"""Which settings a search tries, between what bounds, and which of them matter when."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from optuna.trial import Trial

from csalign.core.enums import DivergenceName, PairwiseName
from csalign.core.errors import ConfigError
from csalign.features.join import Pairs
from csalign.objective.divergences import divergence
from csalign.training.config import TrainConfig, TuneConfig


@dataclass(frozen=True)
class Range:
    """Bounds of a number, both included.

    Attributes:
        low: the least.
        high: the most.
        log: whether it is drawn by its logarithm.
    """

    low: float
    high: float
    log: bool = False

    def with_given(self, value: float) -> "Range":
        """Wide enough to hold what the user gave."""
        return Range(min(self.low, value), max(self.high, value), self.log)


RANGES = {
    "learning_rate": Range(1e-4, 1e-2, log=True),
    "logit_scale": Range(3.0, 100.0, log=True),
    "noise": Range(0.0, 1.0),
    "dropout": Range(0.0, 0.7),
    "other_captions": Range(0.0, 1.0),
    "cs_weight": Range(0.01, 3.0, log=True),
    "bandwidth": Range(0.3, 1.5),
}
# A setting comes after those that decide whether it matters.
SEARCHED = (
    *("adapter", "init", "learning_rate", "logit_scale", "noise", "dropout"),
    *("captions", "other_captions", "cs_weight", "bandwidth"),
)
DECIDED_BY = {"dropout": "adapter", "other_captions": "captions", "bandwidth": "cs_weight"}
WITHOUT_DROPOUT = {"linear", "identity"}
# What optuna knows the two forks by: a number is drawn where the kind is "fixed".
WEIGHT_KIND, BANDWIDTH_KIND = "cs_weight_kind", "bandwidth_kind"
FIXED, GIVEN = "fixed", "given"


@dataclass(frozen=True)
class SearchSpace:
    """The settings to search; made by `search_space`.

    Attributes:
        base: what stays, and the first values of what is searched.
        names: fields of it, in the order of `SEARCHED`.
        adapters: kinds to choose from.
    """

    base: TrainConfig
    names: tuple[str, ...]
    adapters: tuple[str, ...]

    def suggest(self, trial: Trial) -> dict[str, Any]:
        """Let a trial choose a value of each setting that matters beside those chosen before it."""
        chosen: dict[str, Any] = {}
        for name in self.names:
            if _matters(name, self.base.model_copy(update=chosen)):
                chosen[name] = self._value(trial, name)
        return chosen

    def given(self) -> dict[str, Any]:
        """The values of `base` by the names that optuna knows them by."""
        values = {name: getattr(self.base, name) for name in self.names}
        weight = self.base.cs_weight
        weight_kind = weight if weight == "auto" else FIXED if weight else "none"
        return values | {WEIGHT_KIND: weight_kind, BANDWIDTH_KIND: self._given_bandwidth()}

    def describe(self) -> dict[str, Any]:
        """What is searched, as plain JSON values: choices as lists, bounds as records."""
        return {
            name: asdict(self._range(name)) if name in RANGES else list(self._choices(name))
            for name in self.names
        }

    def _value(self, trial: Trial, name: str) -> Any:
        if name == "cs_weight":
            needed = self.base.pairwise is PairwiseName.NONE  # else there would be no loss at all
            kinds = [FIXED, "auto", *([] if needed else ["none"])]
            kind = trial.suggest_categorical(WEIGHT_KIND, kinds)
            if kind != FIXED:
                return kind if kind == "auto" else 0.0
        if name == "bandwidth":
            kind = trial.suggest_categorical(BANDWIDTH_KIND, self._bandwidths())
            if kind != FIXED:
                return self.base.bandwidth if kind == GIVEN else kind
        if name not in RANGES:
            return trial.suggest_categorical(name, self._choices(name))
        bounds = self._range(name)
        value = trial.suggest_float(name, bounds.low, bounds.high, log=bounds.log)
        # Three digits say all there is to say; inside the bounds, whatever those are.
        return min(bounds.high, max(bounds.low, float(f"{value:.3g}")))

    def _bandwidths(self) -> list[str]:
        return list(dict.fromkeys(["median", FIXED, self._given_bandwidth()]))

    def _given_bandwidth(self) -> str:
        if isinstance(self.base.bandwidth, float):
            return FIXED
        return "median" if self.base.bandwidth == "median" else GIVEN  # tied, or several

    def _choices(self, name: str) -> Sequence[str]:
        if name == "adapter":
            return self.adapters
        if name == "init":
            return ("canonical", "random")
        return ("first", "sample") if self.base.mixing else ("first", "sample", "all")

    def _range(self, name: str) -> Range:
        value = getattr(self.base, name)
        is_number = isinstance(value, int | float)
        skipped = name == "cs_weight" and not value  # that is no weight, but none at all
        return RANGES[name].with_given(value) if is_number and not skipped else RANGES[name]


def search_space(config: TuneConfig, rows: Pairs) -> SearchSpace:
    """What a search is to try: what ``--search`` names, or all that was not given.

    Args:
        config: settings, and which of them were given.
        rows: training rows, since not every setting matters to all of them.

    Raises:
        ConfigError: a name is none of `SEARCHED` or changes nothing here, or there is none left.
    """
    base = config.base()
    if config.search is None:
        given = config.model_fields_set
        asked = [name for name in SEARCHED if name not in given]
    else:
        asked = [name.strip().replace("-", "_") for name in config.search.split(",")]
    known = ", ".join(name.replace("_", "-") for name in SEARCHED)
    for name in asked:
        if name not in SEARCHED:
            raise ConfigError(f"search: {name!r} is not searched; there are {known}")
        reason = _moot(name, asked, base, rows)
        if reason and config.search is not None:
            raise ConfigError(f"search: {name.replace('_', '-')} changes nothing here: {reason}")
    names = tuple(n for n in SEARCHED if n in asked and not _moot(n, asked, base, rows))
    if not names:
        raise ConfigError(
            f"search: no setting is left, since all are given; name some with --search ({known})"
        )
    return SearchSpace(base, names, _adapters(base, rows))


def _matters(name: str, config: TrainConfig) -> bool:
    """Whether a setting changes anything, the others being what they are."""
    if name == "dropout":
        return not set(config.kinds.values()) <= WITHOUT_DROPOUT
    if name == "other_captions":
        return config.captions != "all"
    if name == "bandwidth":
        return config.cs_weight != 0 and divergence(config.divergence).has_bandwidth
    return True


def _moot(name: str, asked: Sequence[str], base: TrainConfig, rows: Pairs) -> str | None:
    """Why a setting changes nothing in any trial, None if it does."""
    if name == "adapter" and base.image_adapter and base.text_adapter:
        return "both sides have kinds of their own"
    if name in ("captions", "other_captions") and rows.caption_counts.max() < 2:
        return "no image to train on has several captions"
    if name in ("cs_weight", "bandwidth") and base.divergence is DivergenceName.NONE:
        return "the divergence is none"
    if name == "logit_scale" and base.pairwise is PairwiseName.NONE and base.bandwidth != "tied":
        return "the pairwise loss is none"
    if name == "bandwidth" and not divergence(base.divergence).has_bandwidth:
        return f"{base.divergence} has none"
    decides = DECIDED_BY.get(name)
    if decides and decides not in asked and not _matters(name, base):
        return f"{decides.replace('_', '-')} is {getattr(base, decides)}"
    return None


def _adapters(base: TrainConfig, rows: Pairs) -> tuple[str, ...]:
    """Kinds of adapters that these rows allow, and what the user gave."""
    widths = {rows.images.shape[1], rows.texts.shape[1]}
    kinds = ["linear", "mlp", "glu"]
    if len(widths) == 1 and base.width in (None, *widths):
        kinds.append("low-rank")
    return tuple(dict.fromkeys([*kinds, base.adapter]))
