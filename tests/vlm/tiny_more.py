"""Tiny models of families that need one line of data, or little more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as stock
from torch import Tensor

from tests.vlm.tiny_kit import IMAGE, TEXT, VISION, TinyVlm, maker, pixels, wide_images
from tests.vlm.tiny_llava import CLIP, llama, next_images, sized_images
from tests.vlm.tiny_qwen import ROPE, qwen_images, types

WIDE = {**VISION, "image_size": 64}
ANY_SIZE = {name: value for name, value in VISION.items() if name != "image_size"}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT = {
    "num_key_value_heads": 4, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "v_head_dim": 8, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
    "moe_intermediate_size": 16, "first_k_dense_replace": 1,
}  # fmt: skip
MEDIA = {
    "video_token_id": 98, "image_start_token_id": 97, "image_end_token_id": 96, "video_start_token_id": 95,
    "video_end_token_id": 94,
}  # fmt: skip
PACKED_VISION = {"depth": 3, "hidden_size": 32, "num_heads": 4, "intermediate_size": 48, "patch_size": 8}
_WINDOWS = {"sliding_window": 9, "sliding_window_pattern": 2}


def _siglip() -> Any:
    return stock.SiglipVisionConfig(**VISION, vision_use_head=False)


def _qwen2() -> Any:
    return stock.Qwen2Config(**TEXT)


def _qwen3() -> Any:
    return stock.Qwen3Config(**TEXT, head_dim=8)


def patches(*shape: int, **more: Any) -> Callable[[list[int]], dict[str, Tensor]]:
    """Images of 8 x 8 patches of a shape, all in one tensor, and further arguments of one row per image."""

    def images(counts: list[int]) -> dict[str, Tensor]:
        count, generator = sum(counts), torch.Generator().manual_seed(0)
        rows = {name: torch.tensor([value] * count) for name, value in more.items()}
        return {"pixel_values": torch.randn(count * 64, *shape, generator=generator), **rows}

    return images


def _counted_patches(counts: list[int]) -> dict[str, Tensor]:
    """Images of 8 x 8 patches, a tensor each, and how many of these are no padding."""
    count, generator = sum(counts), torch.Generator().manual_seed(0)
    return {
        "pixel_values": torch.randn(count, 64, 3 * 8 * 8, generator=generator),
        "spatial_shapes": torch.tensor([[8, 8]] * count),
        "pixel_attention_mask": torch.ones(count, 64, dtype=torch.int64),
    }


def _experts(ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Which tokens go to the experts of images."""
    return {**types(ids, mask), "moe_mm_token_type_ids": (ids == IMAGE).int()}


def vlm(name: str, configured: dict[str, Any], attention: str | None = None, **tiny: Any) -> TinyVlm:
    """A model without a tower that can be reduced, of the class `name`.

    `attention` is the one implementation that it has, if it is one.
    """
    made = maker(name, **configured)
    return TinyVlm((lambda asked="sdpa": made(attention or asked)), **{"has_tower": False, **tiny})


