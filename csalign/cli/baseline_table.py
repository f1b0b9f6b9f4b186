"""The table of ``csalign eval --baselines``."""

from collections.abc import Mapping
from typing import Any

from csalign.cli.render import print_table, print_title, print_wrapped
from csalign.core.figures import baseline_notes, baseline_rows


def baseline_table(document: Mapping[str, Any]) -> None:
    """Print the block "baselines", with the evaluated adapter as its last row."""
    print_title("baselines: mean recall, mixed NDCG@10, same-side share and gap")
    print_table(*baseline_rows(document))
    for note in baseline_notes(document):
        print_wrapped(note)
