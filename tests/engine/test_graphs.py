"""CUDA graphs: one per kind of step, the same numbers, and nothing of a model that was changed since."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from stated import TurboProcessor
from torch import Tensor, nn

from gen_turbo import IdentityProcessor, attach, report
from gen_turbo.engine.graphs import Graphs, GraphsWarning
from gen_turbo.methods.random import RandomProcessor
from gen_turbo.models.unet import UNetAdapter
from tests.engine.cuda import StandIn, stand_in
from tests.engine.families import family
from tests.engine.pipelines import made
from tests.schedules import blocks_of, by_hand, par
from tests.tiny_hosts import run_unet, sd15_unet, unet_inputs

TIMES = tuple(range(900, 100, -100))
MOST = {"skipping": 6}
"""Graphs of a guidance branch, where there may be more than four."""


class Waiting(TurboProcessor):
    """Asks the device for a number whenever it makes a map."""

    def plan(self, tokens, site, frame):
        tokens.sum().item()
        return super().plan(tokens, site, frame)


def skipping(model: nn.Module, **settings: Any) -> Any:
    """A schedule by hand, with merging."""
    skips = {blocks_of(model)[0]: [2, 3, 5], "output": [6]}
    reducer = par(model, {"output": [2]}, inner="turbo", **settings)
    reducer.schedule = by_hand(model, skips, tuple(map(float, TIMES)))
    return reducer


KINDS: dict[str, Callable[[nn.Module], Any]] = {
    "identity": lambda model: IdentityProcessor(0.4),
    "residual": lambda model: TurboProcessor(0.4),
    "copied": lambda model: TurboProcessor(0.4, restore="copy"),
    "keys alone": lambda model: TurboProcessor(0.4, kv_only=True),
    "size-weighted": lambda model: TurboProcessor(0.4, proportional_attention=True, restore="copy"),
    "block": lambda model: TurboProcessor(0.4, scope="block"),
    "span": lambda model: TurboProcessor(0.4, scope="block", merge_span=0, restore="copy"),
    "skipping": skipping,
}
CASES = [
    *(("sd15", kind) for kind in ("residual", "copied", "skipping", "identity")),
    *(("sd3", kind) for kind in ("residual", "span", "skipping")),
    ("flux", "size-weighted"),
    *(("wan", kind) for kind in ("copied", "keys alone")),
    ("pixart-sigma", "block"),
]


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """The CPU in the place of a GPU."""
    return stand_in(monkeypatch)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_one_capture_for_each_kind_of_step(name, kind, cuda):
    """Catches a capture per step or per run, numbers of the host that are replayed for ever, and memory that moves."""
    model, run = family(name)
    reducer = KINDS[kind](model)
    with attach(model, reducer, graphs=False):
        expected = run(times=TIMES)
    with attach(model, reducer, graphs=True), torch.no_grad():
        seen = []
        for _ in range(3):
            assert torch.equal(run(times=TIMES), expected)
            seen.append(cuda.since())
        told = report(model)
    num_forecast = told.skipped.get("output", (0, 0))[0] // 3
    assert 0 < seen[0][0] + seen[1][0] <= MOST.get(kind, 4) and seen[2] == (0, len(TIMES) - num_forecast)
    assert len(cuda.pools) == 1 and told.graphs == "captured"


@pytest.mark.parametrize("name", ["unet", "wan"])
def test_a_pipeline_draws_the_same(name, cuda):
    """Catches graphs that are not found again in the next image, and branches of guidance on one another's memory."""
    pipe, draw = made(name)
    with attach(pipe, TurboProcessor(0.4), graphs=False):
        expected = draw(7)
    with attach(pipe, TurboProcessor(0.4), graphs="auto"):
        assert all(torch.equal(draw(7), expected) for _ in range(2))
        cuda.since()
        assert torch.equal(draw(7), expected)
        assert cuda.since() == (0, 7 * (1 + (name == "wan")))
        assert report(pipe).graphs.startswith("captured")


