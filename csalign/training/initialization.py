"""Initialization of the adapters: the best closed form on validation, or random weights."""

import logging
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from csalign.adapters.canonical import ClosedForm, PairMoments, is_non_negative
from csalign.adapters.checkpoint import load_adapter_with_info
from csalign.adapters.model import Adapter, find_kind, shared_width
from csalign.adapters.side import LOUD, SideShape, loud_scale
from csalign.core.enums import Modality
from csalign.core.errors import ConfigError
from csalign.core.progress import duration, show_figures, tick
from csalign.features.join import PairedRows, Pairs
from csalign.training.config import AdapterOptions
from csalign.training.data import Score, validate
from csalign.training.sampler import PairSampler

log = logging.getLogger(__name__)

RIDGES = (0.3, 1.0, 3.0, 10.0)
POWERS = (0.5, 1.0)
# Without a validation set there is nothing to choose by; these did well on every corpus tried.
SAFE_RIDGE, SAFE_POWER = 1.0, 1.0

Roots = tuple[bool, bool]
Candidate = tuple[ClosedForm, Roots]


class Start(NamedTuple):
    """Initialized adapters, the name of their closed form or "random", and a summary for people."""

    adapter: Adapter
    name: str
    summary: str


def initialize(
    options: AdapterOptions,
    rows: Pairs,
    sampler: PairSampler,
    val: PairedRows | None,
    token_widths: Mapping[Modality, int],
    seed: int,
) -> Start:
    """Build adapters at the closed form that does best on validation, or with random weights.

    The candidates depend on what the two kinds can represent. Two kinds with a linear path choose
    among CCA over a grid of ridges and powers and, if the encoders have the same width, the
    centred features themselves: encoders that are already aligned, such as CLIP's, can only lose
    by a map fitted on few pairs. If one side keeps its space, the other is regressed onto it.

    Args:
        options: kinds, widths, and whether to start from a closed form.
        rows: training rows.
        sampler: of their pairs and weights.
        val: held-out rows, measured without tokens, which a closed form does not use.
        token_widths: of the sides that take tokens.
        seed: of random weights.

    """
    began = time.monotonic()
    builder = _Builder(options, rows, sampler, token_widths, seed)
    best: Start | None = None
    best_score: Score | None = None
    if options.init == "canonical":
        grid = (RIDGES, POWERS) if val is not None else ((SAFE_RIDGE,), (SAFE_POWER,))
        total, candidates = builder.candidates(*grid)
        tick("closed form", 0, total)
        for number, (form, roots) in enumerate(candidates, 1):
            adapter = builder.build(len(form.image_weight), roots)
            adapter.start_from(form)
            if val is None:
                return Start(adapter, form.name, f"closed form: {form.name}")
            score = validate(adapter, val)
            log.debug("start %s: validation mean recall %.4f", form.name, score.mean_recall)
            if score.better_than(best_score):
                best_score = score
                recall = f"{100 * score.mean_recall:.1f} %"
                best = Start(adapter, form.name, "")
            tick("closed form", number, total)
            show_figures({"": form.name, "best R": recall})
        if best is not None:
            past = duration(time.monotonic() - began)
            return best._replace(
                summary=f"closed form: {total} settings in {past}, best R {recall}: {best.name}"
            )
    return Start(builder.build(None, (False, False)), "random", "start: random weights")


def announce_start(start: Start) -> None:
    """Log the start, and which dimensions of the embeddings it scales down."""
    log.info("%s", start.summary)
    for side in Modality:
        scale = start.adapter.side(side).scale
        if scale is not None:
            loud = (scale < 1).nonzero()[:, 0].tolist()
            log.info(
                "%s embeddings: %d of %d dimensions (%s) vary more than %g times as much as most "
                "others; scaled down",
                side,
                len(loud),
                len(scale),
                ", ".join(map(str, loud[:5])) + ", ..." * (len(loud) > 5),
                LOUD,
            )


def load_initialized(folder: Path, kinds: Mapping[Modality, str]) -> tuple[Adapter, str]:
    """Load the adapters of a checkpoint, and the name of their initialization."""
    with torch.random.fork_rng(devices=[]):
        adapter, info = load_adapter_with_info(folder, allow=set(kinds.values()))
    return adapter, info.start


