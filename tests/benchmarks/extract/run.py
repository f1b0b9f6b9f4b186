"""How fast ``csalign extract`` is, against what it could be and what else there is.

    python tests/benchmarks/extract/run.py --work DIR [--images 256] [--captions 2048] [--rounds 3]
        [--cpu 0] [--clip-retrieval PYTHON] [--json FILE]

All cases embed the same images and captions with the same random weights (speed does not depend on
them), each in a process of its own pinned to one core, taking turns, so that a noisy machine hits
all of them. Rates count from the first to the last item; "whole" is the process from start to end.

Images: the bare forward pass of open_clip on preloaded tensors; the same through csalign's encoder;
a DataLoader with open_clip; ``clip-retrieval inference`` if PYTHON has it (it needs setuptools<70);
``csalign extract``. Captions: open_clip's tokenizer and text tower in batches of 64; csalign.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

MODEL = "ViT-B-32"
WORDS = """
a photo of two small brown dogs that run over the wet grass behind an old red barn while the sun
sets over quiet hills and somebody on a bicycle waves to them from the road
"""


def make_inputs(work: Path, images: int, captions: int) -> None:
    """Write pictures, captions and the weights, if they are not there yet."""
    import numpy as np
    import open_clip
    import safetensors.torch
    import torch
    from PIL import Image, ImageFilter

    folder = work / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(images):
        path = folder / f"{number:06d}.png"
        if not path.exists():
            pixels = np.random.default_rng(number).integers(0, 256, (256, 256, 3), np.uint8)
            Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(4)).save(path)
    rng = np.random.default_rng(0)
    lengths = rng.integers(5, 21, captions)
    lines = [" ".join(rng.choice(WORDS.split(), length)) for length in lengths]
    (work / "captions.txt").write_text("\n".join(lines) + "\n")
    weights = work / f"{MODEL}.safetensors"
    if not weights.exists():
        torch.manual_seed(0)
        network = open_clip.create_model(MODEL, pretrained=None)
        safetensors.torch.save_file(network.state_dict(), weights)
        torch.save(network.state_dict(), weights.with_suffix(".pt"))


def _network(work: Path) -> tuple[Any, Any]:
    import open_clip

    network, _, transform = open_clip.create_model_and_transforms(
        MODEL, pretrained=str(work / f"{MODEL}.safetensors")
    )
    return network.eval(), transform


def _pictures(work: Path, images: int) -> list[Path]:
    return sorted((work / "pictures").iterdir())[:images]


def _pixels(work: Path, images: int, transform: Callable[..., Any]) -> Any:
    import torch
    from PIL import Image

    paths = _pictures(work, images)
    return torch.stack([transform(Image.open(path).convert("RGB")) for path in paths])


def _timed_batches(embed: Callable[..., Any], items: Any, size: int) -> float:
    embed(items[:size])  # warm
    began = time.perf_counter()
    for start in range(0, len(items), size):
        embed(items[start : start + size])
    return time.perf_counter() - began


def forward(work: Path, images: int, captions: int) -> float:
    """open_clip alone, on tensors that are already there."""
    import torch

    network, transform = _network(work)
    pixels = _pixels(work, images, transform)
    with torch.inference_mode():
        return _timed_batches(network.encode_image, pixels, 32)


def _encoders(work: Path, precision: str = "float32") -> Any:
    import torch

    from csalign.encoders.base import EncoderOptions, load_encoders

    spec = f"open_clip:{MODEL}+{work / MODEL}.safetensors"
    return load_encoders(spec, spec, EncoderOptions(torch.device("cpu"), precision))


def encoder(work: Path, images: int, captions: int) -> float:
    """csalign's encoder, on tensors that are already there."""
    image = _encoders(work).image
    import torch
    from PIL import Image

    pixels = torch.stack(
        [image.preprocess(Image.open(path).convert("RGB")) for path in _pictures(work, images)]
    )
    return _timed_batches(image.embed, pixels, 32)


def loader(work: Path, images: int, captions: int) -> float:
    """The loop that people write: a DataLoader and open_clip."""
    import numpy as np
    import torch
    from PIL import Image
    from torch.utils.data import DataLoader, Dataset

    network, transform = _network(work)
    paths = _pictures(work, images)

    class Pictures(Dataset[Any]):
        def __len__(self) -> int:
            return len(paths)

        def __getitem__(self, index: int) -> Any:
            return transform(Image.open(paths[index]).convert("RGB"))

    began = time.perf_counter()
    with torch.inference_mode():
        rows = [network.encode_image(batch).numpy() for batch in DataLoader(Pictures(), 32)]
    np.save(work / "loader.npy", np.concatenate(rows).astype(np.float16))
    return time.perf_counter() - began


def text_loop(work: Path, images: int, captions: int) -> float:
    """Captions through open_clip, in batches of 64 of the full context length."""
    import open_clip
    import torch

    network, _ = _network(work)
    tokenizer = open_clip.get_tokenizer(MODEL)
    lines = (work / "captions.txt").read_text().splitlines()[:captions]
    with torch.inference_mode():
        return _timed_batches(lambda batch: network.encode_text(tokenizer(batch)), lines, 64)


