"""CUDA graphs beside the rest: runs that were stopped, schedules that look back, a CPU, and a real GPU."""

from __future__ import annotations

import warnings

import pytest
import torch
from stated import TurboProcessor
from torch.utils.flop_counter import FlopCounterMode

from gen_turbo import IdentityProcessor, attach, report
from gen_turbo.engine import settling
from gen_turbo.engine.costs.devices import CLASSES
from gen_turbo.engine.graphs import GraphsWarning
from tests import tiny_transformers
from tests.engine.cuda import StandIn, stand_in
from tests.engine.families import family
from tests.engine.pipelines import made
from tests.engine.test_graphs import TIMES, skipping
from tests.tiny_hosts import run_unet, sd15_unet, unet_inputs


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """The CPU in the place of a GPU."""
    return stand_in(monkeypatch)


class Stop(Exception):
    """The user has seen enough."""


def _stop(pipe, step, time, kwargs):
    if step == 3:
        raise Stop
    return kwargs


@pytest.mark.parametrize("settings", [{}, {"restore": "copy"}])
def test_a_stopped_run_leaves_nothing_in_the_buffers(settings, cuda):
    """Catches buffers that the next run takes over with the residuals, slopes and maps of the one that was stopped."""
    pipe, draw = made("unet")
    with attach(pipe, TurboProcessor(0.4, **settings), graphs=False):
        expected = draw(7)
    with attach(pipe, TurboProcessor(0.4, **settings), graphs=True):
        for _ in range(2):
            draw(7, seed=1)
            with pytest.raises(Stop):
                draw(7, seed=2, callback_on_step_end=_stop)
            assert torch.equal(draw(7), expected)
        assert cuda.num_replayed > 20


def test_what_graphs_read_is_counted(cuda):
    """Catches residuals that the report does not know of from the second image on."""
    pipe, draw = made("unet")
    seen = []

    def look(pipe, step, time, kwargs):
        seen.append(report(pipe).remembered_bytes)
        return kwargs

    with attach(pipe, TurboProcessor(0.4), graphs=True):
        for _ in range(2):
            draw(7, callback_on_step_end=look)
    assert seen[:6] == seen[7:13] and seen[4] > 0


@pytest.mark.parametrize(("name", "threshold"), [("sd3", None), ("sd3", 0.5)])
def test_a_schedule_decides_alike_in_every_run(name, threshold, cuda):
    """Catches errors of forecasts that are remembered from one run to the next."""
    model, run = family(name)
    reducer = skipping(model, threshold=threshold)
    with attach(model, reducer, graphs=False):
        expected = run(times=TIMES)
    with warnings.catch_warnings(), attach(model, reducer, graphs=True):
        warnings.simplefilter("ignore", GraphsWarning)
        assert all(torch.equal(run(times=TIMES), expected) for _ in range(3))


def test_runs_that_merge_nothing_share_a_graph(cuda, monkeypatch):
    """Catches a graph that is captured anew in every run, and one in a pool that has died with its graphs."""
    monkeypatch.setattr(settling, "device_class", lambda device: CLASSES["h200"])
    pipe, draw = made("unet")
    with attach(pipe, TurboProcessor(0.4, scope="auto"), graphs="auto"):
        for _ in range(3):
            draw(12)
        found = report(pipe)
        assert cuda.num_captured == 1 and cuda.num_replayed == 3 * 12 - 2
        assert found.graphs.startswith("captured") and not any(layer.num_reduced for layer in found.layers)


def test_flops_are_counted_in_full(cuda):
    """Catches a count of the calls before the capture alone, for a replay shows a counter nothing."""
    pipe, draw = made("unet")
    counts = []
    for graphs in (False, True):
        with attach(pipe, IdentityProcessor(0.4), graphs=graphs), warnings.catch_warnings():
            warnings.simplefilter("ignore", GraphsWarning)
            draw(4)
            assert (cuda.since()[1] > 0) == graphs
            with FlopCounterMode(display=False) as counter:
                draw(4)
            counts.append(counter.get_total_flops())
            assert cuda.since() == (0, 0)
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize(("mode", "told"), [(True, "cpu, which has no CUDA graphs"), ("auto", "cpu"), (False, "")])
def test_on_a_cpu_nothing_is_captured(mode, told):
    """Catches graphs that are looked for where there are none, in silence or with a warning that nobody asked for."""
    unet, inputs = sd15_unet(), unet_inputs()
    with attach(unet, TurboProcessor(0.4), graphs=False):
        expected = run_unet(unet, TIMES, **inputs)
    with attach(unet, TurboProcessor(0.4), graphs=mode), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert all(torch.equal(run_unet(unet, TIMES, **inputs), expected) for _ in range(2))
        text = str(report(unet))
    assert [one.category for one in caught] == [GraphsWarning] * (mode is True)
    assert told in text and ("CUDA graphs" in text) == bool(told)


