"""Tiny real models with random weights and their inputs, one function each."""

from __future__ import annotations

import warnings

import torch
from diffusers import AutoencoderKL, ControlNetModel, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from gen_turbo.pipelines import tiny

TEXT_WIDTH = 32


def _unet(**shape: object) -> UNet2DConditionModel:
    torch.manual_seed(0)
    common = {"sample_size": 16, "in_channels": 4, "out_channels": 4, "norm_num_groups": 4}
    return UNet2DConditionModel(**common, cross_attention_dim=TEXT_WIDTH, **shape).eval()


def sd15_unet() -> UNet2DConditionModel:
    """The layout of SD 1.x: attention at every level but the deepest, convolutions as projections."""
    return _unet(
        layers_per_block=1,
        block_out_channels=(16, 32, 32),
        attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    )


def sd2_unet() -> UNet2DConditionModel:
    """The layout of SD 2.x: linear projections, heads per level."""
    return _unet(
        layers_per_block=1,
        block_out_channels=(16, 32, 32),
        attention_head_dim=(2, 4, 4),
        use_linear_projection=True,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    )


def sdxl_unet() -> UNet2DConditionModel:
    """The layout of SDXL: no attention at the finest level, several blocks per transformer, text and time added."""
    return _unet(
        layers_per_block=1,
        block_out_channels=(16, 32, 32),
        attention_head_dim=(2, 4, 4),
        use_linear_projection=True,
        transformer_layers_per_block=(1, 2, 2),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=16 + 6 * 8,
    )


UNETS = {"sd15": sd15_unet, "sd2": sd2_unet, "sdxl": sdxl_unet}


def unet_inputs(batch: int = 2, size: tuple[int, int] = (16, 16), seed: int = 0) -> dict[str, object]:
    """Everything that any of the UNets reads, without the time."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "sample": torch.randn(batch, 4, *size, generator=generator),
        "encoder_hidden_states": torch.randn(batch, 6, TEXT_WIDTH, generator=generator),
        "added_cond_kwargs": {
            "text_embeds": torch.randn(batch, 16, generator=generator),
            "time_ids": torch.ones(batch, 6),
        },
    }


@torch.no_grad()
def run_unet(unet: UNet2DConditionModel, times: tuple[int, ...] = (900, 700, 500, 300), **inputs: object) -> Tensor:
    """Calls the UNet once per time on a slowly changing sample and stacks the outputs."""
    sample, outputs = inputs.pop("sample"), []
    for step, time in enumerate(times):
        outputs.append(unet(sample * (1 - 0.05 * step), torch.tensor(time), **inputs).sample)
    return torch.stack(outputs)


def control_net() -> ControlNetModel:
    """A ControlNet for the UNet of SD 1.x; its controls are not zero, as in a trained one."""
    torch.manual_seed(3)
    control = ControlNetModel.from_unet(sd15_unet(), conditioning_embedding_out_channels=(8, 16)).eval()
    with torch.no_grad():
        for block in [*control.controlnet_down_blocks, control.controlnet_mid_block]:
            block.weight.normal_(0, 0.1)
        control.controlnet_cond_embedding.conv_out.weight.normal_(0, 0.1)
    return control


@torch.no_grad()
def run_control_net(
    control: ControlNetModel, times: tuple[int, ...] = (900, 700, 500, 300), **inputs: object
) -> Tensor:
    """Calls the ControlNet as `run_unet` does, shown noise, and stacks all its controls flattened."""
    sample, outputs = inputs.pop("sample"), []
    batch, _, height, width = sample.shape
    shown = torch.rand(batch, 3, 2 * height, 2 * width, generator=torch.Generator().manual_seed(4))
    for step, time in enumerate(times):
        down, middle = control(
            sample * (1 - 0.05 * step), torch.tensor(time), controlnet_cond=shown, return_dict=False, **inputs
        )
        outputs.append(torch.cat([each.flatten(1) for each in (*down, middle)], 1))
    return torch.stack(outputs)


def sd_pipeline() -> StableDiffusionPipeline:
    """A stock text-to-image pipeline: 32 x 32 pixels, 256 tokens in the finest self-attention."""
    torch.manual_seed(0)
    tokenizer = tiny.make_tokenizer()
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=tiny.MAX_LENGTH,
        )
    ).eval()
    autoencoder = AutoencoderKL(
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=32,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
    ).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipe = StableDiffusionPipeline(
            vae=autoencoder,
            text_encoder=text,
            tokenizer=tokenizer,
            unet=sd15_unet(),
            scheduler=DDIMScheduler(clip_sample=False, steps_offset=1),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def image(pipe: StableDiffusionPipeline, seed: int = 0, steps: int = 4, **kwargs: object) -> Tensor:
    """One run of the pipeline as (batch, height, width, 3) in [0, 1]."""
    call = {"prompt": "a large red circle on a gray background", "num_inference_steps": steps} | kwargs
    generator = torch.Generator().manual_seed(seed)
    return torch.from_numpy(pipe(**call, generator=generator, output_type="np").images)
