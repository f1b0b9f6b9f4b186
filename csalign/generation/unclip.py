"""The unCLIP decoders of diffusers: Stable unCLIP, Karlo and Kandinsky 2.2.

Each is run by diffusers' own pipeline from an embedding in place of an image, and takes it as its
image encoder gives it, the projected embedding of a CLIP model without normalising. Stable unCLIP
standardises it by the statistics of its image normalizer, adds noise, and undoes it; Karlo projects
it to time and context; Kandinsky sets it against the embedding of an empty image.

Networks are built from the classes named here, and weights are read from safetensors alone, so
that no class, code or pickle that comes with a decoder is run.
"""

import logging
import re
import sys
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor

from csalign.core.errors import ConfigError, DecoderError
from csalign.core.records import parse_json
from csalign.generation.decoder import Decoder, DrawOptions, Statistics

log = logging.getLogger(__name__)

INDEX = "model_index.json"
# Of a model of the hub: no weights of other precisions, and nothing but weights and settings.
_WANTED = ["*.json", "*.txt", "*/*.safetensors"]
_NOT_WANTED = ["*.fp16.*", "*.non_ema.*"]
_TALKATIVE = ("diffusers", "transformers", "huggingface_hub")
_CANNOT_RUN = (
    ArithmeticError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)


def load_decoder(name: str, prior: str | None, options: DrawOptions) -> Decoder:
    """Load a decoder, frozen.

    Args:
        name: folder in diffusers' format, or a model of the hub (``owner/name``), which is
            downloaded if it is not there.
        prior: likewise, of the prior that belongs to it: for Kandinsky, whose empty image is
            embedded by the prior's image encoder, and for the statistics of embeddings.
        options: how to run it.

    Raises:
        ConfigError: it cannot do what the options ask for, or needs a prior.
        DecoderError: diffusers is not installed; there is no such decoder; or it is of another
            family, lacks weights in safetensors, or is damaged.
    """
    folder, family = find_decoder(name)
    _require_diffusers()
    return family(folder, None if prior is None else _folder(prior), options)


def find_decoder(name: str) -> tuple[Path, "type[_Unclip]"]:
    """The folder of a decoder and its family; loads nothing.

    Raises:
        DecoderError: there is no such decoder, or it is of another family.
    """
    folder = _folder(name)
    kind = _index(folder).get("_class_name")
    families = (StableUnclip, Karlo, Kandinsky)
    for family in families:
        if kind in family.PIPELINES:
            return folder, family
    known = ", ".join(own for family in families for own in family.PIPELINES)
    raise DecoderError(f"{folder}: is a {kind}, no decoder of these: {known}")


class _Unclip:
    """What the families share."""

    PIPELINES: ClassVar[tuple[str, ...]]
    family: str
    pipeline: Any
    # Names of the steps and the guidance in the pipeline's call.
    _STEPS: ClassVar[str] = "num_inference_steps"
    _GUIDANCE: ClassVar[str] = "guidance_scale"

    def __init__(self, folder: Path, prior: Path | None, options: DrawOptions) -> None:
        self.folder = folder
        self.options = options
        self._prior = prior
        with _quiet():
            self.pipeline = self._build().to(options.device)
        self.pipeline.set_progress_bar_config(disable=True)
        self._call(torch.zeros(1, self.width), [""])  # refuses what it cannot do, before the work

    def draw(
        self, embeddings: Tensor, prompts: Sequence[str], seeds: Sequence[int]
    ) -> list[Image.Image]:
        """See `Decoder.draw`."""
        # On the CPU whatever the device, so that an image is the same on each.
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        given = embeddings.to(self.options.device, self.options.dtype)
        asked = {self._STEPS: self.options.steps, self._GUIDANCE: self.options.guidance}
        known = {name: value for name, value in asked.items() if value is not None}
        try:
            with _quiet():
                images: list[Image.Image] = self.pipeline(
                    **self._call(given, prompts), **known, generator=generators
                ).images
        except torch.OutOfMemoryError as error:
            raise DecoderError(
                f"{self.folder}: the device has not the memory for {len(seeds)} images at a time; "
                "choose a smaller --batch-size, --size or --precision"
            ) from error
        except _CANNOT_RUN as error:
            raise DecoderError(f"{self.folder}: cannot be run ({_line(error)})") from error
        return images

    @property
    def width(self) -> int:
        """See `Decoder`."""
        raise NotImplementedError

    @property
    def statistics(self) -> Statistics | None:
        """See `Decoder`."""
        raise NotImplementedError

    def _build(self) -> Any:
        raise NotImplementedError

    def _call(self, embeddings: Tensor, prompts: Sequence[str]) -> dict[str, Any]:
        raise NotImplementedError

    def _sized(self, step: int) -> dict[str, int]:
        """Height and width if they are asked for, in steps that the pipeline can make."""
        size = self.options.size
        if size is None:
            return {}
        if size % step:
            raise ConfigError(f"size: {size} is no multiple of {step}, which {self.family} needs")
        return {"height": size, "width": size}

    def _refuse(self, option: str, value: Any) -> None:
        if value:
            raise ConfigError(f"{option}: {self.family} has no such option")


