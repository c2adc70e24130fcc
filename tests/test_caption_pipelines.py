"""Images to captions to new images, by pipelines that YAML names."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from stated import TurboProcessor
from transformers import BertTokenizer, BlipForConditionalGeneration, BlipForQuestionAnswering, BlipProcessor
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from gen_turbo import attach, load_pipeline, report, scenes
from gen_turbo.config import ConfigError, load_config
from gen_turbo.inputs import find_images, images_of, open_image
from tests.snapshots import differences, model_state
from tests.vlm.test_blip import _blip

SMALL = {"num_inference_steps": 3, "height": 32, "width": 32}


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    """Three scenes."""
    return [scenes.render(caption, 0) for caption in scenes.captions(3, 0)]


@pytest.fixture(scope="module")
def both(vlm, tiny_checkpoint):
    """The combined pipeline on small checkpoints, stock."""
    halves = {"caption": {"checkpoint": str(vlm)}, "generate": {"checkpoint": str(tiny_checkpoint)}}
    pipe = load_pipeline("caption-generate", processor=None, **halves)
    pipe.generate.set_progress_bar_config(disable=True)
    return pipe


def test_a_caption_is_what_generate_writes(vlm, images):
    """Catches a prompt left in the text, another prompt than the model's own, and tokens counted elsewhere."""
    pipe = load_pipeline("caption", checkpoint=str(vlm), processor=TurboProcessor(0.5))
    result = pipe(images, max_new_tokens=5)
    inputs = pipe.preparer(images=images, text=["<image>describe the picture"] * 3, return_tensors="pt")
    with torch.no_grad():
        tokens = pipe.vlm.generate(**inputs, max_new_tokens=5, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    assert result.texts == pipe.preparer.batch_decode(tokens, skip_special_tokens=True)
    assert (result.num_tokens, result.num_kept) == (3 * 256, 3 * 128)
    assert result.text == result.texts[0]
    assert result.seconds > 0


def test_batches_change_nothing_and_reset_gives_stock(vlm, images):
    """Catches images that swap their captions between batches, and a processor that stays."""
    pipe = load_pipeline("caption", checkpoint=str(vlm), processor=None)
    stock, before = pipe(images), model_state(pipe.vlm)
    pipe.set_attn_processor(TurboProcessor(0.75))
    together, apart = pipe(images), pipe(images, batch_size=1)
    assert together.texts == apart.texts
    assert together.num_kept == apart.num_kept == 3 * 64
    assert [row.num_tokens for row in report(pipe).layers] == [256]
    pipe.reset_attn_processor()
    assert differences(before, model_state(pipe.vlm)) == []
    assert pipe(images).texts == stock.texts


def test_a_question_reaches_the_model(vlm, images):
    """Catches a prompt that is dropped on the way."""
    pipe = load_pipeline("caption", checkpoint=str(vlm), processor=None)
    assert pipe.text_of("what shape") == "<image>what shape"
    seen = []
    with torch.no_grad():
        handle = pipe.vlm.register_forward_pre_hook(lambda m, a, k: seen.append(k), with_kwargs=True)
        pipe(images[0], prompt="what shape", max_new_tokens=1)
        handle.remove()
    asked = pipe.preparer.tokenizer("what shape")["input_ids"][1:]
    assert seen[0]["input_ids"][0, -len(asked) :].tolist() == asked
    turn = "{% for part in messages[0].content %}[{{ part.type }}{{ part.text }}]{% endfor %} ASSISTANT:"
    pipe.preparer.chat_template = turn
    assert pipe.text_of("what shape") == "[image][textwhat shape] ASSISTANT:"
    assert pipe.text_of(None) == "[image] ASSISTANT:"
    pipe.config.template = "ask <image> {prompt} now"
    assert pipe.text_of("it") == "ask <image> it now"
    pipe.config.template = "ask <image>"
    with pytest.raises(ConfigError, match="template must contain"):
        pipe.text_of("it")


@pytest.mark.parametrize("model", [BlipForConditionalGeneration, BlipForQuestionAnswering])
def test_models_that_read_images_on_the_side(tmp_path, images, model):
    """Catches a placeholder for models that want none, and tokens counted in a prompt that has no image."""
    made = _blip(model)
    made.save_pretrained(tmp_path)
    words = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *(f"w{i}" for i in range(96))]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    preparer = BlipImageProcessorPil(size={"height": 32, "width": 32})
    BlipProcessor(preparer, BertTokenizer(str(tmp_path / "vocab.txt"))).save_pretrained(tmp_path)
    prompt = None if model is BlipForConditionalGeneration else "w5 w6"
    pipe = load_pipeline("caption", checkpoint=str(tmp_path), processor="turbo_vit")
    assert type(pipe.vlm) is model
    pipe.config.prompt = prompt
    result = pipe(images, max_new_tokens=4)
    assert len(result.texts) == 3
    assert (result.num_tokens, result.num_kept) == (3 * 16, 3 * 6)


