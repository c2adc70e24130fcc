"""Every setting of every method on every family: something reads it, or attaching refuses it by name."""

from __future__ import annotations

import sys
from dataclasses import fields
from functools import cache

import pytest
import torch

from gen_turbo import attach
from gen_turbo.registry import METHODS
from tests.vlm.test_blip import MODELS
from tests.vlm.tiny_kit import pixels
from tests.vlm.tiny_mllama import mllama, mllama_inputs
from tests.vlm.tiny_vlms import PROMPTS, VLMS

OTHER = {
    "ratio": 0.4, "max_downsample": 2, "ratios": {1: 0.5}, "layer_ratios": {"*": 0.2}, "step_scale": {0: 0.5},
    "full_every": 5, "extrapolation_order": 0, "warmup_steps": 3, "stagger": True, "match_every": 7,
    "memory_limit_mb": 1.0, "scope": "block", "merge_span": 2, "kv_only": True, "proportional_attention": True,
    "text_ratio": 0.3, "reference_ratio": 0.3,
    "attention_backend": "native", "keep": 5, "adaptive": True, "across_frames": True, "place": "decoder", "layer": 1,
    "combine": "prune", "value_weight": 0.5, "tile": 4, "is_hashed": False, "seed": 3, "window": 3,
    "num_refinements": 0, "free": 0.5, "contextual": 0.5, "num_removed": 2, "alpha": 0.5, "scale": 10.0, "beta": 2.0,
    "gamma": 1, "threshold": 3, "num_merges": 1, "num_tokens": 4, "weights": "nowhere.safetensors", "first_block": 1,
    "budget": 0.9, "schedule": "nowhere.json", "router": "random", "tokens": 0.7, "layers": 2, "first": 1,
    "mode": "mask", "inner": None, "cuts": [1, 3], "local": 0.25, "late": 0.5, "cut": 3, "energy": 0.5,
    "beyond_half": "diverse",
}  # fmt: skip
SPECIAL = {
    ("restore", "copy"): "residual", ("restore", "residual"): "copy",
    ("combine", "prune"): "merge", ("place", "decoder"): "pre_llm",
    ("semantic", "self"): "none", ("semantic", "class"): "self",
}  # fmt: skip
BASE = {"par": {"router": "uniform", "tokens": 0.5, "layers": 3}}
OTHERS = {**MODELS, "mllama": mllama}
FAMILIES = [*VLMS, *OTHERS]


@cache
def model_of(family):
    """The tiny model."""
    return VLMS[family].make("sdpa") if family in VLMS else OTHERS[family]()


@torch.no_grad()
def run(family):
    """One call."""
    model = model_of(family)
    if family in VLMS:
        # Two images, or adaptive budgets would have nothing to share.
        return model(**PROMPTS["even"].inputs(VLMS[family]))
    if family == "mllama":
        return model(**mllama_inputs())
    ids = torch.tensor([[1, *range(5, 13), 2]])
    given = {"pixel_values": pixels(1), "input_ids": ids}
    if family == "instructblip":
        given["qformer_input_ids"] = ids
    if family in ("blip2", "instructblip"):
        given["input_ids"] = torch.tensor([[99] * 4 + [5, 6]])
    if family == "vqa":
        return model.generate(**given, max_new_tokens=2)
    return model(**given)


def spied(method, settings):
    """A method that notes which of its settings are read, but for checks of what is read."""
    read = set()

    def __getattribute__(self, name):  # noqa: N807
        if name in names:
            frame = sys._getframe(1)
            while frame is not None and frame.f_code.co_name not in ("check_settings", "unread", "__post_init__"):
                frame = frame.f_back
            if frame is None:
                read.add(name)
        return object.__getattribute__(self, name)

    names = {one.name for one in fields(method)}
    made = type(method.__name__, (method,), {"__getattribute__": __getattribute__})(**settings)
    read.clear()
    return made, read


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", [name for name in METHODS.names() if name != "own"])
def test_every_setting_is_read_or_refused(name, family):
    """Catches a setting that is taken and changes nothing, and a refusal that does not say which one."""
    method, base, model = METHODS[name], BASE.get(name, {}), model_of(family)
    try:
        attach(model, method(**base)).detach()
    except ValueError:
        return
    outcomes = {}
    for one in fields(method):
        default = getattr(method(**base), one.name)
        value = SPECIAL.get((one.name, str(default)), OTHER.get(one.name))
        assert value != default or one.name == "inner", one.name
        try:
            reducer, read = spied(method, base | {one.name: value})
            attachment = attach(model, reducer)
        except ValueError as error:
            assert one.name in str(error) or str(value) in str(error), error
            outcomes[one.name] = "refused"
            continue
        with attachment:
            run(family)
        assert one.name in read, f"{one.name} is read by nothing"
        outcomes[one.name] = "read"
    assert outcomes["scope"] == outcomes["restore"] == "refused"
    assert name == "par" or "read" in (outcomes["ratio"], outcomes.get("num_tokens"))
