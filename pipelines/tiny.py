"""The embedded text-to-image model: stock diffusers classes at a small size, its vocabulary and its scheduler."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast

from gen_turbo.scenes import SIZE_PX, WORDS

MAX_LENGTH = 20
LATENT_SIZE = SIZE_PX // 2
TEXT_WIDTH = 128
NUM_TRAIN_STEPS = 1000
NOISE_SHIFT = 3.0
_SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>")
_LATER_WORDS = ("above", "and", "below", "beside", "in", "left", "right", "two")
LEVELS = 5
_WIDTHS, _HEADS = (32, 32, 64, 96, 128), (1, 1, 2, 3, 4)


def weights_folder() -> Path:
    """Where the trained pipeline lies inside the installed package."""
    return Path(str(resources.files("gen_turbo.pipelines"))) / "weights" / "tiny"


def make_tokenizer(special: tuple[str, ...] = _SPECIAL) -> PreTrainedTokenizerFast:
    """One token a word, padded to 20; the special words take the first numbers."""
    words = [*special, *sorted({*WORDS, *_LATER_WORDS})]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[(word, special.index(word)) for word in ("<bos>", "<eos>")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        model_max_length=MAX_LENGTH,
    )


def make_text_encoder(vocabulary: int) -> CLIPTextModel:
    """Two layers of width 128."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=TEXT_WIDTH,
            intermediate_size=2 * TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_LENGTH,
            projection_dim=TEXT_WIDTH,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
    )


def make_autoencoder() -> AutoencoderKL:
    """Factor 2, four channels: nearly lossless on the scenes."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        sample_size=SIZE_PX,
        block_out_channels=(24, 48),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        mid_block_add_attention=False,
        force_upcast=False,
        scaling_factor=1.0,
    )


def make_unet(levels: int = LEVELS) -> UNet2DConditionModel:
    """Levels with self- and cross-attention, 4,096 tokens at the top; the prompt also joins the time embedding.

    With `levels=4` it is the inner network alone, which works at half the resolution; `grow` puts a level around it.
    """
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE >> (LEVELS - levels),
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=_WIDTHS[-levels:],
        attention_head_dim=_HEADS[-levels:],
        norm_num_groups=8,
        cross_attention_dim=TEXT_WIDTH,
        addition_embed_type="text",
        addition_embed_type_num_heads=4,
        down_block_types=("CrossAttnDownBlock2D",) * levels,
        up_block_types=("CrossAttnUpBlock2D",) * levels,
    )


@torch.no_grad()
def grow(inner: UNet2DConditionModel, outer: UNet2DConditionModel) -> None:
    """Copies a UNet into one of a level more, which then gives much what the inner one gives on the pooled input.

    The new level begins as a plain path down and up: its residual branches add nothing yet.
    """
    own = inner.state_dict()
    shifted = {re.sub(r"^down_blocks\.(\d+)", lambda m: f"down_blocks.{int(m[1]) + 1}", n): v for n, v in own.items()}
    shifted.pop("conv_in.weight")
    outer.load_state_dict(shifted, strict=False)
    down, up = outer.down_blocks[0], outer.up_blocks[-1]
    ends = [r.conv2 for r in (*down.resnets, *up.resnets)] + [a.proj_out for a in (*down.attentions, *up.attentions)]
    for end in ends:
        nn.init.zeros_(end.weight)
        nn.init.zeros_(end.bias)
    channels = inner.config.in_channels
    outer.conv_in.weight[:channels] = 0
    outer.conv_in.weight[:channels, :, 1, 1] = torch.eye(channels)
    outer.conv_in.bias[:channels] = 0
    reduce = down.downsamplers[0].conv
    nn.init.zeros_(reduce.weight)
    reduce.weight[:, :channels] = _strided(inner.conv_in.weight)
    reduce.bias.copy_(inner.conv_in.bias)
    nn.init.dirac_(outer.up_blocks[-2].upsamplers[0].conv.weight)
    nn.init.zeros_(outer.up_blocks[-2].upsamplers[0].conv.bias)
    for resnet in up.resnets:
        nn.init.dirac_(resnet.conv_shortcut.weight)
        nn.init.zeros_(resnet.conv_shortcut.bias)


def _strided(kernel: torch.Tensor) -> torch.Tensor:
    """A 3 x 3 kernel of stride 2 that stands for pooling by 2 and then `kernel`, as well as its reach allows."""
    rows = torch.tensor([[1.0, 0, 0], [0, 0.5, 0.5], [0, 0, 0.5]])
    return torch.einsum("oiyx,yv,xw->oivw", kernel, rows, rows)


def alphas_cumprod(shift: float = NOISE_SHIFT) -> torch.Tensor:
    """Signal power at each training step, (1000,): noise-to-signal `shift * t / (1 - t)`, no signal at the last."""
    t = torch.arange(1, NUM_TRAIN_STEPS + 1, dtype=torch.float64) / NUM_TRAIN_STEPS
    signal, noise = 1 - t, shift * t
    return signal**2 / (signal**2 + noise**2)


def make_scheduler() -> DDIMScheduler:
    """Deterministic DDIM with v-prediction and trailing steps."""
    alphas = alphas_cumprod()
    betas = 1 - alphas / torch.cat([torch.ones(1, dtype=alphas.dtype), alphas[:-1]])
    return DDIMScheduler(
        num_train_timesteps=NUM_TRAIN_STEPS,
        trained_betas=betas.tolist(),
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
    )


def assemble(
    autoencoder: AutoencoderKL, text_encoder: CLIPTextModel, unet: UNet2DConditionModel
) -> StableDiffusionPipeline:
    """Puts the parts into a stock pipeline."""
    pipe = StableDiffusionPipeline(
        vae=autoencoder,
        text_encoder=text_encoder,
        tokenizer=make_tokenizer(),
        unet=unet,
        scheduler=make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return pipe
