"""What a refusal advises works: on every family of denoisers, of settings that not every model has."""

from __future__ import annotations

import re

import pytest

from gen_turbo import PARProcessor, TurboProcessor, attach, report
from gen_turbo.methods.turbo_vit import TurboVisionProcessor
from gen_turbo.methods.visionzip import VisionZipProcessor
from tests.engine.families import NAMES, family
from tests.snapshots import differences, model_state

SETTINGS = (
    *({"scope": scope, "restore": "copy"} for scope in ("attention", "block", "model", "auto")),
    *({"scope": "block", "merge_span": length} for length in (0, 2)),
    {"text_ratio": 0.3},
    {"reference_ratio": 0.3},
    {"keep": 32},
    {"ratios": {1: 0.3, 2: 0.3}},
    {"layer_ratios": {"blocks.*": 0.2}},
    {"scope": "block", "text_ratio": 0.3},
)


def _advised(settings, model, said):
    """The settings as a refusal would have them; fails where it says nothing that could be done."""
    name = type(model).__name__
    scope, levels = re.search(r"use scope='(\w+)'", said), re.search(r"attention at (\[.*\])", said)
    layers = re.search(r"no layer of \w+ that can be reduced; there are: ([\w.]+)", said)
    if scope:
        return settings | {"scope": scope[1], "merge_span": 1}
    if levels and name in said:
        return settings | {"ratios": {int(level): 0.3 for level in re.findall(r"\d+", levels[1])}}
    if layers and name in said:
        return settings | {"layer_ratios": {layers[1]: 0.2}}
    named = re.match(r"(\w+)=", said)
    assert named and name in said and re.search(r"leave it out$|use ratio$", said), said
    return {setting: value for setting, value in settings.items() if setting != named[1]}


@pytest.mark.parametrize("name", NAMES)
def test_what_a_refusal_advises_works(name):
    """Catches a setting that does not help, one that this model does not have either, and the name of another model."""
    model, _ = family(name)
    for settings in SETTINGS:
        # Of several that do not fit the first is refused.
        for _ in settings:
            try:
                attach(model, TurboProcessor(0.4, **settings)).detach()
                break
            except ValueError as error:
                settings = _advised(settings, model, str(error))
        attach(model, TurboProcessor(0.4, **settings)).detach()


@pytest.mark.parametrize("scope", ["block", "model"])
@pytest.mark.parametrize(
    ("method", "settings", "what"),
    [
        (VisionZipProcessor, {}, "VisionZipProcessor"),
        (TurboVisionProcessor, {"alpha": 2.0}, "alpha=2.0"),
        (TurboProcessor, {"value_weight": 0.05}, "value_weight=0.05"),
    ],
)
def test_what_reads_attention_is_refused_where_none_is_shown(method, settings, what, scope):
    """Catches an error in the first step, a setting that nobody reads, and a refusal where it would be read."""
    model, run = family("flux")
    before = model_state(model)
    with pytest.raises(ValueError, match=f"^{what} needs the attention of layers, which scope='{scope}' does not show"):
        attach(model, method(0.5, scope=scope, **settings))
    assert differences(before, model_state(model)) == []
    attach(model, method(0.0, scope=scope, **settings)).detach()
    with attach(model, method(0.5, scope="attention", **settings)):
        run()
        assert any(layer.num_reduced for layer in report(model).layers)
    attach(model, TurboProcessor(0.5, scope=scope, semantic="none")).detach()


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("full_every", 4),
        ("extrapolation_order", 0),
        ("warmup_steps", 1),
        ("stagger", True),
        ("memory_limit_mb", 1.0),
    ],
)
def test_what_copied_outputs_do_not_have_is_refused(setting, value):
    """Catches a setting of remembered detail that nobody reads, and PAR's own defaults taken for what a user set."""
    with pytest.raises(ValueError, match=f"{setting}={value} has no effect with restore='copy'; leave it out"):
        TurboProcessor(0.4, restore="copy", **{setting: value})
    TurboProcessor(0.4, restore="residual", **{setting: value})
    model, run = family("sd15")
    with pytest.raises(ValueError, match="no effect with restore='copy'"):
        attach(model, PARProcessor(budget=0.5, inner={"method": "turbo", "restore": "copy"}, **{setting: value}))
    for inner, restore in (({"method": "turbo", "restore": "copy"}, "residual"), ("turbo", "copy")):
        with attach(model, PARProcessor(budget=0.5, inner=inner, restore=restore)):
            run()


def test_blocks_of_one_span_run_in_full_together():
    """Catches full steps that are spread over the blocks of one span, in which some would read what others lack."""
    times = tuple(range(980, 20, -80))
    for name, settings, is_refused in (
        ("sd3", {"scope": "model"}, True),
        ("pixart-sigma", {"scope": "block", "merge_span": 0}, True),
        ("flux", {"scope": "block", "merge_span": 0}, False),
    ):
        model, run = family(name)
        staggered = TurboProcessor(0.4, stagger=True, full_every=3, **settings)
        if is_refused:
            with pytest.raises(ValueError, match="stagger=True spreads nothing where all blocks share one short seq"):
                attach(model, staggered)
            continue
        with attach(model, staggered) as attachment:
            run(times=times)
            counts = {(layer.num_full, layer.num_reduced) for layer in report(model).layers}
            assert all(reduced > 0 for _, reduced in counts) and attachment.layers
