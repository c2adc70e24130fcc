"""What PAR's settings mean: which schedules, which merging, which router and which layout."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from gen_turbo import PARProcessor, ToMeProcessor, TurboProcessor, VisToGProcessor
from gen_turbo.method import LayerInfo, StepInfo
from gen_turbo.methods import par
from gen_turbo.methods.identity import IdentityProcessor
from gen_turbo.training.choosers import RandomChooser, Trained, UniformChooser
from gen_turbo.training.generic import Generic
from gen_turbo.training.layouts import Layout
from gen_turbo.training.schedule import MERGING, WHOLE, Schedule
from gen_turbo.training.schedule_file import ScheduleFile, write
from gen_turbo.vlm.routes import Routing
from tests.schedules import TIMES, by_hand

MODEL = torch.nn.Linear(8, 8)
TEXT = SimpleNamespace(config=SimpleNamespace(num_hidden_layers=12))


def levels(*of: tuple[float, str | None]) -> ScheduleFile:
    """A file for MODEL with schedules of a cost and an inner method."""
    skips = {WHOLE: frozenset({2})}
    schedules = tuple(Schedule(TIMES, skips, cost=cost, psnr_db=100 * cost, inner=inner) for cost, inner in of)
    return replace(by_hand(MODEL, {WHOLE: [2]}), schedules=schedules)


def costs(processor: PARProcessor) -> list[float | str]:
    """The cost of each schedule, "generic" for the rule."""
    return ["generic" if isinstance(one, Generic) else one.cost for one in processor.schedules(MODEL)]


BOTH = levels((0.3, None), (0.4, "turbo"), (0.6, None), (0.7, "turbo"))


@pytest.mark.parametrize(
    ("budget", "inner", "expected"),
    [(0.5, "auto", 0.4), (0.5, None, 0.3), (0.5, "turbo", 0.4), (0.65, "auto", 0.6), (0.99, None, 0.6)],
)
def test_a_schedule_is_one_that_was_measured_as_it_will_run(budget, inner, expected):
    """Catches a schedule measured with merging for a run without it, the reverse, and the rule beside a given file."""
    assert costs(PARProcessor(budget=budget, schedule=BOTH, inner=inner)) == [expected]


def test_schedules_come_from_where_they_are_said_to(tmp_path, monkeypatch):
    """Catches a path that is not read, shipped files beside a given one, and the rule missing beside shipped ones."""
    write(tmp_path / "one.yaml", BOTH, "a test")
    assert costs(PARProcessor(schedule=str(tmp_path / "one.yaml"))) == [0.4]
    monkeypatch.setattr(par, "shipped", lambda model: [levels((0.9, None)), BOTH] if model is MODEL else [])
    assert costs(PARProcessor()) == [0.4, "generic"]
    assert costs(PARProcessor(budget=0.95)) == [0.9, 0.7, "generic"]
    assert costs(PARProcessor(schedule="generic")) == ["generic"]
    assert costs(PARProcessor(schedule=BOTH)) == [0.4]
    assert PARProcessor(budget=1.0).schedules(MODEL) == PARProcessor(budget=1.0, schedule=BOTH).schedules(MODEL) == []
    with pytest.raises(ValueError, match=r"budget=0.2 is less than the cheapest .*, 0.900"):
        PARProcessor(budget=0.2).schedules(MODEL)
    monkeypatch.setattr(par, "shipped", lambda model: [])
    assert costs(PARProcessor(budget=0.2)) == ["generic"]


def test_merging_runs_where_it_was_measured():
    """Catches tokens merged by "auto" under a schedule that was better without, and a merging that is switched off."""
    for inner, schedule, is_off in [
        ("auto", levels((0.4, None)), True),
        ("auto", levels((0.4, "turbo")), False),
        (None, levels((0.4, None)), False),
        ("turbo", levels((0.4, "turbo")), False),
    ]:
        [found] = PARProcessor(schedule=schedule, inner=inner).schedules(MODEL)
        assert (MERGING in found.skips) == is_off
    for inner, is_merged in [("auto", False), (None, True), ("turbo", True)]:
        [rule] = PARProcessor(budget=0.3, schedule="generic", inner=inner).schedules(MODEL)
        assert rule == Generic(0.3, is_merged=is_merged)


def test_what_merges_in_a_denoiser():
    """Catches "auto" that merges without a schedule for it, text forgotten, and anything merged on a whole budget."""
    plain, merged = levels((0.4, None)), levels((0.4, "turbo"))

    def merging(**settings):
        return PARProcessor(**settings).merging(MODEL)

    assert merging(budget=1.0, schedule=merged, text_ratio=0.5) == IdentityProcessor(0.0)
    assert merging(schedule=plain, text_ratio=0.5) == IdentityProcessor(0.0, text_ratio=0.5)
    assert merging(schedule="generic") == IdentityProcessor(0.0, text_ratio=None)
    assert merging(schedule=merged, inner=None, text_ratio=0.5) == IdentityProcessor(0.0, text_ratio=0.5)
    shared = {"full_every": 8, "scope": "attention", "restore": "residual"}
    assert merging(ratio=0.4, schedule=merged) == TurboProcessor(0.4, **shared)
    assert merging(ratio=0.4, schedule=plain, inner="tome") == ToMeProcessor(0.4, **shared, match_every=None)
    given = VisToGProcessor(0.2)
    assert merging(schedule=plain, inner=given) is given


def test_inner_methods_say_what_they_reach_and_plan():
    """Catches a reach that is not the inner method's, and a plan of another one."""
    assert PARProcessor(inner=None).max_ratio == PARProcessor(inner="vistog").max_ratio == 1.0
    assert PARProcessor().max_ratio == PARProcessor(inner={"method": "tome"}).max_ratio == 0.75
    x = torch.randn(2, 64, 4, generator=torch.Generator().manual_seed(0))
    site, frame = LayerInfo("here", 0.5, (8, 8)), StepInfo()
    nothing = PARProcessor(inner=None).plan(x, site, frame)
    assert nothing.is_identity and nothing.slot_BN.shape == (1, 64)
    for inner, alike in [("auto", TurboProcessor(0.5)), ("vistog", VisToGProcessor(0.5))]:
        assert torch.equal(PARProcessor(inner=inner).plan(x, site, frame).slot_BN, alike.plan(x, site, frame).slot_BN)