class StableUnclip(_Unclip):
    """Stable unCLIP, which reads the prompt too."""

    PIPELINES = ("StableUnCLIPImg2ImgPipeline", "StableUnCLIPPipeline")
    family = "Stable unCLIP"

    @property
    def width(self) -> int:
        """See `Decoder`."""
        return int(self.pipeline.image_normalizer.config.embedding_dim)

    @property
    def statistics(self) -> Statistics | None:
        """See `Decoder`."""
        normalizer = self.pipeline.image_normalizer
        mean, std = (part.detach().cpu().float()[0] for part in (normalizer.mean, normalizer.std))
        is_set = bool(mean.any()) or not bool((std == 1).all())  # as they are before training
        return Statistics(mean, std) if is_set else None

    def _build(self) -> Any:
        import diffusers
        from diffusers.pipelines.stable_diffusion import StableUnCLIPImageNormalizer
        from transformers import CLIPTextModel, CLIPTokenizer

        self._refuse("prior", self._prior)
        parts = _Parts(self.folder, self.options.dtype)
        text_encoder = parts.network("text_encoder", CLIPTextModel)
        return diffusers.StableUnCLIPImg2ImgPipeline(
            feature_extractor=None,
            image_encoder=text_encoder,  # asked for its dtype alone, as embeddings are given
            image_normalizer=parts.network("image_normalizer", StableUnCLIPImageNormalizer),
            image_noising_scheduler=parts.scheduler("image_noising_scheduler"),
            tokenizer=parts.load("tokenizer", CLIPTokenizer),
            text_encoder=text_encoder,
            unet=parts.network("unet", diffusers.UNet2DConditionModel),
            scheduler=parts.scheduler("scheduler"),
            vae=parts.network("vae", diffusers.AutoencoderKL),
        )

    def _call(self, embeddings: Tensor, prompts: Sequence[str]) -> dict[str, Any]:
        most = self.pipeline.image_noising_scheduler.config.num_train_timesteps
        if self.options.noise_level >= most:
            raise ConfigError(f"noise-level: {self.options.noise_level} is not below {most}")
        return {
            "image_embeds": embeddings,
            "prompt": list(prompts),
            "noise_level": self.options.noise_level,
            **self._sized(8),
        }


