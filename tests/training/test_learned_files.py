"""Learned files that do not fit are refused in a sentence at attach, before anything of their size is made."""

from __future__ import annotations

import json
import resource
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from gen_turbo import PARProcessor, TurboProcessor, attach, detach, load_pipeline, report
from gen_turbo.commands import cli
from gen_turbo.methods.turbo import TurboProcessor as Turbo
from gen_turbo.methods.vistog_vit import VisToGVisionProcessor
from gen_turbo.training.schedule import Schedule
from gen_turbo.training.schedule_file import read
from gen_turbo.training.train_router import RouterTraining
from gen_turbo.training.vistog_training import VisToGTraining
from tests.schedules import by_hand
from tests.snapshots import differences, model_state

ROOT = Path(__file__).parents[2]
LEARNED = ROOT / "pipelines" / "weights" / "learned"
KINDS = {
    "par": (LEARNED / "par" / "tiny-vlm.safetensors", lambda file: PARProcessor(budget=0.5, router=str(file))),
    "vistog": (LEARNED / "vistog" / "tiny-vlm-64.safetensors", lambda file: VisToGVisionProcessor(weights=str(file))),
}


@pytest.fixture(scope="module")
def pipe():
    """The embedded vision-language model, stock."""
    return load_pipeline("caption", processor=None)


@pytest.fixture(autouse=True)
def _stock(pipe):
    yield
    detach(pipe)


def _parts(kind: str) -> tuple[dict, dict]:
    with safe_open(KINDS[kind][0], "pt") as file:
        return load_file(KINDS[kind][0]), dict(file.metadata())


def _big(tensors: dict) -> str:
    return max((name for name in tensors if tensors[name].ndim == 2), key=lambda name: tensors[name].numel())


def _note(name: str, change):
    def changed(tensors, notes):
        return tensors, {**notes, name: json.dumps(change(json.loads(notes[name])))}

    return changed


