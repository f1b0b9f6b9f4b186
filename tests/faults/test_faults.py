"""A small share of the trials that tests/benchmarks/faults/harness.py makes by the hundred."""

import errno
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from csalign.cli.app import app
from csalign.core import atomic, locks, outputs
from csalign.core.errors import OutputError
from csalign.features.schema import ENTRIES
from tests.faults.damage import Damage
from tests.faults.disk import Machine, Mode, Plan
from tests.faults.trials import COMMANDS, Trials, make_inputs


@pytest.mark.skipif(
    not sys.platform.startswith("linux") or shutil.which("cc") is None,
    reason="the disk that fails by plan is written in C, for Linux",
)
def test_no_fault_loses_anything_or_makes_it_wrong(tmp_path: Path) -> None:
    chance = random.Random(0)
    (tmp_path / "root").mkdir()
    troubles = []
    with Machine(tmp_path / "machine", tmp_path / "root") as machine:
        inputs = make_inputs(tmp_path / "inputs", machine)
        for command in COMMANDS:
            trials = Trials(machine, inputs, command)
            at = chance.randint(1, len(trials.steps(over=True)))
            trials.kill(Plan(Mode.TORN, at), over=True)
            at = chance.randint(1, len(trials.steps(over=False)))
            trials.refuse(Plan(Mode.FAIL_ONCE, at, errno.EIO), over=False)
            Damage(trials, chance).run(1)
            assert sum(counts["trials"] for counts in trials.counts.values()) == 3
            troubles += trials.troubles

    assert troubles == []


@pytest.fixture
def full(tmp_path: Path) -> Iterator[Path]:
    """A disk of 160 kB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=160k", "tmpfs", folder], check=False)
    if made.returncode != 0:
        pytest.skip("no disk can be mounted here")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_full_disk_leaves_what_was_there_and_nothing_else(full: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.ones((500, 4), np.float32))
    np.save(tmp_path / "b.npy", np.random.default_rng(0).random((500, 400)).astype(np.float32))
    run = CliRunner().invoke
    out = full / "out"
    first = run(app, ["import", "--images", f"{tmp_path / 'a.npy'}", "--out", f"{out}"])
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    second = run(
        app, ["import", "--images", f"{tmp_path / 'b.npy'}", "--out", f"{out}", "--overwrite"]
    )

    assert first.exit_code == 0, first.output
    assert second.exit_code == 1
    assert "part-00000.parquet: No space left on device; free some space" in second.output
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert [path.name for path in full.iterdir()] == ["out"]


def test_a_page_sweeps_away_what_dead_processes_left_of_it_and_nothing_else(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    dead, alive = (tmp_path / f".page.html.{digit * 12}.tmp" for digit in "ab")
    other = tmp_path / ".page.html.mine.tmp"
    for path in (dead, alive, other):
        path.write_text("half")
    holder = subprocess.Popen(
        [sys.executable, "-c", "import fcntl, sys; f = open(sys.argv[1]); "
         "fcntl.flock(f, fcntl.LOCK_EX); print(flush=True); sys.stdin.read()", alive],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )  # fmt: skip
    assert holder.stdout is not None
    holder.stdout.readline()
    atomic.remove_stale_temporaries(page)
    left = {path.name for path in tmp_path.iterdir()}
    holder.communicate()

    assert left == {alive.name, other.name}


def test_what_marks_a_folder_as_ours_is_removed_last(tmp_path: Path) -> None:
    folder = tmp_path / "out.partial"
    (folder / "images").mkdir(parents=True)
    (folder / locks.LOCK).touch()
    (folder / "images" / "x").touch()
    seen: list[str] = []

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        if event in ("os.remove", "os.rmdir") and watching:
            seen.append(Path(str(arguments[0])).name)

    watching = True
    sys.addaudithook(watch)  # which cannot be taken back
    outputs.cleanup(folder)
    watching = False

    assert not folder.exists()
    assert seen[-2:] == [locks.LOCK, folder.name]


def test_a_folder_killed_at_its_last_step_can_be_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "manifest.json").write_text('{"format": "csalign-features"}')
    (out / locks.LOCK).touch()
    with pytest.raises(OutputError, match="exists; choose another --out"):
        outputs.check_output(out, ENTRIES, overwrite=False)
    outputs.check_output(out, ENTRIES, overwrite=True)
    with outputs.atomic_folder(out) as folder:
        (folder / "new").touch()

    assert [path.name for path in tmp_path.rglob("*")] == ["out", "new"]


def test_an_artifact_that_happens_to_be_called_partial_is_left_alone(tmp_path: Path) -> None:
    partial = tmp_path / "out.partial"
    partial.mkdir()
    (partial / "manifest.json").write_text('{"format": "csalign-features"}')
    with pytest.raises(OutputError, match="csalign did not make it; move it"):
        outputs.check_output(tmp_path / "out", ENTRIES, overwrite=True)


def test_a_result_that_cannot_be_printed_is_a_failure(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.ones((3, 4), np.float32))
    arguments = ["import", "--images", str(tmp_path / "a.npy"), "--out", str(tmp_path / "out")]
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "csalign", *arguments],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )

    assert done.returncode == 1
    assert "csalign: stdout: No space left on device; free some space\n" in done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.ENOTCONN])
def test_a_disk_that_went_away_is_named(tmp_path: Path, number: int) -> None:
    with (
        pytest.raises(OutputError, match=r"x: .*; check the disk and its mount"),
        atomic.translate_os_errors(tmp_path / "x"),
    ):
        raise OSError(number, "said by a library")
