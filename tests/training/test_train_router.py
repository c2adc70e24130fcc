"""Training of the router on a tiny frozen model: what it learns, what it leaves alone, and how it goes on."""

from __future__ import annotations

import functools

import pytest
import torch

from gen_turbo import PARProcessor, attach, report
from gen_turbo.training import objectives
from gen_turbo.training.calibrate_router import RouterCalibration, RouterSizes
from gen_turbo.training.router import Router, RouterShape
from gen_turbo.training.router_file import RouterArtefact
from gen_turbo.training.train_router import OBJECTIVES, RouterTrainer, RouterTraining
from gen_turbo.vlm.routes import Scores
from gen_turbo.vlm.teacher import Teacher
from tests.snapshots import differences, model_state
from tests.training.damage import damaged
from tests.vlm.test_generate import generate
from tests.vlm.tiny_kit import pixels
from tests.vlm.tiny_vlms import PROMPTS, VLMS

IDLE = 2
QUICK = RouterTraining(samples=4, steps=3, layers=3, tokens=0.5)


@functools.cache
def model_with_an_idle_layer():
    """A tiny LLaVA one of whose layers changes next to nothing."""
    model = VLMS["llava"].make("sdpa")
    layer = model.model.language_model.layers[IDLE]
    with torch.no_grad():
        layer.self_attn.o_proj.weight.mul_(1e-3)
        layer.mlp.down_proj.weight.mul_(1e-3)
    return model


def prompts(number: int) -> dict[str, torch.Tensor]:
    """Two prompts with an image each, other ones for every number."""
    inputs = PROMPTS["padded"].inputs(VLMS["llava"], seed=number)
    return {**inputs, "pixel_values": pixels(2, seed=number)}


def fresh(seed: int = 0) -> Router:
    """An untrained router for it."""
    torch.manual_seed(seed)
    return Router(RouterShape(32, 4, width=16, num_heads=2))


def trainer(training: RouterTraining, folder=None, router=None) -> RouterTrainer:
    """A trainer on short answers."""
    return RouterTrainer(router or fresh(), Teacher(model_with_an_idle_layer(), 3), prompts, training, folder)


def quiet(*figures: object) -> None:
    """Tells nobody."""


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_router_learns_which_layer_is_idle(objective):
    """Catches a preference the wrong way round, a ranking by the wrong KL, and scores that get no gradient."""
    training = RouterTraining(objective, samples=5, steps=25, layers=3, tokens=1.0, learning_rate=2e-2)
    made = trainer(training)
    made.fit(quiet)
    lesson = made.teacher.lesson(prompts(1000))
    kept = objectives.kept(made.router(lesson.prompt), lesson.prompt, 1.0, 3)
    assert kept.layer_BD.tolist() == [[1, 1, 0, 1]] * 2


def test_the_frozen_model_stays_as_it_was():
    """Catches gradients in the model's weights, hooks that stay, and draws from the global generator."""
    model = model_with_an_idle_layer()
    generate(model, prompts(0))  # transformers installs its own hooks in the first call
    before = model_state(model)
    made = trainer(QUICK, router=fresh())
    state = torch.get_rng_state()
    made.fit(quiet)
    assert torch.equal(torch.get_rng_state(), state)
    before["random"] = state
    assert not differences(before, model_state(model))
    assert all(weight.grad is None for weight in model.parameters())