class Karlo(_Unclip):
    """Karlo, by its pipeline of image variations, which reads no prompt."""

    PIPELINES = ("UnCLIPPipeline", "UnCLIPImageVariationPipeline")
    family = "Karlo"
    _STEPS = "decoder_num_inference_steps"
    _GUIDANCE = "decoder_guidance_scale"

    @property
    def width(self) -> int:
        """See `Decoder`."""
        return int(self.pipeline.text_proj.config.clip_embeddings_dim)

    @property
    def statistics(self) -> Statistics | None:
        """See `Decoder`."""
        return _prior_statistics(self._prior or self.folder)

    def _build(self) -> Any:
        import diffusers
        from transformers import CLIPTextModelWithProjection, CLIPTokenizer

        self._refuse("size", self.options.size)
        self._refuse("noise-level", self.options.noise_level)
        if self.options.steps == 1:
            raise ConfigError("steps: Karlo needs 2 or more")
        parts = _Parts(self.folder, self.options.dtype)
        pipeline = diffusers.UnCLIPImageVariationPipeline
        # It has moved among diffusers' modules, but this one has always imported it.
        projection = vars(sys.modules[pipeline.__module__])["UnCLIPTextProjModel"]
        text_encoder = parts.network("text_encoder", CLIPTextModelWithProjection)
        return pipeline(
            decoder=parts.network("decoder", diffusers.UNet2DConditionModel),
            text_encoder=text_encoder,
            tokenizer=parts.load("tokenizer", CLIPTokenizer),
            text_proj=parts.network("text_proj", projection),
            feature_extractor=None,
            image_encoder=text_encoder,  # asked for its dtype alone, as embeddings are given
            super_res_first=parts.network("super_res_first", diffusers.UNet2DModel),
            super_res_last=parts.network("super_res_last", diffusers.UNet2DModel),
            decoder_scheduler=parts.scheduler("decoder_scheduler"),
            super_res_scheduler=parts.scheduler("super_res_scheduler"),
        )

    def _call(self, embeddings: Tensor, prompts: Sequence[str]) -> dict[str, Any]:
        return {"image_embeddings": embeddings}


class Kandinsky(_Unclip):
    """Kandinsky 2.2, which reads no prompt and is guided away from the empty image."""

    PIPELINES = ("KandinskyV22Pipeline",)
    family = "Kandinsky 2.2"

    @property
    def width(self) -> int:
        """See `Decoder`."""
        return int(self.pipeline.unet.config.encoder_hid_dim)

    @property
    def statistics(self) -> Statistics | None:
        """See `Decoder`."""
        return None if self._prior is None else _prior_statistics(self._prior)

    def _build(self) -> Any:
        import diffusers

        self._refuse("noise-level", self.options.noise_level)
        parts = _Parts(self.folder, self.options.dtype)
        self._empty = self._empty_image()
        return diffusers.KandinskyV22Pipeline(
            unet=parts.network("unet", diffusers.UNet2DConditionModel),
            scheduler=parts.scheduler("scheduler"),
            movq=parts.network("movq", diffusers.VQModel),
        )

    def _empty_image(self) -> Tensor:
        """(1, width) embedding of a black image, or (1, 1) zeros where it is not looked at."""
        from transformers import CLIPVisionModelWithProjection

        if self.options.guidance == 1:
            return torch.zeros(1, 1)
        if self._prior is None:
            raise ConfigError(
                "prior: Kandinsky is guided away from the embedding of an empty image, which the "
                "image encoder of its prior makes; name the prior, or leave guidance out by "
                "--guidance 1"
            )
        parts = _Parts(self._prior, torch.float32)
        encoder = parts.network("image_encoder", CLIPVisionModelWithProjection)
        side = encoder.config.image_size
        with torch.no_grad():
            empty: Tensor = encoder(torch.zeros(1, 3, side, side)).image_embeds
        return empty

    def _call(self, embeddings: Tensor, prompts: Sequence[str]) -> dict[str, Any]:
        factor = self.pipeline.movq_scale_factor
        own = self.pipeline.unet.config.sample_size * factor
        if self.options.guidance != 1 and self._empty.shape[1] != self.width:
            raise ConfigError(
                f"prior: its image encoder gives embeddings of width {self._empty.shape[1]}, the "
                f"decoder takes {self.width}; name the prior that belongs to it"
            )
        return {
            "image_embeds": embeddings,
            "negative_image_embeds": self._empty.to(embeddings).expand(len(embeddings), -1),
            "height": own,
            "width": own,
            **self._sized(factor**2),
        }


