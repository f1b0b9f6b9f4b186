"""Frozen open_clip models behind the `Encoder` protocol."""

import hashlib
import logging
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import open_clip
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from open_clip.transformer import TextTransformer, VisionTransformer
from PIL import Image

from csalign.encoders.base import Embedded, Floats
from csalign.encoders.openclip_models import (
    build_network,
    build_tokenizer,
    find_architecture,
    find_weights,
    first_line,
    load_weights,
    warn_of_activation,
)
from csalign.enums import Modality
from csalign.errors import EncoderError
from csalign.store.manifest import EncoderInfo

logger = logging.getLogger(__name__)

RANDOM = "none"
"""Name of the weights that no file holds: random ones, always the same."""

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# Texts that differ in length, to see whether a model's output depends on the padding.
_SAMPLE = ("a", "a photo of a dog", "two people on bicycles wait at a crossing in the rain")
# Rounding differs between lengths by some 2e-6; a model that sees its padding is off by far more.
_CROP_TOLERANCE = 1e-5


@dataclass(frozen=True)
class TokenChoice:
    """Which last-layer tokens to give beside the embeddings.

    Attributes:
        sides: the modalities to give tokens of.
        space: "hidden" after the last norm, "projected" times the encoder's projection too.
    """

    sides: Collection[Modality] = ()
    space: Literal["hidden", "projected"] = "projected"


def load_encoder(
    model: str,
    pretrained: str,
    *,
    device: torch.device,
    precision: str = "auto",
    batch_size: int | None = None,
    tokens: TokenChoice | None = None,
) -> "OpenClipEncoder":
    """Load an open_clip model, frozen.

    Args:
        model: an architecture that open_clip knows, or the path of a JSON file of its config.
        pretrained: a tag that open_clip knows, the path of a local checkpoint, or "none" for
            random weights, which are the same each time.
        device: where to run it.
        precision: of the forward pass, "float32", "float16" or "bfloat16"; "auto" is float32 on
            the CPU and float16 elsewhere.
        batch_size: images or texts a forward pass (default: 32 on the CPU, 256 elsewhere).
        tokens: which tokens to give (default: none).

    Raises:
        EncoderError: there is no such architecture or tag; the weights cannot be had, are no
            checkpoint, or are of another model; or the architecture does not give those tokens.
    """
    architecture = find_architecture(model)
    tokenizer = build_tokenizer(architecture)
    weights = None if pretrained == RANDOM else find_weights(architecture, pretrained)
    network = build_network(architecture, weights)
    if weights is None:
        logger.warning("%s: random weights; the embeddings carry no meaning", model)
    else:
        load_weights(network, weights, model)
        warn_of_activation(architecture, weights)
    on_cpu = device.type == "cpu"
    try:
        return OpenClipEncoder(
            network.eval().requires_grad_(False),
            tokenizer,
            spec=f"open_clip:{model}:{pretrained}",
            activation="quick_gelu" if architecture.quick_gelu else "gelu",
            device=device,
            precision=("float32" if on_cpu else "float16") if precision == "auto" else precision,
            batch_size=batch_size or (32 if on_cpu else 256),
            tokens=tokens or TokenChoice(),
        )
    except (AssertionError, RuntimeError) as error:  # its first run is in there
        raise EncoderError(f"model: {model} cannot be run ({first_line(error)})") from error


