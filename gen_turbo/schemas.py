"""What may be set for each kind of pipeline: the schemas of the YAML files under configs/pipeline."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from typing import Any

from omegaconf import MISSING

DTYPES = ("auto", "float32", "float16", "bfloat16")
SIZE_MULTIPLE = 8
MOST = 1_000_000
"""More of anything is a slip of the keyboard."""
LARGEST_SEED = 2**32 - 1
"""PyTorch's generator on a CPU, which draws the noise of images, reads the lower 32 bits of its seed alone."""
_KINDS: dict[str, tuple[type, str]] = {
    "bool": (bool, "true or false"),
    "int": (Integral, "a whole number"),
    "float": (Real, "a number"),
    "str": (str, "a text"),
}
"""What a value annotated so may be, and how to say so."""
_DEVICE = re.compile(r"auto|cpu|mps|cuda(:(0|[1-9][0-9]?))?")


class ConfigError(ValueError):
    """A setting, file or machine does not allow what was asked; the message is one sentence for the user."""


def reason(error: Exception) -> str:
    """Why a file cannot be read, in one line; what the system says, without its number and the file's name."""
    return getattr(error, "strerror", None) or " ".join(str(error).split())


@dataclass
class Loading:
    """Where a model comes from and where it goes.

    Attributes:
        checkpoint: `embedded:NAME` for a model inside the package, a folder in the layout of its library (relative to
            the current folder), or a repository on the hub, such as `owner/name`.
        pipeline: Name of the builder that makes a pipeline of the checkpoint.
        dtype: auto, float32, float16 or bfloat16; auto is float32 where there is no cuda; on cuda
            float16, or bfloat16 for models that were trained in it, such as Flux.
        device: auto, cpu, mps, cuda or cuda:N; auto takes cuda, then mps, then cpu.
        variant: Which files of the checkpoint to take, such as fp16; None takes those without a variant.
        local_files_only: Whether the hub may be asked for nothing, so that only what was fetched before is used.
        processor: Settings of a method with its name under `method`, a method's name, the path of a YAML file, or None
            for the stock pipeline.
    """

    checkpoint: str = MISSING
    pipeline: str = MISSING
    dtype: str = "auto"
    device: str = "auto"
    variant: str | None = None
    local_files_only: bool = False
    processor: Any = None

    def __post_init__(self) -> None:
        """Checks every setting; raises ConfigError naming it, its value and what it may be."""
        check_finite(self)
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}; got {self.dtype!r}")
        if not _DEVICE.fullmatch(self.device):
            raise ConfigError(f"device must be auto, cpu, mps, cuda or cuda:N; got {self.device!r}")


@dataclass
class PipelineConfig(Loading):
    """A pipeline that makes images from text; the settings of `Loading`, and these.

    Attributes:
        steps: Denoising steps of a run.
        guidance_scale: Scale of classifier-free guidance; raising it follows the prompt more closely.
        height: Height of the images in pixels; None takes the pipeline's own.
        width: Width of the images in pixels; None takes the pipeline's own.
        max_size: The most pixels that height and width may have, so that a slip of the keyboard fills no memory.
        max_steps: The most steps, for the same reason.
    """

    pipeline: str = "text-to-image"
    steps: int = 25
    guidance_scale: float = 7.5
    height: int | None = None
    width: int | None = None
    max_size: int = 4096
    max_steps: int = 1000

    def __post_init__(self) -> None:
        """Checks every setting; raises ConfigError naming it, its value and what it may be."""
        super().__post_init__()
        check_count("steps", self.steps, self.max_steps, "max_steps")
        if not 0 <= self.guidance_scale < float("inf"):
            raise ConfigError(f"guidance_scale must be a number that is not negative; got {self.guidance_scale}")
        for name in ("height", "width"):
            size_px = getattr(self, name)
            if size_px is not None and (size_px < SIZE_MULTIPLE or size_px % SIZE_MULTIPLE):
                raise ConfigError(f"{name} must be a positive multiple of {SIZE_MULTIPLE} pixels; got {size_px}")
            if size_px is not None:
                check_count(name, size_px, self.max_size, "max_size")


@dataclass
class CaptionConfig(Loading):
    """A pipeline that writes about images; the settings of `Loading`, and these.

    Attributes:
        prompt: What the model is asked about each image; None gives no prompt, as captioning models want it.
        template: How a prompt becomes the model's input, with `{prompt}` and the model's own mark of an image in it,
            such as "USER: <image> {prompt} ASSISTANT:"; None takes the checkpoint's chat template, if it has one.
        max_new_tokens: The most tokens that are written about an image.
        batch_size: Images that the model reads at once.
    """

    pipeline: str = "caption"
    prompt: str | None = None
    template: str | None = None
    max_new_tokens: int = 40
    batch_size: int = 8

    def __post_init__(self) -> None:
        """Checks every setting; raises ConfigError naming it, its value and what it may be."""
        super().__post_init__()
        for name in ("max_new_tokens", "batch_size"):
            check_count(name, getattr(self, name))


