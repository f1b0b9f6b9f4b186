import subprocess
import sys

import pytest

from csalign.core.errors import Stopped

WAITING = """
import os, signal, sys, time
from csalign.core import signals
from csalign.core.errors import Stopped

signals.catch_signals(delay_s=float(sys.argv[1]))
try:
    with signals.delayed():
        with signals.delayed():  # an inner block must not end the delay of the outer one
            pass
        for _ in range(int(sys.argv[2])):
            os.kill(os.getpid(), signal.SIGTERM)
            print("on", flush=True)
        time.sleep(float(sys.argv[3]))
        print("whole", flush=True)
except Stopped as stopped:
    print("stopped", stopped.exit_code)
with signals.delayed():
    print("after")
time.sleep(float(sys.argv[4]))
"""


@pytest.mark.parametrize(
    ("patience", "signals", "seconds", "rest", "said"),
    [
        (600, 1, 0, 0, "on whole stopped 143 after"),  # it waits for the end of the block
        (600, 2, 0, 0, "on stopped 143 after"),  # but a second one does not
        (3, 1, 600, 0, "on stopped 143 after"),  # nor does it wait long
        (3, 1, 0, 4, "on whole stopped 143 after"),  # and it comes no more after the block
        (600, 0, 0, 0, "whole after"),
    ],
)
def test_a_signal_waits_for_what_must_not_be_left_half_done(
    patience: float, signals: int, seconds: float, rest: float, said: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WAITING, *map(str, (patience, signals, seconds, rest))],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )

    assert done.stdout.split() == said.split(), done.stderr
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("number", "resumes", "said", "code"),
    [
        (2, False, "Interrupted", 130),
        (2, True, "Interrupted; run the same command to resume", 130),
        (15, True, "stopped by SIGTERM; run the same command to resume", 143),
    ],
)
def test_a_stop_says_whether_the_command_resumes(
    number: int, resumes: bool, said: str, code: int
) -> None:
    stopped = Stopped(number)
    stopped.resumes = resumes

    assert (str(stopped), stopped.exit_code) == (said, code)
