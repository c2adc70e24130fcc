"""What callbacks change in mid run: at ratio 0 the image is the stock one, and changes reach merged steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig
from stated import TurboProcessor
from torch import Tensor

from gen_turbo import attach
from tests import tiny_transformers
from tests.tiny_hosts import image, sd_pipeline

STEPS, AT = 9, 3


def _scale(pipe: Any, step: int, text: Tensor) -> None:
    pipe.unet.set_adapters(["default"], [0.1 * step])


def _data(pipe: Any, step: int, text: Tensor) -> None:
    if step == AT:
        pipe.unet.conv_in.weight.data.mul_(1.5)


def _new_data(pipe: Any, step: int, text: Tensor) -> None:
    if step == AT:
        weight = pipe.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn1.to_q.weight
        weight.data = weight.data * 4


def _text_data(pipe: Any, step: int, text: Tensor) -> None:
    if step == AT:
        text.data.mul_(0.5)


def drawn(change: Any, processor: Any) -> Tensor:
    """An image during which a callback changes something; None leaves all as it was, or the pipeline stock."""
    pipe = sd_pipeline()
    torch.manual_seed(2)
    pipe.unet.add_adapter(LoraConfig(r=2, lora_alpha=8, init_lora_weights=False, target_modules=["to_q", "to_v"]))

    def callback(pipe: Any, step: int, time: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if step >= AT and change is not None:
            change(pipe, step, kwargs["prompt_embeds"])
        return kwargs

    if processor is not None:
        pipe.set_attn_processor(processor)
    names = ["prompt_embeds"]
    return image(pipe, steps=STEPS, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=names)


@pytest.mark.parametrize("change", [_scale, _data, _new_data, _text_data])
def test_a_change_is_honoured(change):
    """Catches steps that go on with weights, scales or text that are no longer there."""
    stock, before = drawn(change, None), drawn(None, None)
    assert not torch.equal(stock, before)
    for settings in ({}, {"scope": "block"}):
        assert torch.equal(drawn(change, TurboProcessor(0.0, **settings)), stock)
        change_of_reduced = drawn(change, TurboProcessor(0.5, **settings)) - drawn(
            None, TurboProcessor(0.5, **settings)
        )
        # The image moves as the stock one does.
        assert (change_of_reduced - (stock - before)).norm() < 0.3 * (stock - before).norm()


@pytest.mark.filterwarnings("ignore:Attention backends are an experimental:UserWarning")
@pytest.mark.parametrize("settings", [{}, {"kv_only": True, "restore": "copy"}, {"text_ratio": 0.3}])
def test_the_kernel_of_a_single_layer(settings):
    """Catches a kernel set on one layer while a processor is attached that is lost, or that another one replaces."""
    model, times = tiny_transformers.build("flux"), (900, 700, 500)
    stock = tiny_transformers.run("flux", model, times)
    with attach(model, TurboProcessor(0.4, **settings)):
        reduced = tiny_transformers.run("flux", model, times)
        layer = model.transformer_blocks[0].attn
        layer.processor._attention_backend = "_native_math"
        again = tiny_transformers.run("flux", model, times)
        assert layer.processor._attention_backend == "_native_math"
        torch.testing.assert_close(again, reduced, rtol=1e-4, atol=1e-4)
    layer.processor._attention_backend = None
    assert torch.equal(tiny_transformers.run("flux", model, times), stock)
