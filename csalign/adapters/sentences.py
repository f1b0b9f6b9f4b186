"""The last module of a sentence-transformers model, which aligns its embeddings."""

from collections.abc import Collection
from pathlib import Path
from typing import Any, Self

from torch import Tensor, nn
from torch.nn.functional import normalize

from csalign.adapters.checkpoint import load_adapter_with_info, read_info, save_adapter
from csalign.adapters.hub import fetch, local_run
from csalign.adapters.side import SideAdapter
from csalign.core import atomic
from csalign.core.enums import Modality, side_of
from csalign.core.errors import ConfigError, SchemaError
from csalign.core.records import read_object

CONFIG = "config.json"
EMBEDDING = "sentence_embedding"


class SentenceAdapter(nn.Module):
    """The last module of a sentence-transformers model, with the interface of its modules.

    ::

        model = SentenceTransformer("the text encoder of the features")
        model.append(csalign.SentenceAdapter("run"))

    Loading a saved model needs ``trust_remote_code=True``, as for every module that is not
    sentence-transformers' own. Saved models name this module, so its path must not change.

    Args:
        run: a run folder, a folder that `save` wrote, or a name on the hub; see `load_adapter`.
        side: which side's adapter, such as "text".
        allow: as for `load_adapter`.

    Raises:
        ConfigError: no such side, or the adapter embeds with tokens.
        DataError: no adapter at `run`.
        SchemaError: its files are damaged.

    >>> import csalign, numpy, tempfile, torch
    >>> images, texts = numpy.random.default_rng(0).normal(size=(2, 30, 4))
    >>> run = tempfile.mkdtemp() + "/run"
    >>> adapter = csalign.fit(images, texts, out=run, steps=2)
    >>> module = csalign.SentenceAdapter(run, "text")
    >>> module({"sentence_embedding": torch.ones(2, 4)})["sentence_embedding"].shape
    torch.Size([2, 4])
    """

    def __init__(
        self, run: Path | str, side: str = Modality.TEXT, *, allow: Collection[str] = ()
    ) -> None:
        super().__init__()
        self._adapter, self._info = load_adapter_with_info(local_run(run), allow=allow)
        self._adapter.side(side)  # raises if there is none
        self._modality = side_of(side)
        if self._side.embeds_with_tokens:
            raise ConfigError(
                f"{run}: embeds {self._modality.plural} with their tokens, which no sentence "
                "embedding has; train one without --tokens and --token-weight"
            )

    def forward(self, features: dict[str, Any], **_: Any) -> dict[str, Any]:
        """Replace the sentence embeddings (n, d) by aligned unit rows (n, width)."""
        embeddings: Tensor = features[EMBEDDING]
        return {**features, EMBEDDING: normalize(self._side(embeddings), dim=-1)}

    def get_embedding_dimension(self) -> int:
        """Return the width of the shared space."""
        return self._side.shape.width

    get_sentence_embedding_dimension = get_embedding_dimension  # its name in version 5

    def save(self, output_path: str, *_: Any, **__: Any) -> None:
        """Write weights and description into a folder."""
        folder = Path(output_path)
        folder.mkdir(parents=True, exist_ok=True)
        save_adapter(folder, self._adapter, self._info)
        atomic.write_json(folder / CONFIG, {"side": self._modality.value})

    @classmethod
    def load(
        cls, model_name_or_path: str, subfolder: str = "", *, revision: str | None = None, **_: Any
    ) -> Self:
        """Read what `save` wrote, from a folder or the hub; called by sentence-transformers."""
        folder = Path(model_name_or_path, subfolder)
        if not folder.exists():
            folder = fetch(model_name_or_path, subfolder=subfolder or None, revision=revision)
        path, remedy = folder / CONFIG, "save the model again"
        if not path.is_file():
            return cls(folder)
        side = read_object(path, remedy).get("side")
        names = read_info(folder).adapters
        if side not in names:
            raise SchemaError(f"{path}: side is {side!r}, not {' or '.join(names)}; {remedy}")
        return cls(folder, side)

    @property
    def _side(self) -> SideAdapter:
        return self._adapter.side(self._modality)
