"""Small stand-ins for published checkpoints: the same pipeline classes with little or no training, no download.

The scripts of this folder take them with `--tiny`. Their images mean nothing except where the class has an embedded
model; they show that a script works.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    WanPipeline,
    WanTransformer3DModel,
)
from transformers import (
    AutoProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    LlavaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessorPil,
    T5Config,
    T5EncoderModel,
    UMT5Config,
    UMT5EncoderModel,
)

from gen_turbo import load_pipeline
from gen_turbo.pipelines import tiny, tiny_dit, tiny_vlm

WIDTH, HEADS, HEAD_WIDTH = 32, 2, 16
_VISION_MARKS = ("<|vision_start|>", "<|image_pad|>", "<|video_pad|>", "<|vision_end|>")
_CHAT = (
    "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %} {{ part['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}"
)


def _clip(kind: type[CLIPTextModel | CLIPTextModelWithProjection], tokenizer: Any) -> Any:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        max_position_embeddings=tokenizer.model_max_length,
        projection_dim=WIDTH,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=3,
    )
    return kind(config).eval()


def _autoencoder(channels: int = 4, **settings: Any) -> AutoencoderKL:
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    shape = {"block_out_channels": (8, 8), "norm_num_groups": 4, "latent_channels": channels, "sample_size": 128}
    return AutoencoderKL(**shape, **blocks, **settings).eval()


def _t5(tokenizer: Any) -> T5EncoderModel:
    config = T5Config(vocab_size=len(tokenizer), d_model=WIDTH, d_kv=HEAD_WIDTH, d_ff=WIDTH, num_layers=1, num_heads=2)
    return T5EncoderModel(config).eval()


def sdxl() -> StableDiffusionXLPipeline:
    """Stable Diffusion XL with random weights: 64 x 64 latents, attention at half of that."""
    tokenizer = tiny_dit.make_tokenizer()
    unet = UNet2DConditionModel(
        sample_size=64,
        block_out_channels=(16, 32, 32),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=2 * WIDTH,
        attention_head_dim=(1, 2, 2),
        transformer_layers_per_block=(1, 1, 2),
        use_linear_projection=True,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=WIDTH + 6 * 8,
    )
    return StableDiffusionXLPipeline(
        vae=_autoencoder(),
        text_encoder=_clip(CLIPTextModel, tokenizer),
        text_encoder_2=_clip(CLIPTextModelWithProjection, tokenizer),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet.eval(),
        scheduler=DDIMScheduler(),
    )


def flux() -> FluxPipeline:
    """Flux with random weights, one block of each kind."""
    tokenizer = tiny_dit.make_tokenizer()
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_WIDTH,
        joint_attention_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        axes_dims_rope=(4, 6, 6),
        guidance_embeds=True,
    )
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=_autoencoder(shift_factor=0.0),
        text_encoder=_clip(CLIPTextModel, tokenizer),
        tokenizer=tokenizer,
        text_encoder_2=_t5(tokenizer),
        tokenizer_2=tokenizer,
        transformer=transformer.eval(),
    )


def pixart() -> PixArtSigmaPipeline:
    """PixArt-Sigma with random weights, two blocks."""
    tokenizer = tiny_dit.make_tokenizer()
    transformer = PixArtTransformer2DModel(
        sample_size=32,
        num_layers=2,
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_WIDTH,
        cross_attention_dim=WIDTH,
        caption_channels=WIDTH,
        out_channels=8,
        use_additional_conditions=False,
    )
    return PixArtSigmaPipeline(tokenizer, _t5(tokenizer), _autoencoder(), transformer.eval(), DDIMScheduler())


def wan() -> WanPipeline:
    """Wan 2.1 with random weights, two blocks."""
    tokenizer = tiny_dit.make_tokenizer()
    text = UMT5Config(vocab_size=len(tokenizer), d_model=WIDTH, d_kv=HEAD_WIDTH, d_ff=WIDTH, num_layers=1, num_heads=2)
    vae = AutoencoderKLWan(base_dim=4, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    transformer = WanTransformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_WIDTH,
        in_channels=16,
        out_channels=16,
        text_dim=WIDTH,
        freq_dim=16,
        ffn_dim=WIDTH,
        num_layers=2,
        rope_max_seq_len=64,
    )
    return WanPipeline(
        tokenizer, UMT5EncoderModel(text).eval(), vae.eval(), FlowMatchEulerDiscreteScheduler(), transformer.eval()
    )


def llava() -> tuple[Any, Any]:
    """The embedded vision-language model and its processor."""
    folder = tiny_vlm.weights_folder()
    return LlavaForConditionalGeneration.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)


def qwen_vl() -> tuple[Any, Any]:
    """Qwen2.5-VL with random weights, two decoder layers, and its processor."""
    marks = (*_VISION_MARKS, "<|im_start|>", "<|im_end|>")
    tokenizer = tiny.make_tokenizer(("<pad>", "<bos>", "<eos>", "<unk>", *marks))
    tokenizer.model_max_length = 4096
    tokenizer.add_special_tokens({"extra_special_tokens": list(marks)})
    start, image, video, _ = tokenizer.convert_tokens_to_ids(list(_VISION_MARKS))
    config = Qwen2_5_VLConfig(
        vision_config={
            "depth": 2,
            "hidden_size": WIDTH,
            "intermediate_size": WIDTH,
            "num_heads": HEADS,
            "out_hidden_size": WIDTH,
            "fullatt_block_indexes": [1],
        },
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": WIDTH,
            "intermediate_size": WIDTH,
            "num_hidden_layers": 2,
            "num_attention_heads": HEADS,
            "num_key_value_heads": HEADS,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
    )
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    size = {"shortest_edge": 56 * 56, "longest_edge": 224 * 224}
    return model, _ImageProcessor(Qwen2VLImageProcessorPil(size=size), tokenizer, chat_template=_CHAT)


class _ImageProcessor(Qwen2_5_VLProcessor):
    """Without the processor of videos, which needs torchvision."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        """Accepts a missing video processor."""
        return None if argument is None else super().check_argument_for_proper_class(argument_name, argument)


PIPELINES: dict[str, Callable[[], Any]] = {
    "StableDiffusionPipeline": lambda: load_pipeline("tiny", processor=None, device="cpu"),
    "StableDiffusion3Pipeline": lambda: load_pipeline("tiny-dit", processor=None, device="cpu"),
    "StableDiffusionXLPipeline": sdxl,
    "FluxPipeline": flux,
    "PixArtSigmaPipeline": pixart,
    "WanPipeline": wan,
}
"""A stand-in for each class of diffusers pipelines."""
READERS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "LlavaForConditionalGeneration": llava,
    "Qwen2_5_VLForConditionalGeneration": qwen_vl,
}
"""A stand-in and its processor for each class of vision-language models."""


def pipeline(name: str) -> Any:
    """A small pipeline of a diffusers class, with the same weights every time."""
    torch.manual_seed(0)
    pipe = PIPELINES[name]()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def reader(name: str) -> tuple[Any, Any]:
    """A small vision-language model of a transformers class and its processor, with the same weights every time."""
    torch.manual_seed(0)
    return READERS[name]()
