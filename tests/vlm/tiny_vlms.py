"""Tiny real vision-language models with random weights, and prompts for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AyaVisionConfig,
    AyaVisionForConditionalGeneration,
    CLIPVisionConfig,
    Cohere2Config,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GemmaConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PixtralVisionConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMoeConfig,
    Qwen3VLMoeForConditionalGeneration,
    SiglipVisionConfig,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

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
_ROPE = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
# Features that Qwen3-VL adds after the first decoder layers, one for each of these blocks of its tower.
_DEEP = [0]


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
    """

    make: Callable[..., nn.Module]
    num_tokens: int = 16
    text: str = "model.language_model"
    grid: tuple[int, int] | None = (4, 4)
    cuts: tuple[int, ...] = (1, 2)
    has_tower: bool = True
    images: Callable[[list[int]], dict[str, Tensor]] = lambda counts: {"pixel_values": pixels(sum(counts))}
    extra: Callable[[Tensor, Tensor], dict[str, Tensor]] = lambda ids, mask: {}


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


def _maker(model: Any, config: Any, **settings: Any) -> Callable[[str], nn.Module]:
    def make(attention: str = "sdpa") -> nn.Module:
        made = config(**{name: value() if callable(value) else value for name, value in settings.items()})
        made._attn_implementation = attention
        torch.manual_seed(0)
        return ready(model(made))

    return make


def _llama() -> LlamaConfig:
    return LlamaConfig(**TEXT)


def _qwen(model: Any, config: Any, vision: dict[str, Any], **text: Any) -> Callable[[str], nn.Module]:
    common = {"patch_size": 8, "spatial_merge_size": 2, "temporal_patch_size": 2, "depth": 3, "in_channels": 3}
    return _maker(
        model,
        config,
        vision_config=lambda: {**common, **vision},
        text_config=lambda: {**TEXT, "rope_parameters": dict(_ROPE), **text},
        image_token_id=IMAGE,
        video_token_id=98,
        vision_start_token_id=97,
        vision_end_token_id=96,
    )


def _qwen_images(counts: list[int]) -> dict[str, Tensor]:
    """Images of 64 x 64 pixels: 8 x 8 patches of two frames, 4 x 4 tokens."""
    generator = torch.Generator().manual_seed(0)
    patches = torch.randn(sum(counts) * 64, 3 * 2 * 8 * 8, generator=generator)
    return {"pixel_values": patches, "image_grid_thw": torch.tensor([[1, 8, 8]] * sum(counts))}


