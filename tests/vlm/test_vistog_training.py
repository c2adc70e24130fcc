"""Training of VisToG: learns without labels, stops and goes on to the bit, leaves the model alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from gen_turbo import attach
from gen_turbo.api import attachments
from gen_turbo.methods.vistog_vit import VisToGVisionProcessor
from gen_turbo.training.train_vistog import VisToGTrainer
from gen_turbo.training.vistog import VisToGArtefact
from gen_turbo.training.vistog_training import VisToGTraining
from gen_turbo.vlm.grouping import Grouping
from tests.snapshots import differences, model_state
from tests.training.damage import damaged
from tests.vlm.tiny_vlms import PROMPTS, VLMS

SETTINGS = VisToGTraining(align_steps=3, tune_steps=2, max_new_tokens=3, num_lessons=2, num_rounds=2)
VLM = VLMS["llava"]


def batches(index):
    """Prompts with images of their own for each step."""
    inputs = PROMPTS["padded"].inputs(VLM, index)
    generator = torch.Generator().manual_seed(index % 4)
    return inputs | {"pixel_values": torch.randn(2, 3, 32, 32, generator=generator)}


def trainer(folder, settings=SETTINGS, model=None, batches=batches, start=None):
    """A trainer on a fresh model, and the attachment."""
    model = model or VLM.make("sdpa")
    attach(model, VisToGVisionProcessor(num_tokens=5), replace=True)
    return VisToGTrainer(attachments(model)[0], batches, settings, folder, start)


def test_the_divergence_falls_without_labels(tmp_path):
    """Catches a loss without a gradient to what is learned, and one that ignores the answers of the full model."""
    settings = VisToGTraining(align_steps=18, tune_steps=2, align_rate=1e-2, max_new_tokens=3)
    made = trainer(tmp_path, settings, batches=lambda index: batches(0))
    before = made.divergence(batches, 1)
    path = made.run({})
    assert made.divergence(batches, 1) < 0.7 * before
    with attach(made.part.model, VisToGVisionProcessor(weights=str(path)), replace=True):
        loaded = attachments(made.part.model)[0].stage(Grouping)
        pairs = zip(loaded.grouping.parameters(), made._grouping.parameters(), strict=True)
        assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


@pytest.mark.parametrize("changes", [{}, {"lora_rank": 2}, {"num_drawn": 2}])
def test_a_training_that_stops_goes_on_to_the_bit(tmp_path, changes):
    """Catches moments, step, noise, adapter or chosen questions that are lost between runs."""
    settings = replace(SETTINGS, **changes)
    whole = trainer(tmp_path / "whole", settings).run({"data": "x"})
    for until in (2, 4, 5):
        path = trainer(tmp_path / "parts", settings).run({"data": "x"}, until)
        assert (path is None) == (until < 5)
    ours, theirs = load_file(path), load_file(whole)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert any("connector" in name for name in ours)
    if settings.lora_rank:
        adapters = [load_file(tmp_path / run / "adapter" / "adapter_model.safetensors") for run in ("whole", "parts")]
        assert all(torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[0])
        assert any(weight.abs().max() > 0 for name, weight in adapters[0].items() if "lora_B" in name)


def test_the_model_is_left_alone(tmp_path):
    """Catches frozen weights that move, flags that stay off, and hooks of the teacher that stay on."""
    model = VLM.make("sdpa")
    model.model.language_model.norm.weight.requires_grad_(False)
    model.generate(**batches(0), max_new_tokens=2)
    before = model_state(model)
    trainer(tmp_path, model=model).run({})
    attachments(model)[0].remove()
    after = model_state(model)
    assert differences(before, after) == []
    assert [name for name, weight in model.named_parameters() if not weight.requires_grad] == [
        "model.language_model.norm.weight"
    ]


def test_other_settings_in_the_same_folder_are_refused(tmp_path):
    """Catches a state that is read into another training."""
    trainer(tmp_path).run({}, 1)
    with pytest.raises(ValueError, match="another align_rate; choose another folder"):
        trainer(tmp_path, replace(SETTINGS, align_rate=1.0))


def test_what_cannot_be_trained_is_refused(tmp_path):
    """Catches a training that fails in its first step, or trains nothing."""
    with pytest.raises(ValueError, match="dtype=float32"):
        trainer(tmp_path, model=VLM.make("sdpa").half())
    model = VLM.make("sdpa")
    attach(model, VisToGVisionProcessor(0.0))
    with pytest.raises(ValueError, match="that removes tokens"):
        VisToGTrainer(attachments(model)[0], batches, SETTINGS, tmp_path)


def test_lessons_are_gone_through_in_rounds():
    """Catches batches that are answered for one step alone, and batches that never come."""
    settings = VisToGTraining(num_lessons=3, num_rounds=2)
    assert [settings.lesson(step) for step in range(14)] == [0, 1, 2, 0, 1, 2, 3, 4, 5, 3, 4, 5, 6, 7]


def test_the_hardest_questions_are_learned_from(tmp_path):
    """Catches a choice by chance, by the easiest, or of answers that belong to other prompts."""
    made = trainer(tmp_path, replace(SETTINGS, num_drawn=2))
    taught = made._taught(batches(0))
    with torch.no_grad():
        each = taught.divergence(made.part.model).sum(1)
    worst = int(each.argmax())
    lesson = made._lesson(0)
    assert len(lesson.answer_BT) == 1 and torch.equal(lesson.answer_BT[0], taught.answer_BT[worst])
    assert torch.equal(lesson.inputs["pixel_values"][0], taught.inputs["pixel_values"][worst])
    with torch.no_grad():
        made._grouping.eval()
        assert lesson.divergence(made.part.model).sum() == pytest.approx(float(each.max()), rel=1e-4)
    packed = replace(taught, inputs=taught.inputs | {"pixel_values": torch.zeros(9, 4)})
    with pytest.raises(ValueError, match="pixel_values have no row for each prompt"):
        packed.of_rows(torch.tensor([0]))


def test_a_choice_outlives_a_stop(tmp_path):
    """Catches questions that are chosen anew, by weights that have moved on, when a training goes on."""
    settings = replace(SETTINGS, num_drawn=2)
    made = trainer(tmp_path, settings)
    made.run({}, 1)
    again = trainer(tmp_path, settings)
    assert torch.equal(again._rows[0], made._rows[0])
    again._rows[0] = 1 - made._rows[0]
    assert not torch.equal(again._lesson(0).inputs["pixel_values"], made._lesson(0).inputs["pixel_values"])
    again.run({}, 4)
    made._lesson(2)
    assert again._rows.keys() == {0, 1} and made._rows.keys() == {2}


def test_weights_of_a_kindred_model_are_a_start(tmp_path):
    """Catches a start that is ignored, and one that overrules the state of the folder."""
    settings = replace(SETTINGS, has_connector=False)
    start = VisToGArtefact.load(trainer(tmp_path / "first", settings).run({}))
    made = trainer(tmp_path / "second", settings, start=start)
    assert torch.equal(made._grouping.query.weight, start.grouping.query.weight)
    made.run({}, 1)
    again = trainer(tmp_path / "second", settings, start=start)
    assert torch.equal(again._grouping.query.weight, made._grouping.query.weight)
    assert not torch.equal(again._grouping.query.weight, start.grouping.query.weight)
    other = VisToGArtefact.load(trainer(tmp_path / "third").run({}))
    with pytest.raises(ValueError, match="have a projector; train it too"):
        trainer(tmp_path / "fourth", settings, start=other)
    late = VLM.make("sdpa")
    attach(late, VisToGVisionProcessor(num_tokens=5, first_block=1))
    made = VisToGTrainer(attachments(late)[0], batches, SETTINGS, tmp_path / "fifth", other)
    assert torch.equal(made._grouping.query.weight, other.grouping.query.weight)
    assert made._grouping.shape.first_block == 1
    connector = made._stage.connector.state_dict()
    assert all(torch.equal(connector[name], weight) for name, weight in other.connector.items())
    few = VLM.make("sdpa")
    attach(few, VisToGVisionProcessor(num_tokens=4))
    with pytest.raises(ValueError, match="expected weights of 4 tokens .* got .5"):
        VisToGTrainer(attachments(few)[0], batches, SETTINGS, tmp_path / "sixth", other)


def test_the_rate_rises_and_falls_in_each_stage():
    """Catches a second stage at the first one's rate, and a cosine over both."""
    settings = VisToGTraining(align_steps=100, tune_steps=50, align_rate=1.0, tune_rate=0.1)
    rates = [settings.rate(step) for step in range(150)]
    assert max(range(100), key=lambda step: rates[step]) == 9 and max(rates[100:]) < 0.1
    assert rates[99] < 0.01 and rates[149] < 0.001 and rates[104] > rates[101]


def test_a_damaged_state_is_refused(tmp_path):
    """Catches a reader's traceback, and weights of a damaged file that are trained on."""
    trainer(tmp_path).run({}, 1)
    for form in damaged(tmp_path / "state.safetensors", "grouping.tokens"):
        with pytest.raises(ValueError, match="state of a training|delete it"):
            trainer(tmp_path)
            pytest.fail(form)
    assert trainer(tmp_path).step == 1
    assert [path.name for path in tmp_path.iterdir()] == ["state.safetensors"]
