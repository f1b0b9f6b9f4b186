"""Whether memory stays flat: resident size of ``csalign extract`` while it embeds many images.

    python tests/benchmarks/extract/memory.py --work DIR [--images 100000]

Writes WebDataset tars of small JPEG pictures with captions, and embeds them with a two-layer CLIP,
so that reading, decoding and writing are what takes the time.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

PICTURES_A_TAR = 10_000
MODEL = {
    "embed_dim": 512,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 20, "vocab_size": 49408, "width": 64, "heads": 4, "layers": 2},
}


def make_tars(folder: Path, images: int) -> None:
    """Write the tars, if they are not there yet."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for first in range(0, images, PICTURES_A_TAR):
        path = folder / f"{first // PICTURES_A_TAR:05d}.tar"
        if path.exists():
            continue
        with tarfile.open(path.with_suffix(".tmp"), "w") as tar:
            for number in range(first, min(images, first + PICTURES_A_TAR)):
                buffer = io.BytesIO()
                pixels = rng.integers(0, 256, (8, 8, 3), np.uint8)
                Image.fromarray(pixels).resize((64, 64)).save(buffer, "JPEG")
                caption = f"picture number {number}".encode()
                for suffix, data in (("jpg", buffer.getvalue()), ("txt", caption)):
                    member = tarfile.TarInfo(f"{number:09d}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
        path.with_suffix(".tmp").rename(path)


def resident() -> float:
    """Resident memory of this process, MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def main() -> None:
    """Embed the tars and print the memory every so often."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--images", type=int, default=100_000)
    options = parser.parse_args()
    tars = options.work / f"tars-{options.images}"
    make_tars(tars, options.images)
    model = options.work / "small-clip.json"
    model.write_text(json.dumps(MODEL))

    import csalign

    said = 0

    def progress(what: str, done: int, total: int | None) -> None:
        nonlocal said
        if what == "records" and done >= said:
            print(f"{done:>8} images  {resident():8.0f} MB", flush=True)
            said += options.images // 20

    csalign.extract(
        csalign.ExtractConfig(
            source=tars,
            encoder=f"open_clip:{model}/none",
            out=options.work / "memory-features",
            overwrite=True,
            device="cpu",
        ),
        progress,
    )
    print(f"     end         {resident():8.0f} MB")


if __name__ == "__main__":
    main()
