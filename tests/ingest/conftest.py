from collections.abc import Iterator
from functools import cache

import open_clip
import pytest


@pytest.fixture(scope="session", autouse=True)
def one_tokenizer() -> Iterator[None]:
    """Build open_clip's tokenizer once; it takes longer than extracting a few images."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(open_clip, "get_tokenizer", cache(open_clip.get_tokenizer))
        yield