def test_the_whole_way(both, images):
    """Catches halves with one processor for both, captions that are not what is drawn, and seeds that do not count."""
    both.set_attn_processor({"caption": TurboProcessor(0.5), "generate": TurboProcessor(0.25, restore="copy")})
    both.config.drawn = "a {caption}"
    result = both(images, batch_size=2, seeds=[5, 6, 7], **SMALL)
    both.config.drawn = "{caption}"
    assert result.captions == both.caption(images).texts
    assert result.prompts == [f"a {text}" for text in result.captions]
    assert (result.num_tokens, result.num_kept) == (3 * 256, 3 * 128)
    assert (result.drawn_tokens, result.drawn_kept) == (256, 192)
    assert result.seconds == result.caption_seconds + result.generate_seconds
    generator = [torch.Generator().manual_seed(7)]
    again = both.generate([result.prompts[2]], generator=generator, guidance_scale=3.0, **SMALL).images[0]
    assert np.array_equal(np.asarray(again), np.asarray(result.images[2]))
    both.reset_attn_processor()
    assert not report(both.generate).layers
    assert not report(both.caption).layers


def test_a_strength_starts_from_the_image(both, images):
    """Catches a strength that is ignored, a processor lost with the change of class, and a way back that is not."""
    both.generate.set_attn_processor(TurboProcessor(0.25, restore="copy"))
    settings = {"num_inference_steps": 4, "height": 32, "width": 32}
    free = both(images[0], **settings).images[0]
    call = {"num_inference_steps": 4, "strength": 0.5}
    both.config.generate.height = both.config.generate.width = 32
    started = both(images[0], **call)
    assert "Img2Img" in type(both.generate).__name__
    assert started.images[0].size == (32, 32)
    assert started.drawn_kept == 192
    assert not np.array_equal(np.asarray(started.images[0]), np.asarray(free))
    assert not np.array_equal(*(np.asarray(both(one, **call).images[0]) for one in images[:2]))
    assert np.array_equal(np.asarray(both(images[0], **settings).images[0]), np.asarray(free))
    assert report(both.generate).layers
    both.config.generate.height = both.config.generate.width = 128
    both.reset_attn_processor()


def test_two_halves_in_one_file(tmp_path):
    """Catches overrides that reach the wrong half, and names that are not replaced by what they stand for."""
    config = load_config(
        "caption-generate", ["caption.processor=tome", "generate.processor.ratio=0.25", "strength=0.5"]
    )
    assert config.caption.processor["method"] == "tome"
    assert config.generate.processor == {"method": "turbo", "ratio": 0.25}
    assert config.strength == 0.5
    (tmp_path / "own.yaml").write_text("pipeline: caption-generate\ncaption: caption\ngenerate: sd15\n")
    own = load_config(tmp_path / "own.yaml")
    assert (own.generate.steps, own.caption.prompt) == (25, "describe the picture")


