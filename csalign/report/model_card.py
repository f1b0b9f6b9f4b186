"""The model card of an exported adapter: Markdown with YAML in front, as model hubs read it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# JSON is YAML, so what stands in a name can break neither.
_TAGS = ("csalign", "cross-modal-retrieval", "embeddings", "alignment", "cs-aligner")

_LOAD = {
    "onnx": """import numpy as np, onnxruntime

session = onnxruntime.InferenceSession("text.onnx")     # image.onnx likewise
(aligned,) = session.run(None, {"embeddings": embeddings})     # float32 (n, d) -> unit rows""",
    "torch-export": """import torch

program = torch.export.load("text.pt2").module()     # image.pt2 likewise; needs torch alone
aligned = program(embeddings)     # float32 (n, d) -> unit rows""",
    "safetensors": """import csalign

adapter = csalign.load_adapter("FOLDER")     # or ("user/name", hub=True)
aligned = adapter.embed(csalign.Modality.TEXT, embeddings)     # (n, d) array -> unit rows
model = csalign.wrap(open_clip_model, "FOLDER")     # encode_image, encode_text""",
}


_USE = """Retrieval across the two sides, and other uses of nearness in the shared space. The inputs
have to be embeddings of exactly the encoders above, made as they were for training; raw or
normalised makes no difference. The figures below hold for data like that it was trained on; measure
it on your own with `csalign eval`. What encoders and training pairs know of the world, biases
included, is in the space too."""


@dataclass(frozen=True)
class Side:
    """What is told of one side's adapter.

    Attributes:
        name: of the side.
        kind: of the adapter.
        encoder: what its inputs are made by.
        width: of an input.
        parameters: how many it has.
    """

    name: str
    kind: str
    encoder: str
    width: int
    parameters: int


@dataclass(frozen=True)
class Card:
    """What a model card tells.

    Attributes:
        name: of the adapter.
        form: a key of `_LOAD`.
        sides: of the adapter.
        width: of the shared space.
        facts: of the training, by name.
        settings: that it was trained with.
        validation: figures on the validation split while it was trained.
        evaluation: of ``csalign eval --json``, or None.
        checks: what the export was compared on, and the largest difference there.
    """

    name: str
    form: str
    sides: Sequence[Side]
    width: int
    facts: Mapping[str, str]
    settings: Mapping[str, Any]
    validation: Mapping[str, float]
    evaluation: Mapping[str, Any] | None
    checks: Mapping[str, float]


def model_card(card: Card) -> str:
    """The card as text."""
    sides = [
        [side.name, side.kind, f"{side.width}", f"{side.parameters:,}", side.encoder]
        for side in card.sides
    ]
    parts = [
        _front(card),
        f"# {_line(card.name)}",
        "Adapters that map the embeddings of two frozen encoders into one space of width "
        f"{card.width}, where what belongs together is near by cosine. Trained with "
        "InfoNCE and the Cauchy-Schwarz divergence by csalign.",
        _table(["side", "kind", "input width", "parameters", "inputs are made by"], sides),
        "## Intended use",
        _USE,
        "## How to load",
        f"```python\n{_LOAD[card.form]}\n```",
        "## Training",
        _table(["", ""], [[name, value] for name, value in card.facts.items()]),
    ]
    if card.settings:
        rows = [[name, json.dumps(value)] for name, value in card.settings.items()]
        parts += ["<details><summary>Settings</summary>", _table(["key", "value"], rows)]
        parts += ["</details>"]
    if card.validation or card.evaluation is not None:
        parts.append("## Figures")
    if card.validation:
        rows = [[name.replace("_", " "), f"{value:.4f}"] for name, value in card.validation.items()]
        parts.append(_table(["on the validation split, which chose these weights", ""], rows))
    if card.evaluation is not None:
        parts += _evaluation(card.evaluation)
    rows = [[what, f"{value:.1e}"] for what, value in card.checks.items()]
    parts += ["## Checked", _table(["largest difference from the run on", ""], rows)]
    return "\n\n".join(parts) + "\n"


def _front(card: Card) -> str:
    front: dict[str, Any] = {
        "library_name": "csalign",
        "pipeline_tag": "feature-extraction",
        "tags": _TAGS,
    }
    if card.evaluation is not None:
        data = {"name": str(card.evaluation["features"]), "type": "features"}
        figures = [
            {"type": f"{direction}_{figure}", "value": value}
            for direction, figure, value in _figures(card.evaluation)
        ]
        task = {"type": "cross-modal-retrieval"}
        result = {"task": task, "dataset": data, "metrics": figures}
        front["model-index"] = [{"name": card.name, "results": [result]}]
    lines = [f"{key}: {json.dumps(value)}" for key, value in front.items()]
    return "\n".join(["---", *lines, "---"])


def _evaluation(document: Mapping[str, Any]) -> list[str]:
    counts = document["counts"]
    title = f"split {document['split']}, {counts['images']:,} images and {counts['texts']:,} texts"
    rows = [
        [f"{direction.replace('_', ' ')} {figure}", f"{value:.4f}"]
        for direction, figure, value in _figures(document)
    ]
    gap = document["gap"]
    rows += [
        [name.replace("_", " "), f"{gap[name]:.4f}"]
        for name in ("centroid_distance", "rmg", "cs_divergence", "frechet")
    ]
    return [_table([title, ""], rows)]


def _figures(document: Mapping[str, Any]) -> list[tuple[str, str, float]]:
    retrieval = document["retrieval"]
    return [
        (direction, figure, retrieval[direction][figure])
        for direction in ("image_to_text", "text_to_image")
        for figure in ("R@1", "R@5", "R@10", "mrr")
    ]


def _table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(text: str) -> str:
    return _line(text).replace("|", "\\|")


def _line(text: str) -> str:
    """Text that stays text, on one line, in Markdown that may hold HTML."""
    return " ".join(str(text).split()).replace("&", "&amp;").replace("<", "&lt;")
