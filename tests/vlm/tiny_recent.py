"""Tiny models of the families of late 2026, most of which read packed patches as Qwen's do."""

from __future__ import annotations

from typing import Any

import torch
import transformers as stock
from torch import Tensor

from tests.vlm.tiny_kit import IMAGE, TEXT, VISION
from tests.vlm.tiny_llava import sized_images
from tests.vlm.tiny_more import ANY_SIZE, EXPERTS, GRID, LATENT, MEDIA, PACKED_VISION, patches, vlm
from tests.vlm.tiny_qwen import RECURRENT, ROPE, qwen_images, types

_MARKED = {"image_token_id": IMAGE, "video_token_id": 98, "vision_start_token_id": 97, "vision_end_token_id": 96}
_KINDS = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 9}
_LINEAR = {
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 4, "linear_num_value_heads": 4,
}  # fmt: skip
_DEEP = {"out_hidden_size": 32, "num_position_embeddings": 64}
_WHOLE: dict[str, Any] = {"cuts": (), "is_whole": True}


def _recurrent() -> Any:
    return stock.Qwen3_5TextConfig(**TEXT, **{**RECURRENT, "rope_parameters": {**RECURRENT["rope_parameters"]}})


def _strips(side: int) -> Any:
    """Images of side x side patches, all in one strip, and their sizes."""

    def images(counts: list[int]) -> dict[str, Tensor]:
        count, generator = sum(counts), torch.Generator().manual_seed(0)
        pixels = torch.randn(1, 3, 8, count * side**2 * 8, generator=generator)
        return {"pixel_values": pixels, "target_sizes": torch.tensor([[side, side]] * count)}

    return images


def _minicpm(name: str, side: int, **tiny: Any) -> Any:
    configured = {
        "vision_config": lambda: {**VISION, "image_size": 128, "insert_layer_id": 1}, "text_config": _recurrent,
        "image_token_id": IMAGE, "video_token_id": 98, "insert_layer_id": 1,
    }  # fmt: skip
    return vlm(f"{name}ForConditionalGeneration", configured, cuts=(), images=_strips(side), **tiny)


def _placed_images(counts: list[int]) -> dict[str, Tensor]:
    """Images of 4 x 4 patches, each a token, and the (x, y) of these."""
    count, side = sum(counts), torch.arange(4)
    places = torch.stack([side.repeat(4), side.repeat_interleave(4)], -1)
    pixels = torch.randn(count, 16, 3 * 24 * 24, generator=torch.Generator().manual_seed(0))
    return {"pixel_values": pixels, "image_position_ids": places.repeat(count, 1, 1)}


