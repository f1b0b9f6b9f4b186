"""The unCLIP decoders of diffusers: Stable unCLIP, Karlo and Kandinsky 2.2.

Each takes what its image encoder gives, a projected CLIP embedding that is not normalised. Stable
unCLIP standardises it by the statistics of its image normalizer, adds noise, and undoes it; Karlo
projects it to time and context; Kandinsky contrasts it with the embedding of an empty image. No
code or pickle that comes with a decoder is run.
"""

import inspect
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor

from csalign.core.devices import pick_device
from csalign.core.errors import ConfigError, DecoderError
from csalign.core.records import read_object
from csalign.encoders.running import first_line
from csalign.generation.config import DecoderOptions

INDEX = "model_index.json"
_WANTED = ["*.json", "*.txt", "*/*.safetensors"]  # of a hub model: weights and settings
_UNWANTED = ["*.fp16.*", "*.non_ema.*"]
_CANNOT_RUN = (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
_CANNOT_LOAD = (*_CANNOT_RUN, ImportError, OSError, SafetensorError)


@dataclass(frozen=True)
class Statistics:
    """Mean and standard deviation (d,) > 0 of a decoder's training embeddings, by component."""

    mean: Tensor
    std: Tensor

    @property
    def norm(self) -> float:
        """Root mean square norm of those embeddings."""
        return float((self.mean.square().sum() + self.std.square().sum()).sqrt())

    def deviation(self, embeddings: Tensor) -> float:
        """Compute the root mean square of standardised rows (n, d); about 1 if they fit."""
        return float(((embeddings - self.mean) / self.std).square().mean().sqrt())


def find_decoder(name: str) -> tuple[Path, "type[Decoder]"]:
    """Find the folder and the family of a decoder without loading it, or raise DecoderError."""
    folder = _find_folder(name)
    kind = _read_index(folder).get("_class_name")
    families = (StableUnclip, Karlo, Kandinsky)
    for family in families:
        if kind in family.PIPELINES:
            return folder, family
    known = ", ".join(family.family for family in families)
    raise DecoderError(f"{folder}: is a {kind}, not a decoder; use one of {known}")


class Decoder:
    """Load a decoder, and draw images from embeddings; ConfigError if it lacks an option."""

    PIPELINES: ClassVar[tuple[str, ...]]  # of diffusers with this decoder; the first one is run
    STEPS: ClassVar[str] = "num_inference_steps"
    GUIDANCE: ClassVar[str] = "guidance_scale"
    family: ClassVar[str]
    width: int  # of the embeddings
    statistics: Statistics | None  # of the training embeddings, where the files have them

    def __init__(self, folder: Path, options: DecoderOptions) -> None:
        self.folder, self.options = folder, options
        self.device = pick_device(options.device)
        auto = "float16" if self.device.type == "cuda" else "float32"
        self.dtype = getattr(torch, auto if options.precision == "auto" else options.precision)
        with _quiet():
            self._load()
            self.pipeline.to(self.device)
        self.pipeline.set_progress_bar_config(disable=True)
        self._arguments(torch.zeros(1, self.width), [""])  # refuses unsupported options early

    def draw(
        self, embeddings: Tensor, prompts: Sequence[str], seeds: Sequence[int]
    ) -> list[Image.Image]:
        """Draw an image of each embedding (n, width) float32; DecoderError if that fails.

        Embeddings are not normalised. Some decoders read the prompts too.
        """
        # On the CPU whatever the device, so that an image is the same on each.
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        given = {self.STEPS: self.options.steps, self.GUIDANCE: self.options.guidance}
        arguments = self._arguments(embeddings.to(self.device, self.dtype), prompts)
        arguments |= {name: value for name, value in given.items() if value is not None}
        try:
            with _quiet():
                images: list[Image.Image] = self.pipeline(**arguments, generator=generators).images
        except _CANNOT_RUN as error:  # also where memory runs out
            raise DecoderError(
                f"{self.folder}: cannot draw {len(seeds)} images at a time ({first_line(error)}); "
                "if memory is short, choose a smaller --batch-size, --size or --precision"
            ) from error
        return images

    def _load(self) -> None:
        """Load the pipeline without its image encoder, since embeddings are given."""
        import diffusers

        kind = getattr(diffusers, self.PIPELINES[0])
        names = set(inspect.signature(kind.__init__).parameters) - {"self"}
        replaced = names & {"image_encoder", "feature_extractor"}
        parts = {
            name: _load_component(self.folder, name, self.dtype, kind)
            for name in sorted(names - replaced)
        }
        if replaced:  # the pipeline asks the image encoder for its dtype
            parts |= {"image_encoder": parts["text_encoder"], "feature_extractor": None}
        self.pipeline = kind(**parts)

    def _arguments(self, embeddings: Tensor, prompts: Sequence[str]) -> dict[str, Any]:
        """Build the family's arguments of the pipeline; ConfigError for unsupported options."""
        raise NotImplementedError

    def _sizes(self, step: int) -> dict[str, int]:
        size = self.options.size
        if size is not None and size % step:
            raise ConfigError(f"--size: {size} is not a multiple of {step}, as {self.family} needs")
        return {} if size is None else {"height": size, "width": size}

    def _refuse(self, *options: str) -> None:
        for option in options:
            if getattr(self.options, option):
                name = option.replace("_", "-")
                raise ConfigError(f"--{name}: {self.family} does not support it; omit it")


class StableUnclip(Decoder):
    """Stable unCLIP, which reads the prompt too."""

    PIPELINES = ("StableUnCLIPImg2ImgPipeline", "StableUnCLIPPipeline")
    family = "Stable unCLIP"

    def _load(self) -> None:
        self._refuse("prior")
        super()._load()
        normalizer = self.pipeline.image_normalizer
        self.width = int(normalizer.config.embedding_dim)
        mean, std = (part.detach().cpu().float()[0] for part in (normalizer.mean, normalizer.std))
        is_trained = bool(mean.any()) or not bool((std == 1).all())
        self.statistics = Statistics(mean, std) if is_trained else None

    def _arguments(self, embeddings: Tensor, prompts: Sequence[str]) -> dict[str, Any]:
        level = self.options.noise_level
        most = self.pipeline.image_noising_scheduler.config.num_train_timesteps
        if level >= most:
            raise ConfigError(f"--noise-level: {level} is not below {most}; choose a smaller one")
        arguments = {"image_embeds": embeddings, "prompt": list(prompts), "noise_level": level}
        return arguments | self._sizes(8)


class Karlo(Decoder):
    """Karlo, with its pipeline of image variations, which reads no prompt."""

    PIPELINES = ("UnCLIPImageVariationPipeline", "UnCLIPPipeline")
    STEPS = "decoder_num_inference_steps"
    GUIDANCE = "decoder_guidance_scale"
    family = "Karlo"

    def _load(self) -> None:
        self._refuse("size", "noise_level")
        if self.options.steps == 1:
            raise ConfigError("--steps: Karlo needs 2 or more")
        super()._load()
        self.width = int(self.pipeline.text_proj.config.clip_embeddings_dim)
        self.statistics = _prior_statistics(_find_folder(self.options.prior or str(self.folder)))

    def _arguments(self, embeddings: Tensor, prompts: Sequence[str]) -> dict[str, Any]:
        return {"image_embeddings": embeddings}


class Kandinsky(Decoder):
    """Kandinsky 2.2, which reads no prompt and is guided away from an empty image."""

    PIPELINES = ("KandinskyV22Pipeline",)
    family = "Kandinsky 2.2"

    def _load(self) -> None:
        self._refuse("noise_level")
        prior = None if self.options.prior is None else _find_folder(self.options.prior)
        self._empty = torch.zeros(1, 1)  # unused without guidance
        if self.options.guidance != 1:
            if prior is None:
                raise ConfigError(
                    "--prior: Kandinsky is guided away from the embedding of an empty image by its "
                    "prior; name it, or disable guidance with --guidance 1"
                )
            encoder = _load_component(prior, "image_encoder", torch.float32)
            side = encoder.config.image_size
            with torch.no_grad():
                self._empty = encoder(torch.zeros(1, 3, side, side)).image_embeds
        super()._load()
        self.width = int(self.pipeline.unet.config.encoder_hid_dim)
        self.statistics = None if prior is None else _prior_statistics(prior)
        if self._empty.shape[1] not in (1, self.width):
            raise ConfigError(
                f"--prior: its image encoder gives embeddings of width {self._empty.shape[1]}, the "
                f"decoder takes {self.width}; name the prior that belongs to it"
            )

    def _arguments(self, embeddings: Tensor, prompts: Sequence[str]) -> dict[str, Any]:
        factor = self.pipeline.movq_scale_factor
        own = self.pipeline.unet.config.sample_size * factor
        negative = self._empty.to(embeddings).expand(len(embeddings), -1)
        sizes = {"height": own, "width": own, **self._sizes(factor**2)}
        return {"image_embeds": embeddings, "negative_image_embeds": negative, **sizes}


def _load_component(folder: Path, name: str, dtype: torch.dtype, pipeline: Any = None) -> Any:
    """Load a component: of a known class, from safetensors, and with all of its weights."""
    import diffusers
    import transformers

    entry = _read_index(folder).get(name)
    wanted = str(entry[-1]) if isinstance(entry, list) and entry else ""
    modules = (diffusers, transformers, sys.modules.get(getattr(pipeline, "__module__", "")))
    found = next((getattr(each, wanted) for each in modules if hasattr(each, wanted)), None)
    kind: Any = found if isinstance(found, type) else object
    models = (diffusers.ModelMixin, transformers.PreTrainedModel)
    others = (diffusers.SchedulerMixin, transformers.PreTrainedTokenizerBase)
    if not issubclass(kind, models + others):
        reason = f"{name} is not a class of diffusers or transformers ({entry})"
        raise DecoderError(f"{folder / INDEX}: {reason}; download the model again")
    is_network = issubclass(kind, models)
    options = {"use_safetensors": True, "output_loading_info": True} if is_network else {}
    try:
        loaded = kind.from_pretrained(str(folder / name), local_files_only=True, **options)
    except _CANNOT_LOAD as error:
        raise DecoderError(
            f"{folder / name}: cannot be loaded ({first_line(error)}); download the whole model, "
            "with its weights as safetensors"
        ) from error
    network, report = loaded if is_network else (loaded, {})
    if missing := sorted(report.get("missing_keys", ())):
        lacks = f"lacks {len(missing)} weights ({missing[0]})"
        raise DecoderError(f"{folder / name}: {lacks}; download it again")
    return network.to(dtype).eval() if is_network else loaded


def _prior_statistics(folder: Path) -> Statistics | None:
    """Read the statistics that a prior was trained with, without its network."""
    for path in sorted((folder / "prior").glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                if not {"clip_mean", "clip_std"} <= set(file.keys()):
                    continue
                mean, std = (file.get_tensor(key).float()[0] for key in ("clip_mean", "clip_std"))
        except (OSError, SafetensorError) as error:
            reason = f"is damaged ({first_line(error)}); download it again"
            raise DecoderError(f"{path}: {reason}") from error
        return Statistics(mean, std) if bool((std > 0).all()) else None
    return None


def _find_folder(name: str) -> Path:
    """Find the folder of a model, downloaded if it is one of the hub's."""
    folder = Path(name)
    if folder.is_dir():
        return folder
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise DecoderError(
            f"{name}: no such folder; pass a decoder in diffusers' format, or a model of the hub, "
            "OWNER/NAME, such as kandinsky-community/kandinsky-2-2-decoder"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=_WANTED, ignore_patterns=_UNWANTED))
    except Exception as error:  # of the network, in more kinds than can be listed
        raise DecoderError(
            f"{name}: not a folder here, and not available from the hub ({first_line(error)})"
        ) from error


def _read_index(folder: Path) -> dict[str, Any]:
    path = folder / INDEX
    if not path.is_file():
        raise DecoderError(f"{folder}: not a pipeline of diffusers (no {INDEX} in it)")
    return read_object(path, "download the model again")


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence warnings and progress bars of the libraries; DecoderError without them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            import diffusers
            import transformers
        except ImportError as error:
            raise DecoderError(
                f"images need diffusers and transformers ({error}): pip install 'csalign[generate]'"
            ) from None
        logs = (diffusers.utils.logging, transformers.utils.logging)
        levels = [each.get_verbosity() for each in logs]
        for each in logs:
            each.set_verbosity_error()
            each.disable_progress_bar()
        try:
            yield
        finally:
            for each, level in zip(logs, levels, strict=True):
                each.set_verbosity(level)
                each.enable_progress_bar()