ODD = {
    "nan": lambda t, n: ({**t, _big(t): t[_big(t)] * float("nan")}, n),
    "infinite": lambda t, n: ({**t, _big(t): t[_big(t)].clone().fill_(float("inf"))}, n),
    "nan in the probe": lambda t, n: ({**t, "probe": t["probe"] * float("nan")}, n),
    "size": lambda t, n: ({**t, _big(t): t[_big(t)][:-1]}, n),
    "flat": lambda t, n: ({**t, _big(t): t[_big(t)].flatten()}, n),
    "dimensions": lambda t, n: ({**t, _big(t): t[_big(t)][None]}, n),
    "scalar": lambda t, n: ({**t, _big(t): torch.tensor(1.0)}, n),
    "missing": lambda t, n: ({name: w for name, w in t.items() if name != _big(t)}, n),
    "extra": lambda t, n: ({**t, "zzz": torch.zeros(2)}, n),
    "no probe": lambda t, n: ({name: w for name, w in t.items() if name != "probe"}, n),
    "another probe": lambda t, n: ({**t, "probe": t["probe"] + 1}, n),
    "whole numbers": lambda t, n: ({**t, _big(t): t[_big(t)].long()}, n),
    "double": lambda t, n: ({**t, _big(t): t[_big(t)].double()}, n),
    "nothing": lambda t, n: ({}, n),
    "no notes": lambda t, n: (t, {"format": n["format"]}),
    "another format": lambda t, n: (t, {**n, "format": "x"}),
    "shape is a list": lambda t, n: (t, {**n, "shape": "[]"}),
    "shape is no JSON": lambda t, n: (t, {**n, "shape": "{"}),
    "shape is deep": lambda t, n: (t, {**n, "shape": "[" * 100_000}),
    "shape lacks all": lambda t, n: (t, {**n, "shape": "{}"}),
    "shape has more": _note("shape", lambda shape: {**shape, "x": 1}),
    "a text": _note("shape", lambda shape: {**shape, "width": "64"}),
    "a fraction": _note("shape", lambda shape: {**shape, "width": float(shape["width"])}),
    "a truth": _note("shape", lambda shape: {**shape, "width": True}),
    "huge": _note("shape", lambda shape: dict.fromkeys(shape, 99_999_999) | {"attention": "full"}),
    "large": _note("shape", lambda shape: {**shape, "width": 200_000}),
    "negative": _note("shape", lambda shape: {**shape, "width": -64}),
}
ODD_ROUTERS = {
    "deep": _note("shape", lambda shape: {**shape, "depth": 1_000_000}),
    "heads": _note("shape", lambda shape: {**shape, "num_heads": 7}),
    "attention": _note("shape", lambda shape: {**shape, "attention": "left"}),
    "dither": lambda t, n: (t, {**n, "shape": n["shape"].replace('"dither": 1.0', '"dither": NaN')}),
    "other layers": lambda t, n: ({**t, "layer_tokens": t["layer_tokens"][:-1]}, _less_layers(n)),
    "budget": _note("layouts", lambda layouts: {"x": layouts.popitem()[1]}),
    "budgets are a list": _note("layouts", lambda layouts: list(layouts)),
    "negative budget": _note("layouts", lambda layouts: {"-1": layouts.popitem()[1]}),
    "nan budget": _note("layouts", lambda layouts: {"nan": layouts.popitem()[1]}),
    "no token": _note("layouts", lambda layouts: {name: {**one, "tokens": 0} for name, one in layouts.items()}),
    "too many layers": _note("layouts", lambda layouts: {name: {**one, "layers": 99} for name, one in layouts.items()}),
    "cut before all": _note("layouts", lambda layouts: {name: {**one, "first": -1} for name, one in layouts.items()}),
    "endless prompt": _note("prompt", lambda prompt: [10**18, 10**18]),
    "more image than prompt": _note("prompt", lambda prompt: [prompt[1] - 1, prompt[1]]),
    "three numbers": _note("prompt", lambda prompt: [*prompt, 1]),
}
ODD_TOKENS = {
    "no group": _note("shape", lambda shape: {**shape, "num_groups": 0}),
    "a block behind all": _note("shape", lambda shape: {**shape, "first_block": 99}),
    "a block before all": _note("shape", lambda shape: {**shape, "first_block": -1}),
    "a projector of other names": lambda t, n: ({**t, "connector.zzz": torch.zeros(2)}, n),
    "as many groups as patches": lambda t, n: _groups(t, n, 256),
}


def _less_layers(notes: dict) -> dict:
    shape = json.loads(notes["shape"])
    return {**notes, "shape": json.dumps({**shape, "num_layers": shape["num_layers"] - 1}), "layouts": "{}"}


def _groups(tensors: dict, notes: dict, count: int) -> tuple[dict, dict]:
    shape = {**json.loads(notes["shape"]), "num_groups": count}
    tokens = torch.zeros(count, tensors["tokens"].shape[1])
    return {**tensors, "tokens": tokens}, {**notes, "shape": json.dumps(shape)}


CASES = [
    *((kind, name, odd) for kind in KINDS for name, odd in ODD.items()),
    *(("par", name, odd) for name, odd in ODD_ROUTERS.items()),
    *(("vistog", name, odd) for name, odd in ODD_TOKENS.items()),
]


