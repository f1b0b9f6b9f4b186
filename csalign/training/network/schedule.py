"""How long a network trains: by the number of pairs, by given options, or by the time there is."""

import logging
import math
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch

from csalign.core import distributed
from csalign.core.progress import duration

log = logging.getLogger(__name__)

EPOCHS = 15
MANY_PAIRS = 1_000_000  # beyond, twice the pairs are seen 1.4 times as often in all
FULL_EPOCHS = 40  # at most, however much time there is
MIN_STEPS = 200  # a small set fills few batches, and too few steps learn nothing
VALIDATIONS = 20
MAX_BETWEEN = 1_000  # steps from one validation to the next
PATIENCE = 10  # validations, and at least half of the steps
WARM_UP, TIMED = 3, 10  # steps before those that are timed, and the least number of these
TIMED_SECONDS, TIMED_SHARE = 2.0, 0.05  # that they last, up to a share of all steps
KERNEL_SHARE = 0.15  # of the minutes, for a kernel CCA
MARGIN = 0.95  # of the time left, for what is not foreseen


class Schedule(NamedTuple):
    """Length of the training of a network; None for a default."""

    steps: int  # over which the learning rate decays
    last: int  # step to stop at, at most `steps`
    validations: int | None = None  # over all steps; by default 20, or one per 1,000 steps
    patience: int | None = None  # validations; by default 10, and at least half of the steps
    until: float | None = None  # seconds of the command to stop after, once known

    @property
    def every(self) -> int:
        """Steps from one validation to the next; the last step is validated too."""
        every = max(1, round(self.steps / (self.validations or VALIDATIONS)))
        return every if self.validations else min(every, MAX_BETWEEN)

    @property
    def patient_steps(self) -> int:
        """Steps without a better validation after which training stops."""
        stale = (self.patience or PATIENCE) * self.every
        return stale if self.patience else max(stale, self.steps // 2)


def plan(
    pairs: int,
    batch_size: int,
    *,
    steps: int | None = None,
    epochs: float | None = None,
    minutes: float | None = None,
    validations: int | None = None,
    patience: int | None = None,
    others: int = 1,
) -> Schedule:
    """Return the schedule for a number of pairs, at least 1; an epoch is at least a step.

    Without `steps` and `epochs` it is 15 epochs for each of the `others`, the sides that a side is
    paired with, and at most 40; beyond a million pairs fewer and at least 1; and at least 200
    steps. If there are `minutes`, it is the longest that may fill them, 40 epochs.

    >>> [plan(pairs, 512).steps for pairs in (1_000, 1_000_000, 4_000_000)]
    [200, 29297, 58594]
    """
    if steps is None:
        enough = min(FULL_EPOCHS, EPOCHS * others) * min(1.0, (MANY_PAIRS / pairs) ** 0.5)
        passes = epochs or (max(1.0, enough) if minutes is None else FULL_EPOCHS)
        steps = math.ceil(passes * pairs / min(batch_size, pairs))
        steps = steps if epochs else max(MIN_STEPS, steps)
    return Schedule(steps, steps, validations, patience)


@dataclass
class Timer:
    """Times the first steps of a network, says how long all take, and keeps to a limit.

    All processes call it at the same steps; the clock of the main one counts.
    """

    clock: Callable[[], float] = time.monotonic  # seconds that the command has taken
    minutes: float | None = None  # that it may take
    networks: int = 1  # trained one after another, for as many steps
    combines: bool = False  # whether a kernel CCA follows them, for which time is kept
    announces: bool = True

    def begin(self, schedule: Schedule, made: int, device: torch.device, pairs: int) -> None:
        """Begin after so many steps, of so many pairs each."""
        self._device, self._pairs, self._first = device, pairs, made + WARM_UP
        self._due = self._first + TIMED if self.announces else -1
        self._step_s = self._validation_s = self._began = 0.0
        if made < schedule.last <= self._due:
            self._announce(schedule)

    def follow(self, schedule: Schedule, made: int) -> Schedule:
        """Return the schedule to follow after so many steps, which changes once they are timed."""
        until, count = schedule.until, made - self._first
        if made >= schedule.last:
            return schedule
        checks = until is not None and made % max(1, schedule.every // 10) == 0
        if checks and distributed.broadcast(lambda: self.clock() > (until or 0.0)):
            log.info(
                "--minutes %g: the time is up after %s of %s steps, slower than foreseen",
                *(self.minutes, f"{made:,}", f"{schedule.steps:,}"),
            )
            return schedule._replace(last=made)
        if count == 0:
            self._began = self._now()
        if made != self._due:
            return schedule
        timed, self._validation_s = distributed.broadcast(
            lambda: (self._now() - self._began, self._validation_s)
        )
        if timed < TIMED_SECONDS and made + count < TIMED_SHARE * schedule.last:
            self._due += count
            return schedule
        self._step_s = timed / count
        if self.minutes is not None and until is None:
            schedule = distributed.broadcast(lambda: self._fill(schedule, made))
        total = duration(self.clock() + self._seconds(schedule, made))
        kernel = ", and the kernel CCA" if self.combines and self.minutes is None else ""
        self._announce(schedule, f", about {total} in all{kernel}")
        return schedule

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Time a validation, apart from the steps."""
        began = self._now()
        yield
        self._validation_s = self._now() - began
        self._began += self._validation_s

    def _fill(self, schedule: Schedule, made: int) -> Schedule:
        """Take as many steps as fit into the time, at most those of the schedule."""

        def of(steps: int) -> Schedule:
            return schedule._replace(steps=steps, last=steps)

        assert self.minutes is not None
        more, left = range(made + 2, schedule.steps + 1), 60 * self.minutes - self.clock()
        fit = bisect_right(more, MARGIN * left, key=lambda n: self._seconds(of(n), made))
        found = of(made + 1 + fit)
        if found.steps == schedule.steps:
            log.info("--minutes %g: at most %d epochs are taken", self.minutes, FULL_EPOCHS)
        if left < 0:
            text = "--minutes %g: %s have passed before the steps; takes only %d"
            log.warning(text, self.minutes, duration(self.clock()), found.steps)
        later = self._after + (self.networks - 1) * found.steps * self._step_s
        return found._replace(until=60 * self.minutes - later)

    def _seconds(self, schedule: Schedule, made: int) -> float:
        """Return the seconds that the command takes from here on."""
        steps = self.networks * schedule.steps - made
        validations = math.ceil((schedule.steps - made) / schedule.every)
        return steps * self._step_s + validations * self._validation_s + self._after

    @property
    def _after(self) -> float:
        """Seconds that are kept for a kernel CCA."""
        return 60 * (self.minutes or 0.0) * KERNEL_SHARE * self.combines

    def _announce(self, schedule: Schedule, estimate: str = "") -> None:
        steps = f"{schedule.steps:,} steps of {self._pairs:,} pairs"
        log.info("training on %s: %s%s", self._device, steps, estimate)

    def _now(self) -> float:
        """Return the time once the device has done what was asked of it."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return self.clock()
