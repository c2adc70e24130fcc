"""The embedded vision-language model: its parts fit each other, the hosts and its training."""

from __future__ import annotations

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from stated import TurboProcessor
from transformers import AutoProcessor, LlavaForConditionalGeneration

from gen_turbo import attach, load_pipeline, report, scenes
from gen_turbo.bench import understanding
from gen_turbo.pipelines import tiny_vlm
from tests.test_examples import EXAMPLES, load


@pytest.fixture
def model():
    """Random weights, 64 image tokens."""
    torch.manual_seed(0)
    return tiny_vlm.make_model(16)


@pytest.fixture
def data(monkeypatch):
    """The training data's module."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return load("vlm_data")


def prompts(questions: list[str], patch: int = 16) -> dict[str, torch.Tensor]:
    """A batch of prompts about one image."""
    image = scenes.render("a small red cross on the top of a gray background", 0)
    texts = [tiny_vlm.prompt_of(question) for question in questions]
    return tiny_vlm.make_processor(patch)(images=[image] * len(texts), text=texts, padding=True, return_tensors="pt")


def test_every_word_has_a_number():
    """Catches a word that the model can neither read nor say."""
    tokenizer = tiny_vlm.make_tokenizer()
    words = {*scenes.WORDS, *scenes.QUESTION_WORDS, *tiny_vlm.CAPTION_PROMPT.split()}
    for caption in [*scenes.captions(5, 0), *scenes.captions(5, 0, 2)]:
        words |= {*caption.split(), *(word for q in scenes.questions(caption, 0, "red") for word in q.question.split())}
    ids = [tokenizer.convert_tokens_to_ids(word) for word in sorted(words)]
    assert tokenizer.unk_token_id not in ids
    assert len(set(ids)) == len(ids)
    text = tokenizer("What color is the DOT?").input_ids
    assert tokenizer.decode(text, skip_special_tokens=True) == "what color is the dot"


def test_model_and_processor_survive_saving(tmp_path):
    """Catches an image that is prepared otherwise after loading, and weights beyond 20 MB."""
    tiny_vlm.make_model().half().save_pretrained(tmp_path)
    tiny_vlm.make_processor().save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size < 20e6
    loaded, image = AutoProcessor.from_pretrained(tmp_path), scenes.render(scenes.captions(1, 0)[0], 0)
    for processor in (loaded, tiny_vlm.make_processor()):
        inputs = processor(images=image, text=tiny_vlm.prompt_of("what color is the dot"), return_tensors="pt")
        assert int((inputs.input_ids == loaded.image_token_id).sum()) == tiny_vlm.NUM_IMAGE_TOKENS
        wanted = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) / 127.5 - 1
        assert torch.allclose(inputs.pixel_values[0], wanted, atol=1e-5)
    stock = LlavaForConditionalGeneration.from_pretrained(tmp_path)
    assert stock.config.image_seq_length == tiny_vlm.NUM_IMAGE_TOKENS


def test_turbo_shortens_what_the_language_model_reads(model):
    """Catches a configuration that the host does not know; detaching gives stock's very answers."""
    inputs = prompts(["what color is the dot", tiny_vlm.CAPTION_PROMPT])
    stock = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    with attach(model, TurboProcessor(0.5)):
        model.generate(**inputs, max_new_tokens=4, do_sample=False)
        assert [(row.num_tokens, row.num_kept) for row in report(model).layers] == [(128, 64)]
    assert torch.equal(model.generate(**inputs, max_new_tokens=4, do_sample=False), stock)


@torch.no_grad()
def test_smaller_patches_begin_where_the_larger_ones_were(model):
    """Catches weights that are not carried over, a kernel of another strength and places that are shuffled."""
    fine, other = tiny_vlm.make_model(8), tiny_vlm.make_model(8)
    tiny_vlm.refine(model, fine)
    smooth = F.interpolate(torch.randn(1, 3, 4, 4), size=128, mode="bicubic")

    def tower(one):
        seen = one.model.vision_tower(smooth).last_hidden_state[:, 1:].transpose(1, 2)
        return F.adaptive_avg_pool2d(seen.unflatten(2, (round(seen.shape[2] ** 0.5), -1)), 8).flatten()

    wanted = tower(model)
    assert F.cosine_similarity(tower(fine), wanted, dim=0) > 0.9
    assert F.cosine_similarity(tower(other), wanted, dim=0) < 0.5
    for name in ("lm_head.weight", "model.multi_modal_projector.linear_1.weight"):
        assert torch.equal(fine.state_dict()[name], model.state_dict()[name])


