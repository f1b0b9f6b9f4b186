"""Frozen open_clip models, one tower per side."""

import logging
from collections.abc import Collection, Sequence
from typing import Any

import open_clip
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from open_clip.transformer import TextTransformer, VisionTransformer

from csalign.core.enums import Modality
from csalign.encoders import openclip_models, running
from csalign.encoders.base import Embedded, EncoderOptions, Encoders
from csalign.features.schema import EncoderInfo

logger = logging.getLogger(__name__)

# Texts that differ in length, to see whether a model's output depends on the padding.
_SAMPLE = ("a", "a photo of a dog", "two people on bicycles wait at a crossing in the rain")
# Rounding differs between lengths by about 2e-6; a model that sees its padding differs far more.
_CROP_TOLERANCE = 1e-5


def load_open_clip(name: str, sides: Collection[Modality], options: EncoderOptions) -> Encoders:
    """Load a frozen open_clip model, keeping only the towers of the given sides.

    Raises:
        ConfigError: the name has no known form.
        EncoderError: no such architecture or tag; the weights cannot be loaded or are of
            another model; or the architecture has no such tokens.
    """
    architecture, weights = openclip_models.find_model(name)
    tokenizer = openclip_models.build_tokenizer(architecture) if Modality.TEXT in sides else None
    network = openclip_models.build_network(architecture, weights)
    if weights is None:
        logger.warning("%s: random weights; the embeddings are meaningless", architecture.spec)
    else:
        openclip_models.load_weights(network, weights, architecture, sides)
    record = {
        "spec": f"open_clip:{name}",
        "weights": running.fingerprint(network),
        "activation": "quick_gelu" if architecture.quick_gelu else "gelu",
    }
    # The CLIP class itself is its text tower.
    visual = network.visual
    del network.visual
    text = getattr(network, "text", network)
    _check_tokens(visual, text, [side for side in sides if side in options.tokens])
    with running.first_run(architecture.spec):
        return Encoders(
            _load_images(visual, options, record) if Modality.IMAGE in sides else None,
            OpenClipTexts(text, tokenizer, options, record) if tokenizer is not None else None,
        )


def _load_images(
    tower: Any, options: EncoderOptions, record: dict[str, str]
) -> running.TowerImages:
    config = PreprocessCfg(**tower.preprocess_cfg)
    space = options.token_space if Modality.IMAGE in options.tokens else None
    return running.TowerImages(
        running.ready(_ImageSide(tower, space), options),
        image_transform_v2(config, is_train=False),
        config.input_size,
        options,
        spec=record["spec"],
        fingerprint=record["weights"],
        preprocessing={
            "image_size": list(config.input_size[1:]),
            "mean": list(config.mean),
            "std": list(config.std),
            "interpolation": config.interpolation,
            "resize_mode": config.resize_mode,
            "activation": record["activation"],
        },
    )


class OpenClipTexts(running.RunningEncoder):
    """The text tower of an open_clip model; see `base.TextEncoder` for its methods."""

    def __init__(
        self, tower: Any, tokenizer: Any, options: EncoderOptions, record: dict[str, str]
    ) -> None:
        self._options = options
        self._tokenizer = tokenizer
        space = options.token_space if Modality.TEXT in options.tokens else None
        self._side = _TextSide(tower.eval(), space)
        # In full precision, since lower would hide the difference.
        self._crops = self._crops_exactly()
        running.ready(self._side, options)
        self._info = self._probe(**record)

    def embed(self, texts: Sequence[str]) -> Embedded:
        """Embed one or more texts, in their order.

        Texts of similar length share a batch, which is cropped to the longest of them.
        """
        ids: torch.Tensor = self._tokenizer(list(texts))  # (n, context length)
        lengths = self._lengths(ids)

        def embed_batch(positions: list[int]) -> Embedded:
            return self._embed_ids(ids[positions, : int(lengths[positions].max())])

        embedded = running.embed_by_length(lengths.tolist(), self.batch_size, embed_batch)
        self.cut += self._cut(texts, ids)
        return embedded

    def _cut(self, texts: Sequence[str], ids: torch.Tensor) -> list[int]:
        """Return the lengths in tokens of the texts that ids (n, t) contain in part."""
        tokenizer = self._tokenizer
        inner = getattr(tokenizer, "tokenizer", None)
        padding = 0 if inner is None else inner.pad_token_id
        is_full = (ids[:, -1] != padding).tolist()
        full = [text for text, own in zip(texts, is_full, strict=True) if own]
        if inner is None:
            counts = [len(tokenizer.encode(text)) + 2 for text in full]  # and both marks
        else:
            counts = [len(inner(tokenizer.clean_fn(own), verbose=False).input_ids) for own in full]
        return [count for count in counts if count > ids.shape[1]]

    def _embed_ids(self, ids: torch.Tensor) -> Embedded:
        with running.inference(self._options):
            pooled, hidden = self._side.embed(running.to_device(ids, self._options))
        if hidden is None:
            return Embedded(running.to_numpy(pooled), None)
        tokens = [
            own[self._words(row)] for own, row in zip(running.to_numpy(hidden), ids, strict=True)
        ]
        limited = running.limit_tokens(tokens, Modality.TEXT, self._options.max_tokens)
        return Embedded(running.to_numpy(pooled), limited)

    def _lengths(self, ids: torch.Tensor) -> torch.Tensor:
        """Return how many ids of each row (n, context length) have to be computed, (n,)."""
        if self._crops:
            return ids.argmax(dim=1) + 1  # the end-of-text token has the highest id
        return torch.full((len(ids),), ids.shape[1])

    def _words(self, ids: torch.Tensor) -> Any:
        """Index the positions of ids (t,) that are neither special tokens nor padding."""
        if isinstance(self._tokenizer, open_clip.SimpleTokenizer):
            # By position, since its padding has the id of a word, "!".
            return slice(1, int(ids.argmax()))
        special = torch.tensor(self._tokenizer.tokenizer.all_special_ids)
        return ~torch.isin(ids, special).numpy()

    def _crops_exactly(self) -> bool:
        """Return whether cropping texts to their length keeps their embeddings."""
        is_known = isinstance(self._tokenizer, open_clip.SimpleTokenizer)
        if not (is_known and self._side.can_crop):
            return False
        ids = self._tokenizer(list(_SAMPLE))
        with torch.inference_mode():
            whole, _ = self._side.embed(ids)
            for row, length in enumerate(ids.argmax(dim=1).tolist()):
                cut, _ = self._side.embed(ids[row : row + 1, : length + 1])
                difference = (cut[0] - whole[row]).abs().max() / whole[row].abs().max()
                if not difference <= _CROP_TOLERANCE:
                    return False
        return True

    def _probe(self, spec: str, weights: str, activation: str) -> EncoderInfo:
        """Embed some texts, so that what cannot run fails before the work."""
        name = getattr(getattr(self._tokenizer, "tokenizer", None), "name_or_path", "")
        return running.describe(
            self.embed(_SAMPLE),
            self._options,
            spec=spec,
            fingerprint=weights,
            preprocessing={
                "tokenizer": name or type(self._tokenizer).__name__,
                "context_length": self._tokenizer.context_length,
                "activation": activation,
            },
        )


