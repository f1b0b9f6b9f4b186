"""Where training starts: the best closed form on validation, or random weights."""

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from csalign.adapters.canonical import ClosedForm, PairMoments, is_non_negative
from csalign.adapters.kinds import find_kind, shared_width
from csalign.adapters.model import Adapter, SideShape
from csalign.adapters.side import SideAdapter
from csalign.config import TrainConfig
from csalign.enums import Modality
from csalign.errors import ConfigError
from csalign.steps.batches import PairSampler
from csalign.steps.guessing import Guesser
from csalign.steps.unpaired import Unpaired
from csalign.steps.validation import Score, validate
from csalign.store.join import PairedRows

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
    rows: PairedRows,
    sampler: PairSampler,
    val: PairedRows | None,
    config: TrainConfig,
    unpaired: Unpaired | None = None,
) -> tuple[Adapter, str]:
    """Build adapters at the closed form that does best on validation.

    Which closed forms there are depends on what the two kinds can hold. Two kinds with a linear
    path choose among CCA over a grid of ridges and powers and, where the encoders share a width
    already, the centred features themselves: aligned encoders such as CLIP's can only lose by a
    map fitted on few pairs. Beside a side that keeps its space the other is regressed onto it.

    With ``config.guess_pairs``, unpaired rows that the winner finds to be each other's nearest are
    taken for pairs of little weight and the closed forms fitted anew; validation decides.

    Args:
        rows: training rows.
        sampler: gives their pairs and weights.
        val: held-out rows, or None.
        config: adapter kinds and widths.
        unpaired: rows of no pair, to guess pairs among.

    Returns:
        The adapters and the winner's name; random ones where the kinds can hold no closed form.
    """
    space = _Space(rows, sampler, config)
    if val is None:
        first = next(space.candidates((SAFE_RIDGE,), (SAFE_POWER,)), None)
        return random_start(rows, config) if first is None else (space.at(*first), first[0].name)
    best = space.best_on(val)
    if best is None:
        return random_start(rows, config)
    guesser = Guesser.of(unpaired, config.seed) if unpaired and config.guess_pairs else None
    if guesser is not None:
        found = replace(space, guessed=(guesser, best.adapter)).best_on(val)
        if found is not None and found.score.better_than(best.score):
            best = replace(found, name=f"{found.name}, with guessed pairs")
    return best.adapter, best.name


def random_start(rows: PairedRows, config: TrainConfig) -> tuple[Adapter, str]:
    """Build adapters with random weights, seeded."""
    return _build(rows, config, None, (False, False)), "random"


def _build(
    rows: PairedRows, config: TrainConfig, width: int | None, roots: tuple[bool, bool]
) -> Adapter:
    """Adapters with random weights.

    Args:
        rows: for the encoders' widths.
        config: everything else.
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
            rank=config.rank,
            layers=config.layers,
        )
        for side, root in zip(Modality, roots, strict=True)
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return Adapter(shapes, allow=allow)


def _widths(rows: PairedRows) -> dict[Modality, int]:
    return {Modality.IMAGE: rows.images.shape[1], Modality.TEXT: rows.texts.shape[1]}


@dataclass(frozen=True)
class _Found:
    """A closed form in place, and how good it is on validation."""

    adapter: Adapter
    name: str
    score: Score


@dataclass(frozen=True)
class _Space:
    """The closed forms that two kinds of adapters can start from.

    Attributes:
        rows: training rows.
        sampler: their pairs and weights.
        config: adapter kinds and widths.
        guessed: pairs to add: what finds them, and in whose space.
    """

    rows: PairedRows
    sampler: PairSampler
    config: TrainConfig
    guessed: tuple[Guesser, Adapter] | None = None

    def best_on(self, val: PairedRows) -> _Found | None:
        """The candidate that does best on held-out rows, None if there is none."""
        best: _Found | None = None
        for form, roots in self.candidates(RIDGES, POWERS):
            adapter = self.at(form, roots)
            score = validate(adapter, val)
            log.debug("start %s: validation mean recall %.4f", form.name, score.mean_recall)
            if score.better_than(best.score if best else None):
                best = _Found(adapter, form.name, score)
        return best

    def at(self, form: ClosedForm, roots: tuple[bool, bool]) -> Adapter:
        """Adapters at a closed form."""
        adapter = _build(self.rows, self.config, len(form.image_weight), roots)
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
            moments = PairMoments.of(images, texts, pairs, weights, roots)
            if self.guessed:
                guesser, adapter = self.guessed
                moments = guesser.mixed_into(moments, adapter, roots)
            self._known[roots] = moments
        return self._known[roots]