@torch.no_grad()
def run_with(unet: nn.Module, time_of: Callable[[int], Any]) -> Tensor:
    """Calls a UNet at times of some type."""
    inputs = unet_inputs()
    sample = inputs.pop("sample")
    return torch.stack([unet(sample, time_of(time), **inputs).sample for time in TIMES])


@pytest.mark.parametrize("time_of", [int, float])
def test_times_that_are_numbers_make_no_graph_for_each_step(time_of, cuda):
    """Catches a number that is baked into a graph, and one that is told from others by its value."""
    unet = sd15_unet()
    with attach(unet, TurboProcessor(0.4), graphs=False):
        expected = run_with(unet, time_of)
    with attach(unet, TurboProcessor(0.4), graphs=True):
        assert torch.equal(run_with(unet, time_of), expected)
        assert cuda.since()[0] <= 4
        assert torch.equal(run_with(unet, time_of), expected)


@pytest.mark.parametrize("order", ["ABA", "ABB"])
def test_every_size_has_graphs_of_its_own(order, cuda):
    """Catches a graph of another size, and one size whose graphs are lost for another one's."""
    pipe, draw = made("unet")
    sizes = {"A": {}, "B": {"height": 24, "width": 32}}
    with attach(pipe, TurboProcessor(0.4), graphs=False):
        expected = {name: draw(5, **size) for name, size in sizes.items()}
    with attach(pipe, TurboProcessor(0.4), graphs=True):
        captured: dict[str, int] = {}
        for name in order:
            assert torch.equal(draw(5, **sizes[name]), expected[name])
            captured[name] = captured.get(name, 0) + cuda.since()[0]
    assert all(0 < number <= 4 for number in captured.values())


def test_graphs_outlive_the_text_of_a_run(cuda):
    """Catches graphs that are lost because a run's text dies where gradients may be recorded again."""
    unet = sd15_unet()
    with attach(unet, TurboProcessor(0.4), graphs=True):
        for _ in range(3):
            cuda.since()
            run_unet(unet, TIMES, **unet_inputs())
        assert cuda.since() == (0, len(TIMES))


@pytest.mark.parametrize("mode", [True, "auto"])
def test_runs_of_few_steps_are_captured_too(mode, cuda):
    """Catches models of four steps that never come to their graphs, for no kind of step comes twice or thrice."""
    model, run = family("pixart-sigma")
    with attach(model, TurboProcessor(0.4, warmup_steps=1, full_every=2), graphs=mode):
        for _ in range(6):
            run(times=TIMES[:3])
    assert cuda.num_replayed > 0


def test_detaching_frees_all_graphs(cuda):
    """Catches graphs, and the memory that they hold, which outlive the attachment."""
    unet, inputs = sd15_unet(), unet_inputs()
    stock = run_unet(unet, TIMES, **inputs)
    with attach(unet, TurboProcessor(0.4), graphs=True):
        for _ in range(2):
            run_unet(unet, TIMES, **inputs)
        assert len(cuda.alive) >= 2
    gc.collect()
    assert not cuda.alive and torch.equal(run_unet(unet, TIMES, **inputs), stock)
    with attach(unet, TurboProcessor(0.4), graphs=True):
        run_unet(unet, TIMES, **inputs)
        assert 2 <= len(cuda.alive) <= 4


@pytest.mark.parametrize("mode", [True, "auto"])
def test_what_cannot_be_captured_runs_and_says_so_once(mode, cuda):
    """Catches an exception in place of an image, a warning in every step, and silence where graphs were asked for."""
    model, run = family("pixart-sigma")
    reducer = Waiting(0.4, restore="copy")
    with attach(model, reducer, graphs=False):
        expected = run(times=TIMES)
    with attach(model, reducer, graphs=mode), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert all(torch.equal(run(times=TIMES), expected) for _ in range(2))
        assert "cannot be captured" in report(model).graphs and cuda.num_captured == 0
    assert [one.category for one in caught] == [GraphsWarning] * (mode is True)


