"""Tiny models built as LLaVA is: a vision tower, a projector, a causal language model."""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers as stock
from torch import Tensor

from tests.vlm.tiny_kit import IMAGE, TEXT, VISION, TinyVlm, maker, wide_images


def llama() -> stock.LlamaConfig:
    """A language model."""
    return stock.LlamaConfig(**TEXT)


def next_images(counts: list[int]) -> dict[str, Tensor]:
    """Square images: a thumbnail and one tile each, whose rows end in a newline."""
    tiles = torch.randn(sum(counts), 2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return {"pixel_values": tiles, "image_sizes": torch.tensor([[32, 32]] * sum(counts))}


def sized_images(side: int) -> Callable[[list[int]], dict[str, Tensor]]:
    """Images of 2 x 8 tokens, with their sizes, for towers that read any size."""

    def images(counts: list[int]) -> dict[str, Tensor]:
        count, generator = sum(counts), torch.Generator().manual_seed(0)
        sizes = torch.tensor([[2 * side, 8 * side]] * count)
        return {"pixel_values": torch.randn(count, 3, 2 * side, 8 * side, generator=generator), "image_sizes": sizes}

    return images


CLIP = {"vision_config": lambda: stock.CLIPVisionConfig(**VISION), "text_config": llama, "image_token_index": IMAGE}
LLAVAS = {
    "llava": TinyVlm(maker("LlavaForConditionalGeneration", **CLIP)),
    "llava_siglip": TinyVlm(
        maker(
            "LlavaForConditionalGeneration",
            **CLIP | {"vision_config": lambda: stock.SiglipVisionConfig(**VISION)},
            vision_feature_select_strategy="full",
        )
    ),
    "llava_next": TinyVlm(
        maker("LlavaNextForConditionalGeneration", **CLIP, image_grid_pinpoints=[[32, 32]]),
        num_tokens=16 + 4 * 5,
        grid=None,
        images=next_images,
    ),
    "llava_pixtral": TinyVlm(
        maker(
            "LlavaForConditionalGeneration",
            **CLIP | {"vision_config": lambda: stock.PixtralVisionConfig(**VISION | {"image_size": 64})},
            vision_feature_select_strategy="full",
            vision_feature_layer=-1,
        ),
        grid=(2, 8),
        has_tower=False,
        images=sized_images(8),
    ),
    "llava_onevision": TinyVlm(
        maker(
            "LlavaOnevisionForConditionalGeneration",
            vision_config=lambda: stock.SiglipVisionConfig(**VISION, vision_use_head=False),
            text_config=lambda: stock.Qwen2Config(**TEXT),
            image_token_index=IMAGE,
            video_token_index=98,
            image_grid_pinpoints=[[32, 32]],
        ),
        num_tokens=16 + 4 * 5,
        grid=None,
        images=next_images,
    ),
    "mistral3": TinyVlm(
        maker(
            "Mistral3ForConditionalGeneration",
            vision_config=lambda: stock.PixtralVisionConfig(**VISION | {"image_size": 128}),
            text_config=lambda: stock.MistralConfig(**TEXT, head_dim=8, sliding_window=None),
            image_token_index=IMAGE,
        ),
        grid=(2, 8),
        has_tower=False,
        images=sized_images(16),
    ),
    "cohere2_vision": TinyVlm(
        maker(
            "Cohere2VisionForConditionalGeneration",
            vision_config=lambda: stock.SiglipVisionConfig(**VISION | {"image_size": 64}, vision_use_head=False),
            text_config=lambda: stock.Cohere2Config(**TEXT, sliding_window=9, sliding_window_pattern=2),
            image_token_id=IMAGE,
            alignment_intermediate_size=64,
        ),
        cuts=(),
        images=wide_images,
    ),
    "aya": TinyVlm(
        maker(
            "AyaVisionForConditionalGeneration",
            vision_config=lambda: stock.SiglipVisionConfig(**VISION | {"image_size": 64}, vision_use_head=False),
            text_config=lambda: stock.Cohere2Config(**TEXT, sliding_window=9, sliding_window_pattern=2),
            image_token_index=IMAGE,
        ),
        cuts=(),
        images=wide_images,
    ),
}