@dataclass
class CaptionGenerateConfig:
    """Image to caption to new image.

    Attributes:
        pipeline: Name of the builder.
        caption: The half that reads images.
        generate: The half that draws.
        drawn: What is drawn, with `{caption}` in it, such as "{caption}, in oil".
        strength: How far a new image may depart from the old one, in (0, 1]; None draws from the caption alone.
        batch_size: Images that are drawn at once.
    """

    pipeline: str = "caption-generate"
    caption: CaptionConfig = field(default_factory=CaptionConfig)
    generate: PipelineConfig = field(default_factory=PipelineConfig)
    drawn: str = "{caption}"
    strength: float | None = None
    batch_size: int = 4

    def __post_init__(self) -> None:
        """Checks every setting; raises ConfigError naming it, its value and what it may be."""
        if "{caption}" not in self.drawn:
            raise ConfigError(f"drawn must contain {{caption}}; got {self.drawn!r}")
        check_strength(self.strength)
        check_count("batch_size", self.batch_size)


Settings = PipelineConfig | CaptionConfig | CaptionGenerateConfig
"""The settings of any pipeline."""

CALL_SETTINGS = {
    "steps": "num_inference_steps",
    "guidance_scale": "guidance_scale",
    "height": "height",
    "width": "width",
}
"""Settings of one run rather than of the pipeline, and what diffusers calls them."""

_SCHEMAS: dict[str, type[Settings]] = {"caption": CaptionConfig, "caption-generate": CaptionGenerateConfig}


def schema_of(tree: Mapping[str, Any]) -> type[Settings]:
    """The schema of a file's settings, by what it has under `pipeline`."""
    return _SCHEMAS.get(str(tree.get("pipeline")), PipelineConfig)


def check_seed(seed: int) -> None:
    """Refuses a seed that is negative, or whose noise on a CPU would be that of a smaller one.

    Raises:
        ConfigError: With the seeds that may be given.
    """
    if not 0 <= seed <= LARGEST_SEED:
        raise ConfigError(f"the seed must be between 0 and {LARGEST_SEED}; got {seed}")


def check_count(name: str, count: int, most: int = MOST, limit: str | None = None) -> None:
    """Refuses a count below 1, or one that nobody means.

    Args:
        name: What is counted.
        count: The count.
        most: The largest that is taken.
        limit: The setting that allows more; None where there is none.

    Raises:
        ConfigError: Naming the setting, its value and what it may be.
    """
    if count < 1:
        raise ConfigError(f"{name} must be at least 1; got {count}")
    if count > most:
        more = f"; {limit}=... allows more" if limit is not None else ""
        raise ConfigError(f"{name} must be at most {most}; got {count}{more}")


def check_finite(settings: Any) -> None:
    """Refuses numbers that are infinite or none among the settings of a dataclass, and in its mappings.

    Raises:
        ConfigError: Naming the setting and its value.
    """
    for one in fields(settings):
        value = getattr(settings, one.name)
        for number in value.values() if isinstance(value, Mapping) else (value,):
            if isinstance(number, float) and not math.isfinite(number):
                raise ConfigError(f"{one.name} must be a finite number; got {value}")


def check_kinds(settings: Any) -> None:
    """Refuses settings of a dataclass whose values are of another kind than their annotations say.

    Raises:
        ConfigError: Naming the setting and its value.
    """
    for one in fields(settings):
        value, annotated = getattr(settings, one.name), str(one.type).removesuffix(" | None")
        if annotated.startswith("list["):
            if not isinstance(value, list | tuple):
                raise ConfigError(f"{one.name} must be a list; got {value!r}")
            annotated, values = annotated[5:-1], list(value)
        else:
            values = [value]
        kind, what = _KINDS.get(annotated, (object, ""))
        for given in values:
            is_none = given is None and str(one.type).endswith(" | None")
            if not is_none and (
                not isinstance(given, kind) or (isinstance(given, bool) and annotated != "bool" and what)
            ):
                raise ConfigError(f"{one.name} must be {what}; got {value!r}")


def check_strength(strength: float | None) -> None:
    """Refuses what is no strength of image-to-image; raises ConfigError."""
    if strength is not None and not 0 < strength <= 1:
        raise ConfigError(f"strength must be a number in (0, 1], or null to draw from the caption; got {strength}")
