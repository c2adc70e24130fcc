"""A stage that fails while it is placed: what was placed before is taken off again, at every step of every stage."""

from __future__ import annotations

from dataclasses import replace

import pytest
from torch import nn
from transformers import BlipForConditionalGeneration, BlipForImageTextRetrieval

from gen_turbo import TurboProcessor, attach
from gen_turbo.methods.resize import ResizeProcessor
from gen_turbo.methods.turbo_vit import TurboVisionProcessor
from gen_turbo.methods.vistog_vit import VisToGVisionProcessor
from gen_turbo.vlm import hooks
from gen_turbo.vlm.settings import Placed
from tests.snapshots import differences, model_state
from tests.vlm.par_oracle import Forced, chooser_for
from tests.vlm.test_blip import _blip
from tests.vlm.tiny_vlms import VLMS

HALF = TurboProcessor(0.5)
STAGES = {
    "gate and videos": ("llava_onevision", HALF),
    "tower": ("llava", Placed(HALF, place="tower")),
    "tower with fused projections": ("internvl", Placed(HALF, place="tower")),
    "packed tower": ("qwen3", Placed(HALF, place="tower")),
    "smaller images": ("llava", ResizeProcessor(0.5)),
    "decoder": ("qwen2_5", Placed(HALF, place="decoder")),
    "words": ("llava", TurboProcessor(0.5, text_ratio=0.5)),
    "groups": ("llava", VisToGVisionProcessor(0.5)),
    "planned groups": ("llava", Placed(HALF, place="projector")),
    "routing": ("llava", Forced()),
    "weighing": ("llava", Forced(mode="soft")),
    "cross-attention": (BlipForConditionalGeneration, TurboVisionProcessor(0.5, place="pre_llm")),
    "text encoder": (BlipForImageTextRetrieval, TurboProcessor(0.5, text_ratio=0.5)),
}


class _Broken(Exception):
    pass


def count_placed(monkeypatch, fails_at):
    """Has one of the coming placements fail; gives the list of those that were asked for."""
    asked = []

    def counted(owner, name):
        stock = getattr(owner, name)

        def place(self, *args, **kwargs):
            asked.append(name)
            if len(asked) == fails_at:
                raise _Broken
            return stock(self, *args, **kwargs)

        monkeypatch.setattr(owner, name, place)

    for name in ("register_forward_pre_hook", "register_forward_hook"):
        counted(nn.Module, name)
    counted(hooks.InstanceMethod, "__init__")
    counted(hooks._Marked, "__init__")
    return asked


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_that_fails_half_way_leaves_nothing(stage, monkeypatch):
    """Catches a stage whose hooks are known only once all are placed: those before the one that fails would stay."""
    family, method = STAGES[stage]
    model = VLMS[family].make() if isinstance(family, str) else _blip(family)
    if isinstance(method, Forced):
        method = replace(method, chooser=chooser_for(model))
    before = model_state(model)
    with monkeypatch.context() as patch:
        asked = count_placed(patch, 0)
        attach(model, method).detach()
    assert len(asked) > 3 and "register_forward_hook" in asked and differences(before, model_state(model)) == []
    for step in range(1, len(asked) + 1):
        with monkeypatch.context() as patch:
            count_placed(patch, step)
            with pytest.raises(_Broken):
                attach(model, method)
        assert differences(before, model_state(model)) == [], f"step {step}: {asked[step - 1]}"
