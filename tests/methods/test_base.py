"""What users hold: presets by name, plans without a model, and bounds of settings where each method has its own."""

from __future__ import annotations

import pytest
import torch
from diffusers import DiffusionPipeline

from gen_turbo import TurboProcessor, VisToGProcessor
from gen_turbo.methods.eadaprune import EAdaPruneProcessor
from gen_turbo.methods.fastv import FastVProcessor
from gen_turbo.methods.pyramiddrop import PyramidDropProcessor
from gen_turbo.methods.resize import ResizeProcessor
from gen_turbo.methods.turbo_vit import TurboVisionProcessor
from gen_turbo.methods.visionzip import VisionZipProcessor
from gen_turbo.methods.vscan import VScanProcessor
from gen_turbo.registry import METHODS


def test_a_preset_is_the_file_of_its_method():
    """Catches a preset that is read and not used, or made by a class that it is not of."""
    fast = TurboProcessor.preset("fast")
    assert type(fast) is TurboProcessor and fast != TurboProcessor()
    assert TurboVisionProcessor.preset("turbo_vit_llava").num_removed == 16
    with pytest.raises(ValueError, match=r"preset 'fast' is of the method 'turbo'; use TurboProcessor\.preset"):
        VisToGProcessor.preset("fast")


def test_plans_without_a_model_know_their_tokens():
    """Catches a plan of other tokens, of the wrong axes, and one beyond what a single merge can reach."""
    x = torch.randn(2, 64, 4, generator=torch.Generator().manual_seed(0))
    assert TurboProcessor(0.5).plan_tokens(x, (8, 8)).num_slots == 32
    with pytest.raises(ValueError, match=r"tokens must be \(batch, tokens, channels\), got \(64, 4\)"):
        TurboProcessor(0.5).plan_tokens(x[0])
    for grid in [(8, 9), (8, 7), (64, 4)]:
        with pytest.raises(ValueError, match=f"a grid of {grid[0]} x {grid[1]} does not hold 64 tokens"):
            TurboProcessor(0.5).plan_tokens(x, grid)


def test_a_processor_in_one_layer_refuses_to_work():
    """Catches a processor that diffusers calls and that runs nothing."""
    with pytest.raises(TypeError, match=r"TurboProcessor is not set on a model but attached: .*attach\(model, Turbo"):
        TurboProcessor()(torch.nn.Linear(1, 1), torch.zeros(1, 1, 1))


def test_pipelines_take_methods():
    """Catches a package whose import teaches pipelines nothing."""
    assert callable(vars(DiffusionPipeline)["set_attn_processor"])
    assert callable(vars(DiffusionPipeline)["reset_attn_processor"])


@pytest.mark.parametrize(
    ("method", "fitting", "wrong"),
    [
        (EAdaPruneProcessor, [{"energy": 1.0}, {"energy": 0.01}, {"place": "decoder"}], [{"energy": 0.0}]),
        (EAdaPruneProcessor, [], [{"energy": 1.01}, {"place": "tower"}, {"place": "projector"}]),
        (FastVProcessor, [{"layer": 1}], [{"place": "pre_llm"}, {"layer": 0}]),
        (PyramidDropProcessor, [{"cuts": [1]}, {"cuts": [2, 5]}], [{"cuts": [0]}, {"cuts": [5, 2]}, {"cuts": [2, 2]}]),
        (PyramidDropProcessor, [], [{"place": "pre_llm"}, {"cuts": [0, 3]}]),
        (ResizeProcessor, [], [{"place": "pre_llm"}, {"place": "tower"}]),
        (VisionZipProcessor, [{"contextual": 0.0}, {"contextual": 1.0}, {"semantic": "self"}], [{"semantic": "none"}]),
        (VisionZipProcessor, [], [{"contextual": -0.1}, {"contextual": 1.1}]),
        (VScanProcessor, [{"local": 0.0, "late": 1.0}, {"local": 1.0, "late": 0.0}, {"cut": 1}], [{"cut": -1}]),
        (VScanProcessor, [{"semantic": "self"}], [{"semantic": "none"}, {"place": "decoder"}]),
        (VScanProcessor, [], [{"local": -0.1}, {"local": 1.1}, {"late": -0.1}, {"late": 1.1}]),
        (TurboVisionProcessor, [{"semantic": "none"}, {"semantic": "self"}], [{"semantic": "text"}]),
        (
            TurboVisionProcessor,
            [dict.fromkeys(("num_removed", "value_weight", "scale", "beta", "threshold", "num_merges"), 0)],
            [{"num_removed": -1}, {"value_weight": -0.1}, {"scale": -0.1}, {"beta": -0.1}],
        ),
        (TurboVisionProcessor, [{"gamma": -1, "alpha": -1.0}], [{"threshold": -1}, {"num_merges": -1}]),
        (TurboVisionProcessor, [{"beyond_half": "diverse"}], [{"beyond_half": "half"}]),
        (VisToGProcessor, [{"window": 1}, {"window": 31}], [{"window": 0}, {"window": 2}, {"window": 33}]),
        (VisToGProcessor, [{"num_refinements": 0}, {"num_refinements": 100}], [{"num_refinements": -1}]),
        (VisToGProcessor, [{"free": 0.0}, {"free": 0.99}], [{"num_refinements": 101}, {"free": -0.1}, {"free": 1.0}]),
        (TurboProcessor, [{"tile": 0}, {"tile": 2}, {"value_weight": 0.0}], [{"tile": 1}, {"tile": -1}]),
        (TurboProcessor, [{"semantic": "none"}, {"semantic": "text"}], [{"semantic": "class"}, {"value_weight": -0.1}]),
        (METHODS["random"], [{"seed": 2**31 - 1}, {"seed": 1 - 2**31}], [{"seed": 2**31}]),
    ],
)
def test_bounds_of_settings(method, fitting, wrong):
    """Catches a bound on the wrong side of what is allowed, and a setting whose bound is another's."""
    for settings in fitting:
        method(**settings)
    for settings in wrong:
        with pytest.raises(ValueError, match=next(iter(settings))):
            method(**settings)
