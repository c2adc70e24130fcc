"""Tiny real pipelines with random weights beside the plain one, and what people hang on them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    PixArtAlphaPipeline,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionAdapterPipeline,
    StableDiffusionControlNetPipeline,
    T2IAdapter,
)
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from PIL import Image
from safetensors.torch import save_file
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from gen_turbo.pipelines import tiny, tiny_dit
from tests import tiny_transformers
from tests.tiny_hosts import TEXT_WIDTH, control_net, sd_pipeline
from tests.tiny_transformers import NUM_TEXT, random

IMAGE_WIDTH, IMAGE_TOKENS = 16, 4


def prompt_image() -> Image.Image:
    """An image of noise."""
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def ip_adapter_pipeline(folder: Path):
    """A pipeline with an image encoder, and the IP-Adapter file for its UNet in the published layout."""
    pipe = sd_pipeline()
    torch.manual_seed(1)
    config = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=32,
        patch_size=16,
        projection_dim=IMAGE_WIDTH,
    )
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    pipe.register_modules(
        image_encoder=CLIPVisionModelWithProjection(config).eval(), feature_extractor=CLIPImageProcessor(**size)
    )
    weights = {
        "image_proj.proj.weight": torch.randn(IMAGE_TOKENS * TEXT_WIDTH, IMAGE_WIDTH),
        "image_proj.proj.bias": torch.zeros(IMAGE_TOKENS * TEXT_WIDTH),
        "image_proj.norm.weight": torch.ones(TEXT_WIDTH),
        "image_proj.norm.bias": torch.zeros(TEXT_WIDTH),
    }
    cross = [name for name in pipe.unet.attn_processors if "attn2" in name]
    for index, name in enumerate(cross):
        layer = pipe.unet.get_submodule(name.removesuffix(".processor"))
        for projection in ("to_k_ip", "to_v_ip"):
            weights[f"ip_adapter.{2 * index + 1}.{projection}.weight"] = torch.randn(layer.inner_dim, TEXT_WIDTH)
    save_file(weights, folder / "adapter.safetensors")
    return pipe


def save_lora(folder: Path) -> None:
    """Saves a LoRA of all attention projections of the UNet in the layout of diffusers."""
    pipe = sd_pipeline()
    torch.manual_seed(2)
    targets = ["to_q", "to_k", "to_v", "to_out.0"]
    pipe.unet.add_adapter(LoraConfig(r=2, lora_alpha=8, init_lora_weights=False, target_modules=targets))
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(pipe.unet))
    pipe.save_lora_weights(folder, unet_lora_layers=layers)


def control_pipeline(number: int = 1) -> StableDiffusionControlNetPipeline:
    """A stock ControlNet pipeline over the tiny UNet; with several of them it holds a MultiControlNetModel."""
    pipe = sd_pipeline()
    nets = control_net() if number == 1 else [control_net() for _ in range(number)]
    made = StableDiffusionControlNetPipeline(**pipe.components, controlnet=nets, requires_safety_checker=False)
    made.set_progress_bar_config(disable=True)
    return made


def adapter_pipeline() -> StableDiffusionAdapterPipeline:
    """A stock T2I-Adapter pipeline over the tiny UNet."""
    pipe = sd_pipeline()
    torch.manual_seed(4)
    adapter = T2IAdapter(
        in_channels=3, channels=[16, 32, 32], num_res_blocks=1, downscale_factor=2, adapter_type="full_adapter"
    )
    parts = {name: part for name, part in pipe.components.items() if name != "image_encoder"}
    made = StableDiffusionAdapterPipeline(**parts, adapter=adapter.eval(), requires_safety_checker=False)
    made.set_progress_bar_config(disable=True)
    return made


def _autoencoder() -> AutoencoderKL:
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return AutoencoderKL(block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, sample_size=32, **blocks)


def flux():
    """Flux: one call per step, thousandths as time."""
    model = tiny_transformers.build("flux")
    model.register_to_config(in_channels=8)
    pipe = FluxPipeline(FlowMatchEulerDiscreteScheduler(), _autoencoder(), None, None, None, None, model)
    latents = random(1, 64, 8)
    return pipe, {"prompt_embeds": random(1, NUM_TEXT, 32), "pooled_prompt_embeds": random(1, 16), "latents": latents}


def sd3():
    """SD3: guidance in one batch."""
    model = tiny_transformers.build("sd3")
    nothing = [None] * 6
    pipe = StableDiffusion3Pipeline(model, FlowMatchEulerDiscreteScheduler(), _autoencoder(), *nothing)
    texts = {"prompt_embeds": random(1, NUM_TEXT, 32), "negative_prompt_embeds": random(1, NUM_TEXT, 32, seed=3)}
    pooled = {"pooled_prompt_embeds": random(1, 16), "negative_pooled_prompt_embeds": random(1, 16, seed=3)}
    return pipe, {**texts, **pooled, "latents": random(1, 4, 16, 16)}


def sd3_with_text() -> StableDiffusion3Pipeline:
    """The parts of the embedded transformer at a smaller size: 32 x 32 pixels, 64 image and 276 text tokens.

    The gates of the blocks are opened, for random ones let little of attention through.
    """
    torch.manual_seed(5)
    model = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=128,
        caption_projection_dim=32,
        pooled_projection_dim=128,
        pos_embed_max_size=8,
    )
    with torch.no_grad():
        for block in model.transformer_blocks:
            block.norm1.linear.weight.mul_(10)
    encoders = (tiny_dit.make_text_encoder().eval(), tiny_dit.make_text_encoder().eval())
    pipe = tiny_dit.assemble(tiny.make_autoencoder().eval(), encoders, model.eval())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pixart():
    """PixArt: guidance that the pipeline does not tell of."""
    model = tiny_transformers.build("pixart-alpha")
    pipe = PixArtAlphaPipeline(None, None, _autoencoder(), model, DDIMScheduler())
    texts = {"prompt_embeds": random(1, NUM_TEXT, 32), "negative_prompt_embeds": random(1, NUM_TEXT, 32, seed=3)}
    mask = torch.ones(1, NUM_TEXT)
    masks = {"prompt_attention_mask": mask, "negative_prompt_attention_mask": mask, "negative_prompt": None}
    return pipe, {**texts, **masks, "latents": random(1, 4, 16, 16), "use_resolution_binning": False}


TRANSFORMERS = {"flux": flux, "sd3": sd3, "pixart": pixart}


def latents_of(pipe: object, call: dict[str, object], steps: int = 5, **kwargs: object) -> torch.Tensor:
    """One run of a pipeline of a transformer on 8 x 8 tokens."""
    fixed = {"height": 32, "width": 32, "num_inference_steps": steps, "output_type": "latent"}
    return pipe(**call, **fixed, **kwargs).images
