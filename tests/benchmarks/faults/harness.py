"""Kills, write errors and damage, over and over: ``python harness.py --work DIR``.

Each trial makes one fault in one command, runs the command again without it, and compares the
result with that of a run without faults. Prints a table of commands and faults::

    trials      made
    recovered   of these: nothing was lost or wrong, before the rerun and after it
    lost        an older output, or the way to a new one
    wrong       another result, exit code or message than there should be, or something left behind
"""

import argparse
import errno
import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3]))

from tests.faults.damage import Damage
from tests.faults.disk import Machine, Mode, Plan
from tests.faults.trials import COMMANDS, ERRORS, VANISHED, Trials, make_inputs

KINDS = ("kill", "write error", "damage")


def main() -> int:
    """Make the trials and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, required=True, help="folder for all files")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--writes", type=int, default=100)
    parser.add_argument("--corruptions", type=int, default=100)
    parser.add_argument("--commands", nargs="*", default=COMMANDS)
    parser.add_argument("--alone", type=int, default=20, help="each so manieth in a new process")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    chance = random.Random(given.seed)
    work = given.work / f"faults-{time.time_ns()}"
    (work / "root").mkdir(parents=True)
    troubles = []
    lines = []
    with Machine(work / "machine", work / "root") as machine:
        inputs = make_inputs(work / "inputs", machine)
        for command in given.commands:
            began = time.monotonic()
            trials = Trials(machine, inputs, command)
            share = len(given.commands)
            kill(trials, -(-given.kills // share), given.alone, chance)
            refuse(trials, -(-given.writes // share), given.alone, chance)
            Damage(trials, chance).run(-(-given.corruptions // share))
            troubles += trials.troubles
            for kind in KINDS:
                counts = trials.counts.get(kind, {})
                lines.append((command, kind, *counts.values()))
            for trouble in trials.troubles:
                print(f"! {trouble}", flush=True)
            print(f"# {command}: {time.monotonic() - began:.0f} s", flush=True)
    print(f"\n{'command':8} {'fault':12} {'trials':>7} {'recovered':>10} {'lost':>5} {'wrong':>6}")
    for command, kind, *counts in lines:
        if counts:
            made, recovered, lost, wrong = counts
            print(f"{command:8} {kind:12} {made:7} {recovered:10} {lost:5} {wrong:6}")
    return bool(troubles)


def kill(trials: Trials, count: int, alone: int, chance: random.Random) -> None:
    """Kill before, in and after operations, and at moments between them."""
    for number in range(count):
        over = chance.random() < 0.5
        if number % 4 == 3:
            trials.kill_after(chance.uniform(0, trials.seconds), over=over)
            continue
        mode = (Mode.KILL_BEFORE, Mode.TORN, Mode.KILL_AFTER)[number % 4]
        at = chance.randint(1, len(trials.steps(over=over)))
        trials.kill(Plan(mode, at), over=over, alone=number % alone == alone - 2)


def refuse(trials: Trials, count: int, alone: int, chance: random.Random) -> None:
    """Let single operations fail, the disk become full, read-only, or vanish."""
    for number in range(count):
        over = number % 2 == 0
        steps = trials.steps(over=over)
        # Evenly spread, each at random within its share.
        at = 1 + int(len(steps) * (number + chance.random()) / count)
        kind = steps[at - 1][0]
        if number % 4 == 1:
            at = chance.randint(1, len(trials.steps(over=over, room=True)))
            plan = Plan(Mode.FULL, at, errno.ENOSPC)
        elif number % 4 == 3:
            plan = Plan(Mode.FAIL_ON, at, chance.choice([errno.EROFS, *VANISHED]))
        else:
            plan = Plan(Mode.FAIL_ONCE, at, chance.choice(ERRORS[kind]))
        trials.refuse(plan, over=over, alone=number % alone == alone - 2)


if __name__ == "__main__":
    sys.exit(main())
