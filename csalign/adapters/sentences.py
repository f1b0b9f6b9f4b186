"""A module behind a sentence-transformers model, which makes its embeddings aligned ones."""

import json
from collections.abc import Collection
from pathlib import Path
from typing import Any, Self

from torch import Tensor, nn
from torch.nn.functional import normalize

from csalign.adapters.checkpoint import load_adapter_with_info, save_adapter
from csalign.adapters.hub import fetch
from csalign.adapters.side import SideAdapter
from csalign.core import atomic
from csalign.core.enums import Modality
from csalign.core.errors import ConfigError, SchemaError

CONFIG = "config.json"
EMBEDDING = "sentence_embedding"


class SentenceAdapter(nn.Module):
    """The last module of a sentence-transformers model; it keeps to their interface.

    ::

        model = SentenceTransformer("the text encoder of the features")
        model.append(csalign.SentenceAdapter("run"))

    What ``model.save`` writes is loaded with ``trust_remote_code=True``, which
    sentence-transformers asks for wherever a module is not its own.

    Args:
        run: a run folder, or a folder that `save` wrote.
        side: which side's adapter.
        allow: as for `load_adapter`.

    Raises:
        ConfigError: the adapter embeds with tokens.
        DataError: there is no adapter at `run`.
        SchemaError: its files are damaged.
    """

    def __init__(
        self,
        run: Path | str,
        side: Modality | str = Modality.TEXT,
        *,
        allow: Collection[str] = (),
    ) -> None:
        super().__init__()
        self._whole, self._info = load_adapter_with_info(Path(run), allow=allow)
        self._name = Modality(side)
        if self._own.embeds_with_tokens:
            raise ConfigError(
                f"{run}: embeds {self._name.plural} with their tokens, which no sentence embedding "
                "has; train one without --tokens and --token-weight"
            )

    def forward(self, features: dict[str, Any], **_: Any) -> dict[str, Any]:
        """Replace the sentence embeddings (n, d) by aligned unit rows (n, width)."""
        embeddings: Tensor = features[EMBEDDING]
        return {**features, EMBEDDING: normalize(self._own(embeddings), dim=-1)}

    def get_embedding_dimension(self) -> int:
        """Width of the shared space."""
        return self._own.shape.width

    def get_sentence_embedding_dimension(self) -> int:
        """The same, as version 5 calls it."""
        return self.get_embedding_dimension()

    def save(self, output_path: str, *_: Any, **__: Any) -> None:
        """Write weights and description into a folder."""
        folder = Path(output_path)
        folder.mkdir(parents=True, exist_ok=True)
        save_adapter(folder, self._whole, self._info)
        atomic.write_json(folder / CONFIG, {"side": self._name.value})

    @classmethod
    def load(
        cls,
        model_name_or_path: str,
        subfolder: str = "",
        *,
        revision: str | None = None,
        **_: Any,
    ) -> Self:
        """Read what `save` wrote, from a folder or the hub; for sentence-transformers."""
        folder = Path(model_name_or_path, subfolder)
        if not folder.exists():
            folder = fetch(model_name_or_path, subfolder=subfolder or None, revision=revision)
        path = folder / CONFIG
        side = Modality.TEXT
        if path.is_file():
            try:
                side = Modality(json.loads(path.read_text(encoding="utf-8"))["side"])
            except (ValueError, KeyError, TypeError) as error:
                raise SchemaError(f"{path}: is damaged ({error}); save the model again") from None
        return cls(folder, side)

    @property
    def _own(self) -> SideAdapter:
        return self._whole.side(self._name)
