"""The page, in a real browser: compare, cancel, explain, caption; narrow and dark; no file of the server is read."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from PIL import Image

from gen_turbo.commands import ui_work
from gen_turbo.commands.ui_code import as_python, as_yaml
from gen_turbo.commands.ui_wish import Wish, settings_of
from gen_turbo.commands.ui_work import Stop, Studio
from gen_turbo.config import ConfigError, PipelineConfig, load_config
from gen_turbo.factory import load_pipeline

ROOT = Path(__file__).parents[1]
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
PATIENCE_MS = 120_000
TINY = "pipeline: text-to-image\ncheckpoint: {checkpoint}\ndevice: cpu\nsteps: 4\nheight: 64\nwidth: 64\n"
BOTH = """
pipeline: caption-generate
caption: {{pipeline: caption, checkpoint: {vlm}, device: cpu, max_new_tokens: 3, processor: {{method: turbo}}}}
generate: {{pipeline: text-to-image, checkpoint: {checkpoint}, device: cpu, steps: 4, height: 64, width: 64}}
"""
DONE = "() => document.querySelector('#status textarea, #status input').value === 'done'"
WIDTHS = "() => [document.documentElement.scrollWidth, document.documentElement.clientWidth]"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path, vlm: Path) -> Path:
    """A folder with two configurations of small models."""
    folder = tmp_path_factory.mktemp("page")
    (folder / "tiny.yaml").write_text(TINY.format(checkpoint=tiny_checkpoint))
    (folder / "both.yaml").write_text(BOTH.format(checkpoint=tiny_checkpoint, vlm=vlm))
    return folder


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    """A page that is served by a process of its own."""
    pytest.importorskip("gradio", reason="the ui extra is not installed")
    command = [sys.executable, "-W", "ignore", "-m", "gen_turbo.commands.cli", "ui", "--port", "0"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen(
            [*command, "--config", "tiny.yaml", "--workflow", "both.yaml"],
            cwd=folder, stdout=log, stderr=log, env=environment,
        )  # fmt: skip
    try:
        end = time.monotonic() + PATIENCE_MS / 1000
        while not (found := re.search(r"the page is at (http://127\.0\.0\.1:\d+)/", (folder / "log").read_text())):
            assert server.poll() is None and time.monotonic() < end, (folder / "log").read_text()
            time.sleep(0.2)
        yield found[1]
    finally:
        server.kill()
        server.wait()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Debian's Chromium without a window."""
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if BROWSER is None:
        pytest.skip("there is no chromium; apt-get install chromium")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    """The page, opened; at the end it must have asked no other server for anything and logged no error."""
    context = browser.new_context(viewport={"width": 1280, "height": 1000})
    context.set_default_timeout(PATIENCE_MS)
    page = context.new_page()
    elsewhere: list[str] = []
    problems: list[str] = []
    page.on("request", lambda request: elsewhere.append(request.url))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.goto(address)
    page.wait_for_selector("#generate")
    yield page
    assert [url for url in elsewhere if not url.startswith((address, "data:", "blob:"))] == []
    assert problems == []
    context.close()


def text_of(page: Any, selector: str) -> str:
    """What a text box holds."""
    return str(page.input_value(f"{selector} textarea, {selector} input"))


def test_images_stand_side_by_side_with_their_figures(page: Any) -> None:
    """Catches a page that needs a mouse, an accelerated image that is stock again, and figures that do not arrive."""
    page.locator("#prompt textarea, #prompt input").focus()
    page.keyboard.type("a large red circle")
    page.keyboard.press("Enter")
    page.wait_for_function(DONE)
    page.wait_for_selector("#stock img")
    figures = page.inner_text("#figures")
    for words in ("times faster", "PSNR", "dB"):
        assert words in figures, figures
    assert re.search(r"tokens[^\d]*(\d+)\s+(?!\1\b)\d+", figures), figures
    assert page.get_attribute("#stock img", "src") != page.get_attribute("#image img", "src")
    page.get_by_role("button", name="Copy as Python or YAML").click()
    page.wait_for_selector("#python >> text=load_pipeline")
    assert "a large red circle" in page.inner_text("#python") and "method: turbo" in page.inner_text("#yaml")


def test_a_run_can_be_cancelled_and_another_one_begins(page: Any, folder: Path) -> None:
    """Catches a cancelled run that goes on in the background and holds the model."""
    page.get_by_role("button", name="Steps, seed, start image").click()
    steps = page.get_by_label("number input for Steps")
    steps.fill("100")
    steps.press("Enter")
    page.click("#generate")
    page.wait_for_function("() => /step/.test(document.querySelector('#status textarea, #status input').value)")
    page.click("#cancel")
    page.wait_for_function("() => document.querySelector('#status textarea, #status input').value === 'cancelled'")
    steps.fill("3")
    steps.press("Enter")
    page.click("#generate")
    page.wait_for_function(DONE)


