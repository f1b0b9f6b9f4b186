"""Progress on stderr: the phase that runs, live on a terminal, in lines with the time in a log."""

import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Event, Lock, Thread

from rich.console import Console
from rich.live import Live
from rich.text import Text

from csalign.cli.layout import JOINT, wrap
from csalign.core import signals
from csalign.core.progress import Progress, duration, reported_to

BAR, LEAST_BAR = 24, 6  # columns
REFRESHES = 4  # per second
NAMED_AFTER_S = 1.0  # a shorter phase is not worth a line in a log
LINE_EVERY_S = 30.0
LINES = 10  # of notable figures in a log, at most about, per phase
LOG_WIDTH = 100
_DETAIL = re.compile(r" \(.*\)$")


@contextmanager
def shown_progress(console: Console, *, quiet: bool) -> Iterator[Progress]:
    """Show what is reported in this block on the console, or nothing if `quiet`.

    Every report also raises a signal whose first exception was dropped. Yields the callback, which
    is the current one in the block.
    """
    if quiet:
        with reported_to(_only_check):
            yield _only_check
        return
    with _Screen(console) if is_live(console) else _Log(console) as shown, reported_to(shown):
        yield shown


def is_live(console: Console) -> bool:
    """Return whether lines on this console can be replaced."""
    return console.is_terminal and not console.is_dumb_terminal


def line_start(console: Console) -> str:
    """Return what a message on the console starts with: in a log, the time."""
    return "csalign: " if is_live(console) else time.strftime("%H:%M:%S ")


def _only_check(what: str, done: int, total: int | None) -> None:
    signals.check()


@dataclass
class Phase:
    """A phase of a command: when it began and at what count, and its latest state."""

    what: str
    began: float
    first: int
    done: int
    total: int | None
    figures: Mapping[str, str] = field(default_factory=dict)
    lines: int = 0  # tenths of the work that have a line in the log

    def __post_init__(self) -> None:
        """Divide what is done into the name of the phase and the unit of its work."""
        self.name, _, self.unit = self.what.partition(": ")

    @property
    def count(self) -> str:
        """Return how much is done, with the unit; "" if nothing is counted."""
        if not self.unit and self.total is None:
            return ""
        done = f"{self.done:,}" + ("" if self.total is None else f"/{self.total:,}")
        return f"{self.unit} {done}".strip()

    def pace(self, now: float) -> list[str]:
        """Return rate and time left as far as they are known, else the time so far."""
        past, made = now - self.began, self.done - self.first
        if made <= 0 or past <= 0:
            return [duration(past)] if past >= 1 else []
        shown = [format_rate(made / past, self.unit)] if self.unit else []
        if self.total is not None and self.done < self.total:
            shown.append(f"{duration((self.total - self.done) * past / made)} left")
        return shown

    def shown_figures(self) -> list[str]:
        """Return name and value of each figure."""
        return [f"{name} {value}".strip() for name, value in self.figures.items()]

    def log_line(self, now: float, width: int) -> str:
        """Return the state on one line, shortened to fit.

        Figures lose what is in parentheses, the first one first; then the pace is dropped.
        """
        head = self.name + (": " if self.unit else " ") + self.count
        parts, pace = [head.strip(), *self.shown_figures()], self.pace(now)
        for place in range(1, len(parts)):
            if len("  ".join([*parts, *pace])) > width:
                parts[place] = _DETAIL.sub("", parts[place])
            while pace and len("  ".join([*parts, *pace])) > width:
                del pace[0]
        return "  ".join([*parts, *pace])


def format_rate(rate: float, unit: str) -> str:
    """Format a rate for people, such as ``0.48 step/s``, ``1,057 rows/s`` or ``25 s/step``."""
    if rate < 0.1:
        return f"{1 / rate:,.0f} s/{unit.removesuffix('s')}"
    digits = 0 if rate >= 10 else 1 if rate >= 1 else 2
    return f"{rate:,.{digits}f} {unit}/s"


