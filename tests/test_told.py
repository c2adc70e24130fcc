"""What is said, and when: models inside of others are found, replaced ones are stock, features made before are told."""

from __future__ import annotations

import copy
import gc
import re
import warnings
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from stated import TurboProcessor
from torch import nn
from transformers import Qwen2_5OmniConfig, Qwen2_5OmniForConditionalGeneration

from gen_turbo import PARProcessor, attach, detach, report
from gen_turbo.api import NoEffectWarning, attachments
from gen_turbo.methods.fastv import FastVProcessor
from gen_turbo.methods.pyramiddrop import PyramidDropProcessor
from gen_turbo.methods.resize import ResizeProcessor
from gen_turbo.methods.stride import StrideProcessor
from gen_turbo.methods.turbo_vit import TurboVisionProcessor
from gen_turbo.methods.visionzip import VisionZipProcessor
from gen_turbo.methods.vistog_vit import VisToGVisionProcessor
from gen_turbo.methods.vscan import VScanProcessor
from gen_turbo.vlm.settings import Placed
from tests.engine.pipelines import made
from tests.snapshots import differences, model_state
from tests.tiny_hosts import image, run_unet, sd15_unet, sd_pipeline, unet_inputs
from tests.vlm.tiny_kit import IMAGE
from tests.vlm.tiny_vlms import PROMPTS, VLMS


def test_what_is_attached_to_a_model_alone_stays_with_it():
    """Catches a warning of a pipeline that nothing was attached to, and a model that is lost by being taken out."""
    pipe, other = sd_pipeline(), sd15_unet()
    stock = image(pipe, steps=3)
    held = attach(pipe.unet, TurboProcessor(0.4))
    unet, reduced = pipe.unet, image(pipe, steps=3)
    pipe.unet = other
    with warnings.catch_warnings():
        warnings.simplefilter("error", NoEffectWarning)
        assert torch.equal(image(pipe, steps=3), stock) and not attachments(pipe) and attachments(unet)
    pipe.unet = unet
    assert torch.equal(image(pipe, steps=3), reduced)
    held.detach()
    assert torch.equal(image(pipe, steps=3), stock)


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda unet: get_peft_model(unet, lora())])
def test_a_wrapped_model_is_attached_to(wrap):
    """Catches a list of supported classes as the answer to a PeftModel of one of them."""
    unet, inputs = sd15_unet(), unet_inputs()
    outer = wrap(unet)
    stock, before = run_unet(unet, **inputs), model_state(unet)
    with attach(outer, TurboProcessor(0.5)):
        assert not torch.equal(run_unet(outer, **inputs), stock)
        assert any(row.num_reduced for row in report(outer).layers)
        assert attachments(unet) == attachments(outer) != []
    assert torch.equal(run_unet(outer, **inputs), stock) and differences(before, model_state(unet)) == []


def test_a_model_that_speaks_is_attached_to_where_it_reads():
    """Catches a list of supported classes as the answer to Qwen2.5-Omni as it is loaded."""
    vlm = VLMS["omni2_5"]
    config = Qwen2_5OmniConfig(thinker_config=vlm.make("sdpa").config.to_dict(), enable_audio_output=False)
    model, inputs = Qwen2_5OmniForConditionalGeneration(config).eval(), PROMPTS["one"].inputs(vlm)
    with attach(model, TurboProcessor(0.5)), torch.no_grad():
        model.thinker(**inputs)
        assert attachments(model.thinker) == attachments(model) != []
        assert any(row.num_reduced for row in report(model).layers)
    assert not attachments(model)


