"""What csalign does on a GPU: equality with the CPU, and times. Prints one Markdown table.

python tests/benchmarks/cuda.py                        # within five minutes on a GPU
python tests/benchmarks/cuda.py --device cpu --small   # shows that it works, in a minute
"""

import argparse
import functools
import gc
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.remove(str(Path(__file__).parent))  # this file has the name of a package of NVIDIA's

import numpy as np
import open_clip
import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.utils._python_dispatch import TorchDispatchMode

import csalign
from csalign.adapters.model import Adapter
from csalign.adapters.side import SideShape
from csalign.core.enums import Modality
from csalign.encoders.base import EncoderOptions, load_encoders
from csalign.metrics.retrieval import rank_both_ways
from csalign.objective.loss import Objective
from csalign.training.config import DataOptions, TrainConfig
from csalign.training.data import load_data
from csalign.training.network.loop import Trainer
from csalign.training.work import Work

WIDTH, SCALE, SIGMA = 512, 7.0, 0.9
PRODUCTS = 7  # of B x B x WIDTH in a step of InfoNCE and CS in tiles
TILE = 4_096
PRECISIONS = ("float32", "TF32", "bfloat16")
Row = tuple[str, str, str]


class Uploads(TorchDispatchMode):
    """Sums the bytes that go from the host to a device."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        name = func._schema.name
        if name in ("aten::copy_", "aten::_to_copy") and found.device.type != "cpu":
            source = args[1] if name == "aten::copy_" else args[0]
            self.bytes += source.nbytes if source.device.type == "cpu" else 0
        return found


class Bench:
    """Runs and times on one device."""

    def __init__(self, device: str, small: bool) -> None:
        self.device, self.small = torch.device(device), small

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def seconds(self, call: Callable[[], Any], *, rounds: int = 5, warm: int = 2) -> list[float]:
        """Time a call, after some that are not counted; fewer rounds of what takes seconds."""
        found: list[float] = []
        for number in range(warm + rounds):
            self.wait()
            start = time.perf_counter()
            call()
            self.wait()
            taken = time.perf_counter() - start
            if number >= warm:
                found.append(taken)
            if sum(found) > 3:
                break
        return found

    def rows(self, count: int, width: int = WIDTH, seed: int = 0) -> Tensor:
        """Draw unit rows, the same on each device."""
        drawn = torch.randn(count, width, generator=torch.Generator().manual_seed(seed))
        return normalize(drawn, dim=1).to(self.device)

    def equality(self) -> Iterator[Row]:
        """Compare with the CPU."""
        count = 300 if self.small else 5_000
        values = []
        for bench in (Bench("cpu", self.small), self):
            x, y = (bench.rows(count, seed=seed).requires_grad_() for seed in (0, 1))
            total = Objective(weight=0.1)(x, y, logit_scale=SCALE, sigma=SIGMA).total
            total.backward()
            assert x.grad is not None
            values.append((total.detach().cpu(), x.grad.cpu()))
        (mine, gradient), (theirs, other) = values
        off = float((other - gradient).norm() / gradient.norm())
        yield (
            f"objective, B = {count:,}",
            "relative difference to the CPU",
            f"{float(abs(theirs / mine - 1)):.1e}, gradient {off:.1e}",
        )
        images, texts = (self.rows(count, 64, seed).cpu().numpy() for seed in (0, 1))
        owners = np.arange(count)
        ranks = [
            rank_both_ways(images, texts, owners, torch.device(d)) for d in ("cpu", self.device)
        ]
        equal = np.mean(ranks[0][0].first == ranks[1][0].first)
        yield f"ranks, {count:,} x {count:,}", "equal to the CPU's", f"{100 * equal:.2f} %"

    def steps(self) -> Iterator[Row]:
        """Time the objective, forth and back, beside ClipLoss and the bare products."""
        for count in (256, 1_024) if self.small else (1_024, 4_096, 16_384, 65_536):
            x, y = (self.rows(count, seed=seed).requires_grad_() for seed in (0, 1))
            for precision in PRECISIONS:
                allows = precision == "TF32"
                torch.backends.cuda.matmul.allow_tf32 = allows
                rounded = "bfloat16" if precision == "bfloat16" else "float32"
                ours = Objective(weight=0.1, precision=rounded)  # type: ignore[arg-type]
                calls = {
                    "InfoNCE + CS": functools.partial(self._step, ours, x, y),
                    "ClipLoss": functools.partial(self._clip_step, x, y, rounded),
                    f"{PRODUCTS} products": functools.partial(self._products, x, y, rounded),
                }
                base: float | None = None
                for name, call in calls.items():
                    found = self._or_memory(call)
                    if isinstance(found, str):
                        yield f"{name}, B = {count:,}, {precision}", "step", found
                        continue
                    middle = statistics.median(found)
                    base = base or middle
                    ratio = "" if name == "InfoNCE + CS" else f"; ours to it {base / middle:.2f}"
                    yield f"{name}, B = {count:,}, {precision}", "step", spread(found) + ratio
                gc.collect()
            torch.backends.cuda.matmul.allow_tf32 = False

    def _or_memory(self, call: Callable[[], Any]) -> list[float] | str:
        try:
            return self.seconds(call)
        except torch.OutOfMemoryError:
            return "out of memory"

    def _step(self, objective: Objective, x: Tensor, y: Tensor) -> None:
        x.grad = y.grad = None
        objective(x, y, logit_scale=SCALE, sigma=SIGMA).total.backward()

    def _clip_step(self, x: Tensor, y: Tensor, rounded: str) -> None:
        x.grad = y.grad = None
        enabled = rounded == "bfloat16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=enabled):
            open_clip.loss.ClipLoss()(x, y, torch.tensor(SCALE, device=self.device)).backward()

    def _products(self, x: Tensor, y: Tensor, rounded: str) -> None:
        dtype = torch.bfloat16 if rounded == "bfloat16" else torch.float32
        with torch.no_grad():
            a, b = x.to(dtype), y.to(dtype)
            for rows in torch.split(a, TILE):
                for columns in torch.split(b, TILE):
                    for _ in range(PRODUCTS):
                        rows @ columns.T

    def training(self, folder: Path) -> Iterator[Row]:
        """Time training steps of the default and of large batches, and count what is uploaded."""
        pairs = 2_000 if self.small else 200_000
        rng = np.random.default_rng(0)
        images, texts = (rng.normal(size=(pairs, w)).astype(np.float32) for w in (768, 512))
        np.save(folder / "images.npy", images)
        np.save(folder / "texts.npy", texts)
        features = folder / "features"
        csalign.import_arrays(
            images=folder / "images.npy", texts=folder / "texts.npy", out=features
        )
        for size in (256,) if self.small else (512, 4_096, 32_768):
            for precision in ("float32", "bfloat16"):
                trainer = self._trainer(features, size, precision)
                count = 5 if self.small else 50
                uploads = Uploads()
                found = self.seconds(
                    functools.partial(take_steps, trainer, count), rounds=3, warm=1
                )
                with uploads:
                    take_steps(trainer, count)
                rate = [size * count / own for own in found]
                low, high = min(rate), max(rate)
                what = f"training, batches of {size:,}, {precision}"
                yield what, "pairs/s", f"{statistics.median(rate):,.0f} ({low:,.0f}-{high:,.0f})"
                yield what, "bytes to the device per step", f"{uploads.bytes / count:,.0f}"

    def _trainer(self, features: Path, size: int, precision: str) -> Trainer:
        config = TrainConfig(
            features=features,
            out=features.parent / "run",
            batch_size=size,
            precision=precision,
            device=str(self.device),
            steps=1_000,
        )
        data = load_data(config.group(DataOptions), out=config.out, seed=0)
        widths = zip(Modality, (768, 512), strict=True)
        adapter = Adapter({side: SideShape("glu", width, 256) for side, width in widths})
        return Work(config, data, None).trainer(adapter)

    def extract(self) -> Iterator[Row]:
        """Time the forward pass of image encoders."""
        for name, side in (("test_vit", 160),) if self.small else (("vit_base_patch16_224", 224),):
            options = EncoderOptions(self.device, batch_size=32 if self.small else 256)
            encoder = load_encoders(f"timm:{name}+none", None, options).image
            assert encoder is not None
            pixels = torch.randn(encoder.batch_size, 3, side, side)
            found = self.seconds(functools.partial(encoder.embed, pixels))
            rate = [len(pixels) / own for own in found]
            value = f"{statistics.median(rate):,.0f} ({min(rate):,.0f}-{max(rate):,.0f})"
            yield f"extract, {name}, batches of {len(pixels)}", "images/s", value

    def evaluation(self) -> Iterator[Row]:
        """Time exact ranks both ways."""
        count = 2_000 if self.small else 100_000
        images, texts = (self.rows(count, 256, seed).cpu().numpy() for seed in (0, 1))
        owners = np.arange(count)
        call = functools.partial(rank_both_ways, images, texts, owners, self.device)
        yield (
            f"ranks, {count:,} x {count:,}, 256 wide",
            "both ways",
            spread(self.seconds(call, rounds=3, warm=1)),
        )


def take_steps(trainer: Trainer, count: int) -> None:
    for _ in range(count):
        trainer._train_step(next(trainer._loader))
    trainer.flush()


def spread(seconds: list[float]) -> str:
    """Show a median, lowest and highest."""
    low, middle, high = (
        f"{1000 * own:.4g}" for own in (min(seconds), statistics.median(seconds), max(seconds))
    )
    return f"{middle} ms ({low}-{high})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true", help="sizes for a minute on a CPU")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    if options.device == "cpu":
        torch.set_num_threads(1)
    bench, start = Bench(options.device, options.small), time.perf_counter()
    name = torch.cuda.get_device_name() if bench.device.type == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}, csalign {csalign.__version__}\n")
    print("| what | figure | median (lowest-highest) |\n| --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        parts = (
            *(bench.equality(), bench.steps(), bench.training(Path(folder))),
            *(bench.extract(), bench.evaluation()),
        )
        for part in parts:
            for row in part:
                print(f"| {' | '.join(row)} |", flush=True)
    print(f"\nIn {time.perf_counter() - start:.0f} s.")


if __name__ == "__main__":
    main()
