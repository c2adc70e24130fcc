"""PAR's settings for denoisers: which schedule a budget takes, and what is refused."""

from dataclasses import replace

import pytest
import torch

from gen_turbo import PARProcessor, TurboProcessor, attach, load_pipeline
from gen_turbo.api import adapter_of, attachments
from gen_turbo.engine.gates import UnitMemory
from gen_turbo.methods import par
from gen_turbo.training.calibrate_denoiser import best_slope
from gen_turbo.training.schedule import WHOLE, Schedule
from gen_turbo.training.schedule_file import ScheduleFile, read, write
from gen_turbo.training.search import Search
from gen_turbo.training.stopwatch import timed
from tests import tiny_transformers
from tests.schedules import TIMES, by_hand
from tests.tiny_hosts import run_unet, sd15_unet, sdxl_unet, unet_inputs


def test_a_forecast_continues_the_line_by_its_slope():
    """Catches a slope over calls instead of over the distance between them."""
    older, newer = torch.tensor([1.0]), torch.tensor([3.0])
    memory = UnitMemory([torch.zeros(()), 0.0], [[newer], [older]])
    for weights, expected in (((2.5, -1.5), 6.0), ((1.75, -0.75), 4.5), ((1.0,), 3.0)):
        memory.weigh(weights)
        assert memory.forecast()[0].item() == expected
    numerator, denominator = best_slope(newer, older, torch.tensor([4.5]), (4, 2, 7))
    assert (numerator / denominator).item() == 0.5


def test_a_file_comes_back_as_it_was_written(tmp_path):
    """Catches a field that is written and not read."""
    unet = sd15_unet()
    file = by_hand(unet, {WHOLE: [2], "deep.1": [3]})
    merged = replace(file.schedules[0], inner={"method": "turbo", "scope": "block", "ratio": 0.5, "text_ratio": None})
    file = replace(file, schedules=(*file.schedules, merged))
    write(tmp_path / "s.yaml", file, "a test")
    again = read(tmp_path / "s.yaml")
    assert again.schedules == file.schedules and again.is_for(unet) and not again.is_for(sdxl_unet())


def test_the_best_schedule_within_the_budget_is_taken():
    """Catches a budget that takes a schedule that costs more, or the cheapest of those that fit."""
    levels = [
        Schedule(TIMES, {WHOLE: frozenset({2})}, cost=cost, psnr_db=psnr, inner=inner)
        for cost, psnr, inner in [(0.8, 70.0, None), (0.5, 50.0, None), (0.3, 40.0, None), (0.6, 60.0, "turbo")]
    ]
    file = ScheduleFile("UNet2DConditionModel", (), "DDIMScheduler", tuple(levels))
    assert file.at(0.7, is_merged=False).cost == 0.5
    assert file.at(0.7, is_merged=True).cost == 0.6
    with pytest.raises(ValueError, match=r"budget=0.2 is less than the cheapest schedule for 4 calls costs, 0.300"):
        file.at(0.2, is_merged=False)


def test_another_model_and_a_missing_file_are_refused():
    """Catches a schedule that is laid over weights that it was not measured on."""
    unet = sd15_unet()
    with pytest.raises(ValueError, match="calibrated for another model, a UNet2DConditionModel"):
        attach(sdxl_unet(), PARProcessor(schedule=by_hand(unet, {WHOLE: [2]})))
    with pytest.raises(ValueError, match=r"skips up_blocks.9, which UNet2DConditionModel does not have"):
        attach(unet, PARProcessor(schedule=by_hand(unet, {"up_blocks.9": [2]})))
    with pytest.raises(ValueError, match="cannot read the schedule nowhere.yaml"):
        attach(unet, PARProcessor(schedule="nowhere.yaml"))
    with pytest.raises(ValueError, match=r"output cannot be skipped at calls \[0\]"):
        by_hand(unet, {WHOLE: [0]})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"budget": 0.0}, "budget must be a share"),
        ({"budget": 1.5}, "budget must be a share"),
        ({"threshold": -1.0}, "threshold must not be negative"),
    ],
)
def test_wrong_settings_are_named(settings, words):
    """Catches a setting that is clipped in silence."""
    with pytest.raises(ValueError, match=words):
        PARProcessor(**settings)


def test_inner_methods():
    """Catches an inner method that loses the shared settings, and one that is PAR itself."""
    assert PARProcessor(0.4).reducer() == TurboProcessor(0.4, full_every=8, scope="attention", restore="residual")
    assert PARProcessor(inner=None).reducer() is None
    assert PARProcessor(inner={"method": "tome", "ratio": 0.2}).reducer().ratio == 0.2
    with pytest.raises(ValueError, match="inner must name a method that merges tokens; got 'par'"):
        PARProcessor(inner="par").reducer()