def lora() -> LoraConfig:
    """Adapters that change nothing yet."""
    return LoraConfig(r=2, target_modules=["to_q", "to_v"])


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_a_vision_language_model_with_adapters_is_attached_to():
    """Catches the same for the other library."""
    vlm = VLMS["llava"]
    model = get_peft_model(vlm.make("sdpa"), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    inputs = PROMPTS["one"].inputs(vlm)
    stock = model(**inputs).logits
    with attach(model, TurboProcessor(0.5)):
        assert not torch.equal(model(**inputs).logits, stock)
    assert torch.equal(model(**inputs).logits, stock)


@pytest.mark.parametrize(
    "family",
    ["internvl", "idefics3", "llava_next", "smolvlm", "llava_onevision", "mistral3", "llava_pixtral", "aya", "gemma3"],
)
def test_what_a_method_cannot_do_is_refused_by_attach(family):
    """Catches an error in the first call about attention that no tower can give."""
    model = VLMS[family].make("sdpa")
    before = model_state(model)
    with pytest.raises(ValueError, match="are no patches of its vision tower"):
        attach(model, VisionZipProcessor(0.5))
    assert differences(before, model_state(model)) == []


@pytest.mark.parametrize(
    "reducer", [FastVProcessor(0.5), PyramidDropProcessor(0.5), ResizeProcessor(), VScanProcessor()]
)
def test_what_no_denoiser_has_is_refused_by_attach(reducer):
    """Catches an error in the first call that speaks of a decoder, and one where nothing would be removed."""
    unet = sd15_unet()
    before = model_state(unet)
    with pytest.raises(ValueError, match="works on vision-language models alone, and UNet2DConditionModel is a denois"):
        attach(unet, reducer)
    assert differences(before, model_state(unet)) == []
    attach(unet, replace(reducer, ratio=0.0)).detach()


@pytest.mark.parametrize(
    ("reducer", "words"),
    [
        (Placed(TurboProcessor(0.5), place="decoder"), "place='decoder' is of vision-language models"),
        (StrideProcessor(0.5, combine="merge"), "combine='merge' is of vision-language models"),
        (PARProcessor(tokens=0.4), "tokens=0.4 is of vision-language models"),
        (VisToGVisionProcessor(num_tokens=64), "num_tokens=64 is of vision-language models"),
        (TurboVisionProcessor(0.5, num_merges=3), "num_merges=3 is of vision-language models"),
        (TurboProcessor(0.5, adaptive=True), "adaptive=True .* is a denoiser, leave it out"),
        (TurboProcessor(keep=9), "keep=9 .* is a denoiser, use ratio"),
    ],
)
def test_what_a_denoiser_does_not_read_is_refused(reducer, words):
    """Catches a place in a language model that a denoiser takes in silence."""
    with pytest.raises(ValueError, match=words):
        attach(sd15_unet(), reducer)


def test_a_word_for_graphs_is_refused():
    """Catches `graphs="off"`, which is true."""
    with pytest.raises(ValueError, match="graphs must be 'auto', True or False; got 'off'"):
        attach(sd15_unet(), TurboProcessor(0.5), graphs="off")


def test_features_in_embeddings_are_told():
    """Catches images that are already in `inputs_embeds`, and so reach the language model in full, in silence."""
    vlm = VLMS["llava"]
    model, inputs = vlm.make("sdpa"), PROMPTS["one"].inputs(vlm)
    with torch.no_grad():
        embeds = model.get_input_embeddings()(inputs["input_ids"])
        features = torch.cat(list(model.model.get_image_features(inputs["pixel_values"]).pooler_output))
        embeds[inputs["input_ids"] == IMAGE] = features
    given = {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]}
    with attach(model, TurboProcessor(0.6)):
        with pytest.warns(NoEffectWarning, match="pass pixel_values"):
            model.generate(**given, max_new_tokens=3)
        with warnings.catch_warnings():
            warnings.simplefilter("error", NoEffectWarning)
            model.generate(**inputs, max_new_tokens=3)
            model.generate(input_ids=torch.tensor([[1, 5, 7]]), max_new_tokens=3)


def other_unet() -> nn.Module:
    """One of the same class with other weights."""
    unet = sd15_unet()
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.mul_(1.01)
    return unet


REPLACED = "unet of this StableDiffusionPipeline is another model .* runs as stock; attach to the pipeline again"


@pytest.mark.parametrize("is_kept", [True, False])
def test_a_replaced_model_is_stock_and_told(is_kept):
    """Catches a new model that is stock in silence, above all where nothing holds the old one, and a false report."""
    pipe, other = sd_pipeline(), other_unet()
    old = pipe.unet if is_kept else None
    attach(pipe, TurboProcessor(0.5))
    pipe.unet = other
    gc.collect()
    with pytest.warns(NoEffectWarning, match=REPLACED):
        drawn = image(pipe)
    assert attachments(pipe) == [] and report(pipe).layers == [] and re.search(REPLACED, str(report(pipe)))
    detach(pipe)
    assert torch.equal(image(pipe), drawn) and str(report(pipe)) == "no gen_turbo processor is attached"
    del old


