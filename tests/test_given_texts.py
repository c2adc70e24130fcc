"""Texts reach the model as they were given, from the command line, from YAML and from Python."""

from __future__ import annotations

import json

import pytest
import yaml

from gen_turbo import factory
from gen_turbo.commands import caption as captioning
from gen_turbo.commands import cli
from gen_turbo.commands.calibrate_vistog import _questions
from gen_turbo.config import CaptionConfig, ConfigError, load_config, load_config_of
from gen_turbo.pipelines.loading import find_checkpoint
from tests.stub_pipelines import CaptionStub, image

TEXTS = (
    "a\nb",
    "a\r\nb",
    "a\tb ",
    "${oc.env:SECRET}",
    "costs ${5}, $ {x} and ${",
    "???",
    "a\x1bb",
    'it\'s "so": #1',
    "null",
    "no",
    "1e-3",
    "",
    "\ue000",
    "\u2028",
)


@pytest.fixture(autouse=True)
def _secret(monkeypatch):
    monkeypatch.setenv("SECRET", "hf_123")


@pytest.mark.parametrize("text", TEXTS)
def test_from_python(text, monkeypatch):
    """Catches a settings library that fills in, strips or reads what a text only says."""
    monkeypatch.setattr(factory, "build_pipeline", lambda config, processor: config)
    assert factory.load_pipeline("caption", prompt=text, template=f"{text}{{prompt}}").prompt == text
    both = factory.load_pipeline("caption-generate", drawn=f"{{caption}}{text}", caption={"prompt": text})
    assert (both.drawn, both.caption.prompt) == (f"{{caption}}{text}", text)


@pytest.mark.parametrize("text", TEXTS)
def test_from_the_command_line(text, tmp_path, monkeypatch, capsys):
    """Catches a prompt that takes the way through YAML, and one that the digest of the settings does not see."""
    image(0).save(tmp_path / "0.png")
    seen = []
    monkeypatch.setattr(captioning, "build_pipeline", lambda config, processor: seen.append(config) or CaptionStub())
    arguments = ["caption", str(tmp_path / "0.png"), "--output", str(tmp_path / "said.jsonl")]
    assert cli.main([*arguments, "--prompt", text]) == 0
    assert cli.main([*arguments, "--prompt", f"{text}?"]) == 0
    assert [config.prompt for config in seen] == [text, f"{text}?"]


@pytest.mark.parametrize("text", TEXTS)
def test_from_yaml(text, tmp_path):
    """Catches a reader that resolves what stands in quotes."""
    path = tmp_path / "own.yaml"
    path.write_text(
        yaml.safe_dump({"pipeline": "caption", "checkpoint": "x", "prompt": text}, default_style='"'), encoding="utf-8"
    )
    assert load_config(path).prompt == text
    assert load_config_of(CaptionConfig, "x", "caption", [f"prompt={json.dumps(text)}"]).prompt == text


def test_nothing_of_the_environment_is_read(tmp_path):
    """Catches a stranger's YAML that puts a secret into a prompt, a manifest or a message."""
    path = tmp_path / "own.yaml"
    path.write_text(
        "pipeline: caption-generate\ncaption: caption\ngenerate: tiny\ndrawn: '{caption} ${oc.env:SECRET}'\n"
    )
    assert load_config(path).drawn == "{caption} ${oc.env:SECRET}"
    path.write_text("checkpoint: ${oc.env:SECRET}\nprocessor: {method: turbo, ratio: '${oc.env:SECRET}'}\n")
    with pytest.raises(ConfigError) as caught:
        find_checkpoint(load_config(path).checkpoint, "model_index.json")
    assert "hf_123" not in str(caught.value)
    with pytest.raises(ConfigError, match="nothing is filled in") as caught:
        factory.processors_of(load_config(path))
    assert "hf_123" not in str(caught.value)


@pytest.mark.parametrize("value", ["no", "1.50", "2024-01-01", "[a]", "0x10"])
def test_what_yaml_reads_as_no_text_is_refused(value):
    """Catches a prompt `no` that becomes `False`, and `1.50` that becomes `1.5`."""
    with pytest.raises(ConfigError, match="prompt must be a text"):
        load_config("caption", [f"prompt={value}"])


def test_questions_are_lines_of_a_file(tmp_path):
    """Catches questions without their spaces, split at rarer line ends, or read by the machine's own encoding."""
    path = tmp_path / "questions.txt"
    path.write_bytes(" what\u2028is it? \r\n\n  \ncaf\u00e9\x0b?".encode())
    assert _questions(path) == [" what\u2028is it? ", "caf\u00e9\x0b?"]