def test_tokens_are_drawn_and_a_caption_becomes_an_image(page: Any) -> None:
    """Catches a tab that was never connected."""
    page.get_by_role("tab", name="Merged tokens").click()
    page.click("#explain")
    page.wait_for_selector("#overlay img")
    page.get_by_role("tab", name="Caption, then generate").click()
    page.click("#both")
    page.wait_for_selector("#new img")
    assert text_of(page, "#caption")


@pytest.mark.parametrize(("scheme", "is_dark"), [("light", False), ("dark", True)])
def test_a_narrow_screen_shows_everything(
    browser: Any, address: str, scheme: str, is_dark: bool, tmp_path: Path
) -> None:
    """Catches a page that is cut off on a telephone, and one that ignores the color scheme."""
    context = browser.new_context(viewport={"width": 390, "height": 800}, color_scheme=scheme)
    page = context.new_page()
    page.goto(address)
    page.wait_for_selector("#generate", timeout=PATIENCE_MS)
    page.wait_for_timeout(500)
    whole, seen = page.evaluate(WIDTHS)
    assert whole <= seen
    page.screenshot(path=tmp_path / "narrow.png")
    with Image.open(tmp_path / "narrow.png") as image:
        assert (image.convert("L").getpixel((4, 4)) < 128) == is_dark
    context.close()


def test_no_file_of_the_server_can_be_read(page: Any, address: str, folder: Path) -> None:
    """Catches a current folder that is served, and an address by which files are fetched."""
    for path in ("/etc/passwd", folder / "tiny.yaml", "tiny.yaml", "../../etc/passwd", ROOT / "pyproject.toml"):
        for route in ("gradio_api/file=", "file="):
            answer = page.request.get(f"{address}/{route}{path}")
            assert answer.status in (403, 404), (path, answer.status)
            assert "checkpoint" not in answer.text() and "root:" not in answer.text()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"prompt": " "}, "a prompt must have 1 to 500"),
        ({"prompt": "x" * 501}, "a prompt must have 1 to 500"),
        ({"preset": "x"}, "there is no setting 'x'"),
        ({"steps": 101}, "steps must be between 1 and 100"),
        ({"seed": -1}, "the seed must be between"),
        ({"seed": 2**32}, "the seed must be between"),
        ({"ratio": float("nan")}, "ratio must be a finite number"),
        ({"steps": None}, "steps must be a whole number"),
        ({"strength": 0.0}, "strength must be a number in"),
        ({"source": Image.new("1", (4097, 4097))}, "an image may have at most"),
    ],
)
def test_the_server_checks_what_the_page_sends(changed: dict[str, Any], message: str) -> None:
    """Catches limits that only the browser keeps."""
    given = {"prompt": "x", "preset": "default", "ratio": 0.5, "steps": 4, "seed": 0} | changed
    with pytest.raises(ConfigError, match=message):
        Wish(**given)


def test_the_first_run_is_warmed_up_before_the_clock_starts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a stock image that is slow because it came first, and a warm-up before every run."""
    monkeypatch.chdir(folder)
    config = load_config("tiny.yaml")
    assert isinstance(config, PipelineConfig)
    image = Image.new("RGB", (8, 8))
    studio, called = Studio(config, None), list[int]()  # type: ignore[arg-type]
    monkeypatch.setattr(studio, "_call", lambda pipe, wish, on_step: called.append(wish.steps) or image)
    monkeypatch.setattr(ui_work, "finest_layer", lambda layers: SimpleNamespace(num_tokens=4, num_kept=2))
    said = [shown.status for _ in range(2) for shown in studio.compare(Wish("x", "default", 0.5, 4, 3), Stop())]
    assert called == [2, 4, 4, 4, 4]
    assert said.count("warming up") == 1 and said.count("done") == 2


def test_what_is_copied_generates_the_same_image(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches Python and YAML that differ from what the page ran."""
    monkeypatch.chdir(folder)
    config = load_config("tiny.yaml")
    assert isinstance(config, PipelineConfig)
    *_, shown = Studio(config, None).compare(Wish("a red circle", "whole blocks", 0.5, 4, 3), Stop())  # type: ignore[arg-type]
    settings = settings_of("whole blocks", 0.5)
    call = {"prompt": "a red circle", "num_inference_steps": 4, "guidance_scale": 7.5, "height": 64, "width": 64}
    names: dict[str, Any] = {}
    exec(as_python("tiny.yaml", settings, call, 3), names)
    assert names["image"].tobytes() == shown.image.tobytes() != shown.stock.tobytes()
    Path("copied.yaml").write_text(as_yaml(config, settings, 4))
    assert yaml.safe_load(Path("copied.yaml").read_text())["processor"] == settings
    loaded = load_config("copied.yaml")
    assert (loaded.checkpoint, loaded.steps, loaded.height) == (config.checkpoint, 4, 64)
    assert type(load_pipeline("copied.yaml")).__name__ == "StableDiffusionPipeline"