def _types(ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    return {"mm_token_type_ids": (ids == IMAGE).int()}


def _rows_of_images(counts: list[int]) -> dict[str, Tensor]:
    """Images in rows (B, most, 3, 64, 64), rows with fewer filled up with zeros."""
    rows = torch.zeros(len(counts), max(counts), 3, 64, 64)
    generator = torch.Generator().manual_seed(0)
    for row, count in enumerate(counts):
        rows[row, :count] = torch.randn(count, 3, 64, 64, generator=generator)
    return {"pixel_values": rows}


def _wide_images(counts: list[int]) -> dict[str, Tensor]:
    """Images of 64 x 64 pixels."""
    return {"pixel_values": torch.randn(sum(counts), 3, 64, 64, generator=torch.Generator().manual_seed(0))}


def _next_images(counts: list[int]) -> dict[str, Tensor]:
    """Square images: a thumbnail and one tile each, whose rows end in a newline."""
    tiles = torch.randn(sum(counts), 2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return {"pixel_values": tiles, "image_sizes": torch.tensor([[32, 32]] * sum(counts))}


def _sized_images(side: int) -> Callable[[list[int]], dict[str, Tensor]]:
    """Images of 2 x 8 tokens, with their sizes, for towers that read any size."""

    def images(counts: list[int]) -> dict[str, Tensor]:
        count, generator = sum(counts), torch.Generator().manual_seed(0)
        sizes = torch.tensor([[2 * side, 8 * side]] * count)
        return {"pixel_values": torch.randn(count, 3, 2 * side, 8 * side, generator=generator), "image_sizes": sizes}

    return images


_CLIP = {"vision_config": lambda: CLIPVisionConfig(**VISION), "text_config": _llama, "image_token_index": IMAGE}
_TILES = {
    "vision_config": lambda: {**VISION, "image_size": 64},
    "text_config": lambda: {**TEXT, "model_type": "llama"},
    "image_token_id": IMAGE,
    "scale_factor": 2,
    "pad_token_id": PAD,
}
_QWEN = {"images": _qwen_images, "extra": _types}
VLMS = {
    "llava": TinyVlm(_maker(LlavaForConditionalGeneration, LlavaConfig, **_CLIP)),
    "llava_siglip": TinyVlm(
        _maker(
            LlavaForConditionalGeneration,
            LlavaConfig,
            **_CLIP | {"vision_config": lambda: SiglipVisionConfig(**VISION)},
            vision_feature_select_strategy="full",
        )
    ),
    "llava_next": TinyVlm(
        _maker(LlavaNextForConditionalGeneration, LlavaNextConfig, **_CLIP, image_grid_pinpoints=[[32, 32]]),
        num_tokens=16 + 4 * 5,
        grid=None,
        images=_next_images,
    ),
    "llava_pixtral": TinyVlm(
        _maker(
            LlavaForConditionalGeneration,
            LlavaConfig,
            **_CLIP | {"vision_config": lambda: PixtralVisionConfig(**VISION | {"image_size": 64})},
            vision_feature_select_strategy="full",
            vision_feature_layer=-1,
        ),
        grid=(2, 8),
        has_tower=False,
        images=_sized_images(8),
    ),
    "llava_onevision": TinyVlm(
        _maker(
            LlavaOnevisionForConditionalGeneration,
            LlavaOnevisionConfig,
            vision_config=lambda: SiglipVisionConfig(**VISION, vision_use_head=False),
            text_config=lambda: Qwen2Config(**TEXT),
            image_token_index=IMAGE,
            video_token_index=98,
            image_grid_pinpoints=[[32, 32]],
        ),
        num_tokens=16 + 4 * 5,
        grid=None,
        images=_next_images,
    ),
    "mistral3": TinyVlm(
        _maker(
            Mistral3ForConditionalGeneration,
            Mistral3Config,
            vision_config=lambda: PixtralVisionConfig(**VISION | {"image_size": 128}),
            text_config=lambda: MistralConfig(**TEXT, head_dim=8, sliding_window=None),
            image_token_index=IMAGE,
        ),
        grid=(2, 8),
        has_tower=False,
        images=_sized_images(16),
    ),
    "aya": TinyVlm(
        _maker(
            AyaVisionForConditionalGeneration,
            AyaVisionConfig,
            vision_config=lambda: SiglipVisionConfig(**VISION | {"image_size": 64}, vision_use_head=False),
            text_config=lambda: Cohere2Config(**TEXT, sliding_window=9, sliding_window_pattern=2),
            image_token_index=IMAGE,
        ),
        cuts=(),
        images=_wide_images,
    ),
    "qwen2": TinyVlm(
        _qwen(Qwen2VLForConditionalGeneration, Qwen2VLConfig, {"embed_dim": 32, "hidden_size": 32, "num_heads": 4}),
        **_QWEN,
    ),
    "qwen2_5": TinyVlm(
        _qwen(
            Qwen2_5_VLForConditionalGeneration,
            Qwen2_5_VLConfig,
            {"hidden_size": 32, "out_hidden_size": 32, "num_heads": 4, "intermediate_size": 48,
             "window_size": 32, "fullatt_block_indexes": [1]},
        ),
        **_QWEN,
    ),
    "qwen3": TinyVlm(
        _qwen(
            Qwen3VLForConditionalGeneration,
            Qwen3VLConfig,
            {"hidden_size": 32, "out_hidden_size": 32, "num_heads": 4, "intermediate_size": 48,
             "num_position_embeddings": 64, "deepstack_visual_indexes": _DEEP},
            head_dim=8,
        ),
        **_QWEN,
    ),
    "qwen3_moe": TinyVlm(
        _qwen(
            Qwen3VLMoeForConditionalGeneration,
            Qwen3VLMoeConfig,
            {"hidden_size": 32, "out_hidden_size": 32, "num_heads": 4, "intermediate_size": 48,
             "num_position_embeddings": 64, "deepstack_visual_indexes": _DEEP},
            head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
        ),
        **_QWEN,
    ),
    "internvl": TinyVlm(
        _maker(
            InternVLForConditionalGeneration,
            InternVLConfig,
            vision_config=lambda: {**VISION, "image_size": [64, 64], "patch_size": [8, 8]},
            text_config=lambda: Qwen2Config(**TEXT),
            image_token_id=IMAGE,
            downsample_ratio=0.5,
        ),
        images=_wide_images,
    ),
    "idefics3": TinyVlm(
        _maker(Idefics3ForConditionalGeneration, Idefics3Config, **_TILES),
        text="model.text_model",
        images=_rows_of_images,
    ),
    "smolvlm": TinyVlm(
        _maker(SmolVLMForConditionalGeneration, SmolVLMConfig, **_TILES),
        text="model.text_model",
        images=_rows_of_images,
    ),
    "gemma3": TinyVlm(
        _maker(
            Gemma3ForConditionalGeneration,
            Gemma3Config,
            vision_config=lambda: SiglipVisionConfig(**VISION | {"image_size": 64}, vision_use_head=False),
            text_config=lambda: Gemma3TextConfig(
                **TEXT, head_dim=8, query_pre_attn_scalar=8, sliding_window=9, sliding_window_pattern=2
            ),
            image_token_index=IMAGE,
            mm_tokens_per_image=16,
        ),
        cuts=(),
        images=_wide_images,
        extra=lambda ids, mask: {"token_type_ids": (ids == IMAGE).int()},
    ),
    "paligemma": TinyVlm(
        _maker(
            PaliGemmaForConditionalGeneration,
            PaliGemmaConfig,
            vision_config=lambda: SiglipVisionConfig(**VISION),
            text_config=lambda: GemmaConfig(**TEXT, head_dim=8),
            image_token_index=IMAGE,
            projection_dim=32,
            hidden_size=32,
        ),
        extra=lambda ids, mask: {"token_type_ids": torch.zeros_like(ids)},
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Prompt:
    """Rows of text lengths and images: each row is a list of ints (that many text tokens) and "i" (an image)."""

    rows: list[list[int | str]]
    side: str = "left"

    def inputs(self, vlm: TinyVlm, seed: int = 0) -> dict[str, Tensor]:
        """Token ids, mask and images."""
        generator = torch.Generator().manual_seed(seed)
        rows = []
        for row in self.rows:
            parts = [
                torch.full((vlm.num_tokens,), IMAGE)
                if part == "i"
                # As long as an image, so that rows with more and with fewer images are of one length.
                else torch.randint(3, 90, (vlm.num_tokens if part == "t" else int(part),), generator=generator)
                for part in row
            ]
            rows.append(torch.cat(parts))
        length = max(map(len, rows))
        ids, mask = torch.full((len(rows), length), PAD), torch.zeros(len(rows), length, dtype=torch.int64)
        for index, row in enumerate(rows):
            place = slice(length - len(row), length) if self.side == "left" else slice(0, len(row))
            ids[index, place], mask[index, place] = row, 1
        counts = [row.count("i") for row in self.rows]
        return {"input_ids": ids, "attention_mask": mask, **vlm.images(counts), **vlm.extra(ids, mask)}


PROMPTS = {
    "one": Prompt([[2, "i", 5]]),
    "even": Prompt([[2, "i", 5], [4, "i", 3]]),
    "padded": Prompt([[2, "i", 7], [1, "i", 2]]),
    "ragged": Prompt([[2, "i", 3, "i", 2], [2, "i", 5, "t"]]),
    "ragged_padded": Prompt([[2, "i", 3, "i", 2], [2, "i", 5], [6]]),
}
