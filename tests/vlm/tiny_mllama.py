"""A tiny Llama 3.2 Vision, whose language model reads tiles by cross-attention."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tests.vlm.tiny_kit import IMAGE, PAD, TEXT, maker

_VISION = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_global_layers": 1, "attention_heads": 4, "intermediate_size": 48,
    "vision_output_dim": 64, "image_size": 32, "patch_size": 8, "max_num_tiles": 2,
    "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]], "intermediate_layers_indices": [1],
}  # fmt: skip
_make = maker(
    "MllamaForConditionalGeneration",
    vision_config=lambda: dict(_VISION),
    text_config=lambda: {**TEXT, "cross_attention_layers": [1, 3]},
    image_token_index=IMAGE,
)


def mllama(attention: str = "sdpa") -> nn.Module:
    """The model, whose cross-attention layers count."""
    model = _make(attention)
    for name, weight in model.named_parameters():
        if "cross_attn" in name and "gate" in name:
            weight.data.fill_(0.7)
    return model


def mllama_inputs() -> dict[str, Tensor]:
    """A row with an image of two tiles and a padded one with an image of one tile."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 90, (2, 8), generator=generator)
    ids[:, 1], ids[1, 0] = IMAGE, PAD
    seen = torch.zeros(2, 8, 1, 2)
    seen[0, 1:], seen[1, 2:, :, 0] = 1, 1
    return {
        "input_ids": ids,
        "attention_mask": (ids != PAD).long(),
        "pixel_values": torch.randn(2, 1, 2, 3, 32, 32, generator=generator),
        "aspect_ratio_ids": torch.tensor([[2], [1]]),
        "aspect_ratio_mask": torch.tensor([[[1, 1]], [[1, 0]]]),
        "cross_attention_mask": seen,
    }
