"""Scenes: grammar, renders that their own checker passes, and questions with one true answer."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from gen_turbo import scenes
from gen_turbo.scenes import Pair, Scene

PAIR = "a red circle left of a blue square on a white background"


def test_images_and_captions_are_those_of_the_records():
    """Catches a change of the draw or of the grammar, after which committed records are of other images."""
    digest = hashlib.sha256("".join(scenes.captions(200, 0)).encode())
    for seed, caption in enumerate(scenes.captions(12, 0)):
        digest.update(scenes.render(caption, seed).tobytes())
    assert digest.hexdigest()[:16] == "80c3a7317bd0abe6"


@pytest.mark.parametrize("num_objects", [1, 2])
def test_true_renders_pass_and_others_fail(num_objects):
    """Catches a checker that passes anything, and objects of a pair that touch or leave the image."""
    captions = scenes.captions(24, 3, num_objects)
    images = [scenes.render(caption, seed) for seed, caption in enumerate(captions)]
    told = [scenes.parse(caption) for caption in captions]
    told = [scene.canonical.caption if isinstance(scene, Pair) else scene.caption for scene in told]
    for image, true in zip(images, told, strict=True):
        assert scenes.check(image, true).passed
        assert not any(scenes.check(image, other).passed for other in told[:6] if other != true)


@pytest.mark.parametrize(
    ("told", "wrong"),
    [
        ("a red circle right of a blue square on a white background", {"relation"}),
        ("a red circle above a blue square on a white background", {"relation"}),
        ("a blue square left of a red circle on a white background", {"relation"}),
        ("a green circle left of a blue square on a white background", {"color"}),
        ("a red circle left of a blue cross on a white background", {"other_shape"}),
        ("a red circle left of a blue square on a gray background", {"background"}),
        ("a blue square right of a red circle on a white background", set()),
    ],
)
def test_each_claim_of_a_pair_fails_alone(told, wrong):
    """Catches a swap that is read as four wrong objects, and a claim that is never looked at."""
    result = scenes.check(scenes.render(PAIR, 5), told)
    assert {name for name, holds in vars(result).items() if not holds} == wrong
    assert result.passed == (not wrong)


def test_a_third_object_is_counted():
    """Catches a checker that looks at the two largest parts alone."""
    image = scenes.render(PAIR, 5)
    image.paste((45, 165, 65), (56, 10, 72, 26))
    assert {name for name, holds in vars(scenes.check(image, PAIR)).items() if not holds} == {"count"}


def test_one_object_is_no_pair():
    """Catches an index error, or a pass, where there is only one object."""
    result = scenes.check(scenes.render("a large red circle on the left of a white background", 0), PAIR)
    assert {name for name, holds in vars(result).items() if holds} == {"background"}


def test_every_sentence_reads_back():
    """Catches a caption whose words `parse` assigns elsewhere; there are two lengths of eleven words."""
    for scene in [*scenes.all_scenes(), *scenes.all_pairs()]:
        assert scenes.parse(scene.caption) == scene


@pytest.mark.parametrize(
    "sentence",
    ["", "a red circle", PAIR.replace("blue", "red"), PAIR.replace("square", "circle"), PAIR.replace(" of", " on")],
)
def test_other_sentences_are_refused(sentence):
    """Catches a pair of equal colours, of which no question has one answer, and a sentence read by halves."""
    with pytest.raises(ValueError, match="not a scene caption"):
        scenes.parse(sentence)


def test_a_pair_and_its_mirror_are_held_out_together():
    """Catches a held-out image that training saw under its other caption."""
    pairs = scenes.all_pairs()
    assert all(scenes.is_held_out(pair) == scenes.is_held_out(pair.mirrored) for pair in pairs)
    assert all(pair.canonical.relation in ("left", "above") for pair in pairs)
    assert 0.15 < sum(map(scenes.is_held_out, pairs)) / len(pairs) < 0.25
    drawn = [scenes.parse(caption) for caption in scenes.captions(50, 0, 2)]
    assert all(isinstance(pair, Pair) and scenes.is_held_out(pair) for pair in drawn)


@pytest.mark.parametrize("num_objects", [0, 3])
def test_other_numbers_of_objects_are_refused(num_objects):
    """Catches a silent fall back to one object."""
    with pytest.raises(ValueError, match="1 or 2 objects"):
        scenes.captions(1, 0, num_objects)


@pytest.mark.parametrize("num_objects", [1, 2])
def test_the_dot_is_small_and_clear_of_everything(num_objects):
    """Catches a dot that an object covers, that lies on the edge, or that moves what else is drawn."""
    for seed, caption in enumerate(scenes.captions(15, 1, num_objects)):
        drawing, plain = scenes.draw(caption, seed, dot="red"), scenes.render(caption, seed)
        differs = np.any(np.asarray(drawing.image) != np.asarray(plain), -1)
        ys, xs = np.nonzero(differs)
        assert 4 <= np.ptp(ys) + 1 <= 6 and 4 <= np.ptp(xs) + 1 <= 6
        assert 4 < min(ys.min(), xs.min()) and max(ys.max(), xs.max()) < scenes.SIZE_PX - 4
        grown = differs.copy()
        for shift in (-3, 3):
            grown |= np.roll(differs, shift, 0) | np.roll(differs, shift, 1)
        assert not (grown & (np.max(drawing.objects, 0) > 0)).any()


def test_an_unknown_dot_is_refused():
    """Catches a KeyError in place of a sentence."""
    with pytest.raises(ValueError, match="dot must have one of the colours red"):
        scenes.render(PAIR, 0, dot="pink")


@pytest.mark.parametrize("caption", ["a small green cross on the top of a black background", PAIR])
def test_questions_have_one_word_answers_of_every_kind(caption):
    """Catches a kind that is never asked, and an answer that tells of another object."""
    asked = scenes.questions(caption, 0, dot="orange")
    places = {"size", "position"} if isinstance(scenes.parse(caption), Scene) else {"relation"}
    assert {question.kind for question in asked} == {"color", "shape", "count", "detail"} | places
    assert all(" " not in question.answer for question in asked)
    assert len({question.question for question in asked}) == len(asked)
    answers = {question.question: question.answer for question in asked}
    assert answers["what color is the dot"] == "orange"
    assert not any(question.kind == "detail" for question in scenes.questions(caption, 0))
    if caption == PAIR:
        assert answers["where is the circle relative to the square"] == "left"
        assert answers["where is the square relative to the circle"] == "right"
        assert answers["what color is the square"] == "blue"
        assert answers["what shape is the red object"] == "circle"
    else:
        assert (answers["where is the cross"], answers["how big is the cross"]) == ("top", "small")


def test_shapes_are_counted_with_every_answer():
    """Catches a count whose answer can be guessed."""
    asked = [q for seed in range(40) for q in scenes.questions(PAIR, seed) if q.kind == "count"]
    answers = {question.answer for question in asked if "objects" not in question.question}
    assert answers == {"none", "one"}
    known = set(scenes.QUESTION_WORDS)
    assert all(set(question.question.split()) | {question.answer} <= known for question in asked)


def test_every_shape_is_counted():
    """Catches numbers that do not follow the caption."""
    asked = scenes.counts(PAIR)
    assert {question.question.split()[2]: question.answer for question in asked} == {
        "circles": "one",
        "squares": "one",
        "triangles": "none",
        "crosses": "none",
    }