GRID = {"image_grid_thw": [1, 8, 8]}
# What begins an image or a sound is no word here, or the model would say it. Positions then count words.
_OMNI = {
    "image_token_id": IMAGE, "video_token_id": 98, "audio_token_id": 103, "vision_start_token_id": 101,
    "audio_start_token_id": 102,
}  # fmt: skip
_EARS = {
    "d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 4, "encoder_ffn_dim": 32, "output_dim": 32,
}  # fmt: skip
MORE = {
    "llava_next_video": vlm(
        "LlavaNextVideoForConditionalGeneration",
        {**CLIP, "video_token_index": 98, "image_grid_pinpoints": [[32, 32]]},
        num_tokens=16 + 4 * 5, grid=None, images=next_images, has_tower=True,
    ),
    "vipllava": vlm("VipLlavaForConditionalGeneration", {**CLIP, "vision_feature_layer": [-2, -1]}),
    "lighton": vlm(
        "LightOnOcrForConditionalGeneration",
        {"vision_config": lambda: stock.PixtralVisionConfig(**VISION | {"image_size": 128}), "text_config": _qwen3,
         "image_token_id": IMAGE},
        grid=(2, 8), images=sized_images(16),
    ),
    "deepseek": vlm(
        "DeepseekVLForConditionalGeneration",
        {"vision_config": _siglip, "text_config": llama, "image_token_id": IMAGE},
        has_tower=True,
    ),
    "janus": vlm(
        "JanusForConditionalGeneration",
        {"vision_config": lambda: {**{name: VISION[name] for name in VISION if name != "intermediate_size"},
                                   "mlp_ratio": 2, "projection_dim": 32, "num_image_tokens": 16},
         "text_config": llama, "image_token_id": IMAGE,
         "vq_config": lambda: {"embed_dim": 8, "num_embeddings": 20, "latent_channels": 8, "base_channels": 32,
                               "channel_multiplier": [1, 1], "num_res_blocks": 1, "num_patches": 4,
                               "projection_dim": 32, "image_token_embed_dim": 32}},
    ),
    "got_ocr2": vlm(
        "GotOcr2ForConditionalGeneration",
        {"vision_config": lambda: {"hidden_size": 32, "output_channels": 8, "num_hidden_layers": 2, "mlp_dim": 48,
                                   "num_attention_heads": 4, "image_size": 128, "patch_size": 8, "window_size": 4,
                                   "global_attn_indexes": [1]},
         "text_config": _qwen2, "image_token_index": IMAGE},
        attention="eager", images=lambda counts: {"pixel_values": pixels(sum(counts)).repeat(1, 1, 4, 4)},
    ),
    "ovis2": vlm(
        "Ovis2ForConditionalGeneration",
        {"vision_config": lambda: {**WIDE, "hidden_stride": 2, "vocab_size": 20, "num_visual_indicator_tokens": 2},
         "text_config": _qwen2, "image_token_id": IMAGE, "visual_indicator_token_ids": [91, 92], "vocab_size": 100,
         "hidden_size": 32},
        images=wide_images,
    ),
    "qianfan": vlm(
        "QianfanOCRForConditionalGeneration",
        {"vision_config": lambda: {**VISION, "image_size": [64, 64], "patch_size": [8, 8]}, "text_config": _qwen3,
         "image_token_id": IMAGE, "downsample_ratio": 0.5},
        images=wide_images,
    ),
    "step3": vlm(
        "Step3p7ForConditionalGeneration",
        {"vision_config": lambda: {**VISION, "image_size": 128, "mlp_ratio": 2.0},
         "text_config": lambda: {**TEXT, "head_dim": 8, "num_experts_per_tok": 2, "num_local_experts": 4,
                                 "moe_intermediate_size": 16, "n_routed_experts": 4, "share_expert_dim": 16,
                                 "sliding_window": 9, "layer_types": ["sliding_attention", "full_attention"] * 2},
         "image_token_id": IMAGE},
        cuts=(), images=lambda counts: {"pixel_values": pixels(sum(counts)).repeat(1, 1, 4, 4)},
    ),
    "aria": vlm(
        "AriaForConditionalGeneration",
        {"vision_config": lambda: {**VISION, "model_type": "idefics3_vision"},
         "text_config": lambda: {**TEXT, "moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1},
         "image_token_index": IMAGE, "projector_patch_to_query_dict": {16: 16}},
        grid=None,
    ),
    "lfm2": vlm(
        "Lfm2VlForConditionalGeneration",
        {"vision_config": lambda: stock.Siglip2VisionConfig(**ANY_SIZE, num_patches=64, vision_use_head=False),
         "text_config": lambda: stock.Lfm2Config(**TEXT, full_attn_idxs=[1, 3], block_ff_dim=48, block_multiple_of=8),
         "image_token_id": IMAGE, "downsample_factor": 2},
        cuts=(), grid=None, images=_counted_patches,
    ),
    "hunyuan": vlm(
        "HunYuanVLForConditionalGeneration",
        {"vision_config": lambda: {**ANY_SIZE, "out_hidden_size": 32, "text_hidden_size": 32, "max_image_size": 64,
                                   "min_image_size": 32},
         "text_config": lambda: {**TEXT, "head_dim": 8, "rope_parameters": {**ROPE, "mrope_section": [1, 1, 2, 0]}},
         "image_token_id": IMAGE},
        # No channel turns by the last axis, the number of an image, which the stock model counts over a whole batch.
        # Every row of tokens ends in a newline, and an image begins and ends with a token.
        num_tokens=2 + 4 * 5, grid=None, images=patches(3 * 8 * 8, **GRID), extra=types,
    ),
    "llama4": vlm(
        "Llama4ForConditionalGeneration",
        {"vision_config": lambda: {**WIDE, "intermediate_size": 128, "pixel_shuffle_ratio": 0.5,
                                   "projector_input_dim": 32, "projector_output_dim": 32, "vision_output_dim": 32},
         "text_config": lambda: {**TEXT, "head_dim": 8, "intermediate_size_mlp": 48, "num_local_experts": 2,
                                 "attention_chunk_size": 9},
         "image_token_index": IMAGE, "boi_token_index": 97, "eoi_token_index": 96},
        text="language_model.model", cuts=(), images=wide_images,
    ),
    "exaone": vlm(
        "Exaone4_5_ForConditionalGeneration",
        {"vision_config": lambda: {**PACKED_VISION, "out_hidden_size": 32, "num_key_value_heads": 2,
                                   "window_size": 32, "fullatt_block_indexes": [1]},
         "text_config": lambda: stock.Exaone4Config(**TEXT, **_WINDOWS, head_dim=8), "image_token_id": IMAGE,
         "video_token_id": 98},
        cuts=(), images=qwen_images,
    ),
    "omni2_5": vlm(
        "Qwen2_5OmniThinkerForConditionalGeneration",
        {"vision_config": lambda: {**PACKED_VISION, "out_hidden_size": 32, "window_size": 32,
                                   "fullatt_block_indexes": [1]},
         "text_config": lambda: {**TEXT, "rope_parameters": dict(ROPE)}, "audio_config": lambda: dict(_EARS), **_OMNI},
        images=qwen_images,
    ),
    "omni3": vlm(
        "Qwen3OmniMoeThinkerForConditionalGeneration",
        {"vision_config": lambda: {**PACKED_VISION, "out_hidden_size": 32, "num_position_embeddings": 64,
                                   "deepstack_visual_indexes": [0]},
         "text_config": lambda: {**TEXT, **EXPERTS, "head_dim": 8, "rope_parameters": dict(ROPE)},
         "audio_config": lambda: {**_EARS, "downsample_hidden_size": 16}, **_OMNI},
        images=qwen_images, has_tower=True,
    ),
    "ernie": vlm(
        "Ernie4_5_VLMoeForConditionalGeneration",
        {"vision_config": lambda: {**PACKED_VISION, "temporal_merge_size": 2},
         "text_config": lambda: {**TEXT, "rope_parameters": dict(ROPE), "moe_intermediate_size": [16, 16], "moe_k": 2,
                                 "moe_num_experts": 4, "moe_num_shared_experts": 1,
                                 "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]},
         "image_token_id": IMAGE, **MEDIA},
        images=patches(3 * 8 * 8, **GRID), extra=_experts,
    ),
    "glm_ocr": vlm(
        "GlmOcrForConditionalGeneration",
        {"vision_config": lambda: {**PACKED_VISION, "out_hidden_size": 32, "image_size": 64},
         "text_config": lambda: {**TEXT, "rope_parameters": dict(ROPE)}, "image_token_id": IMAGE, **MEDIA},
        images=qwen_images, extra=types,
    ),
    "kimi": vlm(
        "Kimi_K25ForConditionalGeneration",
        {"vision_config": lambda: {**ANY_SIZE, "pos_emb_height": 8, "pos_emb_width": 8},
         "text_config": lambda: stock.DeepseekV3Config(**TEXT | LATENT), "image_token_id": IMAGE,
         # No word, for the model would read one that it said as another.
         "video_token_id": 104, "projection_hidden_size": 32},
        images=patches(3, 8, 8, **GRID),
    ),
    "paddleocr": vlm(
        "PaddleOCRVLForConditionalGeneration",
        {"vision_config": lambda: dict(WIDE),
         "text_config": lambda: {**TEXT, "head_dim": 8, "rope_parameters": dict(ROPE)}, "image_token_id": IMAGE,
         "video_token_id": 98, "vision_start_token_id": 97, "vision_end_token_id": 96},
        images=patches(3, 8, 8, **GRID), extra=types,
    ),
    "videollama3": vlm(
        "VideoLlama3ForConditionalGeneration",
        {"vision_config": lambda: dict(ANY_SIZE), "text_config": _qwen2, "image_token_id": IMAGE,
         "video_token_id": 98},
        images=patches(3 * 8 * 8, **GRID, image_merge_sizes=2),
    ),
}  # fmt: skip
