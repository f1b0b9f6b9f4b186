"""The section of a page that sets an adapter beside what needs no training."""

from collections.abc import Mapping
from typing import Any

from csalign.core.figures import baseline_notes, baseline_rows
from csalign.report.page import Entry, Section


def baselines_section(document: Mapping[str, Any]) -> Section:
    """Build the table of the block "baselines", with the evaluated adapter as its last row."""
    labels, columns = baseline_rows(document)
    heading, rows = ["", *columns], zip(labels, *columns.values(), strict=True)
    table: list[list[str | Entry]] = [[*heading], *([*row] for row in rows)]
    return Section("Baselines", " ".join(baseline_notes(document)), rows=table)
