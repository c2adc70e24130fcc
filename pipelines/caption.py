"""Any image-text-to-text model that transformers can load: images in, what is said about them out."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from PIL import Image
from torch import Tensor

from gen_turbo.api import attach, detach
from gen_turbo.config import CaptionConfig, ConfigError
from gen_turbo.engine.report import report
from gen_turbo.inputs import as_rgb
from gen_turbo.method import TokenReducer
from gen_turbo.registry import PIPELINES
from gen_turbo.schemas import check_count

from .loading import device_of, dtype_of, find_checkpoint, reason

_INDEX = "config.json"
_CROSS = ("Blip", "InstructBlip")
"""Text of these models reads the image on the side, so that no image token is in a prompt, or only queries are."""
_OWN_MARKS = ("PaliGemma", *_CROSS)
"""Preparers of these models place the image themselves."""
_ANSWERS = ("BlipForQuestionAnswering",)


@dataclass(frozen=True)
class CaptionResult:
    """What was said about some images, and what it took.

    Attributes:
        texts: One for each image, in their order.
        seconds: Passed from the first image's preparation to the last text.
        num_tokens: Image tokens of all images, as the stock model reads them.
        num_kept: Those of them that the language model, or the layers behind a cut, still had.
    """

    texts: list[str]
    seconds: float
    num_tokens: int
    num_kept: int

    @property
    def text(self) -> str:
        """The first image's text."""
        return self.texts[0]


