"""Compare ways to bind two runs that share a side, by recall between sides that never met.

Usage::

    python tests/benchmarks/bind/bind.py SIDES --work DIR

SIDES has a folder for each corpus: NAME.npy for each side and items.csv, with columns item, split
and a 0-based row per side. Runs that are in DIR already are used again. Prints the numbers of
RESULTS.md.
"""

import argparse
import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

import csalign
from csalign.adapters.canonical import ClosedForm, PairMoments
from csalign.training.network.validation import measure

CORPORA = {"art": ("image", "title", "keywords"), "icons": ("mdi", "name", "hugeicons")}
MORE_TESTED = {"icons": 500}  # items with both sides, beside those of the split
RIDGES, TAUS = (0.1, 0.3, 1.0), (0.05, 0.1)
PARTS = {"h1": (0, 1), "h2": (2, 1), "joint": (0, 2), "test": (0, 2)}  # numbers of the sides

Rows = NDArray[np.float32]


def prepare(source: Path, out: Path, sides: tuple[str, str, str]) -> None:
    """Write the rows of two halves of the items, of all of them, and of the test items."""
    rows = [*csv.DictReader((source / "items.csv").open())]
    rng = np.random.default_rng(0)
    both = [row for row in rows if row[sides[0]] and row[sides[2]]]
    for place in rng.choice(len(both), MORE_TESTED.get(source.name, 0), replace=False):
        both[place]["split"] = "test"
    half = {item: rng.integers(2) for item in dict.fromkeys(row["item"] for row in rows)}
    out.mkdir(parents=True, exist_ok=True)
    for part, numbers in PARTS.items():
        own = [sides[number] for number in numbers]
        chosen = [
            row
            for row in rows
            if (row["split"] == "test") == (part == "test")
            and all(row[side] for side in own)
            and part in ("test", "joint", f"h{half[row['item']] + 1}")
        ]
        for side in own:
            values = np.load(source / f"{side}.npy", mmap_mode="r")
            np.save(out / f"{part}-{side}.npy", values[[int(row[side]) for row in chosen]])


def trained(folder: Path, part: str, sides: tuple[str, str, str]) -> csalign.Adapter:
    """Train with the defaults, unless the run is there."""
    run = folder / f"{part}-run"
    if not run.exists():
        one, other = (sides[number] for number in PARTS[part])
        arrays = [np.load(folder / f"{part}-{side}.npy") for side in (one, other)]
        features = folder / f"{part}-set"
        csalign.import_arrays(*arrays, names=f"{one},{other}", out=features, overwrite=True)
        csalign.train(features, run, seed=0)
    return csalign.load_adapter(run)


def unit(rows: Rows) -> Rows:
    """Normalise rows."""
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def fit(x: Rows, y: Rows) -> PairMoments:
    """Accumulate the moments of matched rows."""
    rows = np.arange(len(x))
    return PairMoments.of(x, y, (rows, rows), np.ones(len(x)))


def mapped(form: ClosedForm, rows: Rows) -> Rows:
    """Map rows from the space of the second run to that of the first."""
    return form.outputs(torch.from_numpy(rows), torch.zeros(1, len(form.text_mean)))[0].numpy()


def soft(query: Rows, keys: Rows, values: Rows, tau: float) -> Rows:
    """Average values by the softmax of cosines of their keys."""
    logits = query @ keys.T / tau
    weights = np.exp(logits - logits.max(1, keepdims=True))
    return unit(weights @ values)


def ways(x: Rows, y: Rows, own: Rows, targets: Rows, first: Rows, query: Rows) -> dict[str, Rows]:
    """Map queries in every way.

    Args:
        x, y: rows of the shared side in the space of the second run and of the first.
        own, targets: rows of the other side in its space, and their texts in that of the first.
        first: rows of the first run's other side.
        query: rows of the second run's other side.
    """
    shared, pairs, mean = fit(x, y), fit(own, targets), torch.from_numpy(own.mean(0))
    turned = shared.procrustes("text")
    away = replace(turned, image_mean=mean, image_bias=torch.from_numpy(first.mean(0)))
    forms = {"rotation": turned, "rotation, mean of the side": replace(turned, image_mean=mean)}
    forms |= {"rotation, means of both sides": away}
    forms |= {f"ridge {ridge}": shared.ridge("text", ridge) for ridge in RIDGES}
    for tau in TAUS:
        pseudo = fit(own, soft(own, x, y, tau))
        forms[f"pseudo pairs, tau {tau}: rotation"] = pseudo.procrustes("text")
        forms[f"pseudo pairs, tau {tau}: ridge 0.3"] = pseudo.ridge("text", 0.3)
    forms["pairs of the second run: rotation"] = pairs.procrustes("text")
    forms["pairs of the second run: ridge 0.3"] = pairs.ridge("text", 0.3)
    found = {name: mapped(form, query) for name, form in forms.items()}
    return found | {f"mean of similar texts, tau {tau}": soft(query, x, y, tau) for tau in TAUS}


def show(name: str, one: Rows, other: Rows, items: NDArray[np.int64]) -> None:
    """Print the mean recall between two sides of the test items, and its standard error."""
    rows = np.unique(items, return_index=True)[1]
    found = measure(unit(one)[rows], unit(other), items)
    error = found.recalls.std(ddof=1) / len(found.recalls) ** 0.5
    print(f"  {name:40} {100 * found.score.mean_recall:5.1f} ± {100 * error:.1f}")


def main() -> None:
    """Print recall of all ways, on all corpora, in both directions."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sides", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for corpus, sides in CORPORA.items():
        folder = options.work / corpus
        prepare(options.sides / corpus, folder, sides)
        runs = {part: trained(folder, part, sides) for part in ("h1", "h2", "joint")}
        load = {path.stem: np.load(path) for path in folder.glob("*.npy")}
        image, text, other = sides
        tested = [load[f"test-{side}"] for side in (image, other)]
        items = np.unique(tested[0], axis=0, return_inverse=True)[1].ravel()
        print(f"{corpus}: {items.max() + 1} test items")
        random = np.random.default_rng(0).normal(size=(2, len(items), 32))
        show("chance", *random, items)
        show("joint run", *map(runs["joint"].embed, csalign.Modality, tested), items)
        texts = np.unique(np.concatenate([load[f"h1-{text}"], load[f"h2-{text}"]]), axis=0)
        spaces = {"h1": image, "h2": other}
        for first, second in (("h1", "h2"), ("h2", "h1")):
            one, two = runs[first], runs[second]
            print(f" space of {spaces[first]} and {text}, {len(texts):,} shared rows")
            given = dict(zip(spaces, tested, strict=True))
            out = folder / f"bound-{first}"
            csalign.bind(*(folder / f"{p}-run" for p in (first, second)), out, overwrite=True)
            bound = csalign.load_adapter(out)
            own = [bound.embed(spaces[part], given[part]) for part in spaces]
            show("csalign bind", *own, items)
            found = ways(
                two.embed_texts(texts),
                one.embed_texts(texts),
                two.embed_images(load[f"{second}-{spaces[second]}"]),
                one.embed_texts(load[f"{second}-{text}"]),
                one.embed_images(load[f"{first}-{spaces[first]}"]),
                two.embed_images(given[second]),
            )
            for name, rows in found.items():
                both = {first: one.embed_images(given[first]), second: rows}
                show(name, both["h1"], both["h2"], items)


if __name__ == "__main__":
    main()
