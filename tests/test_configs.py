"""Settings from YAML, overrides and code become processors and pipelines, or one sentence says why not."""

import json
from importlib import import_module
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

from gen_turbo import IdentityProcessor, RandomProcessor, ToMeProcessor, TurboProcessor, report
from gen_turbo.config import ConfigError, config_files, load_config, read_yaml
from gen_turbo.factory import build_processor, list_methods, list_pipelines, load_pipeline, processors_of
from gen_turbo.registry import METHODS, PIPELINES


def _yaml(folder: Path, text: str) -> str:
    path = folder / "own.yaml"
    path.write_text(text)
    return str(path)


@pytest.fixture
def own_yaml(tmp_path, tiny_checkpoint) -> str:
    """A configuration of the small checkpoint with a processor."""
    return _yaml(tmp_path, f"checkpoint: {tiny_checkpoint}\ndevice: cpu\nprocessor:\n  method: tome\n  ratio: 0.3\n")


@pytest.mark.parametrize("name", config_files("pipeline"))
def test_every_pipeline_file_is_valid_and_described(name):
    """Catches a shipped YAML with a key or method that the code does not know."""
    import_module("gen_turbo.pipelines")
    config = load_config(name)
    processors_of(config)
    assert list_pipelines()[name]
    assert config.pipeline in PIPELINES


def test_every_method_has_a_file_that_says_what_the_class_says():
    """Catches a YAML that promises another default than `Processor()` has."""
    assert sorted(config_files("method")) == sorted(list_methods())
    for name in config_files("method"):
        assert build_processor(name) == METHODS[name](), name
        assert read_yaml("method", name)["method"] == name
        assert list_methods()[name].endswith(".")


def test_overrides_apply_in_order_with_their_types():
    """Catches overrides that stay texts, or that are applied before the file."""
    overrides = [
        "steps=3",
        "processor=tome",
        "processor.ratio=0.25",
        "processor.ratios.2=1e-1",
        "variant=null",
        "steps=7",
    ]
    config = load_config("tiny", overrides)
    assert (config.steps, config.variant) == (7, None)
    assert build_processor(config.processor) == ToMeProcessor(0.25, ratios={2: 0.1})


def test_another_method_keeps_shared_settings():
    """Catches a change of method that silently drops the ratio."""
    config = load_config("tiny", ["processor.ratio=0.2", "processor.method=random"])
    assert build_processor(config.processor).ratio == 0.2
    assert isinstance(build_processor(config.processor), RandomProcessor)


def test_null_means_stock():
    """Catches a null processor that falls back to a default."""
    assert build_processor(load_config("tiny", ["processor=null"]).processor) is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stpes=3", "no setting 'stpes'; known: checkpoint"),
        ("steps=many", "steps: Value 'many'"),
        ("steps=0", "steps must be at least 1; got 0"),
        ("steps=2.5", "steps: Value '2.5'"),
        ("height=100", "height must be a positive multiple of 8 pixels; got 100"),
        ("width=-8", "width must be a positive multiple of 8 pixels; got -8"),
        ("guidance_scale=nan", "guidance_scale must be"),
        ("dtype=int8", "dtype must be one of auto, float32"),
        ("device=tpu", "device must be auto, cpu"),
        ("checkpoint=null", "checkpoint"),
        ("steps", "expected key=value"),
        ("=3", "expected key=value"),
        ("steps=[1", "cannot read the value"),
        ("steps=${nowhere}", "steps: nothing is filled in for '${nowhere}'"),
        ("steps=???", "steps: nothing is filled in for '???'"),
        ("steps=1000000000000", "steps must be at most 1000; got 1000000000000; max_steps=... allows more"),
        ("height=8000000", "height must be at most 4096; got 8000000; max_size=... allows more"),
        ("width=8000000", "width must be at most 4096"),
        ("device=cuda:99999999999", "device must be auto, cpu"),
        ("device=cuda:007", "device must be auto, cpu"),
        ("device=???", "device must be auto, cpu"),
        ("variant=no", "variant must be a text; YAML reads this one as False, write it in quotes"),
        ("guidance_scale=inf", "guidance_scale must be"),
        ("device.name=x", "device is 'auto', which has no settings"),
    ],
)
def test_a_wrong_override_says_what_is_wrong(override, message):
    """Catches wrong settings that are ignored, clamped or end in a library's traceback."""
    with pytest.raises(ConfigError) as caught:
        load_config("tiny", [override])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "turbo", "rato": 1}, "method 'turbo' has no setting 'rato'; known: ratio"),
        ({"method": "turbo", "ratio": "abc"}, "ratio: Value 'abc'"),
        ({"method": "turbo", "ratio": 1.2}, "got 1.2"),
        ({"method": "turbo", "ratios": {"a": 0.1}}, "ratios.a"),
        ({"method": "nope"}, "unknown method 'nope'; known: divprune"),
        ({"ratio": 0.3}, "lacks a method"),
        ([1], "processor must be"),
        ("nope", "unknown method 'nope'"),
        ("nope.yaml", "there is no file nope.yaml"),
    ],
)
def test_a_wrong_processor_says_what_is_wrong(settings, message):
    """Catches a processor built from settings that were not understood."""
    with pytest.raises(ConfigError) as caught:
        build_processor(settings)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b\n", "must hold keys and values"),
        ("a: [1\n", "is not valid YAML"),
        ("steps: 3\n", "lacks checkpoint"),
        ("checkpoint: x\nsteps: ${oc.env:HOME}\n", "steps: nothing is filled in for '${oc.env:HOME}'"),
        ("steps: 3\nsteps: 4\n", "duplicate key steps"),
        ("[" * 5000, "is not valid YAML"),
        ("", "lacks checkpoint"),
    ],
)
def test_a_wrong_file_says_what_is_wrong(tmp_path, text, message):
    """Catches a YAML error that shows as a parser's traceback."""
    with pytest.raises(ConfigError) as caught:
        load_config(_yaml(tmp_path, text))
    assert message in str(caught.value)


