import subprocess
import sys

import pytest

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
time.sleep(0.3)
"""


@pytest.mark.parametrize(
    ("patience", "signals", "seconds", "said"),
    [
        (60, 1, 0, "on whole stopped 143 after"),  # it waits for the end of the block
        (60, 2, 0, "on stopped 143 after"),  # but a second one does not
        (0.1, 1, 60, "on stopped 143 after"),  # nor does it wait long
        (0.2, 1, 0, "on whole stopped 143 after"),  # and it comes no more after the block
        (60, 0, 0, "whole after"),
    ],
)
def test_a_signal_waits_for_what_must_not_be_left_half_done(
    patience: float, signals: int, seconds: float, said: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WAITING, str(patience), str(signals), str(seconds)],
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )

    assert done.stdout.split() == said.split(), done.stderr
    assert done.stderr == ""
