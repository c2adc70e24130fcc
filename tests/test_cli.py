"""The command line: what it writes, and that nothing wrong gets past it or leaves a trace."""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gen_turbo import output
from gen_turbo.commands import cli
from gen_turbo.commands.generate import Comparison, Job, plan_jobs, prompt_notes
from gen_turbo.config import ConfigError

PROMPT = "a large red circle"
SMALL = ("--height", "32", "--width", "32", "--steps", "3", "device=cpu")
ALWAYS = "processor.scope=attention"
"""Merges in runs of so few steps, too."""


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty current folder."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def _generate(checkpoint: Path, *arguments: str) -> int:
    return cli.main(["generate", "--prompt", PROMPT, *SMALL, f"checkpoint={checkpoint}", *arguments])


def _pixels(path: Path | str) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def _left(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_generate_writes_one_file(here, tiny_checkpoint, capsys):
    """Catches images of another size, and temporary files left behind."""
    assert _generate(tiny_checkpoint, "--output", "new/one.png", ALWAYS) == 0
    assert _left(here) == ["new", "new/one.png"]
    assert _pixels("new/one.png").shape == (32, 32, 3)
    assert capsys.readouterr().out == "new/one.png\n"


def test_generate_counts_seeds_up(here, tiny_checkpoint):
    """Catches several images of one prompt that are all the same, and a seed that is not honoured."""
    assert _generate(tiny_checkpoint, "--num-images", "2", "--seed", "4", "--output", "a", ALWAYS) == 0
    assert _left(here / "a") == ["000-a-large-red-circle-4.png", "001-a-large-red-circle-5.png"]
    assert _generate(tiny_checkpoint, "--seed", "5", "--output", "b.png", ALWAYS) == 0
    first, second = (_pixels(path) for path in sorted((here / "a").iterdir()))
    assert not np.array_equal(first, second)
    assert np.array_equal(second, _pixels("b.png"))


def test_generate_uses_the_processor(here, tiny_checkpoint):
    """Catches a command that loads the pipeline and forgets the processor."""
    method = ("processor=tome", "processor.ratio=0.6")
    assert _generate(tiny_checkpoint, "--output", "tome.png", *method) == 0
    assert _generate(tiny_checkpoint, "--output", "stock.png", "processor=null") == 0
    assert not np.array_equal(_pixels("tome.png"), _pixels("stock.png"))


def test_compare_writes_both_and_the_figures(here, tiny_checkpoint, capsys):
    """Catches a comparison of the processor with itself, and counts that are not those of the run."""
    assert _generate(tiny_checkpoint, "--compare", "--output", "both.png", "processor=random") == 0
    assert _left(here) == ["both.json", "both.png"]
    image = _pixels("both.png")
    assert image.shape == (32, 68, 3)
    record = json.loads(Path("both.json").read_text())
    figures = record["images"][0]
    assert (figures["num_tokens"], figures["num_kept"]) == (256, 128)
    error = np.mean((image[:, :32].astype(float) - image[:, 36:]) ** 2)
    assert error > 0
    assert figures["psnr_db"] == pytest.approx(10 * np.log10(255**2 / error), abs=0.01)
    assert record["config"]["processor"]["ratio"] == 0.5
    shown = capsys.readouterr().out
    assert "128/256" in shown
    assert "both.json" in shown


def test_compare_with_identity_is_lossless(here, tiny_checkpoint):
    """Catches another noise for the second image, and infinity in a JSON file."""
    assert _generate(tiny_checkpoint, "--compare", "--output", "many", "processor=identity") == 0
    assert _left(here / "many") == ["000-a-large-red-circle-0.png", "comparison.json"]
    record = json.loads(Path("many/comparison.json").read_text())
    assert record["images"][0]["psnr_db"] is None


def test_list_shows_every_name(capsys):
    """Catches a list kept by hand."""
    assert cli.main(["list"]) == 0
    shown = capsys.readouterr().out
    for name in ("identity", "random", "tome", "turbo", "sd15", "sdxl", "tiny"):
        assert f"\n  {name} " in shown


def test_report_shows_what_was_reduced(tiny_checkpoint, capsys):
    """Catches a report on a pipeline that has not run."""
    assert (
        cli.main(
            [
                "report",
                "--steps",
                "3",
                f"checkpoint={tiny_checkpoint}",
                "height=32",
                "width=32",
                "processor.ratio=0.5",
                "processor.scope=attention",
            ]
        )
        == 0
    )
    assert "256 -> 128 tokens" in capsys.readouterr().out


def test_bench_is_forwarded(capsys):
    """Catches a benchmark command whose arguments are not those of gen_turbo.bench."""
    with pytest.raises(SystemExit) as caught:
        cli.main(["bench", "layer", "--help"])
    assert caught.value.code == 0
    assert "--rounds" in capsys.readouterr().out


WRONG = {
    "no command": ([], "the following arguments are required: COMMAND"),
    "unknown command": (["paint"], "invalid choice: 'paint'"),
    "no prompt": (["generate"], "the following arguments are required: --prompt"),
    "unknown option": (["--bogus"], "unknown arguments: --bogus"),
    "unknown key": (["stpes=3"], "no setting 'stpes'"),
    "unknown method key": (["processor.rato=1"], "no setting 'rato'"),
    "bad method value": (["processor.ratio=1.2"], "got 1.2"),
    "unknown method": (["processor=nope"], "unknown method 'nope'"),
    "no key": (["steps"], "expected key=value"),
    "no such configuration": (["--config", "nope"], "unknown pipeline configuration 'nope'"),
    "no such file": (["--config", "nope.yaml"], "there is no file nope.yaml"),
    "no such device": (["device=cuda:99"], "there is no device cuda:99"),
    "no such checkpoint": (["checkpoint=./nope"], "there is no checkpoint folder ./nope"),
    "no internet": (["--config", "sd15", "device=cpu"], "the hub cannot be reached"),
    "no steps": (["--steps", "0"], "steps must be at least 1"),
    "not a number": (["--steps", "x"], "invalid int value: 'x'"),
    "odd height": (["--height", "100"], "height must be a positive multiple of 8"),
    "no images": (["--num-images", "0"], "the number of images must be at least 1"),
    "seed whose noise is that of 0": (["--seed", "4294967296"], "the seed must be between 0 and 4294967295"),
    "last seed whose noise is that of 0": (
        ["--seed", "4294967295", "--num-images", "2"],
        "the seed must be between 0 and 4294967295; got 4294967296",
    ),
    "negative seed": (["--seed", "-1"], "the seed must be between 0"),
    "file below a file": (["--output", "/dev/null/x.png"], "cannot write to /dev/null"),
    "many in one": (["--num-images", "2", "--output", "x.png"], "2 images do not fit"),
    "other format": (["--output", "x.jpg"], "images are written as PNG"),
    "nothing to compare": (["--compare", "processor=null"], "there is no processor to compare"),
    "report on captions": (["report", "--config", "caption"], "gen-turbo report cannot use the configuration caption"),
    "no semantic tokens": (["calibrate", "vistog", "--num-tokens", "0"], "--num-tokens must be at least 1; got 0"),
    "no prompts": (["calibrate", "par", "--config", "tiny", "--prompts", "0"], "--prompts must be at least 1; got 0"),
    "too many prompts": (
        ["calibrate", "par", "--config", "tiny", "--prompt", "x", "--prompts", "2"],
        "--prompts must be at most 1, or give more --prompt; got 2",
    ),
    "no schedule": (
        ["processor=par", "processor.schedule=nowhere.yaml"],
        "cannot read the schedule nowhere.yaml: No such file or directory\n",
    ),
}


@pytest.mark.parametrize(("arguments", "message"), WRONG.values(), ids=WRONG)
def test_wrong_use_is_one_sentence(here, capsys, arguments, message):
    """Catches tracebacks, usage pages, other exit codes, and folders made before the check."""
    is_whole = not arguments or arguments[0] in ("paint", "generate", "report", "calibrate")
    code = cli.main(arguments if is_whole else ["generate", "--prompt", PROMPT, *arguments])
    printed = capsys.readouterr()
    assert code == 2
    assert printed.err.startswith("gen-turbo: error: ")
    assert printed.err.count("\n") == 1
    assert message in printed.err
    assert not printed.out
    assert not _left(here)


def test_a_level_that_the_model_lacks_is_one_sentence(here, tiny_checkpoint, capsys):
    """Catches errors found only after loading that skip the one place where they are printed."""
    assert _generate(tiny_checkpoint, "processor.ratios.7=0.3") == 2
    assert "downsample factors [7]" in capsys.readouterr().err
    assert not _left(here)


RULE = ("processor=par", "processor.schedule=generic", "processor.inner=null")


def test_a_warning_is_one_sentence(here, tiny_checkpoint):
    """Catches a warning that begins with a file of ours and ends with a line of its source."""
    command = [str(Path(sys.executable).with_name("gen-turbo")), "generate", "--prompt", PROMPT]
    settings = [*SMALL, f"checkpoint={tiny_checkpoint}", *RULE]
    done = subprocess.run([*command, *settings], capture_output=True, text=True)
    said = [line for line in done.stderr.splitlines() if "nothing is skipped" in line or "skipping" in line]
    assert done.returncode == 0
    assert [line.partition("run: ")[0] for line in said] == ["gen-turbo: warning: nothing is skipped in this "]


def test_warm_up_is_not_warned_of(here, tiny_checkpoint, capsys):
    """Catches a warning of three steps that the user never wanted, and a column that says 0 of 0 tokens."""
    assert _generate(tiny_checkpoint, *RULE, "--compare", "--steps", "6", "--output", "a.png") == 0
    assert "all" in capsys.readouterr().out and warnings.formatwarning("x", UserWarning, "f.py", 7, "").startswith(
        "f.py"
    )


def test_the_command_is_installed_and_prints_no_traceback(here):
    """Catches an entry point that ignores the exit code."""
    command = [str(Path(sys.executable).with_name("gen-turbo")), "generate", "--prompt", "x", "--steps", "0"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "gen-turbo: error: steps must be at least 1; got 0\n"


def test_a_failed_write_leaves_the_old_file(tmp_path):
    """Catches a file that is opened for writing before its content is there."""
    path = tmp_path / "old.json"
    output.write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        output.write_json(path, {"a": float("inf")})
    with pytest.raises(OSError, match="cannot write mode"):
        output.write_image(path, Image.new("LAB", (2, 2)))
    assert _left(tmp_path) == ["old.json"]
    assert json.loads(path.read_text()) == {"a": 1}


def test_an_error_that_cannot_be_printed_is_an_exit_code(monkeypatch):
    """Catches a traceback where standard error is a file on a full disk."""

    class Full:
        def write(self, text):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys, "stderr", Full())
    assert cli.main(["generate", "--prompt", "x", "--steps", "0"]) == 2


def test_check_writable_leaves_no_trace(tmp_path):
    """Catches a check that makes the folder for good."""
    output.check_writable(tmp_path / "a" / "b")
    assert not _left(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="cannot write"):
        output.check_writable(tmp_path / "file" / "b")


def test_prompts_and_seeds_make_jobs():
    """Catches seeds that depend on how many prompts there are."""
    assert plan_jobs(["a", "b"], 3, 2) == [Job("a", 3), Job("a", 4), Job("b", 3), Job("b", 4)]


def test_unknown_words_are_noted(tiny_checkpoint):
    """Catches an image of nothing for a word that the model never saw."""
    from gen_turbo.factory import load_pipeline

    pipe = load_pipeline("tiny", checkpoint=str(tiny_checkpoint), device="cpu")
    assert not prompt_notes(pipe, PROMPT)
    assert prompt_notes(pipe, "a red banana") == ["the model does not know 'banana' in 'a red banana'"]
    assert "cut off" in prompt_notes(pipe, "red " * 30)[0]


def test_stock_is_on_the_left():
    """Catches images that change places."""
    black, white = Image.new("RGB", (8, 8)), Image.new("RGB", (8, 8), "white")
    both = Comparison(Job("x", 0), black, white, 2.0, 1.0, 4, 2, 0.5).side_by_side()
    assert (both.getpixel((0, 0)), both.getpixel((19, 0))) == ((0, 0, 0), (255, 255, 255))