class OpenClipEncoder:
    """An open_clip model; see `Encoder` for its methods and `load_encoder` to make one."""

    def __init__(
        self,
        network: Any,
        tokenizer: Any,
        *,
        spec: str,
        activation: str,
        device: torch.device,
        precision: str,
        batch_size: int,
        tokens: TokenChoice,
    ) -> None:
        self._network = network
        self._tokenizer = tokenizer
        self._tokens = tokens
        self._device = device
        self._precision = precision
        self._batch_size = batch_size
        self._config = PreprocessCfg(**network.visual.preprocess_cfg)
        self._transform = image_transform_v2(self._config, is_train=False)
        self._spec = spec
        self._activation = activation
        self._fingerprint = _fingerprint(network)
        _check_tokens(network, tokens)
        self._text_side = _TextSide(network, with_tokens=Modality.TEXT in tokens.sides)
        network.to(device)
        self._crops = self._crops_exactly()
        self._infos = self._probe()

    @property
    def batch_size(self) -> int:
        """How many images or texts go through a forward pass."""
        return self._batch_size

    def info(self, modality: Modality) -> EncoderInfo:
        """What made the embeddings of one side, for the manifest."""
        return self._infos[modality]

    def preprocess(self, image: Image.Image) -> torch.Tensor:
        """Turn an RGB image into (3, h, w) float32; may be called from several threads."""
        pixels: torch.Tensor = self._transform(image)
        return pixels

    def embed_images(self, pixels: torch.Tensor) -> Embedded:
        """Embed one batch of preprocessed images, (n, 3, h, w) float32 on the CPU."""
        network = self._network
        with self._inference():
            pixels = pixels.to(self._device)
            if Modality.IMAGE not in self._tokens.sides:
                return Embedded(_to_numpy(network.encode_image(pixels, normalize=False)), None)
            output = network.visual.forward_intermediates(
                pixels, indices=1, normalize_intermediates=True, output_fmt="NLC"
            )
            tokens = output["image_intermediates"][-1]
            if self._tokens.space == "projected":
                tokens = tokens @ network.visual.proj
            return Embedded(_to_numpy(output["image_features"]), list(_to_numpy(tokens)))

    def embed_texts(self, texts: Sequence[str]) -> Embedded:
        """Embed one or more texts, in as many batches as they need, in their order.

        Texts of like length share a batch, which is cut to the longest of them.
        """
        ids: torch.Tensor = self._tokenizer(list(texts))  # (n, context length)
        lengths = self._lengths(ids)
        order = torch.argsort(lengths, stable=True)
        embeddings: list[Floats] = [np.empty(0)] * len(texts)
        tokens: list[Floats] = [np.empty(0)] * len(texts)
        for start in range(0, len(order), self._batch_size):
            batch = order[start : start + self._batch_size]
            cut = ids[batch, : int(lengths[batch].max())]
            pooled, hidden = self._embed_ids(cut)
            for row, position in enumerate(batch.tolist()):
                embeddings[position] = pooled[row]
                if hidden is not None:
                    tokens[position] = hidden[row][self._words(cut[row])]
        with_tokens = Modality.TEXT in self._tokens.sides
        return Embedded(np.stack(embeddings), tokens if with_tokens else None)

    def _embed_ids(self, ids: torch.Tensor) -> tuple[Floats, Floats | None]:
        with self._inference():
            pooled, hidden = self._text_side.embed(ids.to(self._device))
            if hidden is not None and self._tokens.space == "projected":
                hidden = self._text_side.project(hidden)
            return _to_numpy(pooled), None if hidden is None else _to_numpy(hidden)

    def _lengths(self, ids: torch.Tensor) -> torch.Tensor:
        """(n,) how much of each row of ids (n, context length) has to be computed."""
        if self._crops:
            return ids.argmax(dim=1) + 1  # the end mark has the highest id
        return torch.full((len(ids),), ids.shape[1])

    def _words(self, ids: torch.Tensor) -> Any:
        """Select the positions of ids (t,) that are no special tokens and no padding."""
        if isinstance(self._tokenizer, open_clip.SimpleTokenizer):
            # By position, since its padding has the id of a piece of text, "!".
            return slice(1, int(ids.argmax()))
        special = torch.tensor(self._tokenizer.tokenizer.all_special_ids)
        return ~torch.isin(ids, special).numpy()

    def _crops_exactly(self) -> bool:
        """Whether cutting texts to their length leaves the embeddings what they are."""
        if not isinstance(self._tokenizer, open_clip.SimpleTokenizer):
            return False
        if not self._text_side.can_crop:
            return False
        ids = self._tokenizer(list(_SAMPLE)).to(self._device)
        with torch.inference_mode():
            whole, _ = self._text_side.embed(ids)
            for row, length in enumerate(ids.argmax(dim=1).tolist()):
                cut, _ = self._text_side.embed(ids[row : row + 1, : length + 1])
                difference = (cut[0] - whole[row]).abs().max() / whole[row].abs().max()
                if not difference <= _CROP_TOLERANCE:
                    return False
        return True

    def _probe(self) -> dict[Modality, EncoderInfo]:
        """Embed an image and a text, so that what does not work fails before the work."""
        size = self._config.input_size
        images, texts = self.embed_images(torch.zeros(1, *size)), self.embed_texts(_SAMPLE)
        common = {"precision": self._precision, "activation": self._activation}
        return {
            Modality.IMAGE: self._info(
                images,
                {
                    "image_size": list(size[1:]),
                    "mean": list(self._config.mean),
                    "std": list(self._config.std),
                    "interpolation": self._config.interpolation,
                    "resize_mode": self._config.resize_mode,
                    **common,
                },
            ),
            Modality.TEXT: self._info(
                texts,
                {
                    "tokenizer": _tokenizer_name(self._tokenizer),
                    "context_length": self._tokenizer.context_length,
                    **common,
                },
            ),
        }

    def _info(self, embedded: Embedded, preprocessing: dict[str, Any]) -> EncoderInfo:
        tokens = embedded.tokens
        return EncoderInfo(
            spec=self._spec,
            fingerprint=self._fingerprint,
            width=embedded.embeddings.shape[1],
            token_width=None if tokens is None else tokens[0].shape[1],
            token_space=None if tokens is None else self._tokens.space,
            preprocessing=preprocessing,
        )

    @contextmanager
    def _inference(self) -> Iterator[None]:
        dtype = _DTYPES[self._precision]
        autocast = torch.autocast(
            self._device.type, dtype=dtype, enabled=dtype is not torch.float32
        )
        with torch.inference_mode(), autocast:
            yield