@pytest.mark.parametrize("inner", ["par", "nothing", {"ratio": 0.2}])
def test_an_inner_method_that_there_is_not(inner):
    """Catches PAR inside of PAR, and a list of names with one that would be refused."""
    with pytest.raises(ValueError, match="inner must name a method that merges tokens; got .*, known: .*tome") as told:
        PARProcessor(inner=inner).reducer()
    assert ", par," not in str(told.value) and "identity, pool" in str(told.value)


def test_schedules_of_others_are_refused():
    """Catches merging by Turbo on a schedule that was measured with another method, and one of another model."""
    with pytest.raises(ValueError, match="measured with tokens merged by 'tome'; name it as inner"):
        PARProcessor(schedule=levels((0.4, "tome"))).schedules(MODEL)
    assert costs(PARProcessor(schedule=levels((0.4, "tome")), inner="tome")) == [0.4]
    with pytest.raises(ValueError, match="calibrated for another model, a Linear; calibrate one for this ReLU"):
        PARProcessor(schedule=BOTH).schedules(torch.nn.ReLU())


@pytest.mark.parametrize("name", ["uniform", "random"])
def test_controls_are_routed_as_told(name):
    """Catches a share of tokens for what is dropped, layers of another count, and one control for the other."""
    made = {"uniform": UniformChooser, "random": RandomChooser}[name]
    for settings, expected in [
        ({"tokens": 0.25}, (0.75, 12, 2, "drop")),
        ({"layers": 5}, (0.0, 5, 2, "drop")),
        ({"tokens": 0.25, "layers": 5, "first": 0, "mode": "mask"}, (0.75, 5, 0, "mask")),
        ({"budget": 1.0}, (0.0, 12, 2, "drop")),
        ({"budget": 1.0, "tokens": 0.25}, (0.75, 12, 2, "drop")),
    ]:
        found = PARProcessor(router=name, **settings).routing(MODEL, TEXT)
        assert type(found.chooser) is made and found.chooser._num_layers == 12
        assert (found.ratio, found.num_layers, found.first, found.mode) == expected
    with pytest.raises(ValueError, match=f"router='{name}' has no calibration; give tokens and layers"):
        PARProcessor(router=name).routing(MODEL, TEXT)


def test_routers_are_routed_as_told(monkeypatch):
    """Catches a calibrated layout where one is given, and a router asked for where everything is kept."""
    asked = []

    def router_for(model, text, name):
        asked.append((model, text, name))
        router = SimpleNamespace(eval=lambda: "trained")
        return SimpleNamespace(router=router, layout_at=lambda budget, text: Layout(0.4 * budget, 7, 1))

    monkeypatch.setattr(par, "router_for", router_for)

    def routing(**settings):
        found = PARProcessor(**settings).routing(MODEL, TEXT)
        assert type(found.chooser) is Trained and found.chooser.router == "trained"
        return replace(found, chooser=None)

    assert routing() == Routing(None, 1 - 0.2, 7, 1, "drop")
    assert routing(budget=0.25, mode="mask", first=9, router="a") == Routing(None, 1 - 0.1, 7, 1, "mask")
    assert routing(tokens=0.5) == routing(tokens=0.5, budget=1.0) == Routing(None, 0.5, 12, 2, "drop")
    assert routing(layers=3, first=1) == Routing(None, 0.0, 3, 1, "drop")
    assert asked == [(MODEL, TEXT, name) for name in (None, "a", None, None, None)]
    whole = PARProcessor(budget=1.0, router="a").routing(MODEL, TEXT)
    assert type(whole.chooser) is type(PARProcessor(budget=1.0).routing(MODEL, TEXT).chooser) is UniformChooser
    assert (whole.ratio, whole.num_layers) == (0.0, 12) and len(asked) == 5


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"budget": 0.0}, "budget must be a share of the stock model's cost"),
        ({"budget": 1.01}, "budget must be a share of the stock model's cost"),
        ({"tokens": 0.0}, "tokens must be the share of image tokens kept"),
        ({"tokens": 1.01}, "tokens must be the share of image tokens kept"),
        ({"mode": "soft"}, "mode must be 'drop' or 'mask'; got 'soft'"),
        ({"threshold": -0.01}, "threshold must not be negative; got -0.01"),
    ],
)
def test_bounds_of_settings(settings, words):
    """Catches a bound on the wrong side of what is allowed."""
    with pytest.raises(ValueError, match=words):
        PARProcessor(**settings)
    PARProcessor(budget=1.0, tokens=1.0, threshold=0.0, mode="mask"), PARProcessor(budget=0.01, tokens=0.01)
