"""The embedded diffusion transformer: Stable Diffusion 3's classes at a small size, without a T5 encoder."""

from __future__ import annotations

import math

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, PreTrainedTokenizerFast

from gen_turbo.pipelines import tiny

PATCH = 2
SHIFT = 3.0
NUM_PADDING = 256
"""Text tokens of zeros that the pipeline appends where there is no T5 encoder."""
_WIDTH, _HEADS, _LAYERS, _TEXT_WIDTH = 192, 6, 6, 64


def make_tokenizer() -> PreTrainedTokenizerFast:
    """The vocabulary of the embedded models; transformers pools at id 2 in a way of its own, so <eos> is 3."""
    return tiny.make_tokenizer(("<pad>", "<bos>", "<unk>", "<eos>"))


def make_text_encoder() -> CLIPTextModelWithProjection:
    """Two layers of width 64; the pipeline takes the first layer's tokens and the second's pooled projection."""
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(make_tokenizer()),
            hidden_size=_TEXT_WIDTH,
            intermediate_size=4 * _TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=tiny.MAX_LENGTH,
            projection_dim=_TEXT_WIDTH,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=3,
        )
    )


def make_transformer(pool: int = 1) -> SD3Transformer2DModel:
    """Six joint blocks of width 192; 1,024 image tokens, or fewer on pooled latents for cheap training.

    Args:
        pool: Latents are pooled by this factor, 1, 2 or 4. The weights mean the same at every factor, and positions the
            same place of the image: `finer.load_state_dict(weights(coarser), strict=False)` goes on at the next.
    """
    side = tiny.LATENT_SIZE // (PATCH * pool)
    model = SD3Transformer2DModel(
        sample_size=tiny.LATENT_SIZE // pool,
        patch_size=PATCH,
        in_channels=4,
        out_channels=4,
        num_layers=_LAYERS,
        attention_head_dim=_WIDTH // _HEADS,
        num_attention_heads=_HEADS,
        joint_attention_dim=2 * _TEXT_WIDTH,
        caption_projection_dim=_WIDTH,
        pooled_projection_dim=2 * _TEXT_WIDTH,
        pos_embed_max_size=side,
        qk_norm="rms_norm",
    )
    model.pos_embed.pos_embed.copy_(_positions(side))
    return model


def _positions(side: int) -> torch.Tensor:
    """Position embeddings (1, side * side, width): those of the finest grid, averaged where it is coarser."""
    finest = get_2d_sincos_pos_embed(_WIDTH, tiny.LATENT_SIZE // PATCH, base_size=16, output_type="pt").float()
    grid = finest.T.reshape(1, _WIDTH, *(2 * (math.isqrt(len(finest)),)))
    pooled = torch.nn.functional.adaptive_avg_pool2d(grid, side)
    return pooled.flatten(2).transpose(1, 2)


def weights(model: SD3Transformer2DModel) -> dict[str, torch.Tensor]:
    """What is learned: everything but the position table, which belongs to one resolution."""
    return {name: value for name, value in model.state_dict().items() if name != "pos_embed.pos_embed"}


def make_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Straight paths from noise to image, with more steps where there is much noise."""
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=SHIFT)


def assemble(
    autoencoder: AutoencoderKL,
    text_encoders: tuple[CLIPTextModelWithProjection, CLIPTextModelWithProjection],
    transformer: SD3Transformer2DModel,
) -> StableDiffusion3Pipeline:
    """Puts the parts into a stock pipeline."""
    autoencoder.register_to_config(shift_factor=0.0)
    tokenizer = make_tokenizer()
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=make_scheduler(),
        vae=autoencoder,
        text_encoder=text_encoders[0],
        tokenizer=tokenizer,
        text_encoder_2=text_encoders[1],
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )
