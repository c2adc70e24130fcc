"""What the parts of a denoiser read, recognized by their names, from which costs are counted."""

from __future__ import annotations

from typing import Any

from torch import nn

_ONE_ROW = (
    "time_",
    "timestep",
    "norm",
    "adaln",
    "guidance",
    "add_embedding",
    "class_",
    "pooled",
    "_mod.",
    "embedding_",
    "modulation",
    "av_cross_attn",
    "t_embedder.mlp",
    "t_embedding.mlp",
    "proj_out_1",
)
"""Parts of names of layers that read one row per image: modulations, embeddings of the time."""
TIMES = ("time_embed", "time_proj", "av_cross_attn_video")
"""Of these, those that read one for each time, where frames or tokens have a time of their own."""
_TEXT_ROWS = (
    "add_",
    "context",
    "caption",
    "cap_",
    "text_",
    "attn2.to_k",
    "attn2.to_v",
    "cross_attention.to_key",
    "cross_attention.to_value",
    "txt",
    "glyph",
    "to_q_t",
    "to_k_t",
    "to_v_t",
    "to_out_t",
    "ff_t",
)
"""Parts of names of layers that read the text tokens."""
_SOUND_KEYS, _SOUND_QUERIES = ("audio_to_video", "va_cross_attention"), ("video_to_audio", "av_cross_attention")
"""Attention of a video to its sound and of the sound to the video, by name."""
IMAGE_ALONE = ("noise_refiner", "mode_blocks")
"""Stacks that text joins later, by name."""
_KEYS = ("to_k", "to_v", "to_key", "to_value")
_CROSS = ("attn2", "cross_attn", "cross_attention")
_FUSED = ("to_qkv_mlp_proj", "img_qkv_proj")
QUERIES = ("to_q", "to_query", *_FUSED)
"""What makes queries, by name."""


def rows_of(name: str) -> str:
    """What a matrix product reads, by its name: tokens of "image", "text" or "sound", or "one" row per image."""
    lowered = name.lower()
    if any(part in lowered for part in _ONE_ROW):
        return "one"
    asks_sound = any(part in lowered for part in _SOUND_KEYS)
    if asks_sound or any(part in lowered for part in _SOUND_QUERIES):
        return "sound" if asks_sound == lowered.endswith(_KEYS) else "image"
    if any(part in lowered for part in _TEXT_ROWS):
        return "text"
    return "sound" if "audio_" in lowered else "image"


def heads_width(attention: Any, query: Any) -> int:
    """Channels of all heads together; a projection that is fused with others is wider."""
    is_fused = any(hasattr(attention, name) for name in _FUSED)
    return int(attention.inner_dim if is_fused else query.out_features)


def sides_of(name: str) -> tuple[str, str]:
    """Where queries and keys of an attention come from, by its name."""
    if any(part in name for part in _SOUND_KEYS):
        return "image", "sound"
    if any(part in name for part in _SOUND_QUERIES):
        return "sound", "image"
    has_sound = "audio_" in name
    if name.endswith(_CROSS):
        return "sound" if has_sound else "image", "text"
    return ("sound", "sound") if has_sound else ("joined", "joined")


def self_attentions(module: nn.Module) -> tuple[str, ...]:
    """Prefixes of second attentions that read image tokens alone, as in SD 3.5, where other families read the text."""
    second = ((name, part) for name, part in module.named_modules() if name.endswith("attn2"))
    return tuple(f"{name}." for name, part in second if getattr(part, "is_cross_attention", True) is False)


def shares_of(module: nn.Module) -> dict[str, float]:
    """Of layers inside of routed experts, by name, the share of the tokens that each reads if all are asked alike."""
    shares: dict[str, float] = {}
    for name, part in module.named_modules():
        experts: Any = getattr(part, "experts", None)
        if isinstance(experts, nn.ModuleList) and hasattr(part, "num_activated_experts"):
            inside = f"{name}.experts" if name else "experts"
            share = int(part.num_activated_experts) / len(experts)
            shares |= {f"{inside}.{inner}": share for inner, _ in experts.named_modules()}
    return shares
