"""The families of transformers vision-language models that can be reduced: one entry each."""

from dataclasses import replace

from gen_turbo.vlm.family import (
    Family,
    TowerFacts,
    clip_class_tokens,
    feature_block,
    mllama_tile_length,
    one_class_token,
    packed_grids,
    placed_grids,
    sized_grids,
    square_grids,
    target_grids,
    tile_length,
)
from gen_turbo.vlm.videos import packed_frames, placed_frames, pooled_frames, strided_frames, target_frames

_CLIP = TowerFacts(
    "model.vision_tower",
    ("clip_vision_model", "siglip_vision_model"),
    num_leading=clip_class_tokens,
    last_block=feature_block,
)
_SIGLIP = TowerFacts("model.vision_tower", ("siglip_vision_model",), output_norm="post_layernorm")
_PROJECTOR = "model.multi_modal_projector"

FAMILIES = (
    Family(
        ("LlavaForConditionalGeneration",),
        tower=replace(_CLIP, projector=_PROJECTOR),
        grids=sized_grids,
    ),
    # The features of an image are a thumbnail and tiles with newlines between, which make no grid.
    Family(
        ("LlavaNextForConditionalGeneration", "LlavaOnevisionForConditionalGeneration"),
        tower=_CLIP,
        frames=pooled_frames,
    ),
    Family(("LlavaNextVideoForConditionalGeneration",), tower=_CLIP, frames=strided_frames),
    # Features of several blocks of the tower stand side by side, so that none may be shorter.
    Family(("VipLlavaForConditionalGeneration",), grids=square_grids),
    Family(("AyaVisionForConditionalGeneration",), tower=_CLIP, grids=square_grids),
    Family(
        (
            "Mistral3ForConditionalGeneration",
            "LightOnOcrForConditionalGeneration",
            "MistralLarge4ForConditionalGeneration",
        ),
        grids=sized_grids,
    ),
    Family(
        ("DeepseekVLForConditionalGeneration", "JanusForConditionalGeneration"),
        tower=replace(_SIGLIP, module="model.vision_model"),
        grids=square_grids,
    ),
    Family(
        (
            "GotOcr2ForConditionalGeneration",
            "Ovis2ForConditionalGeneration",
            "QianfanOCRForConditionalGeneration",
            "Step3p7ForConditionalGeneration",
        ),
        grids=square_grids,
    ),
    # The tokens of an image are a resampler's, which stand nowhere in it.
    Family(("AriaForConditionalGeneration",)),
    # Images of any size, whose shape their features do not have.
    Family(("Lfm2VlForConditionalGeneration", "HunYuanVLForConditionalGeneration")),
    Family(
        ("Llama4ForConditionalGeneration",),
        base="",
        text="language_model.model",
        grids=square_grids,
    ),
    Family(("Cohere2VisionForConditionalGeneration",), tower=_SIGLIP, grids=square_grids),
    Family(("Gemma3ForConditionalGeneration",), tower=_SIGLIP, grids=square_grids, masks_in_base=True),
    # Positions of patches decide how the tower pools them, so that it has to see all.
    Family(
        ("Gemma4ForConditionalGeneration", "Gemma4UnifiedForConditionalGeneration"),
        grids=placed_grids,
        frames=placed_frames,
        masks_in_base=True,
    ),
    Family(
        ("PaliGemmaForConditionalGeneration",),
        tower=replace(_SIGLIP, projector=_PROJECTOR),
        grids=square_grids,
        masks_in_base=True,
    ),
    Family(
        (
            "Qwen2VLForConditionalGeneration",
            "Qwen2_5_VLForConditionalGeneration",
            "Qwen3VLForConditionalGeneration",
            "Qwen3VLMoeForConditionalGeneration",
            "Qwen3_5ForConditionalGeneration",
            "Qwen3_5MoeForConditionalGeneration",
            "Qwen3OmniMoeThinkerForConditionalGeneration",
            "Qwen4ExpForConditionalGeneration",
            "CohereCompassForConditionalGeneration",
        ),
        tower=TowerFacts(
            "model.visual",
            (
                "qwen2_vl_vision",
                "qwen2_5_vl_vision",
                "qwen3_vl_vision",
                "qwen3_vl_moe_vision",
                "qwen3_5_vision",
                "qwen3_5_moe_vision",
                "qwen3_omni_moe_vision_encoder",
                "qwen4_exp_vision",
                "cohere_compass_vision",
            ),
            encoder="",
            blocks="blocks",
            attention="attn",
            norm2="norm2",
            has_qkv=True,
            is_packed=True,
        ),
        grids=packed_grids,
        frames=packed_frames,
    ),
    Family(
        (
            "Ernie4_5_VLMoeForConditionalGeneration",
            "Exaone4_5_ForConditionalGeneration",
            "Qwen2_5OmniThinkerForConditionalGeneration",
            "Cosmos3EdgeForConditionalGeneration",
            "HyperCLOVAXVisionV2ForConditionalGeneration",
            "Lfm3VlForConditionalGeneration",
            "MuseGlimmerForConditionalGeneration",
            "MuseSparkForConditionalGeneration",
        ),
        grids=packed_grids,
        frames=packed_frames,
    ),
    Family(
        (
            "MiniCPMV4_6ForConditionalGeneration",
            "MiniCPMV4_7ForConditionalGeneration",
            "MiniCPMOcrForConditionalGeneration",
        ),
        grids=target_grids,
        frames=target_frames,
        has_lone_frames=True,
    ),
    Family(
        (
            "Glm4vForConditionalGeneration",
            "Glm4vMoeForConditionalGeneration",
            "Glm46VForConditionalGeneration",
            "GlmOcrForConditionalGeneration",
            "Glm5NextForConditionalGeneration",
        ),
        grids=packed_grids,
        frames=packed_frames,
        placeholder="image",
    ),
    Family(
        (
            "Kimi_K25ForConditionalGeneration",
            "PaddleOCRVLForConditionalGeneration",
            "VideoLlama3ForConditionalGeneration",
        ),
        grids=packed_grids,
    ),
    Family(
        ("InternVLForConditionalGeneration",),
        tower=TowerFacts(
            "model.vision_tower",
            ("internvl_vision",),
            blocks="layer",
            attention="attention",
            norm2="layernorm_after",
            num_leading=one_class_token,
            last_block=feature_block,
        ),
        grids=square_grids,
    ),
    Family(
        ("Idefics3ForConditionalGeneration", "SmolVLMForConditionalGeneration"),
        text="model.text_model",
        tower=TowerFacts("model.vision_model", ("idefics3_vision", "smolvlm_vision")),
        grids=square_grids,
        pieces=tile_length,
    ),
    # The tokens of an image are a resampler's, which stand nowhere in it.
    Family(("Idefics2ForConditionalGeneration",), text="model.text_model", pieces=tile_length),
    Family(("MllamaForConditionalGeneration",), pieces=mllama_tile_length, is_cross=True),
    Family(
        (
            "BlipForConditionalGeneration",
            "BlipForQuestionAnswering",
            "BlipForImageTextRetrieval",
            "Blip2ForConditionalGeneration",
            "InstructBlipForConditionalGeneration",
        ),
        tower=TowerFacts(
            "vision_model",
            ("blip_vision_model", "blip_2_vision_model", "instructblip_vision_model"),
            num_leading=one_class_token,
            has_qkv=True,
            is_restored=False,
            output_norm="post_layernorm",
        ),
        is_cross=True,
    ),
)
