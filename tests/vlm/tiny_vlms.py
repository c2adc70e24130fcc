"""Tiny real vision-language models with random weights, and prompts for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, SiglipVisionConfig

IMAGE, PAD = 99, 0
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": None,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}


@dataclass(frozen=True)
class TinyVlm:
    """One model family at toy size.

    Attributes:
        make: Builds the model with an attention implementation.
        pixels: Makes the arguments that bring `n` pictures.
        num_tokens: Image tokens of one picture.
        between: Tokens that the family puts around a picture.
    """

    make: Callable[[str], nn.Module]
    pixels: Callable[[int], dict[str, Tensor]]
    num_tokens: int = 16
    extra: Callable[[Tensor], dict[str, Tensor]] = field(default=lambda ids: {})


def ready(model: nn.Module, seed: int = 0) -> nn.Module:
    """Weights large enough that every token matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                fan_in = weight[0].numel()
                weight.copy_(torch.randn(weight.shape, generator=generator) * (1.5 / fan_in**0.5))
    return model.eval()


def pixels(count: int, seed: int = 0) -> Tensor:
    """Pictures of 32 x 32 pixels."""
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def _llava(attention: str, vision: Any = CLIPVisionConfig, strategy: str = "default") -> nn.Module:
    config = LlavaConfig(
        vision_config=vision(**VISION),
        vision_feature_select_strategy=strategy,
        text_config=LlamaConfig(**TEXT),
        image_token_index=IMAGE,
        image_seq_length=16,
    )
    config._attn_implementation = attention
    return ready(LlavaForConditionalGeneration(config))


def _llava_siglip(attention: str) -> nn.Module:
    return _llava(attention, SiglipVisionConfig, "full")


VLMS = {
    "llava": TinyVlm(_llava, lambda count: {"pixel_values": pixels(count)}),
    "llava_siglip": TinyVlm(_llava_siglip, lambda count: {"pixel_values": pixels(count)}),
}


@dataclass(frozen=True)
class Prompt:
    """Rows of text lengths and pictures: each row is a list of ints (that many text tokens) and "i" (a picture)."""

    rows: list[list[int | str]]
    side: str = "left"

    def inputs(self, vlm: TinyVlm, seed: int = 0) -> dict[str, Tensor]:
        """Token ids, mask and pictures."""
        generator = torch.Generator().manual_seed(seed)
        rows = []
        for row in self.rows:
            parts = [
                torch.full((vlm.num_tokens,), IMAGE)
                if part == "i"
                else torch.randint(3, 90, (int(part),), generator=generator)
                for part in row
            ]
            rows.append(torch.cat(parts))
        length = max(map(len, rows))
        ids, mask = torch.full((len(rows), length), PAD), torch.zeros(len(rows), length, dtype=torch.int64)
        for index, row in enumerate(rows):
            place = slice(length - len(row), length) if self.side == "left" else slice(0, len(row))
            ids[index, place], mask[index, place] = row, 1
        count = sum(part == "i" for row in self.rows for part in row)
        return {"input_ids": ids, "attention_mask": mask, **vlm.pixels(count), **vlm.extra(ids)}


PROMPTS = {
    "one": Prompt([[2, "i", 5]]),
    "even": Prompt([[2, "i", 5], [4, "i", 3]]),
    "padded": Prompt([[2, "i", 7], [1, "i", 2]]),
    "ragged": Prompt([[2, "i", 3, "i", 2], [2, "i", 21]]),
    "ragged_padded": Prompt([[2, "i", 3, "i", 2], [2, "i", 5], [6]]),
}
