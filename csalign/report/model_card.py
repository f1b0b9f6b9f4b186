"""The model card of an exported adapter: Markdown with YAML in front, as model hubs read it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined


@dataclass(frozen=True)
class Side:
    """One side of an adapter: its kind, the encoder and width of its inputs, its parameters."""

    name: str
    kind: str
    encoder: str
    width: int
    parameters: int


@dataclass(frozen=True)
class Card:
    """The content of a model card.

    Attributes:
        name: of the adapter.
        form: "onnx", "torch-export" or "safetensors".
        sides: of the adapter.
        width: of the shared space.
        facts: of the training, by name.
        settings: of the training.
        validation: results on the validation split during training.
        evaluation: a document of ``csalign eval --json``, or None.
        checks: largest difference between run and export, by the data compared on.
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
    """Render a card."""
    # Markdown, where autoescaping would show; `line` escapes what a user named.
    templates = Environment(
        loader=PackageLoader("csalign.report"),
        trim_blocks=True,
        keep_trailing_newline=True,
        undefined=StrictUndefined,
    )
    # JSON is YAML, so that no name can break the front matter.
    templates.filters |= {"json": json.dumps, "line": _escape_line, "cell": _escape_cell}
    front: dict[str, Any] = {
        "library_name": "csalign",
        "pipeline_tag": "feature-extraction",
        "tags": ["csalign", "cross-modal-retrieval", "embeddings", "alignment", "cs-aligner"],
    }
    recalls = []
    if card.evaluation is not None:
        retrieval = card.evaluation["retrieval"]
        recalls = [
            (direction, name, retrieval[direction][name])
            for direction in ("image_to_text", "text_to_image")
            for name in ("R@1", "R@5", "R@10", "mrr")
        ]
        result = {
            "task": {"type": "cross-modal-retrieval"},
            "dataset": {"name": str(card.evaluation["features"]), "type": "features"},
            "metrics": [
                {"type": f"{direction}_{name}", "value": value}
                for direction, name, value in recalls
            ],
        }
        front["model-index"] = [{"name": card.name, "results": [result]}]
    template = templates.get_template("model_card.md")
    return template.render(card=card, front=front, recalls=recalls)


def _escape_line(text: str) -> str:
    """Escape text for one line of Markdown, which may contain HTML."""
    return " ".join(str(text).split()).replace("&", "&amp;").replace("<", "&lt;")


def _escape_cell(text: str) -> str:
    return _escape_line(text).replace("|", "\\|")
