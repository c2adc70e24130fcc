"""Tiny models whose language model reads fewer tokens than patches, or images that see all of the prompt."""

from __future__ import annotations

import torch
import transformers as stock
from torch import Tensor

from tests.vlm.tiny_kit import IMAGE, PAD, TEXT, VISION, TinyVlm, maker, wide_images


def _rows_of_images(counts: list[int]) -> dict[str, Tensor]:
    """Images in rows (B, most, 3, 64, 64), rows with fewer filled up with zeros."""
    rows = torch.zeros(len(counts), max(counts), 3, 64, 64)
    generator = torch.Generator().manual_seed(0)
    for row, count in enumerate(counts):
        rows[row, :count] = torch.randn(count, 3, 64, 64, generator=generator)
    return {"pixel_values": rows}


def _placed_images(counts: list[int]) -> dict[str, Tensor]:
    """Images of 8 x 8 patches and where each patch is, (x, y)."""
    generator = torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
    places = torch.stack([x.flatten(), y.flatten()], 1)[None].expand(sum(counts), -1, -1)
    patches = torch.rand(sum(counts), 64, 3 * 8 * 8, generator=generator)
    return {"pixel_values": patches, "image_position_ids": places}


_TILES = {
    "vision_config": lambda: {**VISION, "image_size": 64},
    "text_config": lambda: {**TEXT, "model_type": "llama"},
    "image_token_id": IMAGE,
    "scale_factor": 2,
    "pad_token_id": PAD,
}
POOLED = {
    "internvl": TinyVlm(
        maker(
            "InternVLForConditionalGeneration",
            vision_config=lambda: {**VISION, "image_size": [64, 64], "patch_size": [8, 8]},
            text_config=lambda: stock.Qwen2Config(**TEXT),
            image_token_id=IMAGE,
            downsample_ratio=0.5,
        ),
        images=wide_images,
    ),
    "idefics2": TinyVlm(
        maker(
            "Idefics2ForConditionalGeneration",
            vision_config=lambda: {**VISION, "image_size": 64},
            perceiver_config=lambda: {
                "hidden_size": 32,
                "resampler_n_latents": 16,
                "resampler_depth": 1,
                "resampler_n_heads": 4,
                "resampler_head_dim": 8,
                "num_key_value_heads": 2,
            },
            text_config=lambda: {**TEXT, "model_type": "mistral", "sliding_window": None, "head_dim": 8},
            image_token_id=IMAGE,
        ),
        text="model.text_model",
        grid=None,
        has_tower=False,
        images=_rows_of_images,
    ),
    "idefics3": TinyVlm(
        maker("Idefics3ForConditionalGeneration", **_TILES),
        text="model.text_model",
        images=_rows_of_images,
    ),
    "smolvlm": TinyVlm(
        maker("SmolVLMForConditionalGeneration", **_TILES),
        text="model.text_model",
        images=_rows_of_images,
    ),
    "gemma3": TinyVlm(
        maker(
            "Gemma3ForConditionalGeneration",
            vision_config=lambda: stock.SiglipVisionConfig(**VISION | {"image_size": 64}, vision_use_head=False),
            text_config=lambda: stock.Gemma3TextConfig(
                **TEXT, head_dim=8, query_pre_attn_scalar=8, sliding_window=9, sliding_window_pattern=2
            ),
            image_token_index=IMAGE,
            mm_tokens_per_image=16,
        ),
        cuts=(),
        images=wide_images,
        extra=lambda ids, mask: {"token_type_ids": (ids == IMAGE).int()},
    ),
    "gemma4": TinyVlm(
        maker(
            "Gemma4ForConditionalGeneration",
            vision_config=lambda: stock.Gemma4VisionConfig(
                **{name: value for name, value in VISION.items() if name != "image_size"},
                num_key_value_heads=4,
                head_dim=8,
                pooling_kernel_size=2,
                position_embedding_size=16,
            ),
            text_config=lambda: stock.Gemma4TextConfig(
                **TEXT | {"num_hidden_layers": 6},
                head_dim=8,
                global_head_dim=8,
                sliding_window=9,
                layer_types=["sliding_attention", "full_attention"] * 3,
                hidden_size_per_layer_input=8,
                vocab_size_per_layer_input=100,
                num_kv_shared_layers=2,
                use_bidirectional_attention="vision",
            ),
            audio_config=lambda: None,
            image_token_id=IMAGE,
            video_token_id=98,
            audio_token_id=95,
        ),
        cuts=(),
        has_tower=False,
        images=_placed_images,
        extra=lambda ids, mask: {"mm_token_type_ids": (ids == IMAGE).int()},
    ),
    "paligemma": TinyVlm(
        maker(
            "PaliGemmaForConditionalGeneration",
            vision_config=lambda: stock.SiglipVisionConfig(**VISION),
            text_config=lambda: stock.GemmaConfig(**TEXT, head_dim=8),
            image_token_index=IMAGE,
            projection_dim=32,
            hidden_size=32,
        ),
        extra=lambda ids, mask: {"token_type_ids": torch.zeros_like(ids)},
    ),
}
