"""A stock text-to-image pipeline far smaller than the embedded one, with random weights."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from gen_turbo.pipelines import tiny


def save_toy_pipeline(folder: Path) -> None:
    """Saves the pipeline: 32 x 32 pixels, 256 tokens in the top self-attention."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=16,
        layers_per_block=1,
        block_out_channels=(16, 32),
        attention_head_dim=2,
        norm_num_groups=8,
        cross_attention_dim=tiny.TEXT_WIDTH,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )
    autoencoder = AutoencoderKL(
        block_out_channels=(8, 8),
        norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        mid_block_add_attention=False,
    )
    text_encoder = tiny.make_text_encoder(len(tiny.make_tokenizer()))
    tiny.assemble(autoencoder, text_encoder, unet).save_pretrained(folder)