class _Parts:
    """The components of a pipeline in a folder, one a subfolder."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        self._folder = folder
        self._dtype = dtype

    def load(self, name: str, kind: Any, **options: Any) -> Any:
        """Load a component.

        Raises:
            DecoderError: it is not there, or damaged.
        """
        if not (self._folder / name).is_dir():
            raise DecoderError(f"{self._folder}: has no {name}; download the whole model")
        try:
            return kind.from_pretrained(str(self._folder / name), local_files_only=True, **options)
        except (OSError, ValueError, RuntimeError, TypeError, LookupError, ImportError) as error:
            raise DecoderError(
                f"{self._folder / name}: cannot be loaded ({_line(error)})"
            ) from error
        except SafetensorError as error:
            raise DecoderError(f"{self._folder / name}: is damaged ({_line(error)})") from error

    def network(self, name: str, kind: Any) -> Any:
        """Load a network, all of its weights, from safetensors.

        Raises:
            DecoderError: it is not there, damaged, or not all there.
        """
        there = list((self._folder / name).glob("*"))
        if there and not any(path.suffix == ".safetensors" for path in there):
            raise DecoderError(
                f"{self._folder / name}: holds no .safetensors; other weights can run code when "
                "they are loaded: convert them first"
            )
        network, told = self.load(name, kind, use_safetensors=True, output_loading_info=True)
        missing = sorted(told["missing_keys"])
        if missing:
            raise DecoderError(
                f"{self._folder / name}: lacks {len(missing)} weights ({missing[0]}); download the "
                "whole model"
            )
        return network.to(self._dtype).eval()

    def scheduler(self, name: str) -> Any:
        """Load a scheduler of the class that the index names, if it is one of diffusers'.

        Raises:
            DecoderError: it is none, not there, or damaged.
        """
        import diffusers

        named = _index(self._folder).get(name)
        kind = getattr(diffusers, str(named[-1]), None) if isinstance(named, list) else None
        if not (isinstance(kind, type) and issubclass(kind, diffusers.SchedulerMixin)):
            raise DecoderError(f"{self._folder / INDEX}: names no scheduler of diffusers as {name}")
        return self.load(name, kind)


def _prior_statistics(folder: Path) -> Statistics | None:
    """The statistics that a prior was trained with, read without its network."""
    for path in sorted((folder / "prior").glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                if not {"clip_mean", "clip_std"} <= set(file.keys()):
                    continue
                mean, std = (file.get_tensor(key).float()[0] for key in ("clip_mean", "clip_std"))
        except (OSError, SafetensorError) as error:
            raise DecoderError(f"{path}: is damaged ({_line(error)})") from error
        return Statistics(mean, std) if bool((std > 0).all()) else None
    return None


def _folder(name: str) -> Path:
    """The folder of a decoder, downloaded if it is one of the hub's."""
    folder = Path(name)
    if folder.is_dir():
        return folder
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise DecoderError(f"{name}: no such folder")
    _require_diffusers()
    from huggingface_hub import snapshot_download

    try:
        with _quiet():
            return Path(
                snapshot_download(name, allow_patterns=_WANTED, ignore_patterns=_NOT_WANTED)
            )
    except Exception as error:  # of the network, in more kinds than can be listed
        raise DecoderError(
            f"{name}: is no folder here, and the hub does not give it ({_line(error)})"
        ) from error


def _index(folder: Path) -> Mapping[str, Any]:
    path = folder / INDEX
    try:
        document = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DecoderError(f"{folder}: holds no pipeline of diffusers (no {INDEX})") from None
    except (OSError, ValueError) as error:
        raise DecoderError(f"{path}: cannot be read ({_line(error)})") from None
    if not isinstance(document, dict):
        raise DecoderError(f"{path}: is damaged (no JSON object)")
    return document


def _require_diffusers() -> None:
    try:
        with _quiet():  # which needs transformers itself
            import diffusers  # noqa: F401
    except ImportError as error:
        raise DecoderError(
            f"images are made by diffusers and transformers ({error}): "
            "pip install 'csalign[generate]'"
        ) from None


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep warnings and bars of the libraries from the user; errors are raised anyway."""
    levels = {name: logging.getLogger(name).level for name in _TALKATIVE}
    for name in levels:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from transformers.utils import logging as transformers_logging

            shown = transformers_logging.is_progress_bar_enabled()
            transformers_logging.disable_progress_bar()
            try:
                yield
            finally:
                if shown:
                    transformers_logging.enable_progress_bar()
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def _line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return textwrap.shorten(" ".join(lines[:1]), 160, placeholder=" ...") or type(error).__name__
