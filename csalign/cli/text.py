"""Text of strangers, as a terminal may have it."""

import re

_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all but tab and line end


def spelled(text: str) -> str:
    r"""Text with what a terminal would obey in it spelled out, as ``\x1b``."""
    return _CONTROLS.sub(lambda found: ascii(found[0])[1:-1], text)
