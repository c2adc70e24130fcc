"""Tiny transformers of the families of late 2026 with random weights, and the inputs of one call of each."""

from __future__ import annotations

import torch
from diffusers import (
    BriaFiboTransformer2DModel,
    ConsisIDTransformer3DModel,
    CosmosTransformer3DModel,
    ErnieImageTransformer2DModel,
    Flux3Transformer2DModel,
    GlmImageTransformer2DModel,
    Ideogram4Transformer2DModel,
    Kandinsky6Transformer3DModel,
    PRXTransformer2DModel,
)
from torch import nn

from tests.tiny_family import HEADS, NUM_TEXT, Family, frames, patched, random, rising, rotary, text, thousandth
from tests.tiny_flux import image_positions


def flux3() -> nn.Module:
    """FLUX.3: image and text run alone in one block each, then together in two."""
    shape = {"in_channels": 8, "cond_in_channels": 8, "num_layers": 1, "num_single_layers": 2}
    return Flux3Transformer2DModel(**HEADS, **shape, axes_dims_rope=(4, 4, 4, 4), joint_attention_dim=32)


def flux3_inputs(batch: int, grid: tuple[int, int]) -> dict[str, object]:
    """Positions of four columns that all samples share, those of the text in the last."""
    image = torch.cat([image_positions(*grid), torch.zeros(grid[0] * grid[1], 1)], 1)
    words = torch.cat([torch.zeros(NUM_TEXT, 3), torch.arange(NUM_TEXT)[:, None]], 1)
    return {**text(batch), "img_ids": image, "txt_ids": words}


def fibo() -> nn.Module:
    """Bria FIBO: half of the text's channels are new in every block."""
    widths = {"in_channels": 8, "joint_attention_dim": 32, "text_encoder_dim": 16, "axes_dims_rope": [4, 4, 8]}
    return BriaFiboTransformer2DModel(**HEADS, num_layers=1, num_single_layers=2, **widths)


def fibo_inputs(batch: int, grid: tuple[int, int]) -> dict[str, object]:
    """Positions, and states of a text encoder for three blocks."""
    layers = [random(batch, NUM_TEXT, 16, seed=seed) for seed in range(5, 8)]
    places = {"img_ids": image_positions(*grid), "txt_ids": torch.zeros(NUM_TEXT, 3)}
    return {**text(batch), "text_encoder_layers": layers, **places}


def glm_image() -> nn.Module:
    """GLM-Image: every token has a word of the image."""
    shape = {"in_channels": 4, "out_channels": 4, "num_layers": 2, "prior_vq_quantizer_codebook_size": 10}
    return GlmImageTransformer2DModel(**HEADS, **shape, text_embed_dim=32, time_embed_dim=16, condition_dim=8)


def glm_image_inputs(batch: int, grid: tuple[int, int]) -> dict[str, object]:
    """Words of the image, which an unconditional row drops, and sizes."""
    words = torch.arange(grid[0] * grid[1]).remainder(10).repeat(batch, 1)
    dropped = (torch.arange(batch) == 0)[:, None].expand_as(words)
    sizes = {"target_size": torch.full((batch, 2), 128.0), "crop_coords": torch.zeros(batch, 2)}
    return {**text(batch), "prior_token_id": words, "prior_token_drop": dropped, **sizes}


def ernie_image() -> nn.Module:
    """ERNIE-Image: one stream whose blocks have the tokens before the batch."""
    shape = {"in_channels": 4, "out_channels": 4, "num_layers": 2, "patch_size": 2, "text_in_dim": 32}
    heads = {"hidden_size": 32, "num_attention_heads": 2, "ffn_hidden_size": 48, "rope_axes_dim": (4, 6, 6)}
    model = ErnieImageTransformer2DModel(**shape, **heads)
    # Made as zeros, which would hide all that the blocks do.
    for layer in (model.adaLN_modulation[-1], model.final_linear):
        nn.init.normal_(layer.weight, std=0.2)
    return model


def prx() -> nn.Module:
    """PRX: text gives keys alone."""
    widths = {"in_channels": 4, "context_in_dim": 32, "hidden_size": 32, "num_heads": 2, "axes_dim": [8, 8]}
    model = PRXTransformer2DModel(**widths, depth=2, patch_size=2, mlp_ratio=2.0, bottleneck_size=16)
    for name, weight in model.named_parameters():
        # Made as zeros, which would hide all that the blocks do.
        if "modulation" in name or "final_layer" in name:
            nn.init.normal_(weight, std=0.2)
    return model


def prx_inputs(batch: int, grid: tuple[int, int]) -> dict[str, object]:
    """Text of which the last row has one token less."""
    mask = torch.ones(batch, NUM_TEXT).long()
    mask[-1, -1] = 0
    return {**text(batch), "attention_mask": mask}


