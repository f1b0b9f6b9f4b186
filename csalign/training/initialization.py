"""Where training starts: the best closed form on validation, or random weights."""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch

from csalign.adapters.canonical import ClosedForm, PairMoments, is_non_negative
from csalign.adapters.kinds import find_kind, shared_width
from csalign.adapters.model import Adapter, SideShape
from csalign.adapters.side import SideAdapter
from csalign.core.enums import Modality
from csalign.core.errors import ConfigError
from csalign.features.join import PairedRows, Pairs
from csalign.training.config import TrainConfig
from csalign.training.sampler import PairSampler
from csalign.training.validation import Score, validate

TokenWidths = Mapping[Modality, int]

log = logging.getLogger(__name__)

RIDGES = (0.3, 1.0, 3.0, 10.0)
POWERS = (0.5, 1.0)
# Without a validation set there is nothing to choose by; these did well on every corpus tried.
SAFE_RIDGE, SAFE_POWER = 1.0, 1.0


def kinds_of(config: TrainConfig) -> dict[Modality, str]:
    """The kind of adapter that each side is to have."""
    return {
        Modality.IMAGE: config.image_adapter or config.adapter,
        Modality.TEXT: config.text_adapter or config.adapter,
    }


def closed_form_start(
    rows: Pairs,
    sampler: PairSampler,
    val: PairedRows | None,
    config: TrainConfig,
    token_widths: TokenWidths,
) -> tuple[Adapter, str]:
    """Build adapters at the closed form that does best on validation.

    Which closed forms there are depends on what the two kinds can hold. Two kinds with a linear
    path choose among CCA over a grid of ridges and powers and, where the encoders share a width
    already, the centred features themselves: aligned encoders such as CLIP's can only lose by a
    map fitted on few pairs. Beside a side that keeps its space the other is regressed onto it.

    Args:
        rows: training rows.
        sampler: gives their pairs and weights.
        val: held-out rows, or None.
        config: adapter kinds and widths.
        token_widths: of the sides that take tokens. Validation is without them: a closed form
            makes nothing of them.

    Returns:
        The adapters and the winner's name; random ones where the kinds can hold no closed form.
    """
    space = _Space(rows, sampler, config, token_widths)
    if val is None:
        first = next(space.candidates((SAFE_RIDGE,), (SAFE_POWER,)), None)
        if first is None:
            return random_start(rows, config, token_widths)
        return space.at(*first), first[0].name
    best: tuple[Adapter, str] | None = None
    best_score: Score | None = None
    for form, roots in space.candidates(RIDGES, POWERS):
        adapter = space.at(form, roots)
        score = validate(adapter, val)
        log.debug("start %s: validation mean recall %.4f", form.name, score.mean_recall)
        if score.better_than(best_score):
            best, best_score = (adapter, form.name), score
    return best or random_start(rows, config, token_widths)


def random_start(
    rows: Pairs, config: TrainConfig, token_widths: TokenWidths
) -> tuple[Adapter, str]:
    """Build adapters with random weights, seeded."""
    return _build(rows, config, token_widths, None, (False, False)), "random"


