"""What tiny real vision-language models are made of: sizes, weights, images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

IMAGE, PAD = 99, 0
TEXT: dict[str, Any] = {
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
VISION: dict[str, Any] = {
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
        num_tokens: Image tokens of one image.
        text: Path of the language model.
        grid: (height, width) of an image in tokens, where the family knows it.
        cuts: Decoder layers to cut at; none where windows slide.
        has_tower: Whether tokens can merge inside the vision tower.
        images: Makes the arguments that bring images, from the number in each row.
        extra: Makes further arguments from the token ids and the mask.
        is_whole: Whether the oracle runs the stock model as a whole, whose layers it does not know one by one.
    """

    make: Callable[..., nn.Module]
    num_tokens: int = 16
    text: str = "model.language_model"
    grid: tuple[int, int] | None = (4, 4)
    cuts: tuple[int, ...] = (1, 2)
    has_tower: bool = True
    images: Callable[[list[int]], dict[str, Tensor]] = lambda counts: {"pixel_values": pixels(sum(counts))}
    extra: Callable[[Tensor, Tensor], dict[str, Tensor]] = lambda ids, mask: {}
    is_whole: bool = False


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
    """Images of 32 x 32 pixels."""
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def maker(name: str, **settings: Any) -> Callable[[str], nn.Module]:
    """Gives what builds a model of a class with an attention implementation; settings that can be called are made anew.

    A test that builds one which the installed transformers does not have yet is skipped.
    """

    def make(attention: str = "sdpa") -> nn.Module:
        model = getattr(transformers, name, None)
        if model is None:
            pytest.skip(f"transformers {transformers.__version__} has no {name}")
        made = model.config_class(**{name: value() if callable(value) else value for name, value in settings.items()})
        made._attn_implementation = attention
        torch.manual_seed(0)
        return ready(model(made))

    return make


def wide_images(counts: list[int]) -> dict[str, Tensor]:
    """Images of 64 x 64 pixels."""
    return {"pixel_values": torch.randn(sum(counts), 3, 64, 64, generator=torch.Generator().manual_seed(0))}
