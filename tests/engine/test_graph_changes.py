"""A model that was changed is captured anew: weights, scales, processors, whatever a graph has baked in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from peft import LoraConfig
from stated import TurboProcessor
from torch import nn

from gen_turbo import attach
from gen_turbo.engine.watch import Watch
from tests.engine.cuda import Graph, StandIn, stand_in
from tests.tiny_hosts import run_unet, sd15_unet, unet_inputs

FEW = tuple(range(900, 300, -100))


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """The CPU in the place of a GPU."""
    return stand_in(monkeypatch)


def _new_data(unet: Any) -> None:
    unet.conv_in.weight.data = unet.conv_in.weight.data * 1.5


@torch.no_grad()
def _in_place(unet: Any) -> None:
    unet.conv_in.weight.mul_(1.5)


def _free_u(unet: Any) -> None:
    unet.enable_freeu(s1=0.6, s2=0.4, b1=1.1, b2=1.2)


def _module(unet: Any) -> None:
    unet.conv_out = nn.Conv2d(16, 4, 3, padding=1)
    nn.init.constant_(unet.conv_out.weight, 0.01)
    nn.init.zeros_(unet.conv_out.bias)


def _hook(unet: Any) -> None:
    unet.mid_block.register_forward_hook(lambda module, args, output: 1.5 * output)


def _scale(unet: Any) -> None:
    unet.set_adapters(["default"], [0.3])


def _fused(unet: Any) -> None:
    unet.fuse_lora(lora_scale=0.5)


def _no_lora(unet: Any) -> None:
    unet.delete_adapters(["default"])


def _no_adapters(unet: Any) -> None:
    unet.disable_adapters()


def _processor(unet: Any) -> None:
    unet.set_attn_processor(AttnProcessor())


def _assigned(unet: Any) -> None:
    unet.load_state_dict({name: 1.1 * value for name, value in unet.state_dict().items()}, assign=True)


CHANGES = [
    _new_data,
    _in_place,
    _module,
    _scale,
    _fused,
    _no_lora,
    _processor,
    _assigned,
    _free_u,
    _hook,
    _no_adapters,
]


@pytest.mark.parametrize("change", [_free_u, _new_data, _scale, _processor])
def test_a_model_that_a_callback_changes_is_seen(change, cuda):
    """Catches what is looked for between two images alone."""
    outputs = []
    for graphs in (False, True):
        unet, inputs = sd15_unet(), unet_inputs(1)
        torch.manual_seed(2)
        unet.add_adapter(LoraConfig(r=2, lora_alpha=8, init_lora_weights=False, target_modules=["to_q", "to_v"]))
        with attach(unet, TurboProcessor(0.4), graphs=graphs):
            run_unet(unet, FEW, **inputs)
            before = run_unet(unet, FEW[:4], **inputs)
            change(unet)
            outputs.append((before, run_unet(unet, FEW[4:], **inputs)))
    assert cuda.num_replayed > len(FEW)
    assert all(map(torch.equal, *outputs))


@pytest.mark.filterwarnings("ignore:Already unmerged", "ignore:Adapter cannot be set")
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_model_is_seen(change, cuda):
    """Catches a graph that goes on with weights, scales or code that the model no longer has."""
    outputs = []
    for graphs in (False, True):
        unet, inputs = sd15_unet(), unet_inputs(1)
        torch.manual_seed(2)
        unet.add_adapter(LoraConfig(r=2, lora_alpha=8, init_lora_weights=False, target_modules=["to_q", "to_v"]))
        with attach(unet, TurboProcessor(0.4), graphs=graphs):
            before = run_unet(unet, FEW, **inputs)
            change(unet)
            outputs.append((before, run_unet(unet, FEW, **inputs)))
    assert not torch.equal(outputs[0][0], outputs[0][1]) and cuda.num_replayed > len(FEW)
    assert all(map(torch.equal, *outputs))


def test_the_device_computes_while_the_whole_model_is_looked_at(cuda, monkeypatch):
    """Catches milliseconds of Python before the first replay of a run, in which the device has nothing to do."""
    unet, inputs, seen = sd15_unet(), unet_inputs(1), []
    is_same, replay = Watch.is_same, Graph.replay

    def look(watch: Watch, is_first_step: bool) -> bool:
        seen.append("whole model" if is_first_step else "addresses")
        return is_same(watch, is_first_step)

    def play(graph: Graph) -> None:
        seen.append("replay")
        replay(graph)

    monkeypatch.setattr(Watch, "is_same", look)
    monkeypatch.setattr(Graph, "replay", play)
    with attach(unet, TurboProcessor(0.4), graphs=True):
        for _ in range(3):
            seen.clear()
            run_unet(unet, FEW, **inputs)
    assert seen == ["addresses", "replay", "whole model", *["addresses", "replay"] * (len(FEW) - 1)]


def _changed(change: Callable[[Any], object]) -> bool:
    model: Any = sd15_unet()
    block = model.mid_block
    block.strength, block.note = None, 1000.5
    watch = Watch(model)
    assert watch.is_same(True)
    change(block)
    return not watch.is_same(True)


def test_every_plain_attribute_counts_and_no_object_does():
    """Catches a number that takes the place of None or of another name, and graphs dropped for an equal number."""
    assert _changed(lambda block: setattr(block, "strength", 1.2))
    assert _changed(lambda block: setattr(block, "more", True))
    assert _changed(lambda block: (delattr(block, "note"), setattr(block, "other", 1000.5)))
    assert _changed(lambda block: block.register_forward_hook(lambda *_: None))
    assert not _changed(lambda block: setattr(block, "note", float("1000.5")))
    assert not _changed(lambda block: setattr(block, "strength", object()))