def ideogram4() -> nn.Module:
    """Ideogram 4: text and image in one sequence, each with zeros in the places of the other."""
    widths = {"in_channels": 8, "intermediate_size": 48, "adaln_dim": 16, "llm_features_dim": 32}
    return Ideogram4Transformer2DModel(**HEADS, **widths, num_layers=2, mrope_section=(4, 2, 2))


def ideogram4_inputs(batch: int, grid: tuple[int, int]) -> dict[str, object]:
    """Positions, one padded place in the last row, and what each place is."""
    num_image = grid[0] * grid[1]
    words = torch.arange(NUM_TEXT)[:, None].expand(-1, 3)
    places = torch.cat([words, image_positions(*grid).long() + 65536])
    segments = torch.ones(batch, NUM_TEXT + num_image).long()
    segments[-1, 0] = -1
    kinds = torch.tensor([3] * NUM_TEXT + [2] * num_image)
    return {
        "encoder_hidden_states": random(batch, NUM_TEXT + num_image, 32),
        "position_ids": places.repeat(batch, 1, 1),
        "segment_ids": segments,
        "indicator": kinds.repeat(batch, 1),
    }


def consisid() -> nn.Module:
    """ConsisID without faces: CogVideoX with rotary positions."""
    shape = {"in_channels": 4, "out_channels": 4, "num_layers": 2, "sample_frames": 5}
    sizes = {"sample_width": 16, "sample_height": 16, "text_embed_dim": 32, "time_embed_dim": 16}
    return ConsisIDTransformer3DModel(**HEADS, **shape, **sizes, use_rotary_positional_embeddings=True)


def cosmos() -> nn.Module:
    """Cosmos: attention over all frames, learned positions beside rotary ones."""
    shape = {"in_channels": 4, "out_channels": 4, "num_layers": 2, "text_embed_dim": 32, "adaln_lora_dim": 8}
    heads = {"num_attention_heads": 2, "attention_head_dim": 16, "max_size": (4, 24, 24)}
    return CosmosTransformer3DModel(**shape, **heads, concat_padding_mask=False)


def kandinsky6() -> nn.Module:
    """Kandinsky 6: video and sound in one block, latents with the channels last."""
    widths = {"in_text_dim": 32, "in_text_dim2": 16, "time_dim": 16, "model_dim": 32, "ff_dim": 48}
    shape = {"in_visual_dim": 4, "out_visual_dim": 4, "num_text_blocks": 1, "num_visual_blocks": 2}
    sound = {"in_audio_dim": 4, "out_audio_dim": 4, "ca_rope": True, "cross_gates": True, "fix_modulation": True}
    model = Kandinsky6Transformer3DModel(**widths, **shape, **sound, visual_cond=False, axes_dims=(4, 6, 6))
    for name, weight in model.named_parameters():
        # Made as zeros, which would hide all that the blocks do.
        if "modulation" in name:
            nn.init.normal_(weight, std=0.2)
    return model


def kandinsky6_inputs(batch: int, grid: tuple[int, int]) -> dict[str, object]:
    """Text, and three tokens of sound."""
    return {**text(batch), "pooled_projections": random(batch, 16, seed=4), "audio_hidden_states": random(batch, 3, 4)}


RECENT: dict[str, Family] = {
    "flux3": Family(flux3, flux3_inputs, lambda g: (g[0] * g[1], 8), thousandth),
    "bria-fibo": Family(fibo, fibo_inputs, lambda g: (g[0] * g[1], 8)),
    "glm-image": Family(glm_image, glm_image_inputs, patched()),
    "ernie-image": Family(
        ernie_image,
        lambda b, g: {"text_bth": random(b, NUM_TEXT, 32), "text_lens": torch.full((b,), NUM_TEXT)},
        patched(),
    ),
    "prx": Family(prx, prx_inputs, patched(), thousandth),
    "ideogram4": Family(ideogram4, ideogram4_inputs, lambda g: (NUM_TEXT + g[0] * g[1], 8), rising),
    "consisid": Family(
        consisid,
        lambda b, g: {**text(b), "image_rotary_emb": rotary(2 * g[0] * g[1])},
        lambda g: (2, 4, 2 * g[0], 2 * g[1]),
        num_frames=2,
    ),
    "kandinsky6": Family(kandinsky6, kandinsky6_inputs, lambda g: (2, 2 * g[0], 2 * g[1], 4), num_frames=2),
    "cosmos": Family(cosmos, lambda b, g: text(b), frames(2), thousandth, num_frames=2),
}
"""By name."""