class _Side(torch.nn.Module):
    """A tower of open_clip; returns tokens too if a space for them is named."""

    def __init__(self, tower: Any, token_space: str | None) -> None:
        super().__init__()
        self.tower = tower
        self._token_space = token_space


class _ImageSide(_Side):
    """An image tower."""

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of the tokens."""
        rows, columns = self.tower.grid_size
        return rows, columns

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Embed pixels (n, 3, h, w): (n, d) and, if requested, tokens (n, t, d_t)."""
        if self._token_space is None:
            return _first(self.tower(pixels)), None
        output = self.tower.forward_intermediates(
            pixels, indices=1, normalize_intermediates=True, output_fmt="NLC"
        )
        tokens = output["image_intermediates"][-1]
        if self._token_space == "projected" and self.tower.proj is not None:
            tokens = tokens @ self.tower.proj
        return output["image_features"], tokens


class _TextSide(_Side):
    """A text tower that runs on less than its context length."""

    @property
    def can_crop(self) -> bool:
        """True if padding has no effect: a causal tower that pools at the end of the text."""
        causal = isinstance(getattr(self.tower, "attn_mask", None), torch.Tensor)
        return causal and getattr(self.tower, "cls_emb", None) is None

    def embed(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Embed ids (n, t): (n, d) and, if requested, tokens (n, t, d_t).

        open_clip adds all position embeddings whatever t is, so for a shorter t they and the
        mask are replaced by their first rows during the call.
        """
        length = ids.shape[1]
        replaced = {}
        if self.can_crop and length < len(self.tower.attn_mask):
            replaced = {
                "tower.positional_embedding": self.tower.positional_embedding[:length],
                "tower.attn_mask": self.tower.attn_mask[:length, :length],
            }
        output: tuple[torch.Tensor, torch.Tensor | None]
        output = torch.func.functional_call(self, replaced, (ids,))
        return output

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See `embed`."""
        tower = self.tower
        is_clip = isinstance(tower, open_clip.CLIP)
        if self._token_space is None:
            return _first(tower.encode_text(ids, normalize=False) if is_clip else tower(ids)), None
        if is_clip:
            output = tower.forward_intermediates(
                text=ids, text_indices=1, normalize=False, normalize_intermediates=True
            )
        else:
            output = tower.forward_intermediates(
                ids, indices=1, normalize_intermediates=True, output_fmt="NLC"
            )
        tokens = output["text_intermediates"][-1]
        if self._token_space == "projected":
            tokens = self._project(tokens)
        return output["text_features"], tokens

    def _project(self, tokens: torch.Tensor) -> torch.Tensor:
        projection = self.tower.text_projection
        if projection is None:
            return tokens
        is_module = isinstance(projection, torch.nn.Module)
        projected: torch.Tensor = projection(tokens) if is_module else tokens @ projection
        return projected


def _first(output: Any) -> torch.Tensor:
    """Return the embedding of a tower's output, to which CoCa models add tokens."""
    embedding: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return embedding


def _check_tokens(visual: Any, text: Any, sides: Collection[Modality]) -> None:
    pools = getattr(text, "cls_emb", None) is not None
    is_plain = {
        Modality.IMAGE: isinstance(visual, VisionTransformer) and visual.attn_pool is None,
        Modality.TEXT: isinstance(text, TextTransformer | open_clip.CLIP) and not pools,
    }
    for side in sides:
        if not is_plain[side]:
            tower = visual if side is Modality.IMAGE else text
            raise running.no_tokens(f"the {side} tower ({type(tower).__name__})")
