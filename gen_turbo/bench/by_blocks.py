"""Denoisers whose calls read values, from their first block on, for tensors that have shapes alone."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import HunyuanVideo15Transformer3DModel, QwenImage21Transformer2DModel
from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21KVLayerCache
from torch import Tensor


class HunyuanVideo15(HunyuanVideo15Transformer3DModel):  # type: ignore[misc]
    """HunyuanVideo 1.5 on text that is embedded and in order."""

    def forward(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> tuple[Tensor]:
        """Runs the blocks on latents (B, C, frames, h, w) and all conditions (B, T, width); gives tokens."""
        rotary, temb = self.rope(hidden_states), self.time_embed(timestep)
        x, text = self.x_embedder(hidden_states), encoder_hidden_states
        mask = torch.ones(text.shape[:2], device=text.device, dtype=torch.bool)
        for block in self.transformer_blocks:
            x, text = block(x, text, temb, mask, rotary)
        return (self.proj_out(self.norm_out(x, temb)),)


class QwenImage21(QwenImage21Transformer2DModel):  # type: ignore[misc]
    """Qwen-Image 2.1 in a step that has the keys of text and references from the first step."""

    def forward(self, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor) -> tuple[Tensor]:
        """Runs the blocks on latents (B, C, h, w) behind a prefix of the length of the text; gives tokens."""
        config: Any = self.config
        x = self.img_in(hidden_states.flatten(2).transpose(1, 2))
        temb = self.time_text_embed(torch.cat([timestep, timestep]), x)
        modulation, is_target = self.modulation(temb), x.new_ones(x.shape[1], dtype=torch.bool)
        shape = (1, encoder_hidden_states.shape[1], config.num_attention_heads, config.attention_head_dim)
        rotary = torch.empty(x.shape[1], config.attention_head_dim // 2, dtype=torch.complex64, device=x.device)
        cache = QwenImage21KVLayerCache()
        cache.store(x.new_empty(shape), x.new_empty(shape))
        for block in self.transformer_blocks:
            x = block(
                x,
                modulation,
                rotary_emb=rotary,
                target_token_mask=is_target,
                layer_cache=cache,
                kv_cache_mode="cached",
            )
        return (self.proj_out(self.norm_out(x, temb, is_target)),)


BY_BLOCKS = {
    "HunyuanVideo15Transformer3DModel": HunyuanVideo15,
    "QwenImage21Transformer2DModel": QwenImage21,
}
"""By the names of the classes that they stand for."""