def _build(
    rows: Pairs,
    config: TrainConfig,
    token_widths: TokenWidths,
    width: int | None,
    roots: tuple[bool, bool],
) -> Adapter:
    """Adapters with random weights.

    Args:
        rows: for the encoders' widths.
        config: everything else.
        token_widths: of the sides that take tokens.
        width: of the shared space; None for what the kinds and the config say.
        roots: whether the square root is taken of images and texts.
    """
    kinds = kinds_of(config)
    widths = _widths(rows)
    allow = set(kinds.values())  # the user named them
    if width is None:
        width = shared_width(kinds, widths, config.width, allow=allow)
    shapes = {
        side: SideShape(
            kind=kinds[side],
            input_width=widths[side],
            width=width,
            hidden=config.hidden,
            dropout=config.dropout,
            signed_sqrt=root,
            token_width=token_widths.get(side),
            rank=config.rank,
            layers=config.layers,
        )
        for side, root in zip(Modality, roots, strict=True)
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return Adapter(shapes, allow=allow)


def _widths(rows: Pairs) -> dict[Modality, int]:
    return {Modality.IMAGE: rows.images.shape[1], Modality.TEXT: rows.texts.shape[1]}


@dataclass(frozen=True)
class _Space:
    """The closed forms that two kinds of adapters can start from."""

    rows: Pairs
    sampler: PairSampler
    config: TrainConfig
    token_widths: TokenWidths

    def at(self, form: ClosedForm, roots: tuple[bool, bool]) -> Adapter:
        """Adapters at a closed form."""
        adapter = _build(self.rows, self.config, self.token_widths, len(form.image_weight), roots)
        adapter.start_from(form)
        return adapter

    def candidates(
        self, ridges: tuple[float, ...], powers: tuple[float, ...]
    ) -> Iterator[tuple[ClosedForm, tuple[bool, bool]]]:
        """Closed forms, the safest first, and whether the square root is taken of each side."""
        kept = [side for side, kind in self._classes.items() if kind.keeps_width]
        free = [side for side, kind in self._classes.items() if kind.accepts_closed_form]
        if len(kept) + len(free) < len(Modality):
            return
        width = shared_width(
            kinds_of(self.config), _widths(self.rows), self.config.width, allow=self._allow
        )
        if len(free) == len(Modality):
            yield from self._mapped(ridges, powers, width)
        elif not free:
            frozen = [side for side in kept if kinds_of(self.config)[side] == "identity"]
            yield self._moments((False, False)).centred(*frozen), (False, False)
        else:
            yield from self._regressed(kept[0], ridges)

    def _mapped(
        self, ridges: tuple[float, ...], powers: tuple[float, ...], width: int
    ) -> Iterator[tuple[ClosedForm, tuple[bool, bool]]]:
        """For two kinds that can be any linear map."""
        widths = _widths(self.rows)
        plain = (False, False)
        alike = len(set(widths.values())) == 1
        if alike and self.config.width in (None, widths[Modality.IMAGE]):
            yield self._moments(plain).centred(), plain
        if width > min(widths.values()):
            raise ConfigError(
                f"width: {width} is more than the narrower encoder's {min(widths.values())}, which "
                "the closed form cannot give; lower it, or use --init random"
            )
        for ridge in ridges:
            for form in self._moments(self._roots).cca(ridge=ridge, powers=powers, width=width):
                yield form, self._roots

    def _regressed(
        self, to: Modality, ridges: tuple[float, ...]
    ) -> Iterator[tuple[ClosedForm, tuple[bool, bool]]]:
        """For a side that keeps its space beside one that can be any linear map."""
        image_root, text_root = self._roots
        roots = (image_root and to is not Modality.IMAGE, text_root and to is not Modality.TEXT)
        is_frozen = kinds_of(self.config)[to] == "identity"
        for ridge in ridges:
            yield self._moments(roots).ridge(to, ridge, centre=not is_frozen), roots

    @cached_property
    def _classes(self) -> Mapping[Modality, type[SideAdapter]]:
        return {
            side: find_kind(kind, allow=self._allow) for side, kind in kinds_of(self.config).items()
        }

    @property
    def _allow(self) -> set[str]:
        return set(kinds_of(self.config).values())

    @cached_property
    def _roots(self) -> tuple[bool, bool]:
        return is_non_negative(self.rows.images), is_non_negative(self.rows.texts)

    @cached_property
    def _known(self) -> dict[tuple[bool, bool], PairMoments]:
        return {}

    def _moments(self, roots: tuple[bool, bool]) -> PairMoments:
        if roots not in self._known:
            pairs, weights = self.sampler.weighted_pairs()
            images, texts = self.rows.images, self.rows.texts
            self._known[roots] = PairMoments.of(images, texts, pairs, weights, roots)
        return self._known[roots]