@pytest.mark.parametrize("restore", ["copy", "residual"])
def test_the_random_control_is_not_captured(restore, cuda):
    """Catches one draw replayed in every step, by which the control would be another one with graphs."""
    model, run = family("pixart-sigma")
    reducer = RandomProcessor(0.4, restore=restore)
    with attach(model, reducer, graphs=False):
        expected = run(times=TIMES)
    with attach(model, reducer, graphs="auto"):
        assert all(torch.equal(run(times=TIMES), expected) for _ in range(3))
        assert "cannot be captured" in report(model).graphs


@pytest.mark.parametrize(("replay", "is_kept"), [(1.0, True), (9.9, False), (20.0, False)])
def test_auto_keeps_what_gains(replay, is_kept, cuda):
    """Catches graphs that are kept though they gain nothing, and given up though they do."""
    cuda.replay = replay
    model, run = family("pixart-sigma")
    with attach(model, TurboProcessor(0.4), graphs="auto"):
        for _ in range(2):
            run(times=TIMES)
        cuda.since()
        run(times=TIMES)
        assert (cuda.since()[1] > 0) == is_kept
        assert ("gain nothing" in report(model).graphs) != is_kept
    gc.collect()
    assert not cuda.alive


def test_a_kind_of_step_that_gains_nothing_leaves_the_others_their_graphs(cuda):
    """Catches reduced steps that are launched by the host because full ones are as fast without a graph."""
    sizes = set()

    def cost(num_operators: int) -> float:
        sizes.add(num_operators)
        return 20.0 if num_operators > min(sizes) else 1.0

    cuda.replay = cost
    model, run = family("pixart-sigma")
    times = tuple(range(900, 100, -20))
    with attach(model, TurboProcessor(0.4), graphs="auto"):
        for _ in range(3):
            run(times=times)
        assert len(sizes) > 1 and report(model).graphs == "captured: 1.0 ms a step instead of 10.0"
        cuda.since()
        run(times=times)
        assert cuda.since() == (0, len(times))


def test_compiled_blocks_keep_their_buffers_without_graphs(cuda):
    """Catches buffers that are given up with the graphs: the first step of every later run would run twice."""
    cuda.replay = 20.0
    model, run = family("pixart-sigma")
    for block in model.transformer_blocks:
        # Where a compiled call stands; PyTorch does not compile while the stand-in records.
        block._compiled_call_impl = block._call_impl
    calls = []
    model.proj_out.register_forward_hook(lambda *given: calls.append(given))
    with attach(model, TurboProcessor(0.4, restore="copy", match_every=0), graphs="auto"):
        expected = [run(times=TIMES) for _ in range(2)][0]
        assert "gain nothing" in report(model).graphs
        run(times=TIMES)
        calls.clear()
        assert torch.equal(run(times=TIMES), expected) and len(calls) == len(TIMES)


class Scaled(nn.Module):
    """A model with another number among its arguments."""

    def forward(self, sample: Tensor, scale: float, timestep: float) -> Tensor:
        """A call."""
        return scale * sample + timestep


@pytest.mark.parametrize("time", [1, 2.0])
def test_the_time_alone_becomes_a_tensor(time):
    """Catches every argument that is the same number made a tensor with the time."""
    graphs = Graphs(Scaled(), UNetAdapter().read, True)
    sample = torch.zeros(1)
    for args, kwargs in [((sample, time, time), {}), ((sample,), {"scale": time, "timestep": time})]:
        given = dict(zip(("sample", "scale", "timestep"), graphs._with_time(args, kwargs)[0], strict=False))
        given |= graphs._with_time(args, kwargs)[1]
        assert given["scale"] is time and given["timestep"].item() == time


def test_a_kind_runs_once_before_it_is_captured(cuda):
    """Catches a capture in which libraries are loaded and kernels are compiled, which CUDA forbids."""
    model, run = family("pixart-sigma")
    with attach(model, IdentityProcessor(0.4), graphs=True):
        run(times=TIMES[:1])
        assert cuda.since() == (0, 0)


def test_auto_measures_the_identity(cuda):
    """Catches a stock model whose graphs were never compared with its eager calls."""
    cuda.replay = 20.0
    model, run = family("pixart-sigma")
    with attach(model, IdentityProcessor(0.4), graphs="auto"):
        run(times=TIMES)
        assert "gain nothing" in report(model).graphs