@torch.no_grad()
def test_packed_turns_are_those_of_single_prompts(model, data):
    """Catches a turn that sees another's answer, and places or a target that inference does not have."""
    train = load("train_tiny_vlm")
    row = data.Row("a small red cross on the top of a gray background", 0, None)
    asked = data.turns(row, 0)
    packed = data.pack([asked, asked[:2]], 64)
    images = data.images([row, row])[0]
    logits = model.lm_head(train.read(model, train.see(model, images)[1], packed))
    for number, (question, answer, _) in enumerate(asked, 1):
        inputs = prompts([question])
        own = (packed.turn[0] == number).nonzero()[:, 0]
        length = len(question.split())
        assert torch.equal(packed.ids[0, own[:length]], inputs["input_ids"][0, -length:])
        wanted = model(**inputs).logits[0, -1]
        assert torch.allclose(logits[0, own[length - 1]], wanted, atol=1e-5)
        said = packed.target[0, own[length - 1 :]]
        assert tiny_vlm.make_tokenizer().decode(said[said >= 0]) == f"{answer} <eos>"


def test_what_patches_show_is_what_is_drawn(data):
    """Catches labels of another image, transposed, or of a dot that is left out."""
    row = data.Row("a large blue square on the left of a white background", 1, "red")
    shown = data.images([row])[1][0].bool()
    by_name = dict(zip(data.SHOWN, shown, strict=True))
    assert torch.equal(by_name["blue"], by_name["square"]) and torch.equal(by_name["blue"], by_name["large"])
    assert by_name["blue"][:, :8].sum() > 3 * by_name["blue"][:, 8:].sum()
    assert 1 <= by_name["red dot"].sum() <= 4
    assert not by_name["red"].any() and not by_name["blue dot"].any()
    assert by_name["white"].sum() > 150


def test_training_goes_on_where_it_stopped_and_ships_a_stock_model(data, tmp_path, monkeypatch):
    """Catches a checkpoint that is written and never read, patches that stay large, and weights nobody can load."""
    train = load("train_tiny_vlm")
    monkeypatch.setattr(train, "STAGES", tuple(replace(stage, batch=2) for stage in train.STAGES))
    monkeypatch.setattr(train, "HELD_OUT", 1)
    monkeypatch.setattr(train.tiny_vlm, "weights_folder", lambda: tmp_path / "shipped")

    def run(*more: str) -> int:
        arguments = ["train", "--output", str(tmp_path / "run"), "--scenes", "4", "--seconds", "0.2", "0.2", *more]
        monkeypatch.setattr(sys, "argv", arguments)
        train.main()
        return train.VlmTraining(tmp_path / "run", 0).trainer.steps

    first = run()
    assert first >= len(train.STAGES)
    assert run("--ship") == first
    shipped = LlavaForConditionalGeneration.from_pretrained(tmp_path / "shipped")
    assert shipped.config.vision_config.patch_size == tiny_vlm.PATCH_PX
    assert all(value.dtype == torch.float16 for value in load_file(tmp_path / "shipped" / "model.safetensors").values())
    AutoProcessor.from_pretrained(tmp_path / "shipped")


def test_the_shipped_model_reads_scenes_that_it_never_saw():
    """Catches weights of another vocabulary, a processor of another scale, and a half precision that spoils them."""
    kinds = ("color", "size", "position", "detail")
    asks = [ask for ask in understanding.asked(6, seed=1) if ask.kind in kinds]
    said = list(understanding.answers(load_pipeline("caption", processor=None), asks))
    assert sum(one == ask.answer for one, ask in zip(said, asks, strict=True)) >= 0.9 * len(asks)