WRONG = {
    "strength": (["strength=2"], "strength must be a number in"),
    "drawn": (["drawn=nothing"], "drawn must contain {caption}"),
    "batch": (["caption.batch_size=0"], "batch_size must be at least 1"),
    "length": (["caption.max_new_tokens=0"], "max_new_tokens must be at least 1"),
    "unknown": (["caption.stpes=1"], "stpes"),
    "half": (["caption=nope"], "unknown pipeline configuration 'nope'"),
}


@pytest.mark.parametrize(("overrides", "message"), WRONG.values(), ids=WRONG)
def test_wrong_settings_say_what_is_wrong(overrides, message):
    """Catches settings of a half that nobody checks."""
    with pytest.raises(ConfigError) as caught:
        load_config("caption-generate", overrides)
    assert message in str(caught.value)


def test_wrong_checkpoints_say_what_is_wrong(tmp_path, tiny_checkpoint, vlm):
    """Catches tracebacks, pickled weights, and models without a preparer."""
    with pytest.raises(ConfigError, match="is no transformers checkpoint: it holds no config.json"):
        load_pipeline("caption", checkpoint=str(tiny_checkpoint))
    with pytest.raises(ConfigError, match="there is no embedded model 'nope'"):
        load_pipeline("caption", checkpoint="embedded:nope")
    with pytest.raises(ConfigError, match="not in the local cache and the hub cannot be reached"):
        load_pipeline("caption", checkpoint="somebody/not-cached")
    with pytest.raises(ConfigError, match="set local_files_only=false to fetch it"):
        load_pipeline("caption", checkpoint="somebody/not-cached", local_files_only=True)
    for name in ("config.json", "generation_config.json"):
        (tmp_path / name).write_bytes((vlm / name).read_bytes())
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match="cannot load"):
        load_pipeline("caption", checkpoint=str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes((vlm / "model.safetensors").read_bytes())
    with pytest.raises(ConfigError, match="processor"):
        load_pipeline("caption", checkpoint=str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ConfigError, match="cannot load"):
        load_pipeline("caption", checkpoint=str(tmp_path))


def test_images_are_found_and_opened(tmp_path, images):
    """Catches other files of a folder, doubles, transparency that turns black, and sideways photographs."""
    for index, image in enumerate(images):
        image.save(tmp_path / f"{index}.png")
    (tmp_path / "notes.txt").write_text("no image")
    assert [path.name for path in find_images([tmp_path, tmp_path / "1.png"])] == ["0.png", "1.png", "2.png"]
    assert [path.name for path in find_images([f"{tmp_path}/[12].*"])] == ["1.png", "2.png"]
    with pytest.raises(ConfigError, match="does not exist"):
        find_images([tmp_path / "no*.png"])
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert open_image(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)
    turned = Image.new("RGB", (8, 4))
    exif = turned.getexif()
    exif[274] = 6
    turned.save(tmp_path / "turned.jpg", exif=exif)
    assert open_image(tmp_path / "turned.jpg").size == (4, 8)
    assert len(images_of([images[0], str(tmp_path / "1.png"), tmp_path])) == 7
    with pytest.raises(ConfigError, match="cannot read the image"):
        open_image(tmp_path / "notes.txt")
    with pytest.raises(ConfigError, match="expected an image"):
        images_of(3)


def test_attach_takes_the_pipeline(vlm):
    """Catches a pipeline that `attach` and `report` do not know."""
    pipe = load_pipeline("caption", checkpoint=str(vlm), processor=None)
    with attach(pipe, TurboProcessor(0.5)):
        assert report(pipe).layers
    assert not report(pipe).layers


@pytest.mark.parametrize("images", [None, 3, "image.png", [], [None]], ids=repr)
def test_what_is_no_image_is_refused_in_a_sentence(images):
    """Catches a TypeError about iteration where somebody passes None or the number of an image."""
    pipe = load_pipeline("caption", processor=None)
    with pytest.raises(ConfigError, match="expected a PIL image or a list of them; got"):
        pipe(images)