class CaptionPipeline:
    """A vision-language model with its preparation of images and words, to be called on images.

    Attributes:
        vlm: The stock model.
        preparer: The checkpoint's own processor: images and text to tensors, and back to text.
        config: Its settings; the prompt, the length and the batch are defaults of the call.
    """

    def __init__(self, vlm: Any, preparer: Any, config: CaptionConfig) -> None:
        self.vlm, self.preparer, self.config = vlm, preparer, config

    @property
    def components(self) -> dict[str, Any]:
        """What the pipeline is made of."""
        return {"vlm": self.vlm, "preparer": self.preparer}

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        device: torch.device = self.vlm.device
        return device

    def set_attn_processor(self, processor: TokenReducer | None) -> None:
        """Attaches a gen_turbo processor in place of one attached before; None detaches.

        Raises:
            TypeError: If it is no gen_turbo processor.
            ValueError: If the processor would reduce nothing on this model.
        """
        if processor is None:
            detach(self)
        else:
            attach(self, processor, replace=True)

    def reset_attn_processor(self) -> None:
        """Takes gen_turbo off the model."""
        detach(self)

    @torch.inference_mode()
    def __call__(
        self,
        images: Image.Image | Sequence[Image.Image],
        prompt: str | None = None,
        max_new_tokens: int | None = None,
        batch_size: int | None = None,
        **generate: Any,
    ) -> CaptionResult:
        """Says something about every image.

        Args:
            images: One image or several, of any mode and size.
            prompt: The prompt; None takes the configuration's.
            max_new_tokens: The most tokens that are written about an image; None as configured.
            batch_size: Images that are read at once; None as configured.
            **generate: Goes to the model's `generate`; by default the likeliest token is taken each time.

        Raises:
            ConfigError: If there is no image, one has no known white, or the template does not fit.
        """
        each = [images] if isinstance(images, Image.Image) else [*images] if isinstance(images, Sequence) else []
        if not each or not all(isinstance(one, Image.Image) for one in each):
            raise ConfigError(f"expected a PIL image or a list of them; got {images!r:.80}")
        length = positive("max_new_tokens", max_new_tokens, self.config.max_new_tokens)
        batch = positive("batch_size", batch_size, self.config.batch_size)
        settings = {"max_new_tokens": length, "do_sample": False, **generate}
        texts: list[str] = []
        num_tokens = num_kept = 0
        start_s = time.perf_counter()
        for first in range(0, len(each), batch):
            said, before, after = self._batch(each[first : first + batch], prompt, settings)
            texts, num_tokens, num_kept = texts + said, num_tokens + before, num_kept + after
        return CaptionResult(texts, time.perf_counter() - start_s, num_tokens, num_kept)

    def _batch(
        self, images: list[Image.Image], prompt: str | None, settings: dict[str, Any]
    ) -> tuple[list[str], int, int]:
        text = self.text_of(self.config.prompt if prompt is None else prompt)
        inputs = self.preparer(
            images=[as_rgb(one, one.format) for one in images],
            text=None if text is None else [text] * len(images),
            return_tensors="pt",
            padding=True,
        ).to(self.device)
        inputs["pixel_values"] = inputs["pixel_values"].to(self.vlm.dtype)
        output = self.vlm.generate(**inputs, **settings)
        written = output[:, _prompt_length(inputs, output) :]
        said = self.preparer.batch_decode(written, skip_special_tokens=True)
        num_tokens = self._num_tokens(inputs, len(images))
        return [" ".join(one.split()) for one in said], num_tokens, self._num_kept(num_tokens)

    def text_of(self, prompt: str | None) -> str | None:
        """What the preparer is given with an image for a prompt; None where the model wants no text.

        Raises:
            ConfigError: If the template has no place for a prompt.
        """
        template = self.config.template
        if template is not None:
            if prompt and "{prompt}" not in template:
                raise ConfigError(f"template must contain {{prompt}} to ask {prompt!r}; got {template!r}")
            return template.replace("{prompt}", prompt or "")
        if getattr(self.preparer, "chat_template", None):
            said = [{"type": "text", "text": prompt}] if prompt else []
            turn = {"role": "user", "content": [{"type": "image"}, *said]}
            text: str = self.preparer.apply_chat_template([turn], add_generation_prompt=True)
            return text
        if type(self.preparer).__name__.startswith(_OWN_MARKS):
            return prompt
        return f"{getattr(self.preparer, 'image_token', '')}{prompt or ''}"

    @property
    def _is_cross(self) -> bool:
        return type(self.vlm).__name__.startswith(_CROSS)

    def _num_tokens(self, inputs: Any, count: int) -> int:
        """Image tokens of a batch: marks in the prompt, or patches where text reads the image on the side."""
        config = self.vlm.config
        if self._is_cross:
            vision = config.vision_config
            return count * int(vision.image_size // vision.patch_size) ** 2
        token = getattr(config, "image_token_id", None)
        return 0 if token is None else int((inputs["input_ids"] == token).sum())

    def _num_kept(self, num_tokens: int) -> int:
        # Words are no image tokens.
        rows = [layer for layer in report(self).layers if layer.num_tokens and layer.name != "text_encoder"]
        if not rows:
            return num_tokens
        # A tower that text reads on the side has a row for each block; elsewhere the last row is the language model.
        before = rows[0 if self._is_cross else -1].num_tokens
        return num_tokens * rows[-1].num_kept // before


@PIPELINES.register("caption")
def caption(config: CaptionConfig) -> CaptionPipeline:
    """Loads the model and the preparer of a checkpoint onto a device.

    Only safetensors files are read and no code of a checkpoint is run.

    Raises:
        ConfigError: If the device or the checkpoint is not there, cannot be read, or reads no images.
    """
    device = device_of(config.device)
    checkpoint = find_checkpoint(config.checkpoint, _INDEX)
    hub = {"local_files_only": config.local_files_only, "trust_remote_code": False}
    try:
        settings = transformers.AutoConfig.from_pretrained(checkpoint, **hub)
        answers = any(name in _ANSWERS for name in settings.architectures or ())
        auto = transformers.AutoModelForVisualQuestionAnswering if answers else transformers.AutoModelForImageTextToText
        vlm = auto.from_pretrained(
            checkpoint,
            dtype=dtype_of(config.dtype, device),
            variant=config.variant,
            use_safetensors=True,
            **hub,
        )
        preparer = transformers.AutoProcessor.from_pretrained(checkpoint, **hub)
    except (torch.OutOfMemoryError, MemoryError):
        raise
    # What a stranger's files or a network can do wrong has no common class.
    except Exception as error:
        raise ConfigError(f"cannot load {config.checkpoint}: {reason(error, config.local_files_only)}") from error
    if not hasattr(preparer, "image_processor") or not hasattr(preparer, "tokenizer"):
        raise ConfigError(f"{config.checkpoint} has no processor for images and text; add preprocessor_config.json")
    preparer.tokenizer.padding_side = "left"
    return CaptionPipeline(vlm.to(device).eval(), preparer, config)


def _prompt_length(inputs: Any, output: Tensor) -> int:
    """Columns of the output that repeat the prompt; models that give new tokens alone repeat none."""
    ids = inputs.get("input_ids")
    if ids is None or output.shape[1] < ids.shape[1] or not torch.equal(output[: len(ids), : ids.shape[1]], ids):
        return 0
    return int(ids.shape[1])


def positive(name: str, given: int | None, configured: int) -> int:
    """A number given to a call, or the configured one; raises ConfigError below 1."""
    if given is not None:
        check_count(name, given)
    return configured if given is None else given