def test_an_unknown_name_lists_the_known():
    """Catches a missing file reported by a path inside the package."""
    with pytest.raises(ConfigError, match=r"unknown pipeline configuration 'nope'; known: .*tiny"):
        load_config("nope")


def test_load_pipeline_attaches_what_the_file_names(own_yaml):
    """Catches a factory that builds the processor and forgets to attach it."""
    pipe = load_pipeline(own_yaml)
    assert type(pipe) is StableDiffusionPipeline
    assert pipe.unet.dtype == torch.float32
    pipe.set_progress_bar_config(disable=True)
    pipe("a red circle", num_inference_steps=1, height=32, width=32)
    reduced = [layer for layer in report(pipe).layers if layer.status == "reduced"]
    assert {(layer.num_tokens, layer.num_kept) for layer in reduced} == {(256, 256 - int(256 * 0.3))}


def test_load_pipeline_takes_overrides(own_yaml):
    """Catches keyword overrides that lose against the file."""
    pipe = load_pipeline(own_yaml, processor=None, dtype="float16")
    assert not report(pipe).layers
    assert pipe.unet.dtype == torch.float16
    assert report(load_pipeline(own_yaml, processor=IdentityProcessor())).layers
    assert report(load_pipeline(own_yaml, processor="turbo")).layers


def test_load_pipeline_refuses_what_has_no_effect(own_yaml):
    """Catches steps that are accepted at loading and then ignored by the call."""
    with pytest.raises(ConfigError, match="num_inference_steps=..."):
        load_pipeline(own_yaml, steps=3)


def test_the_same_settings_give_the_same_image_as_code(own_yaml):
    """Catches a processor from YAML that differs from the one made in Python."""
    pipe = load_pipeline(own_yaml, processor={"method": "turbo", "ratio": 0.4, "restore": "copy", "scope": "block"})
    pipe.set_progress_bar_config(disable=True)
    images = []
    for processor in (None, TurboProcessor(0.4, restore="copy", scope="block")):
        if processor is not None:
            pipe.set_attn_processor(processor)
        generator = torch.Generator().manual_seed(1)
        out = pipe("a red circle", num_inference_steps=2, height=32, width=32, generator=generator, output_type="pt")
        images.append(out.images)
    assert torch.equal(*images)


def test_the_embedded_model_loads():
    """Catches weights that are missing from the package or of another architecture."""
    assert type(load_pipeline("tiny", device="cpu")) is StableDiffusionPipeline


@pytest.mark.parametrize(
    ("checkpoint", "message"),
    [
        ("embedded:nope", "there is no embedded model 'nope'"),
        ("/no/such/folder", "there is no checkpoint folder /no/such/folder"),
        ("somebody/not-cached", "not in the local cache and the hub cannot be reached"),
    ],
)
def test_a_missing_checkpoint_says_so(checkpoint, message):
    """Catches a hub error page shown for a wrong path."""
    with pytest.raises(ConfigError) as caught:
        load_pipeline("sd15", checkpoint=checkpoint, device="cpu")
    assert message in str(caught.value)


def test_a_checkpoint_that_was_never_fetched_says_so():
    """Catches a message about the network where asking it was forbidden."""
    with pytest.raises(ConfigError, match="set local_files_only=false to fetch it"):
        load_pipeline("sd15", local_files_only=True, checkpoint="somebody/not-cached", device="cpu")


def test_a_missing_device_says_so():
    """Catches a silent fall back to the CPU."""
    with pytest.raises(ConfigError, match="there is no device cuda:99 on this machine"):
        load_pipeline("tiny", device="cuda:99")


def _copy(source: Path, target: Path) -> Path:
    for path in source.rglob("*"):
        if path.is_file():
            to = target / path.relative_to(source)
            to.parent.mkdir(parents=True, exist_ok=True)
            to.write_bytes(path.read_bytes())
    return target


def test_pickled_weights_are_not_read(tiny_checkpoint, tmp_path):
    """Catches a loader that falls back to pickle files, which may run code."""
    folder = _copy(tiny_checkpoint, tmp_path / "pickled")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.unlink()
    torch.save({}, weights.with_suffix(".bin"))
    with pytest.raises(ConfigError, match="cannot load"):
        load_pipeline("tiny", checkpoint=str(folder), device="cpu")


def test_code_of_a_checkpoint_is_not_run(tiny_checkpoint, tmp_path):
    """Catches a loader that trusts remote code."""
    folder = _copy(tiny_checkpoint, tmp_path / "coded")
    index = json.loads((folder / "model_index.json").read_text())
    index["_class_name"] = ["pipeline", "Own"]
    (folder / "model_index.json").write_text(json.dumps(index))
    (folder / "pipeline.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(ConfigError, match="cannot load"):
        load_pipeline("tiny", checkpoint=str(folder), device="cpu")
    assert not (tmp_path / "ran").exists()


def test_a_damaged_checkpoint_says_so(tiny_checkpoint, tmp_path):
    """Catches a truncated download that ends in a traceback."""
    folder = _copy(tiny_checkpoint, tmp_path / "damaged")
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ConfigError, match="cannot load"):
        load_pipeline("tiny", checkpoint=str(folder), device="cpu")
