"""The embedded vision-language model: the stock LLaVA class at a small size, its vocabulary and its processor."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from gen_turbo.scenes import QUESTION_WORDS, SIZE_PX, WORDS

PATCH_PX = 8
NUM_IMAGE_TOKENS = (SIZE_PX // PATCH_PX) ** 2
CAPTION_PROMPT = "describe the picture"
IMAGE = "<image>"
_SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>", IMAGE)
_PROMPT_WORDS = ("describe", "picture", "above", "below", "right", "left")
_TOWER_WIDTH, _TOWER_LAYERS = 128, 4
_TEXT_WIDTH, _TEXT_LAYERS = 160, 6
_HEAD_WIDTH = 32


def weights_folder() -> Path:
    """Where the trained model and its processor lie inside the installed package."""
    return Path(str(resources.files("gen_turbo.pipelines"))) / "weights" / "tiny-vlm"


def prompt_of(question: str) -> str:
    """What the processor is given as text for a question about one image; `CAPTION_PROMPT` requests a caption."""
    return f"{IMAGE}{question}"


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, without punctuation and case, padded on the left; a prompt begins with <bos>."""
    words = [*_SPECIAL, *sorted({*WORDS, *QUESTION_WORDS, *_PROMPT_WORDS})]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Lowercase(), normalizers.Replace(Regex("[?.,!]"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": IMAGE},
        padding_side="left",
        model_max_length=1024,
    )


def make_processor(patch_px: int = PATCH_PX) -> LlavaProcessor:
    """Images of any size become 128 x 128; each <image> of a prompt becomes one token a patch."""
    images = CLIPImageProcessorPil(
        size={"height": SIZE_PX, "width": SIZE_PX},
        do_center_crop=False,
        crop_size={"height": SIZE_PX, "width": SIZE_PX},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=make_tokenizer(),
        patch_size=patch_px,
        vision_feature_select_strategy="default",
        image_token=IMAGE,
        num_additional_image_tokens=1,
    )


def make_model(patch_px: int = PATCH_PX) -> LlavaForConditionalGeneration:
    """A CLIP tower of 4 layers, 256 patch tokens, and a Llama of 6 layers, with random weights."""
    tokenizer = make_tokenizer()
    vision = CLIPVisionConfig(
        hidden_size=_TOWER_WIDTH,
        intermediate_size=3 * _TOWER_WIDTH,
        num_hidden_layers=_TOWER_LAYERS,
        num_attention_heads=_TOWER_WIDTH // _HEAD_WIDTH,
        image_size=SIZE_PX,
        patch_size=patch_px,
        projection_dim=_TOWER_WIDTH,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=_TEXT_WIDTH,
        intermediate_size=2 * _TEXT_WIDTH,
        num_hidden_layers=_TEXT_LAYERS,
        num_attention_heads=_TEXT_WIDTH // _HEAD_WIDTH,
        num_key_value_heads=_TEXT_WIDTH // _HEAD_WIDTH,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE),
        vision_feature_select_strategy="default",
        vision_feature_layer=-1,
        image_seq_length=(SIZE_PX // patch_px) ** 2,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlavaForConditionalGeneration(config)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    return model.eval()


@torch.no_grad()
def refine(coarse: LlavaForConditionalGeneration, fine: LlavaForConditionalGeneration) -> None:
    """Copies a model into one of half the patch, which sees a patch in four as the coarse one sees it blurred.

    The kernel of a fine patch is the coarse one, summed over 2 x 2 pixels; places are interpolated.
    """
    own = coarse.state_dict()
    kernel, place = (
        f"model.vision_tower.embeddings.{name}.weight" for name in ("patch_embedding", "position_embedding")
    )
    own[kernel] = torch.nn.functional.avg_pool2d(own[kernel], 2) * 4
    side = round((len(own[place]) - 1) ** 0.5)
    grid = own[place][1:].T.unflatten(1, (side, side))[None]
    grown = torch.nn.functional.interpolate(grid, scale_factor=2, mode="bilinear")[0].flatten(1).T
    own[place] = torch.cat([own[place][:1], grown])
    fine.load_state_dict({name: value for name, value in own.items() if "position_ids" not in name}, strict=False)
