"""How long the complete command ``csalign eval`` takes, against its ranking.

    python tests/benchmarks/eval/command.py [--rounds 3] [--images 5000] [--captions 5] [--peer]

The set has 512 columns: images in 100 clusters, and texts that are their images with noise and an
offset. In alternated rounds, each in a new process of one thread: the command with and without
intervals; `rank_both_ways` alone; the same by ``torch.mm``, MKL, as the command multiplied before;
and with --peer the function of the installed CLIP_benchmark. CPU seconds (user and system) and peak
memory of the process. RESULTS.md has the results.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import ranks
import torch
from torch import Tensor
from torch.nn.functional import normalize

from csalign.features.arrays import write_arrays
from csalign.metrics import retrieval


def rows(images: int, captions: int) -> tuple[Tensor, Tensor, Tensor]:
    """Unit rows of both sides, and the image of each text."""
    torch.manual_seed(0)
    centres = torch.randn(100, ranks.WIDTH)
    x = centres[torch.randint(100, (images,))] + torch.randn(images, ranks.WIDTH)
    owners = torch.arange(images).repeat_interleave(captions)
    y = torch.randn(len(owners), ranks.WIDTH).mul_(6).add_(x[owners]).add_(centres[0])
    return normalize(x), normalize(y), owners


def run(case: str, images: int, captions: int) -> None:
    """Run a ranking in this process, and print its CPU seconds."""
    if case == "ranking by MKL":
        retrieval.product = lambda a, b: a @ b.T
    data = rows(images, captions)
    function = ranks.clip_benchmark if case == "CLIP_benchmark" else ranks.ours
    function(*(own[:64] for own in data[:2]), torch.arange(64))  # loads what is loaded once
    start = time.process_time()
    function(*data)
    print(time.process_time() - start)


def measured(case: str, folder: Path, *sizes: str) -> tuple[float, float]:
    """CPU seconds and peak memory, MB, of a case in a new process."""
    is_command = case.startswith("command")
    command = [sys.executable, __file__, "--case", case, *sizes]
    if is_command:
        command = [sys.executable, "-m", "csalign", "eval", str(folder), "--json"]
        command += ["--no-intervals"] * case.endswith("without intervals")
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(write, 1)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        os.execve(sys.executable, command, os.environ | {"OMP_NUM_THREADS": "1"})
    os.close(write)
    with os.fdopen(read) as output:
        printed = output.read()
    _, status, used = os.wait4(child, 0)
    if status:
        raise SystemExit(f"{case}: failed with status {status}")
    seconds = used.ru_utime + used.ru_stime if is_command else float(printed)
    return seconds, used.ru_maxrss / 1e3


def main() -> None:
    """Print the medians and spreads of all cases, and their ratios to the rankings by round."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=5_000)
    parser.add_argument("--captions", type=int, default=5)
    parser.add_argument("--peer", action="store_true")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        run(options.case, options.images, options.captions)
        return
    cases = ["command", "command without intervals", "ranking", "ranking by MKL"]
    cases += ["CLIP_benchmark"] * options.peer
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder, "set")
        x, y, owners = rows(options.images, options.captions)
        write_arrays(place, x.numpy(), y.numpy(), owners.numpy())
        del x, y
        sizes = ["--images", str(options.images), "--captions", str(options.captions)]
        found: dict[str, list[tuple[float, float]]] = {case: [] for case in cases}
        for _ in range(options.rounds):
            for case in cases:
                found[case].append(measured(case, place, *sizes))
                print(f"{case}: {found[case][-1][0]:.2f} s", flush=True)
    for case, results in found.items():
        cpu, memory = np.array(results).T
        print(f"{case:26} {np.median(cpu):7.2f} s ({min(cpu):.2f}-{max(cpu):.2f})", end="")
        for base in ("ranking", "ranking by MKL"):
            ratios = cpu / np.array(found[base])[:, 0]
            print(f"  x{np.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})", end="")
        print(f"  {max(memory):6.0f} MB")


if __name__ == "__main__":
    main()
