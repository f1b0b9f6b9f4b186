"""Tables of ``csalign diagnose``."""

from collections.abc import Iterator, Mapping
from typing import Any

from csalign.adapters.kinds import is_baseline
from csalign.cli import render, side_tables
from csalign.cli.eval_tables import evaluated
from csalign.cli.next_steps import Step, first_free
from csalign.core.enums import Names, renamed
from csalign.core.figures import figure_of, percent, recall_range
from csalign.evaluation.config import DiagnoseConfig

Document = Mapping[str, Any]

TERMS = {
    "loss": "loss",
    "alignment": "alignment: pulls the rows of a pair together",
    "uniformity": "uniformity: pushes all rows apart",
    "gradient_cosine": "cosine of gradients: -1 cancel, 1 agree",
}
NAMED = {"logit_scale": "logit scale", "cs_weight": "CS weight"}
CONFLICT = {-0.9: "nearly cancel", -0.5: "conflict", -0.1: "conflict slightly"}
"""Words for the cosine between two gradients below a limit."""
SIDES = {
    "effective_rank": ("effective rank", ".0f"),
    "mean_energy": ("energy of the mean", "%"),
    "top_energy": ("variance of the first direction", "%"),
    "removal": ("mutual 10-NN without it", ".3f"),
    "repeated": ("repeated rows", "%"),
}
"""Labels and formats of the figures of a side."""


def diagnosis_table(document: Document, settings: DiagnoseConfig) -> None:
    """Print the document of ``csalign diagnose``: the forecast, the objectives, then the gap."""
    features, adapter = document["features"], document.get("adapter")
    if "sides" in document:
        side_tables.diagnosis_tables(document)
        render.print_closing(settings, ("train", features, "--out", first_free("run")))
        return
    _forecast(document["forecast"], features, document.get("names"))
    if "objective" in document:
        render.print_line()
        _conflict(document, settings)
    step: Step = ("train", features, "--out", first_free("run"))
    if adapter:
        step = ("eval", features, "--adapter", adapter)
    elif document["forecast"]["looks_random"]:
        step = "next: check the keys that join the pairs"
    render.print_closing(settings, step)


def _forecast(found: Document, features: str, names: Names | None) -> None:
    """Print what is foretold in words, then its figures."""
    split = "all rows" if found["split"] == "all" else found["split"].replace(",", " and ")
    counted = f"{found['pairs']:,} pairs"
    if found["different"] < found["pairs"]:
        counted += f", {found['different']:,} of them different"
    render.print_line(renamed(f"{features}, {split}: {counted}", names), "bold")
    for sentence in found["words"]:
        render.print_wrapped(renamed(sentence, names))
    rows = [
        (f"linear maps, {own['pairs']:,} pairs{note}", recall_range(own))
        for key, note in (("curve", ""), ("extrapolated", ", foretold"))
        for own in found[key]
    ]
    if found["expected"]:
        rows += [(f"csalign train, {found['different']:,} pairs", recall_range(found["expected"]))]
        render.print_title("mean recall in a gallery of 1,000, and where 9 of 10 lie")
        render.print_rows(rows)
    if found["mutual_knn"] is None:
        return
    shifts = found["sliced_wasserstein"]
    labels = [label for label, _ in SIDES.values()] + ["distance of unpaired rows"] * bool(shifts)
    columns = {}
    for side in ("image", "text"):
        cells = [
            percent(found[key][side], 0) if form == "%" else f"{found[key][side]:{form}}"
            for key, (_, form) in SIDES.items()
        ]
        own = shifts.get(side)
        cells += [f"{own['value']:.2f} (noise {own['noise']:.2f})" if own else ""] * bool(shifts)
        columns[renamed(side, names)] = cells
    render.print_title("raw sides")
    render.print_table(labels, columns)


def _conflict(document: Document, settings: DiagnoseConfig) -> None:
    infonce, objective, gap = document["infonce"], document["objective"], document["gap"]
    render.print_line(f"{evaluated(document)}: {document['pairs']:,} pairs", "bold")
    adapter = document["adapter"]
    given = settings.model_dump(include={*NAMED})
    is_run = adapter is not None and not is_baseline(adapter)
    source = {name: "this run: " if is_run and given[name] is None else "" for name in NAMED}
    render.print_rows([(NAMED[name], f"{source[name]}{document[name]:g}") for name in NAMED])
    render.print_line()
    for sentence in verdict(document):
        render.print_wrapped(sentence)
    render.print_line()
    blocks = {"InfoNCE": infonce, "with CS": objective}
    columns = {name: [f"{own[term]:.4f}" for term in TERMS] for name, own in blocks.items()}
    render.print_table([*TERMS.values()], columns)
    render.print_title("divergence and gap")
    cosine = objective["infonce_cs_gradient_cosine"]
    meanings = [
        ("CS divergence", f"{objective['cs_divergence']:.4f}", "between the two distributions"),
        ("CS, cross term", f"{objective['cs_cross']:.4f}", "attracts the two sides"),
        ("CS, terms within", f"{objective['cs_intra']:.4f}", "spread each side"),
        ("InfoNCE and CS", f"{cosine:+.2f}", "cosine of their gradients: -1 oppose, 1 agree"),
        (figure_of("gap.frechet").label, f"{gap['frechet']:.4f}", "size of the gap, as Gaussians"),
        ("centroid offset", percent(gap["centroid_share"], 0), "of it; centring removes this"),
        ("shape difference", percent(gap["shape_share"], 0), "of it; only training removes this"),
    ]
    for side in ("image", "text"):
        label = renamed(f"uniformity, {side}", document.get("names"))
        meanings.append((label, f"{gap[f'uniformity_{side}']:.4f}", "lower is more spread out"))
    render.print_rows([(name, f"{value:>8}   {meaning}") for name, value, meaning in meanings])


def verdict(document: Document) -> Iterator[str]:
    """Word what a diagnosis means, in three or four sentences."""
    infonce, objective, gap = document["infonce"], document["objective"], document["gap"]
    plain, full = infonce["gradient_cosine"], objective["gradient_cosine"]
    degrees = [word for limit, word in CONFLICT.items() if plain < limit]
    change = "raises that" if full > plain else "lowers that"
    change = "changes that little" if abs(full - plain) < 0.05 else change
    yield (
        f"InfoNCE's alignment and uniformity {[*degrees, 'do not conflict'][0]} here (cosine of "
        f"gradients {plain:+.2f}; at -1 they cancel and the gap stays). CS at weight "
        f"{document['cs_weight']:g} {change} ({full:+.2f})."
    )
    both = objective["infonce_cs_gradient_cosine"]
    relation = "pull the same way" if both > 0.5 else "oppose each other"
    if abs(both) <= 0.5:
        relation = "are nearly independent, so CS adds what InfoNCE lacks"
    yield f"The gradients of InfoNCE and of CS {relation} (cosine {both:+.2f})."
    yield (
        f"{percent(gap['centroid_share'], 0)} of the gap is a centroid offset, which centring "
        f"alone would remove; {percent(gap['shape_share'], 0)} is a difference in shape."
    )
    if document["adapter"] is not None and not is_baseline(document["adapter"]):
        yield (
            "Read the conflict on embeddings from before training, without --adapter or with "
            "--adapter closed-form: at a minimum the two gradients cancel by definition."
        )