def test_gradients_are_never_captured(cuda):
    """Catches a replay, through which no gradient goes."""
    unet, inputs = sd15_unet(), unet_inputs()
    sample = inputs.pop("sample").requires_grad_()
    with attach(unet, TurboProcessor(0.4), graphs="auto"):
        for time in TIMES:
            unet(sample, torch.tensor(time), **inputs).sample.square().mean().backward()
        assert sample.grad is not None and cuda.num_captured == 0 and "gradients" in report(unet).graphs


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3", "flux", "pixart-sigma", "wan"])
@pytest.mark.parametrize(
    "reducer",
    [
        IdentityProcessor(0.4),
        TurboProcessor(0.4),
        TurboProcessor(0.4, restore="copy"),
        TurboProcessor(0.4, scope="block"),
        TurboProcessor(0.4, proportional_attention=True, restore="copy"),
    ],
    ids=["identity", "residual", "copied", "block", "size-weighted"],
)
def test_a_replay_on_a_gpu_is_bit_identical(name, reducer):
    """Catches whatever a capture bakes in that the stand-in does not show."""
    model, run = family(name)
    torch.set_default_device("cuda")
    try:
        model.to("cuda")
        with attach(model, reducer, graphs=False):
            expected = on_gpu(name, model)
        with attach(model, reducer, graphs=True):
            assert all(torch.equal(on_gpu(name, model), expected) for _ in range(3))
            assert report(model).graphs == "captured"
    finally:
        torch.set_default_device("cpu")


NEWER = (
    "flux2",
    "longcat-image",
    "ovis-image",
    "hunyuan-image",
    "hidream",
    "qwen-image-2.1",
    "wan-ti2v",
    "wan-vace",
    "wan-animate",
    "chrono-edit",
    "skyreels-v2",
    "skyreels-v2-forcing",
    "hunyuan-video-1.5",
    "kandinsky5",
    "ltx2",
    "ltx2-split",
)
NOT_CAPTURED = {
    "hidream": "this model cannot be captured",
    "hunyuan-video-1.5": "this model cannot be captured",
    "qwen-image-2.1": "its calls hand on an object",
    "kandinsky5": "this model cannot be captured",
    "ltx2": "this model cannot be captured",
    "ltx2-split": "this model cannot be captured",
}
"""Models that count experts or words on the host, whose prefix is in an object, or that copy numbers to the device."""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", NEWER)
def test_newer_models_are_captured_on_a_gpu_or_say_why_not(name):
    """Catches numbers that a call copies to the device, and a failed capture that leaves the device unusable."""
    model, _ = family(name)
    torch.set_default_device("cuda")
    try:
        model.to("cuda")
        for settings in ({}, {"scope": "block", "restore": "copy"}):
            reducer = TurboProcessor(0.4, **settings)
            with attach(model, reducer, graphs=False):
                expected = on_gpu(name, model)
            with warnings.catch_warnings(), attach(model, reducer, graphs=True):
                warnings.simplefilter("ignore", GraphsWarning)
                assert all(torch.equal(on_gpu(name, model), expected) for _ in range(3))
                assert report(model).graphs.startswith(NOT_CAPTURED.get(name, "captured"))
    finally:
        torch.set_default_device("cpu")


@torch.no_grad()
def on_gpu(name: str, model: torch.nn.Module) -> torch.Tensor:
    """A run whose inputs are made on the CPU, the same on every device."""
    outputs = []
    if name in ("sd15", "sdxl"):
        with torch.device("cpu"):
            inputs = _moved(unet_inputs())
        sample = inputs.pop("sample")
        for time in TIMES:
            outputs.append(model(sample, torch.tensor(time, device="cuda"), **inputs).sample)
        return torch.stack(outputs)
    kind = tiny_transformers.FAMILIES[name]
    with torch.device("cpu"):
        inputs, latents = _moved(kind.inputs(2, (8, 8))), _moved(tiny_transformers.random(2, *kind.latents((8, 8))))
        times = [_moved(kind.time(time, 2)) for time in TIMES]
    if kind.first:
        model(hidden_states=latents, **inputs, **kind.first, **times[0])
    for time in times[bool(kind.first) :]:
        outputs.append(model(hidden_states=latents, **inputs, **kind.then, **time, return_dict=False)[0])
    return torch.stack(outputs)


def _moved(given):
    if isinstance(given, dict):
        return {key: _moved(value) for key, value in given.items()}
    if isinstance(given, tuple | list):
        return type(given)(map(_moved, given))
    return given.to("cuda") if isinstance(given, torch.Tensor) else given