class _TextSide(torch.nn.Module):
    """The text half of an open_clip model, which can be run on less than its context length."""

    def __init__(self, network: Any, *, with_tokens: bool) -> None:
        super().__init__()
        self.network = network
        self._with_tokens = with_tokens
        # CLIP proper carries the parts of its text tower itself.
        self._prefix = "network.text" if hasattr(network, "text") else "network"

    @property
    def _tower(self) -> Any:
        # No attribute: a module that is registered twice has its parameters replaced for good.
        return self.get_submodule(self._prefix)

    @property
    def can_crop(self) -> bool:
        """Whether padding behind the end cannot be seen: a causal tower that pools at the end."""
        tower = self._tower
        causal = isinstance(getattr(tower, "attn_mask", None), torch.Tensor)
        return causal and getattr(tower, "cls_emb", None) is None

    def embed(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Embed ids (n, t) -> (n, d) and, if asked for, tokens after the last norm (n, t, d_t).

        open_clip adds all of its position embeddings whatever t is, so for a shorter t they and
        the mask are replaced by their beginnings during the call.
        """
        length = ids.shape[1]
        replaced = {}
        if self.can_crop and length < len(self._tower.attn_mask):
            replaced = {
                f"{self._prefix}.positional_embedding": self._tower.positional_embedding[:length],
                f"{self._prefix}.attn_mask": self._tower.attn_mask[:length, :length],
            }
        output: tuple[torch.Tensor, torch.Tensor | None]
        output = torch.func.functional_call(self, replaced, (ids,))
        return output

    def forward(self, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See `embed`."""
        if not self._with_tokens:
            return self.network.encode_text(ids, normalize=False), None
        output = self.network.forward_intermediates(
            text=ids, text_indices=1, normalize=False, normalize_intermediates=True
        )
        return output["text_features"], output["text_intermediates"][-1]

    def project(self, tokens: torch.Tensor) -> torch.Tensor:
        """Apply the text projection to tokens (n, t, d_t) -> (n, t, d)."""
        projection = self._tower.text_projection
        if projection is None:
            return tokens
        projected: torch.Tensor
        if isinstance(projection, torch.nn.Module):
            projected = projection(tokens)
        else:
            projected = tokens @ projection
        return projected


def _check_tokens(network: Any, tokens: TokenChoice) -> None:
    visual, text = network.visual, getattr(network, "text", network)
    if Modality.IMAGE in tokens.sides and not (
        isinstance(visual, VisionTransformer) and visual.attn_pool is None
    ):
        raise EncoderError(_no_tokens("image", visual))
    if Modality.TEXT in tokens.sides and not (
        isinstance(text, TextTransformer | open_clip.CLIP)
        and getattr(text, "cls_emb", None) is None
    ):
        raise EncoderError(_no_tokens("text", text))


def _no_tokens(side: str, tower: Any) -> str:
    return (
        f"tokens: the {side} tower ({type(tower).__name__}) gives no tokens that share a space "
        "with its embedding; choose a plain ViT model, or leave this side's tokens out"
    )


def _fingerprint(network: Any) -> str:
    """Hex SHA-256 over names, shapes and values of all weights, whatever file they came from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def _tokenizer_name(tokenizer: Any) -> str:
    inner = getattr(tokenizer, "tokenizer", None)
    return str(getattr(inner, "name_or_path", "")) or type(tokenizer).__name__


def _to_numpy(tensor: torch.Tensor) -> Floats:
    array: Floats = tensor.float().cpu().numpy()
    return array