def test_the_search_takes_what_is_cheap_and_fills_the_budget():
    """Catches a search that ignores prices, that prices a skip after another as the first, or stops early."""

    def error(group: str, call: int, newer: int, older: int) -> float:
        return {"cheap": 1e-6, "dear": 1.0, WHOLE: 1e-2}[group] * (call - newer) ** 4

    search = Search(12, 1.0, {WHOLE: 1.0, "cheap": 0.3, "dear": 0.3}, {WHOLE: ["cheap", "dear"]}, error)
    light, heavy = search.run([0.8, 0.4])
    assert set(light) == {"cheap"} and len(light["cheap"]) >= 8
    assert search.cost() <= 0.4 and "dear" not in heavy and heavy[WHOLE]
    assert not heavy[WHOLE] & heavy["cheap"] and min(heavy[WHOLE]) >= 2
    gaps = sorted(heavy[WHOLE])
    assert not any({call, call + 1, call + 2, call + 3} <= set(gaps) for call in gaps)


def test_the_search_counts_what_merging_saves_already():
    """Catches a search that skips where merging alone fits the budget, or prices a merged block as the stock one."""

    def error(group: str, call: int, newer: int, older: int) -> float:
        return {"merged": 0.9e-2, "plain": 2e-2, WHOLE: 1.0}[group]

    shares = {WHOLE: 0.5, "merged": 0.1, "plain": 0.3}
    search = Search(10, 0.6, shares, {WHOLE: ["merged", "plain"]}, error)
    nothing, some = search.run([0.7, 0.5])
    assert nothing == {} and set(some) == {"plain"} and len(some["plain"]) == 4
    assert search.cost() == pytest.approx(0.48)


def test_seconds_of_units():
    """Catches hooks that stay, seconds of a unit that lack what idles with it, and parts longer than the whole."""
    model = sd15_unet()
    units = adapter_of(model).units(model)
    with timed(model, units) as seconds:
        run_unet(model, **unet_inputs())
    assert all(len(calls) == 4 for calls in seconds.values())
    assert all(
        0 < part <= whole for calls in seconds.values() for part, whole in zip(calls, seconds[WHOLE], strict=True)
    )
    assert sum(seconds["deep.1"]) > sum(seconds["deep.2"])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_schedule_ships_for_the_embedded_model():
    """Catches weights and schedule that no longer belong together, and a file that the package leaves out."""
    pipe = load_pipeline("tiny", processor=PARProcessor(budget=0.5))
    units = attachments(pipe)[0].skipped_units
    assert any(name.startswith("up_blocks.4.") for name in units)
    with pytest.raises(ValueError, match="is less than the cheapest schedule for 25 calls"):
        pipe.set_attn_processor(PARProcessor(budget=0.05))
    assert attachments(pipe)[0].skipped_units is units


def test_text_that_repeats_is_merged_under_a_budget():
    """Catches calls of PAR that pay for padding, text merged on a budget of 1, and `text_ratio=0` that nobody reads."""
    model, inputs = tiny_transformers.build("sd3"), tiny_transformers.FAMILIES["sd3"].inputs(1, (8, 8))
    words = tiny_transformers.random(1, 4, 32)
    inputs["encoder_hidden_states"] = torch.cat([words, torch.zeros(1, 12, 32)], 1)
    latents = tiny_transformers.random(1, *tiny_transformers.FAMILIES["sd3"].latents((8, 8)))

    def run() -> torch.Tensor:
        time = tiny_transformers.FAMILIES["sd3"].time(900, 1)
        with torch.no_grad():
            return model(hidden_states=latents, **inputs, **time, return_dict=False)[0]

    stock, texts = run(), []
    for settings in ({}, {"inner": None}, {"text_ratio": 0.0}, {"budget": 1.0}):
        with attach(model, PARProcessor(**settings)):
            is_equal = torch.equal(run(), stock)
            assert torch.allclose(run(), stock, atol=1e-5)
            texts.append((attachments(model)[0].text_tokens, is_equal))
    assert texts == [((16, 5), False)] * 2 + [((0, 0), True)] * 2


def test_one_attachment_merges_in_one_way(monkeypatch):
    """Catches a run that merges by the settings of another run's schedule, and schedules lost where one would do."""
    unet, made = sd15_unet(), {"method": "turbo", "scope": "block", "restore": "copy", "ratio": 0.4}
    short = by_hand(unet, {"output": [2]})
    (plain,) = short.schedules
    merging = [replace(plain, inner=inner, psnr_db=60.0) for inner in (made, "turbo")]
    files = [replace(short, schedules=(plain, one)) for one in merging]
    monkeypatch.setattr(par, "shipped", lambda model: files)
    processor = PARProcessor(budget=0.5)
    taken = processor._calibrated(unet)
    assert [schedule.inner for schedule in taken] == [made, None]
    reducer = processor.merging(unet)
    assert (reducer.scope, reducer.restore, reducer.ratio) == ("block", "copy", 0.4)
    # Whoever names what merges gets schedules that do not merge in a way of their own.
    assert [s.inner for s in PARProcessor(budget=0.5, inner="turbo")._calibrated(unet)] == [None, "turbo"]
    assert [s.inner for s in PARProcessor(budget=0.5, inner=None)._calibrated(unet)] == [None, None]
    # Where all of the other's schedules merge in another way, the rule is left for its runs.
    files[1] = replace(short, schedules=(merging[1],))
    assert [schedule.inner for schedule in processor._calibrated(unet)] == [made]
