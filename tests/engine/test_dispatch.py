"""Reduced attention calls go to the layer's processor at once, where its forward would only look up what that takes."""

from __future__ import annotations

from types import MethodType

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from stated import TurboProcessor
from torch import Tensor, nn

from gen_turbo import attach
from gen_turbo.engine.dispatch import ARGUMENTS, only_calls_processor
from tests.engine.families import TIMES, family

DISPATCHING = (
    *("sd15", "hunyuan-dit", "sd3", "aura-flow", "chroma", "flux", "flux2", "longcat-image", "ovis-image", "z-image"),
    *("hunyuan-image", "qwen-image", "ltx-video", "hunyuan-video", "kandinsky5", "ltx2"),
)
"""A family for each attention class of diffusers whose forward looks up what its processor takes."""


@pytest.mark.parametrize("name", DISPATCHING)
def test_the_result_is_that_of_the_layers_own_forward(name):
    """Catches an argument that is lost, or gets another default, on the way past the forward, and a way never taken."""
    model, run = family(name)
    with attach(model, TurboProcessor(0.4, restore="copy")) as attachment:
        layers = [layer for part in attachment.parts for layer in part.layers]
        forwards = [layer for layer in layers if layer.attention is not None]
        entered: list[nn.Module] = []
        for layer in forwards:
            layer.inner = _noted(layer.inner, entered)
        at_once = run(times=TIMES)
        assert forwards and not entered
        for layer in forwards:
            layer.attention = None
        assert torch.equal(run(times=TIMES), at_once) and entered


def _noted(forward, entered):
    def call(*args, **kwargs):
        entered.append(forward.__self__)
        return forward(*args, **kwargs)

    return call


class Doubled(Attention):
    """An attention layer that does more than to call its processor."""

    def forward(self, *args, **kwargs):
        """As diffusers', twice."""
        return 2 * super().forward(*args, **kwargs)


def test_a_forward_of_another_kind_is_called():
    """Catches a check by the class's name, which leaves out what a subclass or another library does in forward."""
    layer = Attention(8, heads=1, dim_head=8)
    assert only_calls_processor(layer.forward)
    for other in (Doubled(8, heads=1, dim_head=8).forward, lambda x: x, nn.Linear(1, 1).forward):
        assert not only_calls_processor(other)
    layer.forward = MethodType(lambda self, *args, **kwargs: Attention.forward(self, *args, **kwargs), layer)
    assert not only_calls_processor(layer.forward)


class OtherDefault:
    """A processor that does without a mask where it is not told that there is none."""

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | str | None = "made here",
    ) -> Tensor:
        """Its tokens, or zeros where it would have to make a mask."""
        return hidden_states if attention_mask is None else 0 * hidden_states


def test_a_processor_with_another_default_is_called_by_the_forward():
    """Catches a call that means something else where an argument is not given, for which forward passes None."""
    assert not ARGUMENTS[OtherDefault] and "attention_mask" in ARGUMENTS[AttnProcessor2_0]