@dataclass
class _Builder:
    """Builds adapters, and the closed forms that their kinds can represent."""

    options: AdapterOptions
    rows: Pairs
    sampler: PairSampler
    token_widths: Mapping[Modality, int]
    seed: int
    _known: dict[Roots, PairMoments] = field(default_factory=dict)
    _scales: dict[tuple[Modality, bool], Tensor | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._kinds = self.options.kinds
        self._allow = set(self._kinds.values())  # the user named them
        self._widths = {side: self.rows.embeddings(side).shape[1] for side in Modality}

    def build(self, width: int | None, roots: Roots) -> Adapter:
        """Build adapters with random weights.

        Args:
            width: of the shared space; None for that of the kinds and options.
            roots: whether to take the square root of images and texts.
        """
        options = self.options
        if width is None:
            width = shared_width(self._kinds, self._widths, options.width, allow=self._allow)
        scales = dict(zip(Modality, self._scales_of(roots), strict=True))
        shapes = {
            side: SideShape(
                kind=self._kinds[side],
                input_width=self._widths[side],
                width=width,
                hidden=options.hidden,
                dropout=options.dropout,
                signed_sqrt=root,
                token_width=self.token_widths.get(side),
                rank=options.rank,
                layers=options.layers,
                scaled=scales[side] is not None,
            )
            for side, root in zip(Modality, roots, strict=True)
        }
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            adapter = Adapter(shapes, allow=self._allow)
        for side, scale in scales.items():
            if scale is not None:
                adapter.side(side).set_scale(scale)
        return adapter

    def candidates(
        self, ridges: tuple[float, ...], powers: tuple[float, ...]
    ) -> tuple[int, Iterator[Candidate]]:
        """Return how many closed forms there are, and yield them, the safest first.

        With each comes whether the square root of either side is taken.
        """
        classes = {side: find_kind(kind, allow=self._allow) for side, kind in self._kinds.items()}
        kept = [side for side, kind in classes.items() if kind.keeps_width]
        free = [side for side, kind in classes.items() if kind.accepts_closed_form]
        if len(kept) + len(free) < len(Modality):
            return 0, iter(())
        width = shared_width(self._kinds, self._widths, self.options.width, allow=self._allow)
        plain = (False, False)
        if not free:
            frozen = [side for side in kept if self._kinds[side] == "identity"]
            return 1, iter([(self._moments(plain).centred(*frozen), plain)])
        roots = is_non_negative(self.rows.images), is_non_negative(self.rows.texts)
        if kept:
            target = kept[0]
            roots = roots[0] and target is Modality.TEXT, roots[1] and target is Modality.IMAGE
            centre = self._kinds[target] != "identity"
            regressed = (self._moments(roots).ridge(target, r, centre=centre) for r in ridges)
            return len(ridges), ((form, roots) for form in regressed)
        narrower = min(self._widths.values())
        is_equal = max(self._widths.values()) == narrower
        keeps_width = is_equal and self.options.width in (None, narrower)
        centred = (self._moments(plain).centred() for _ in range(keeps_width))
        if width > narrower:
            raise ConfigError(
                f"--width: {width} is more than the narrower encoder's {narrower}, which the "
                "closed form cannot give; lower it, or use --init random"
            )
        correlated = (
            form
            for ridge in ridges
            for form in self._moments(roots).cca(ridge=ridge, powers=powers, width=width)
        )
        forms = chain(((form, plain) for form in centred), ((form, roots) for form in correlated))
        return keeps_width + len(ridges) * len(powers), forms

    def _moments(self, roots: Roots) -> PairMoments:
        if roots not in self._known:
            pairs, weights = self.sampler.weighted_pairs()
            images, texts = self.rows.images, self.rows.texts
            scales = self._scales_of(roots)
            self._known[roots] = PairMoments.of(images, texts, pairs, weights, roots, scales)
        return self._known[roots]

    def _scales_of(self, roots: Roots) -> tuple[Tensor | None, Tensor | None]:
        """Return the scale of each side's dimensions; None without one, or if the side is kept."""
        for side, root in zip(Modality, roots, strict=True):
            if (side, root) not in self._scales:
                keeps = find_kind(self._kinds[side], allow=self._allow).keeps_width
                rows = self.rows.embeddings(side)
                self._scales[side, root] = None if keeps else loud_scale(rows, signed_sqrt=root)
        return self._scales[Modality.IMAGE, roots[0]], self._scales[Modality.TEXT, roots[1]]
