"""The command line as a whole: help, defaults, models by name, completion."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from gen_turbo.commands.cli import _parser, main
from gen_turbo.commands.parsing import model_overrides
from gen_turbo.config import PipelineConfig, load_config
from gen_turbo.pipelines.loading import dtype_of


def parsers(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """A parser and all below it."""
    yield parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for child in action.choices.values():
                yield from parsers(child)


def test_every_option_has_a_help_text_that_names_its_default() -> None:
    """Catches an option without a word, and a default that one has to look up in the source."""
    seen = 0
    for parser in parsers(_parser()):
        formatter = parser._get_formatter()
        for action in parser._actions:
            if action.option_strings and not isinstance(action, (argparse._HelpAction, argparse._VersionAction)):
                text = formatter._get_help_string(action)
                assert action.help, (parser.prog, action.option_strings)
                is_flag = isinstance(action, argparse._StoreTrueAction)
                assert is_flag or action.required or "(default: " in text, (parser.prog, action.option_strings, text)
                assert text.count("default: ") <= 1, (parser.prog, text)
                seen += 1
        parser.format_help()
    assert seen > 100


def test_a_model_by_name_has_its_own_size() -> None:
    """Catches a checkpoint that is run at the size and guidance of the embedded model."""
    arguments = ["generate", "--prompt", "x", "--model", "owner/name", "--device", "cpu", "--dtype", "bfloat16"]
    name, given = model_overrides(_parser().parse_args(arguments))
    config = load_config(name, given)
    assert isinstance(config, PipelineConfig)
    assert (config.checkpoint, config.height, config.width, config.variant) == ("owner/name", None, None, None)
    assert (config.guidance_scale, config.device, config.dtype) == (7.5, "cpu", "bfloat16")
    _, given = model_overrides(_parser().parse_args([*arguments, "--config", "sdxl"]))
    config = load_config("sdxl", given)
    assert isinstance(config, PipelineConfig)
    assert (config.checkpoint, config.height) == ("owner/name", 1024)


def test_a_folder_is_a_model(tmp_path: Path, tiny_checkpoint: Path) -> None:
    """Catches `--model` that no command reads."""
    command = ["generate", "--prompt", "x", "--output", str(tmp_path / "a.png"), "--steps", "1", "processor=null"]
    assert main([*command, "--model", str(tiny_checkpoint), "--device", "cpu", "--height", "32", "--width", "32"]) == 0
    assert (tmp_path / "a.png").exists()


@pytest.mark.parametrize(
    ("pipeline", "dtype"),
    [
        ("FluxPipeline", torch.bfloat16),
        ("WanPipeline", torch.bfloat16),
        ("StableDiffusionXLPipeline", torch.float16),
        ("", torch.float16),
    ],
)
def test_dtype_is_that_of_the_training(pipeline: str, dtype: torch.dtype) -> None:
    """Catches Flux in float16, which overflows, and half precision on a CPU."""
    assert dtype_of("auto", torch.device("cuda"), pipeline) == dtype
    assert dtype_of("auto", torch.device("cpu"), pipeline) == torch.float32
    assert dtype_of("float16", torch.device("cuda"), pipeline) == torch.float16


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_knows_commands_and_options(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a script of another program."""
    pytest.importorskip("shtab", reason="the completion extra is not installed")
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert all(word in script for word in ("gen-turbo", "caption-generate", "--retry-quarantined"))
