"""The section of a page that sets an adapter beside what needs no training."""

from collections.abc import Mapping
from typing import Any

from csalign.core.figures import baseline_table
from csalign.report.page import Entry, Section


def baselines_section(document: Mapping[str, Any]) -> Section:
    """Build the table of the block "baselines", with the evaluated adapter as its last row."""
    labels, columns, note = baseline_table(document)
    rows: list[list[str | Entry]] = [["", *columns]]
    rows += [[*row] for row in zip(labels, *columns.values(), strict=True)]
    return Section("Baselines", note, rows=rows)