@pytest.mark.parametrize(
    ("kind", "odd"), [(kind, odd) for kind, _, odd in CASES], ids=[f"{k}: {n}" for k, n, _ in CASES]
)
def test_what_does_not_fit_is_refused_at_attach(pipe, tmp_path, kind, odd):
    """Catches values that pass into a model in silence, tracebacks of the reader, and a model that is half attached."""
    tensors, notes = odd(*_parts(kind))
    file = tmp_path / "x.safetensors"
    save_file({name: value.contiguous() for name, value in tensors.items()}, file, metadata=notes)
    before = model_state(pipe.vlm)
    with pytest.raises(ValueError) as caught:
        attach(pipe, KINDS[kind][1](file))
    assert "\n" not in str(caught.value)
    assert str(file) in str(caught.value) or "budget" in str(caught.value)
    assert differences(before, model_state(pipe.vlm)) == []


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_files_of_half_the_bits_are_taken(pipe, tmp_path, kind, dtype):
    """Catches checks that refuse what `save` writes, and weights drawn from the user's generator to be replaced."""
    tensors, notes = _parts(kind)
    save_file({name: value.to(dtype) for name, value in tensors.items()}, tmp_path / "x.safetensors", metadata=notes)
    random = torch.get_rng_state()
    with attach(pipe, KINDS[kind][1](tmp_path / "x.safetensors")):
        assert torch.equal(torch.get_rng_state(), random)
        assert report(pipe).layers


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_made_before_sizes_are_known(pipe, tmp_path, kind):
    """Catches a module that is made of what the notes say, and then compared."""
    tensors, notes = ODD["large"](*_parts(kind))
    save_file(tensors, tmp_path / "x.safetensors", metadata=notes)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match="has the size"):
        attach(pipe, KINDS[kind][1](tmp_path / "x.safetensors"))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000


def test_the_command_says_it_in_a_sentence(tmp_path, capsys):
    """Catches a traceback, and an exit code of 0 after a caption by weights that are no numbers."""
    tensors, notes = ODD["nan"](*_parts("par"))
    save_file(tensors, tmp_path / "x.safetensors", metadata=notes)
    from tests.stub_pipelines import image

    image(0).save(tmp_path / "0.png")
    arguments = ["processor=par", f"processor.router={tmp_path / 'x.safetensors'}"]
    assert cli.main(["caption", str(tmp_path / "0.png"), *arguments]) == 2
    error = capsys.readouterr().err
    assert "is not finite" in error and error.count("gen-turbo: error") == 1


SCHEDULE = yaml.safe_load((ROOT / "configs" / "schedule" / "tiny-25.yaml").read_text())


def _level(**changed):
    return {**SCHEDULE, "levels": [{**SCHEDULE["levels"][0], **changed}]}


ODD_SCHEDULES = {
    "nan time": {**SCHEDULE, "times": [float("nan"), *SCHEDULE["times"][1:]]},
    "a text for times": {**SCHEDULE, "times": "abc"},
    "no times": {**SCHEDULE, "times": []},
    "too many times": {**SCHEDULE, "times": [1.0] * 20_000},
    "no levels": {**SCHEDULE, "levels": []},
    "levels are a mapping": {**SCHEDULE, "levels": {}},
    "nan slope": {**SCHEDULE, "slopes": {"a": float("nan")}},
    "infinite probe": {**SCHEDULE, "probe": [float("inf")] * 32},
    "long probe": {**SCHEDULE, "probe": [0.0] * 33},
    "model is a list": {**SCHEDULE, "model": ["a"]},
    "nan cost": _level(cost=float("nan")),
    "cost is a text": _level(cost="0.5"),
    "infinite distance": _level(psnr_db=float("inf")),
    "inner is a number": _level(inner=3),
    "inner is a list": _level(inner=["turbo"]),
    "a setting of inner is a list": _level(inner={"method": "turbo", "ratio": [0.5]}),
    "a fraction of a call": _level(skips={"output": [1.5]}),
    "a truth for a call": _level(skips={"output": [True]}),
    "a call before the second": _level(skips={"output": [0]}),
    "a call behind all": _level(skips={"output": [99]}),
    "more calls than there are": _level(skips={"output": [1] * 1000}),
    "skips are a list": _level(skips=[1]),
    "lacks skips": {**SCHEDULE, "levels": [{"cost": 0.5, "psnr_db": 1.0, "inner": None}]},
    "level is a text": {**SCHEDULE, "levels": ["a"]},
    "times that rise": {**SCHEDULE, "times": SCHEDULE["times"][::-1]},
    "a key that nobody reads": {**SCHEDULE, "x": 1},
    "a key of a level that nobody reads": _level(x=1),
    "weights of a unit that is never skipped": _level(skips={"output": [5]}, weights={"deep.1": {5: [1.0]}}),
    "weights at a fraction of a call": _level(skips={"output": [5]}, weights={"output": {5.5: [1.0]}}),
    "weights at a truth": _level(skips={"output": [5]}, weights={"output": {True: [1.0]}}),
    "weights of what was not run": _level(skips={"output": [2]}, weights={"output": {2: [2.0, -1.5, 0.5]}}),
}


