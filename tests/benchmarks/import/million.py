"""An import of a million pairs: CPU seconds and memory, of arrays and of a captions table.

    python tests/benchmarks/import/million.py --work FOLDER [--rows 1000000] [--width 512]

Two .npy files of float16 are written once and kept in the work folder, with a CSV of captions. Each
import runs in a process of its own, whose CPU time and largest resident size are printed as one
JSON object per line.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

CHUNK = 50_000


def write_arrays(work: Path, rows: int, width: int) -> None:
    """Random images and texts, and a table of captions in another order than the texts."""
    rng = np.random.default_rng(0)
    for name in ("image", "text"):
        header = {"descr": "<f2", "fortran_order": False, "shape": (rows, width)}
        with (work / f"{name}.npy").open("wb") as file:  # a map would count as memory of children
            np.lib.format.write_array_header_1_0(file, header)
            for start in range(0, rows, CHUNK):
                shape = min(CHUNK, rows - start), width
                part = rng.standard_normal(shape, dtype=np.float32) * width**-0.5
                file.write(part.astype(np.float16).data)
    with (work / "pairs.csv").open("w") as table:
        table.write("text_id,image_id,caption\n")
        for row in rng.permutation(rows).tolist():
            table.write(f'{row},{row},"a picture, number {row}"\n')


def measure(work: Path, name: str, *options: str) -> None:
    """Import once, and print what it took."""
    out = work / "features"
    shutil.rmtree(out, ignore_errors=True)
    arrays = [str(work / "image.npy"), str(work / "text.npy")]
    command = [sys.executable, "-m", "csalign", "import", *arrays, *options, "--out", str(out)]
    process = subprocess.Popen(command)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{name}: exit status {status}")
    figures = {
        "import": name,
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 2),
        "user_seconds": round(usage.ru_utime, 2),
        "peak_mb": round(usage.ru_maxrss / 1024),
    }
    print(json.dumps(figures), flush=True)


def main() -> None:
    """Parse the command line and measure."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=512)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    if not (options.work / "pairs.csv").exists():
        write_arrays(options.work, options.rows, options.width)
    measure(options.work, "by row order")
    measure(options.work, "with --pairs", "--pairs", str(options.work / "pairs.csv"))


if __name__ == "__main__":
    main()