def _extract(work: Path, source: Path, side: str, precision: str = "float32") -> float:
    import csalign

    times: list[tuple[float, int]] = []

    def progress(what: str, done: int, total: int | None) -> None:
        times.append((time.perf_counter(), done))

    other = "text" if side == "image" else "image"
    began = time.perf_counter()
    options: dict[str, Any] = {
        "source": source,
        "out": work / f"features-{side}",
        "overwrite": True,
        f"{side}_encoder": f"open_clip:{MODEL}+{work / MODEL}.safetensors",
        f"{other}_encoder": "none",
        "precision": precision,
        "device": "cpu",
    }
    csalign.extract(csalign.ExtractConfig(**options), progress)
    # From the first batch on, which leaves loading out, to the very end, which keeps writing in.
    (first, done), end = times[0], time.perf_counter()
    print(f"whole call {end - began:.1f} s", file=sys.stderr)
    return (end - first) * times[-1][1] / (times[-1][1] - done)


def extract(work: Path, images: int, captions: int) -> float:
    """``csalign extract`` on the folder."""
    return _extract(work, work / f"pictures-{images}", "image")


def extract_bf16(work: Path, images: int, captions: int) -> float:
    """The same with bfloat16 weights."""
    return _extract(work, work / f"pictures-{images}", "image", "bfloat16")


def extract_texts(work: Path, images: int, captions: int) -> float:
    """``csalign extract`` on the captions."""
    return _extract(work, work / f"captions-{captions}.txt", "text")


IMAGE_CASES = (forward, encoder, loader, extract, extract_bf16)
TEXT_CASES = (text_loop, extract_texts)
CASES = {case.__name__: case for case in (*IMAGE_CASES, *TEXT_CASES)}


def clip_retrieval(python: Path, work: Path, images: int, cpu: int) -> tuple[float, float]:
    """Run ``clip-retrieval inference``; its own figure of the rate is not kept, so none is given.

    Returns:
        Seconds of the whole process, and of the part that embeds as its statistics tell.
    """
    out = work / "clip-retrieval"
    began = time.perf_counter()
    command = [str(python.parent / "clip-retrieval"), "inference"]
    command += ["--input_dataset", str(work / f"pictures-{images}"), "--output_folder", str(out)]
    command += ["--clip_model", f"open_clip:{MODEL}/{work / MODEL}.pt", "--enable_text", "False"]
    command += ["--batch_size", "32", "--num_prepro_workers", "1", "--enable_wandb", "False"]
    _pinned(command, cpu)
    whole = time.perf_counter() - began
    stats = json.loads(next((out / "stats").glob("*.json")).read_text())
    return whole, stats["end_time"] - stats["start_time"]


def _pinned(command: list[str], cpu: int) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        ["taskset", "-c", str(cpu), *command],
        env=environment,
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    return done.stdout


def _subset(work: Path, images: int, captions: int) -> None:
    folder = work / f"pictures-{images}"
    folder.mkdir(exist_ok=True)
    for path in _pictures(work, images):
        link = folder / path.name
        if not link.exists():
            os.link(path, link)
    lines = (work / "captions.txt").read_text().splitlines()[:captions]
    (work / f"captions-{captions}.txt").write_text("\n".join(lines) + "\n")


def main() -> None:
    """Run all cases in alternation and print their medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--captions", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cpu", type=int, default=0)
    parser.add_argument("--clip-retrieval", type=Path, help="a Python that has it installed")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--case", choices=CASES)
    options = parser.parse_args()
    work, counts = options.work, (options.images, options.captions)
    if options.case:
        print(json.dumps(CASES[options.case](work, *counts)))
        return
    make_inputs(work, *counts)
    _subset(work, *counts)
    rates: dict[str, list[float]] = {}
    wholes: dict[str, list[float]] = {}
    for _ in range(options.rounds):
        for name, case in CASES.items():
            command = [sys.executable, __file__, "--work", str(work), "--case", name]
            command += ["--images", str(counts[0]), "--captions", str(counts[1])]
            began = time.perf_counter()
            seconds = float(_pinned(command, options.cpu))
            wholes.setdefault(name, []).append(time.perf_counter() - began)
            items = counts[1] if case in TEXT_CASES else counts[0]
            rates.setdefault(name, []).append(items / seconds)
            print(f"{name}: {rates[name][-1]:.2f}/s", flush=True)
        if options.clip_retrieval:
            whole, seconds = clip_retrieval(options.clip_retrieval, work, counts[0], options.cpu)
            wholes.setdefault("clip_retrieval", []).append(whole)
            rates.setdefault("clip_retrieval", []).append(counts[0] / seconds)
            print(f"clip_retrieval: {rates['clip_retrieval'][-1]:.2f}/s", flush=True)
    report = {}
    for name, values in rates.items():
        middle = statistics.median(values)
        base = statistics.median(rates["text_loop" if "text" in name else "loader"])
        report[name] = {
            "per_second": middle,
            "low": min(values),
            "high": max(values),
            "to_the_loop": middle / base,
            "whole_seconds": statistics.median(wholes[name]),
        }
        print(
            f"{name:>16} {middle:8.2f}/s ({min(values):.2f} to {max(values):.2f})  "
            f"{middle / base:5.2f} x the loop, whole {report[name]['whole_seconds']:.0f} s"
        )
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
