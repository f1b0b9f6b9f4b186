"""Frozen timm models as image encoders."""

import logging
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data.config import resolve_model_data_config
from timm.data.transforms_factory import create_transform

from csalign.core.enums import Modality
from csalign.core.errors import EncoderError
from csalign.encoders import running
from csalign.encoders.base import EncoderOptions
from csalign.encoders.checkpoints import find_state, load_state, read_tensors

logger = logging.getLogger(__name__)

# Settings of the transform, which determine the embeddings too.
_RECORDED = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")


def load_timm(name: str, options: EncoderOptions) -> running.TowerImages:
    """Load a frozen timm model without its classifier.

    Args:
        name: MODEL for timm's own weights, MODEL+FILE for a local checkpoint of the
            same architecture (its classifier is ignored), MODEL+none for random weights, the same
            each time. MODEL may be hf-hub:NAME or local-dir:FOLDER, as in
            `timm.create_model`.
        options: how to run it. Without a projection the tokens of both spaces are the same.

    Raises:
        EncoderError: no such model; the weights cannot be loaded or are of another model;
            or it has no tokens that share a space with its embedding.
    """
    model, _, weights = name.partition("+")
    network = _build(model, pretrained=not weights)
    if weights == "none":
        logger.warning("%s: random weights; the embeddings are meaningless", model)
    elif weights:
        _load_weights(network, Path(weights), model)
    config = resolve_model_data_config(network)
    with_tokens = Modality.IMAGE in options.tokens
    with running.first_run(f"timm:{name}"):
        if with_tokens:
            _check_tokens(network.eval(), config["input_size"], f"timm:{name}")
        own = running.fingerprint(network)
        return running.TowerImages(
            running.ready(_Side(network, with_tokens=with_tokens), options),
            create_transform(**config, is_training=False),
            config["input_size"],
            options,
            spec=f"timm:{name}",
            fingerprint=own,
            preprocessing={
                key: list(config[key]) if isinstance(config[key], tuple) else config[key]
                for key in _RECORDED
                if key in config
            },
        )


class _Side(torch.nn.Module):
    """A timm model that returns its tokens too, if requested."""

    def __init__(self, network: Any, *, with_tokens: bool) -> None:
        super().__init__()
        self.network = network
        self.grid: tuple[int, int] | None = None  # of the last tokens; None if not known
        self._with_tokens = with_tokens

    def forward(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Embed pixels (n, 3, h, w): (n, d) and, if requested, tokens (n, t, d_t)."""
        network = self.network
        if not self._with_tokens:
            return network(pixels), None
        features = network.forward_features(pixels)
        pooled = network.forward_head(features)
        if features.ndim == 4:  # a feature map
            if getattr(network, "output_fmt", "NCHW") != "NHWC":
                features = features.permute(0, 2, 3, 1)
            self.grid = (features.shape[1], features.shape[2])
            return pooled, features.flatten(1, 2)
        tokens = features[:, getattr(network, "num_prefix_tokens", 0) :]
        if getattr(network, "fc_norm", None) is not None:
            # Models that average their tokens have their last norm after that.
            tokens = network.fc_norm(tokens)
        grid = getattr(getattr(network, "patch_embed", None), "grid_size", None)
        self.grid = None if grid is None else (grid[0], grid[1])
        return pooled, tokens


def _check_tokens(network: Any, input_size: tuple[int, ...], spec: str) -> None:
    """Refuse a model whose tokens do not share a space with its embedding.

    They do in a plain ViT, which pools by class token or mean, and if the embedding is their mean.
    """
    noise = torch.rand(1, *input_size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        pooled, tokens = _Side(network, with_tokens=True)(noise)
    plain_vit = (
        hasattr(network, "num_prefix_tokens") and getattr(network, "attn_pool", None) is None
    )
    mean = tokens.mean(dim=1)
    if pooled.shape == mean.shape and (plain_vit or torch.allclose(pooled, mean, atol=1e-4)):
        return
    raise running.no_tokens(f"{spec} ({type(network).__name__})")


def _build(model: str, *, pretrained: bool) -> Any:
    known = timm.list_models()
    if ":" not in model and not timm.is_model(model):
        raise EncoderError(f"timm has no model {model!r}; {running.suggest(model, known)}")
    with running.quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            return timm.create_model(model, pretrained=pretrained, num_classes=0)
        except Exception as error:  # damaged files and downloads fail in many ways
            remedy = (
                f"connect once, or use timm:{model}+FILE with a local checkpoint"
                if pretrained
                else "see timm.list_models()"
            )
            raise EncoderError(
                f"timm:{model} could not be loaded ({running.first_line(error)}); {remedy}"
            ) from error


def _load_weights(network: Any, path: Path, model: str) -> None:
    """Load a checkpoint without its classifier, tensors only: pickled code is refused."""
    names = network.state_dict().keys()
    state = find_state(read_tensors(path), names, path)
    heads = network.pretrained_cfg.get("classifier") or ()
    prefixes = tuple(f"{head}." for head in ([heads] if isinstance(heads, str) else heads))
    state = {name: values for name, values in state.items() if not name.startswith(prefixes)}
    load_state(network, state, names, path, model)
