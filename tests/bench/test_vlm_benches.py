"""The benchmarks of vision-language models of real size, and of the way from image to new image."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch

from gen_turbo import TurboProcessor, scenes
from gen_turbo.bench import caption_generate, tables, vlm_step
from gen_turbo.bench.commands import add_arguments, run
from gen_turbo.bench.markdown import NO_RECORDS
from gen_turbo.bench.records import load
from gen_turbo.bench.settings import Stock
from gen_turbo.pipelines import tiny_vlm
from gen_turbo.pipelines.caption_generate import CaptionGenerateResult

SETTINGS = """
pipeline: caption-generate
caption:
  checkpoint: {vlm}
  max_new_tokens: 3
  processor: {{method: turbo, ratio: 0.5}}
generate:
  checkpoint: {folder}
  device: cpu
  height: 32
  width: 32
  steps: 2
  processor: {{method: turbo, ratio: 0.5, scope: attention, restore: copy}}
"""


def _run(*arguments: str) -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    run(parser.parse_args(arguments))


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory, tiny_checkpoint) -> Path:
    """A YAML of small checkpoints."""
    folder = tmp_path_factory.mktemp("halves")
    state = torch.get_rng_state()
    torch.manual_seed(0)
    tiny_vlm.make_model().save_pretrained(folder / "vlm")
    torch.set_rng_state(state)
    tiny_vlm.make_processor().save_pretrained(folder / "vlm")
    (folder / "both.yaml").write_text(SETTINGS.format(vlm=folder / "vlm", folder=tiny_checkpoint))
    return folder / "both.yaml"


def _caption_generate(pipeline, folder, *more):
    places = ("--records", str(folder / "records"), "--work", str(folder / "work"))
    _run("caption-generate", "--pipeline", str(pipeline), "--images", "3", *places, *more)
    return {record.setting: record for record in load(folder / "records", "caption-generate")}


def test_caption_generate_records_both_and_goes_on(pipeline, tmp_path, capsys):
    """Catches a part that records without the rest, images measured twice, and two columns that are one setting."""
    assert not _caption_generate(pipeline, tmp_path, "--part", "1/2")
    assert "2 of 3 images done" in capsys.readouterr().out
    work = next((tmp_path / "work").rglob("*.jsonl"))
    with work.open("a") as file:
        file.write('{"index": 1, "sto')
    before = work.read_text()
    work.write_text(before + "\n")
    found = _caption_generate(pipeline, tmp_path)
    assert work.read_text().startswith(before)
    assert len(work.read_text().splitlines()) == 4
    assert sorted(found) == ["accelerated", "stock"]
    stock, fast = found["stock"], found["accelerated"]
    assert stock.cpu_s == fast.baseline_cpu_s != fast.cpu_s
    assert (stock.counts["kept"], fast.counts["kept"], fast.counts["drawn_kept"]) == (256, 128, 128)
    assert len(fast.values["passed"]) == 3
    assert "| accelerated | " in tables.caption_generate(tmp_path / "records")
    _caption_generate(pipeline, tmp_path)
    assert "finished before" in capsys.readouterr().out


class _Perfect:
    """A pipeline that says what it sees and draws it again."""

    def __init__(self, captions):
        self.captions, self.asked = captions, []

    def set_attn_processor(self, processors):
        self.asked.append(processors)

    def __call__(self, image, seeds):
        return CaptionGenerateResult([self.captions.pop()], [], [image], 0.0, 0.0, 4, 2, 0, 0)


def test_a_right_image_passes_and_a_wrong_caption_does_not():
    """Catches a check against the caption that was said, and settings that always come in one order."""
    captions = scenes.captions(2, 0)
    pipe = _Perfect([captions[1], "a lie", captions[0], captions[0]])
    trials = [caption_generate._measure(pipe, {"caption": TurboProcessor()}, captions, i, 0) for i in range(2)]
    assert [[trial[name]["passed"] for name in caption_generate.SETTINGS] for trial in trials] == [[1, 1], [1, 1]]
    assert [trial["stock"]["captioned"] for trial in trials] == [1, 1]
    assert [trial["accelerated"]["captioned"] for trial in trials] == [1, 0]
    assert [processors is None for processors in pipe.asked] == [True, False, False, True]


def test_vlm_step_records_times_beside_counts(tmp_path):
    """Catches a budget that is not kept, attention that is not counted, and a setting that is left on the model."""
    small = ("--layers", "2", "--tower-layers", "2", "--width-scale", "0.0625", "--new-tokens", "2", "--rounds", "1")
    _run("vlm-step", *small, "--records", str(tmp_path), "--settings", "pool-192", "turbo_vit-gate-64")
    found = {(r.setting, r.params["phase"]): r for r in load(tmp_path, "vlm-step")}
    assert len(found) == 6
    prompt = vlm_step._TEXT_BEFORE + 576 + vlm_step._TEXT_AFTER
    for name, kept in (("pool-192", 192), ("turbo_vit-gate-64", 64)):
        record = found[name, "prefill"]
        assert record.counts["stock_kv_bytes"] == 2 * 2 * 256 * 4 * prompt
        assert record.counts["kv_bytes"] == 2 * 2 * 256 * 4 * (prompt - 576 + kept)
        assert record.counts["flops"] < record.counts["stock_flops"]
        assert found[name, "generate"].counts["flops"] > record.counts["flops"]
    assert "| pool-192 | " in tables.vlm_step(tmp_path)
    path = tmp_path / "vlm-step.jsonl"
    path.write_text(path.read_text().splitlines()[2] + "\n")
    assert "| pool-192 |  |  | " in tables.vlm_step(tmp_path) and "|  |  | 0.39 |" in tables.vlm_step(tmp_path)
    _run("vlm-step", *small, "--records", str(tmp_path), "--settings", "pool-192", "turbo_vit-gate-64")
    assert len(path.read_text().splitlines()) == 6


def test_vlm_step_times_batches(tmp_path):
    """Catches stock timed at another batch, and rows of batches among those of one image."""
    small = ("--layers", "2", "--tower-layers", "2", "--width-scale", "0.0625", "--rounds", "2", "--batch", "3")
    _run("vlm-step", *small, "--records", str(tmp_path), "--settings", "turbo_vit-gate-64")
    [record] = load(tmp_path, "vlm-step")
    assert record.params["batch"] == 3 and len(record.cpu_s) == len(record.baseline_cpu_s) == 2
    assert record.counts["flops"] < record.counts["stock_flops"]
    assert "| turbo_vit-gate-64 | 3 | 2 | " in tables.vlm_batches(tmp_path)
    assert "turbo_vit-gate-64" not in tables.vlm_step(tmp_path)


def test_semantic_tokens_cost_the_tower_their_share():
    """Catches semantic tokens that pass blocks they need not, and a tower that is counted with what reads it."""
    model = vlm_step.make_model(0.0625, 1, 6, 0)
    found = {setting.name: setting for setting in vlm_step.catalogue(6)}
    names = ("vistog_vit-64", "vistog_vit-late-64", "pool-64")
    own = {name: vlm_step._counted(model, found[name], 1)["tower"] for name in names}
    stock = vlm_step._counted(model, Stock(), 1)["tower"]
    weights = sum(w.numel() for w in model.model.vision_tower.encoder.layers[0].parameters() if w.ndim == 2)
    # All pairs of tokens are computed, those that the mask hides too.
    a_block = 2 * 64 * weights + 4 * 64 * ((577 + 64) ** 2 - 577**2)
    # The projector reads what the last block but one gives: five of six, or the last one of them.
    added = {name: own[name] - stock for name in names}
    assert added["pool-64"] == 0
    assert added["vistog_vit-late-64"] == pytest.approx(a_block, rel=0.01)
    assert added["vistog_vit-64"] == pytest.approx(5 * a_block, rel=0.01)


def test_counted_attention_is_that_of_the_formula():
    """Catches attention kernels that the counter does not know, which would count as nothing."""
    model = vlm_step.make_model(0.0625, 1, 1, 0)
    with_one = vlm_step._counted(model, Stock(), 1)["prefill"]
    tower, text, tokens = 64, 256, vlm_step._TEXT_BEFORE + 576 + vlm_step._TEXT_AFTER
    weights = 2 * tokens * sum(w.numel() for w in model.model.language_model.layers.parameters() if w.ndim == 2)
    blocks = model.model.vision_tower.encoder.layers
    weights += 2 * 577 * sum(w.numel() for w in blocks.parameters() if w.ndim == 2)
    projector = 2 * 576 * sum(w.numel() for w in model.model.multi_modal_projector.parameters() if w.ndim == 2)
    patches = 2 * 576 * 3 * 14 * 14 * tower
    head = 2 * model.lm_head.weight.numel()
    attention = 4 * (577**2 * tower + tokens**2 * text)
    rest = with_one - (weights + projector + patches + head + attention)
    assert 0 <= rest < 0.001 * with_one


def test_operators_are_counted_at_every_batch(tmp_path, monkeypatch):
    """Catches a count of the first call, of one batch for all, and counts in the table of times."""
    monkeypatch.setattr(vlm_step, "_WHOLE", {"layers": 2, "tower_layers": 2, "scale": 0.0625})
    monkeypatch.setattr(vlm_step, "BATCHES", (1, 2))
    _run("vlm-step", "--operators", "--records", str(tmp_path), "--settings", "pool-64")
    (record,) = load(tmp_path, "vlm-step")
    counts = record.counts
    assert counts["stock_operators_1"] == counts["stock_operators_2"] < counts["operators_1"]
    assert counts["operators_2"] - counts["operators_1"] < 10
    assert tables.TABLES["vlm-step"](tmp_path) == NO_RECORDS
    stock, own = tables.TABLES["vlm-operators"](tmp_path).splitlines()[2:4]
    assert stock == f"| stock | {counts['stock_operators_1']:,} | {counts['stock_operators_2']:,} |"
    assert own.startswith(f"| pool-64 | {counts['operators_1'] / counts['stock_operators_1']:.2f} times |")
