"""What is said, and when: models inside of others are found, replaced ones are stock, features made before are told."""

from __future__ import annotations

import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from stated import TurboProcessor
from torch import nn

from gen_turbo import attach, report
from gen_turbo.api import NoEffectWarning, attachments
from gen_turbo.methods.visionzip import VisionZipProcessor
from tests.snapshots import differences, model_state
from tests.tiny_hosts import image, run_unet, sd15_unet, sd_pipeline, unet_inputs
from tests.vlm.tiny_vlms import IMAGE, PROMPTS, VLMS


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


def test_a_replaced_model_is_stock_and_the_report_says_so():
    """Catches a report about a model that the pipeline no longer has, and a new one that is half attached."""
    pipe, other = sd_pipeline(), sd15_unet()
    stock = image(pipe)
    attach(pipe, TurboProcessor(0.5))
    pipe.unet = other
    assert torch.equal(image(pipe), stock) and attachments(pipe) == [] and report(pipe).layers == []
    assert "no gen_turbo processor is attached" in str(report(pipe))
    pipe.set_attn_processor(TurboProcessor(0.5))
    assert not torch.equal(image(pipe), stock)