class _Reporter:
    """Keeps the phases; the latest one that reported is shown."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._lock = Lock()
        self._phases: dict[str, Phase] = {}
        self._began = time.monotonic()
        self._phase = Phase("starting", self._began, 0, 0, None)
        self._is_named = True  # in a log, where "starting" is of no use

    def __call__(self, what: str, done: int, total: int | None) -> None:
        signals.check()
        with self._lock:
            phase, now = self._phases.get(what), time.monotonic()
            is_other = phase is not self._phase
            # A phase may be interrupted by others, and it may come again.
            if phase is None or done < phase.done or (is_other and done <= phase.first):
                phase = self._phases[what] = Phase(what, now, done, done, total)
            phase.done, phase.total, self._phase = done, total, phase
            self._is_named &= not is_other

    def figures(self, figures: Mapping[str, str], notable: bool) -> None:
        with self._lock:
            self._phase.figures = figures


class _Screen(_Reporter):
    """A few lines that follow the phase, and vanish."""

    def __enter__(self) -> "_Screen":
        self._live = Live(
            get_renderable=self.render,
            console=self._console,
            transient=True,
            refresh_per_second=REFRESHES,
        )
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def render(self) -> Text:
        """Return the lines, none wider than the console."""
        phase, width, now = self._phase, self._console.width, time.monotonic()
        full, rest = "━─" if self._console.encoding.startswith("utf") else "=-"
        first = [phase.name, *filter(None, [phase.count]), *phase.pace(now)]
        columns = min(BAR, width - len("  ".join([*first, ""])))
        if phase.total and columns >= LEAST_BAR:
            made = min(columns, round(columns * phase.done / phase.total))
            first.insert(1, full * made + rest * (columns - made))
        lines = [*_packed(first, width), *_packed(phase.shown_figures(), width, "  ")]
        text = Text("\n".join(lines), no_wrap=True)
        text.highlight_regex(re.escape(full) + "{2,}", "bar.complete")
        text.highlight_regex(re.escape(rest) + "{2,}", "bar.back")
        return text


def _packed(parts: list[str], width: int, indent: str = "") -> list[str]:
    """Return lines of at most `width` columns, broken between parts if they fit."""
    joined = "  ".join(part.replace(" ", JOINT) for part in parts)
    return wrap(joined, width - len(indent), indent) if joined else []


class _Log(_Reporter):
    """Lines when a phase has run for a second, for notable figures, and every half a minute."""

    def __enter__(self) -> "_Log":
        self._last = self._began
        self._ended = Event()
        self._clock = Thread(target=self._watch, daemon=True)
        self._clock.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._ended.set()
        self._clock.join(NAMED_AFTER_S)
        past = time.monotonic() - self._began
        if kind is None and past >= NAMED_AFTER_S:
            self._print(f"done in {duration(past)}")

    def figures(self, figures: Mapping[str, str], notable: bool) -> None:
        super().figures(figures, notable)
        with self._lock:
            phase = self._phase
            made = phase.done * LINES // phase.total + 1 if phase.total else phase.lines + 1
            if notable and made > phase.lines:
                phase.lines = made
                self._print_phase(time.monotonic())

    def _watch(self) -> None:
        while not self._ended.wait(NAMED_AFTER_S / 2):
            with self._lock:
                now = time.monotonic()
                is_new = not self._is_named and now - self._phase.began >= NAMED_AFTER_S
                if is_new or now - self._last >= LINE_EVERY_S:
                    self._print_phase(now)

    def _print_phase(self, now: float) -> None:
        self._last, self._is_named = now, True
        start = line_start(self._console)
        self._print(self._phase.log_line(now, LOG_WIDTH - len(start)))

    def _print(self, text: str) -> None:
        self._console.print(line_start(self._console) + text, markup=False, highlight=False)