@pytest.mark.parametrize("name", ["flux", "wan"])
def test_a_replaced_transformer_is_told(name):
    """Catches the same for UNets alone, or pipelines that warn in every step."""
    pipe, draw = made(name)
    with attach(pipe, TurboProcessor(0.5)):
        pipe.transformer = copy.deepcopy(pipe.transformer)
        with pytest.warns(NoEffectWarning, match="transformer of this .* is another model") as told:
            draw()
    assert len(told) == 1


def test_a_class_in_place_of_a_processor_is_refused():
    """Catches `set_attn_processor(TurboProcessor)`, which diffusers takes and calls in the middle of the next run."""
    pipe = sd_pipeline()
    attach(pipe, TurboProcessor(0.5))
    before = dict(pipe.unet.attn_processors)
    with pytest.raises(TypeError, match=r"a processor such as TurboProcessor\(0.4\), got the class TurboProcessor"):
        pipe.set_attn_processor(TurboProcessor)
    assert attachments(pipe.unet) and pipe.unet.attn_processors == before


def test_detach_reaches_the_model_that_was_replaced():
    """Catches an old model that keeps its processor after the pipeline was detached, and one that lost it before."""
    pipe = sd_pipeline()
    old, new = pipe.unet, other_unet()
    state, names = model_state(old), set(vars(pipe))
    stock = image(pipe)
    attach(pipe, TurboProcessor(0.5))
    drawn = image(pipe)
    pipe.unet = new
    pipe.set_attn_processor(TurboProcessor(0.4))
    image(pipe)
    pipe.unet = old
    assert torch.equal(image(pipe), drawn) and report(pipe).notes == ()
    pipe.unet = new
    pipe.reset_attn_processor()
    assert differences(state, model_state(old)) == [] and attachments(new) == []
    pipe.unet = old
    assert torch.equal(image(pipe), stock) and "progress_bar" not in set(vars(pipe)) - names


def test_a_pipeline_without_its_model_can_be_detached():
    """Catches a model that was taken out of its pipeline, as to free memory, and keeps its processor for good."""
    pipe = sd_pipeline()
    unet, pipe.unet = pipe.unet, None
    with pytest.raises(TypeError, match="expected a diffusers pipeline"):
        detach(pipe)
    pipe.unet = unet
    state = model_state(unet)
    attach(pipe, TurboProcessor(0.5))
    pipe.unet = None
    detach(pipe)
    assert differences(state, model_state(unet)) == [] and "progress_bar" not in vars(pipe)


def test_nothing_is_told_of_a_model_that_was_only_wrapped_or_detached():
    """Catches a warning about `torch.compile` and adapters around the same model, copies, and what was taken off."""
    pipe = sd_pipeline()
    with attach(pipe, TurboProcessor(0.5)):
        twin = copy.deepcopy(pipe)
        image(twin)
        pipe.unet = torch.compile(pipe.unet, backend="eager")
        assert report(pipe).notes == () and report(twin).notes == ()
        detach(pipe.unet)
        assert report(pipe).notes == ()
        image(twin)


def test_a_failed_attach_still_tells_of_a_replaced_model():
    """Catches records that are lost where the next attach raises."""
    pipe = sd_pipeline()
    attach(pipe, TurboProcessor(0.5))
    pipe.unet = other_unet()
    with pytest.raises(ValueError):
        attach(pipe, TurboProcessor(0.5, text_ratio=0.3, reference_ratio=0.1))
    with pytest.warns(NoEffectWarning, match=REPLACED):
        image(pipe)


def test_a_progress_bar_of_the_user_s_own_survives():
    """Catches a method of the pipeline's own that is lost on detach, whether it was placed before or after attach."""
    pipe, seen = sd_pipeline(), []

    def bar(*args, **kwargs):
        seen.append(args)
        return type(pipe).progress_bar(pipe, *args, **kwargs)

    pipe.progress_bar = bar
    with attach(pipe, TurboProcessor(0.5)):
        image(pipe)
        assert len(seen) == 1
    assert pipe.progress_bar is bar
    del pipe.progress_bar
    with attach(pipe, TurboProcessor(0.5)):
        pipe.progress_bar = bar
    image(pipe)
    assert pipe.progress_bar is bar and len(seen) == 2
