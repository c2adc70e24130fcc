"""CUDA graphs beside the rest: runs that were stopped, schedules that look back, a CPU, and a real GPU."""

from __future__ import annotations

import gc
import warnings

import pytest
import torch
from stated import TurboProcessor
from torch.utils.flop_counter import FlopCounterMode

from gen_turbo import IdentityProcessor, attach, report
from gen_turbo.engine import settling
from gen_turbo.engine.costs.devices import CLASSES
from gen_turbo.engine.graphs import GraphsWarning
from tests import tiny_pipelines, tiny_transformers
from tests.engine.cuda import StandIn, stand_in
from tests.engine.families import family
from tests.engine.pipelines import made
from tests.engine.test_graphs import TIMES, skipping
from tests.tiny_hosts import run_unet, sd15_unet, unet_inputs
from tests.tiny_images import hunyuan_image


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


def _text(num_words: int, seed: int, num_tokens: int = 16) -> torch.Tensor:
    """A text of some words and of padding that repeats."""
    words = tiny_transformers.random(1, num_words, 32, seed=seed)
    padding = tiny_transformers.random(1, 1, 32, seed=seed + 9)
    return torch.cat([words, padding.expand(1, num_tokens - num_words, 32)], 1)


def _drawn(pipe: object, call: dict[str, object], text: torch.Tensor) -> torch.Tensor:
    texts = {"prompt_embeds": text.clone(), "negative_prompt_embeds": _text(1, 3, text.shape[1])}
    return tiny_pipelines.latents_of(pipe, call | texts, len(TIMES))


@pytest.mark.parametrize(
    ("settings", "texts"),
    [
        ({"text_ratio": 0.4}, [_text(5, seed, 5) for seed in (1, 5, 7, 1)]),
        ({}, [_text(3, seed) for seed in (1, 5, 7, 1)]),
    ],
    ids=["ratio", "what repeats"],
)
def test_runs_with_merged_text_share_graphs(settings, texts, cuda):
    """Catches graphs that are captured anew for every prompt, and those that weigh one prompt as another was merged."""
    pipe, call = tiny_pipelines.sd3()
    pipe.set_progress_bar_config(disable=True)
    reducer = TurboProcessor(0.4, **settings)
    with attach(pipe, reducer, graphs=False):
        expected = [_drawn(pipe, call, text) for text in texts]
    with attach(pipe, reducer, graphs=True) as attachment:
        captured = []
        for text, wanted in zip(texts, expected, strict=True):
            assert torch.equal(_drawn(pipe, call, text), wanted)
            captured.append(cuda.since())
        before, after = attachment.parts[0].text_tokens
        assert before > after
    assert 0 < captured[0][0] + captured[1][0] <= 4 and captured[2:] == [(0, len(TIMES))] * 2


def test_prompts_of_about_one_length_share_graphs(cuda):
    """Catches a graph for every number of words, and tokens that stay for that and change the result."""
    pipe, call = tiny_pipelines.sd3()
    pipe.set_progress_bar_config(disable=True)
    texts = [_text(num_words, num_words) for num_words in (3, 5, 4, 6)]
    with attach(pipe, TurboProcessor(0.4, text_ratio=0.0), graphs=False):
        unmerged = [_drawn(pipe, call, text) for text in texts]
    with attach(pipe, TurboProcessor(0.4), graphs=True) as attachment:
        captured = []
        for text, wanted in zip(texts, unmerged, strict=True):
            torch.testing.assert_close(_drawn(pipe, call, text), wanted, rtol=1e-4, atol=1e-4)
            assert attachment.parts[0].text_tokens == (16, 8)
            captured.append(cuda.since())
    assert captured[2:] == [(0, len(TIMES))] * 2


def test_rows_that_a_mask_counts_are_not_captured(cuda):
    """Catches a stand-in on which masks of one prompt choose the tokens of the next: a GPU refuses such a capture."""
    torch.manual_seed(0)
    model, texts = (
        hunyuan_image(text_embed_2_dim=16).eval(),
        {"encoder_hidden_states": tiny_transformers.random(2, 6, 32)},
    )
    texts |= {"encoder_hidden_states_2": tiny_transformers.random(2, 4, 16), "encoder_attention_mask": torch.ones(2, 6)}
    texts |= {"encoder_attention_mask_2": torch.ones(2, 4)}
    with attach(model, TurboProcessor(0.4, restore="copy"), graphs="auto"), torch.no_grad():
        for time in TIMES:
            model(tiny_transformers.random(2, 4, 16, 16), torch.full((2,), float(time)), **texts)
        assert cuda.num_captured == 0 and "cannot be captured" in report(model).graphs


def test_graphs_of_another_length_of_text_go(cuda):
    """Catches buffers and graphs of every length of prompt, held at once, and a pool that has died with its graphs."""
    pipe, call = tiny_pipelines.sd3()
    pipe.set_progress_bar_config(disable=True)
    with attach(pipe, TurboProcessor(0.4), graphs=True):
        alive = []
        for num_words in (3, 12, 20):
            _drawn(pipe, call, _text(num_words, 1, 48))
            assert cuda.since()[1] >= len(TIMES) // 2 and report(pipe).graphs == "captured"
            gc.collect()
            alive.append(len(cuda.alive))
    assert len(cuda.pools) == 3 and len(set(alive)) == 1


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