def test_a_stopped_training_goes_on_the_same(tmp_path):
    """Catches noise, moments or a schedule that begin anew after a stop."""
    whole = trainer(QUICK)
    whole.fit(quiet)

    class Stopped(Exception):
        pass

    def stop(step: int, *figures: object) -> None:
        if step == 2:
            raise Stopped

    first = trainer(QUICK, tmp_path)
    with pytest.raises(Stopped):
        first.fit(stop, save_every=1)
    second = trainer(QUICK, tmp_path, router=fresh(seed=9))
    assert second.step == 1
    second.fit(quiet)
    assert second.data_hash == whole.data_hash
    for one, other in zip(whole.router.parameters(), second.router.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_checkpoint_of_other_settings_is_refused(tmp_path):
    """Catches two trainings mixed in one folder."""
    trainer(QUICK, tmp_path).fit(quiet)
    with pytest.raises(ValueError, match="of a training with other settings"):
        trainer(RouterTraining(samples=4, steps=4, layers=3, tokens=0.5), tmp_path)
    with pytest.raises(ValueError, match="or of another model"):
        RouterTrainer(fresh(), Teacher(VLMS["llava"].make("sdpa"), 3), prompts, QUICK, tmp_path)


def test_a_damaged_checkpoint_is_refused(tmp_path):
    """Catches a reader's traceback, and weights of a damaged file that are trained on."""
    trainer(QUICK, tmp_path).fit(quiet)
    for form in damaged(tmp_path / "state.safetensors", "weight.0"):
        with pytest.raises(ValueError, match="state of a training|delete it"):
            trainer(QUICK, tmp_path)
            pytest.fail(form)
    assert trainer(QUICK, tmp_path).step == QUICK.steps
    assert [path.name for path in tmp_path.iterdir()] == ["state.safetensors"]


def test_the_teacher_measures_the_kl_of_routed_answers():
    """Catches answers compared at shifted places, rows mixed up between routes, and KL the wrong way round."""
    model = model_with_an_idle_layer()
    teacher = Teacher(model, 3)
    lesson = teacher.lesson(prompts(5))
    made = trainer(QUICK)
    depth = 4
    layer = torch.tensor([[0.0, 1, 2, 3], [0.0, 3, 1, 2]]).repeat_interleave(2, 0)
    routes = Scores(torch.rand(4, lesson.prompt.embeds_BLC.shape[1]), layer)
    each = teacher.divergence(lesson, routes, made.routing)
    for number in range(2):
        rows = slice(2 * number, 2 * number + 2)
        chosen = objectives.kept(Scores(routes.token_BL[rows], layer[rows]), lesson.prompt, 0.5, 3)
        expected = []
        for row in range(2):
            keep = ~lesson.prompt.is_image_BL[row] & lesson.prompt.real_BL[row] | chosen.token_BL[row].bool()
            expected.append(_routed_kl(model, lesson, row, keep, chosen.layer_BD[row].bool(), depth))
        assert torch.allclose(each[number], torch.stack(expected), atol=1e-5)


@torch.no_grad()
def _routed_kl(model, lesson, row, keep, runs, depth):
    """KL(own || routed) of one row: the layers called one by one on what is kept."""
    text = model.model.language_model
    ids, count = lesson.answer_BT[row], int(lesson.counts_BT[row].sum())
    prompt = lesson.prompt.embeds_BLC[row]
    hidden = torch.cat([prompt, model.get_input_embeddings()(ids[:-1])])[None]
    real = torch.cat([lesson.prompt.real_BL[row], torch.ones(len(ids) - 1, dtype=torch.bool)])
    keep = torch.cat([keep, torch.ones(len(ids) - 1, dtype=torch.bool)])
    position = (real.cumsum(0) - 1)[None]
    for first, last, stays in ((0, 2, real), (2, depth, keep[real])):
        hidden, position = hidden[:, stays], position[:, stays]
        mask = torch.full((hidden.shape[1],) * 2, torch.finfo(hidden.dtype).min).triu(1)[None, None]
        rotary = text.rotary_emb(hidden, position_ids=position)
        for index in range(first, last):
            if runs[index]:
                hidden = text.layers[index](hidden, attention_mask=mask, position_embeddings=rotary)
    routed = model.lm_head(text.norm(hidden))[0, -len(ids) :][:count].log_softmax(-1)
    own = lesson.logits_BTV[row, :count].log_softmax(-1)
    return (own.exp() * (own - routed)).sum(-1).mean()


@functools.cache
def artefact() -> RouterArtefact:
    """A calibration of three steps."""
    calibration = RouterCalibration(
        model_with_an_idle_layer(), prompts, QUICK, RouterSizes(width=16), max_new_tokens=3, num_batches=1
    )
    return calibration.run(quiet, quiet)


def test_the_artefact_reads_back_and_routes(tmp_path):
    """Catches a file that forgets its sizes or layouts, and a budget that is not met on the model."""
    path = tmp_path / "router.safetensors"
    artefact().save(path)
    model, inputs = model_with_an_idle_layer(), prompts(3)
    for budget in (0.55, 0.8):
        layout = artefact().layout_at(budget, model.model.language_model)
        given = PARProcessor(router=str(path), tokens=layout.tokens, layers=layout.layers, first=layout.first)
        found = []
        for processor in (PARProcessor(budget=budget, router=str(path)), given):
            with attach(model, processor):
                found.append(generate(model, inputs)[1])
                assert report(model).flops_saved > 0
        assert torch.equal(*found)


def test_another_model_is_refused(tmp_path):
    """Catches a router that routes a model by the embeddings of another."""
    path = tmp_path / "router.safetensors"
    artefact().save(path)
    other = VLMS["llava"].make("sdpa")
    with pytest.raises(ValueError, match="was trained for another model"):
        attach(other, PARProcessor(router=str(path)))
    with pytest.raises(ValueError, match="no router ships for this LlavaForConditionalGeneration"):
        attach(other, PARProcessor())
    with pytest.raises(ValueError, match="there is no file"):
        attach(other, PARProcessor(router="nowhere.safetensors"))


def test_a_whole_budget_needs_no_router():
    """Catches a budget of 1 that asks for training, or computes the same another way."""
    model, inputs = model_with_an_idle_layer(), prompts(3)
    stock = generate(model, inputs)[1]
    with attach(model, PARProcessor(budget=1.0)):
        assert torch.equal(generate(model, inputs)[1], stock)


@pytest.mark.parametrize("name", ["random", "uniform"])
def test_controls_keep_what_they_are_told(name):
    """Catches a control at another budget than the method it is compared with."""
    model, inputs = model_with_an_idle_layer(), prompts(3)
    with attach(model, PARProcessor(router=name, tokens=0.5, layers=3)):
        generate(model, inputs)
        rows = report(model).layers
    length = inputs["input_ids"].shape[1]
    layers = [row for row in rows if row.status == "reduced"]
    ran = [row.num_kept / (length if index < 2 else length - 8) for index, row in enumerate(layers)]
    assert ran[0] == 2 and sum(ran) == 2 * 3
    with pytest.raises(ValueError, match="give tokens and layers"):
        attach(model, PARProcessor(router=name))


def test_what_cannot_be_trained_is_refused():
    """Catches settings that would train in silence on nothing."""
    for settings, words in (
        ({"objective": "best"}, "objective must be one of"),
        ({"samples": 1}, "at least 2 samples"),
    ):
        with pytest.raises(ValueError, match=words):
            RouterTraining(**settings)
    ragged = PROMPTS["ragged"].inputs(VLMS["llava"])
    made = RouterTrainer(fresh(), Teacher(model_with_an_idle_layer(), 3), lambda number: ragged, QUICK)
    with pytest.raises(ValueError, match="train on one image of one size"):
        made.fit(quiet)