@pytest.mark.parametrize("tree", ODD_SCHEDULES.values(), ids=ODD_SCHEDULES)
def test_schedules_that_cannot_be_are_refused(tmp_path, tree):
    """Catches numbers that are rounded or passed on, and errors of Python's instead of a sentence with the path."""
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump(tree))
    with pytest.raises(ValueError, match="is no schedule") as caught:
        read(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["[" * 5000, "a: [", "\x00", "- 1", "", "x" * (2**24 + 1)], ids=lambda text: text[:4])
def test_files_that_are_no_schedule_are_refused(tmp_path, text):
    """Catches a reader's traceback, and a file of any length that is parsed."""
    path = tmp_path / "own.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match="schedule"):
        read(path)


INNER = {
    (("ratio", 0.5),): "inner must name a method",
    (("method", "turbo"), ("speed", 2.0)): "does not take what is given.*speed",
    (("method", "turbo"), ("ratio", 5.0)): "ratio must be",
}


def test_a_schedule_measured_with_another_method_asks_for_it(tmp_path):
    """Catches "auto", which merges by Turbo, on a schedule measured with another method, and settings that are none."""
    from tests.tiny_hosts import sd15_unet

    unet = sd15_unet()
    found = by_hand(unet, {"output": [2]})
    for inner in ("tome", "nobody"):
        file = replace(found, schedules=tuple(replace(one, inner=inner) for one in found.schedules))
        with pytest.raises(ValueError, match=f"merged by '{inner}'"):
            attach(unet, PARProcessor(budget=0.5, schedule=file))
    for inner, told in INNER.items():
        file = replace(found, schedules=tuple(replace(one, inner=dict(inner)) for one in found.schedules))
        with pytest.raises(ValueError, match=told):
            attach(unet, PARProcessor(budget=0.5, schedule=file))
    with attach(unet, PARProcessor(budget=0.5, schedule=replace(file, schedules=found.schedules))):
        pass


SETTINGS = {
    "threshold": lambda value: PARProcessor(threshold=value),
    "memory_limit_mb": lambda value: TurboProcessor(memory_limit_mb=value),
    "value_weight": lambda value: Turbo(value_weight=value),
    "ratio": lambda value: TurboProcessor(ratio=value),
    "layer_ratios": lambda value: TurboProcessor(layer_ratios={"a": value}),
    "step_scale": lambda value: TurboProcessor(step_scale={0: value}),
    "learning_rate": lambda value: RouterTraining(learning_rate=value),
    "noise": lambda value: RouterTraining(noise=value),
    "align_rate": lambda value: VisToGTraining(align_rate=value),
    "cost": lambda value: Schedule((1.0, 0.5), {}, cost=value),
}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("make", SETTINGS.values(), ids=SETTINGS)
def test_settings_are_finite(make, value):
    """Catches a comparison that NaN passes, because it is false for it."""
    with pytest.raises(ValueError, match="finite|cost is"):
        make(value)


def test_settings_of_a_training_are_checked():
    """Catches a training of fewer than no steps that ends as if it had learned something."""
    for wrong in ({"align_steps": -1}, {"num_drawn": 0}, {"lora_rank": -1}, {"tune_rate": -1.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            replace(VisToGTraining(), **wrong)