RECENT = {
    "minicpm4_6": _minicpm("MiniCPMV4_6", 16),
    "minicpm4_7": _minicpm("MiniCPMV4_7", 16, extra=types),
    "minicpm_ocr": _minicpm("MiniCPMOcr", 8),
    "gemma4_unified": vlm(
        "Gemma4UnifiedForConditionalGeneration",
        {"vision_config": lambda: {"patch_size": 8, "mm_embed_dim": 32, "mm_posemb_size": 16, "output_proj_dims": 32},
         "text_config": lambda: {**TEXT, **_KINDS, "head_dim": 8, "global_head_dim": 8}, "audio_config": None,
         "image_token_id": IMAGE, "video_token_id": 98, "audio_token_id": 95},
        cuts=(), images=_placed_images, extra=types,
    ),
    "qwen4": vlm(
        "Qwen4ExpForConditionalGeneration",
        {"vision_config": lambda: {**PACKED_VISION, **_DEEP},
         "text_config": lambda: {**TEXT, **_LINEAR, **EXPERTS, "eos_token_id": IMAGE, "head_dim": 8,
                                 "shared_expert_intermediate_size": 16, "hc_count": 2, "hc_lowrank": 8,
                                 "layer_types": ["linear_attention", "indexed_attention"] * 2, "ple_layer_ids": [1],
                                 "ple_embed_dim": 32, "ngram_vocab_size_base": 50, "heads_per_ngram": 2,
                                 "make_ngram_vocab_size_divisible_by": 4, "split_ngram_parts": 1,
                                 "rope_parameters": dict(ROPE), "indexer_n_heads": 2, "indexer_kv_heads": 1,
                                 "indexer_head_dim": 8, "indexer_budget": 8, "indexer_compress_ratio": 4},
         **_MARKED},
        images=qwen_images, extra=types, has_tower=True, **_WHOLE,
    ),
    "compass": vlm(
        "CohereCompassForConditionalGeneration",
        {"vision_config": lambda: {**PACKED_VISION, **_DEEP, "deepstack_visual_indexes": [0]},
         "text_config": lambda: {**TEXT, **_KINDS,
                                 "rope_parameters": {"full_attention": None, "sliding_attention": dict(ROPE)}},
         **_MARKED},
        cuts=(), images=qwen_images, extra=types, has_tower=True,
    ),
    "cosmos": vlm(
        "Cosmos3EdgeForConditionalGeneration",
        {"vision_config": lambda: {**ANY_SIZE, "num_patches": 64},
         "text_config": lambda: {**TEXT, "head_dim": 8, "rope_parameters": dict(ROPE)}, "projector_hidden_size": 32,
         **_MARKED},
        images=patches(3 * 8 * 8, **GRID), extra=types,
    ),
    "clova": vlm(
        "HyperCLOVAXVisionV2ForConditionalGeneration",
        {"vision_config": lambda: {**PACKED_VISION, "model_type": "qwen2_5_vl_vision", "out_hidden_size": 32,
                                   "window_size": 32, "fullatt_block_indexes": [1]},
         "text_config": lambda: {**TEXT, "model_type": "hyperclovax", "head_dim": 8}, "image_token_id": IMAGE,
         "video_token_id": 98},
        images=qwen_images,
    ),
    "lfm3": vlm(
        "Lfm3VlForConditionalGeneration",
        {"vision_config": lambda: {**ANY_SIZE, "num_key_value_heads": 2,
                                   "layer_types": ["conv", "full_attention", "conv"]},
         "text_config": lambda: stock.Lfm3Config(
             **TEXT, head_dim=8, sliding_window=9,
             layer_types=["conv", "full_attention", "sliding_attention", "full_attention"]),
         "projector_hidden_size": 32, **_MARKED},
        images=qwen_images, **_WHOLE,
    ),
    "muse": vlm(
        "MuseGlimmerForConditionalGeneration",
        {"vision_config": lambda: {**ANY_SIZE, "pos_emb_height": 8, "pos_emb_width": 8, "max_position_embeddings": 64},
         "text_config": lambda: {**TEXT, **_KINDS, "head_dim": 8}, "image_token_id": IMAGE, "video_token_id": 98,
         "out_hidden_size": 128, "projector_hidden_size": 32},
        images=qwen_images, **_WHOLE,
    ),
    "muse_spark": vlm(
        "MuseSparkForConditionalGeneration",
        {"vision_config": lambda: {**ANY_SIZE, "pos_emb_height": 8, "pos_emb_width": 8, "max_position_embeddings": 64},
         "text_config": lambda: {**TEXT, **_KINDS, "head_dim": 8, "moe_intermediate_size": 16, "num_local_experts": 4,
                                 "num_experts_per_tok": 2, "moe_hidden_size": 16},
         "audio_config": lambda: {"patch_sizes": (4, 2), "hidden_sizes": (8, 8), "depths": (1, 1),
                                  "num_hidden_layers": 2, "out_hidden_size": 32},
         "image_token_id": IMAGE, "video_token_id": 98, "audio_token_id": 103, "out_hidden_size": 128,
         "projector_hidden_size": 32},
        images=qwen_images, **_WHOLE,
    ),
    "mistral_large4": vlm(
        "MistralLarge4ForConditionalGeneration",
        {"vision_config": lambda: stock.PixtralVisionConfig(**VISION | {"image_size": 128}),
         "text_config": lambda: {**TEXT, **LATENT, "index_topk": 64, "index_head_dim": 8, "index_n_heads": 2,
                                 "head_dim": 8, "indexer_types": ["full", "shared"] * 2, "no_rope_layers": [1, 0, 1, 1],
                                 "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0,
                                                     "llama_4_scaling_beta": 0.1,
                                                     "original_max_position_embeddings": 8}},
         "image_token_index": IMAGE},
        grid=(2, 8), images=sized_images(16), **_WHOLE,
    ),
    "glm5": vlm(
        "Glm5NextForConditionalGeneration",
        {"vision_config": lambda: {**PACKED_VISION, "out_hidden_size": 32, "image_size": 64,
                                   "projection_intermediate_size": 48},
         "text_config": lambda: {**TEXT, **LATENT, "qk_rope_head_dim": 0, "index_topk": 8, "index_kpool": 4,
                                 "index_head_dim": 8, "index_n_heads": 2, "linear_head_dim": 8,
                                 "linear_num_heads": 4},
         "image_token_id": IMAGE, **MEDIA},
        images=qwen_images, extra=types, **_WHOLE,
    ),
}  # fmt: skip
