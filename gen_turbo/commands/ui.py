"""`gen-turbo ui`: a page on which stock and accelerated images stand side by side."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

from gen_turbo import scenes
from gen_turbo.commands.failures import is_out_of_memory, sentence
from gen_turbo.config import CALL_SETTINGS, CaptionGenerateConfig, ConfigError, PipelineConfig, load_config_of

_MOST_WAITING, _MOST_UPLOAD = 16, "10mb"
_EXAMPLE = "a large red circle on the left of a gray background"
_CSS = """
.gradio-container, .gradio-container > main {width: 100% !important; max-width: 1100px !important; margin: auto}
footer {display: none !important}
:focus-visible {outline: 3px solid #4f6df5 !important; outline-offset: 2px}
@media (max-width: 640px) {.pair {flex-direction: column !important} .pair > * {width: 100% !important}}
"""


def add_ui_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of the command."""
    parser.add_argument("--config", default="tiny", help="the pipeline that generates: a name or YAML (default: tiny)")
    parser.add_argument(
        "--workflow", default="caption-generate", help="the one that captions and generates (default: caption-generate)"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine)")
    parser.add_argument("--port", type=int, default=7860, help="port; 0 takes any that is free (default: 7860)")
    parser.add_argument("--open", action="store_true", help="open a browser (default: print the address)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings of the pipeline that generates")
    parser.set_defaults(run=run)


def run(namespace: argparse.Namespace) -> None:
    """Serves the page until it is interrupted.

    Raises:
        ConfigError: If a configuration does not fit, Gradio is not installed or the port is taken.
    """
    config = load_config_of(PipelineConfig, "gen-turbo ui", namespace.config, namespace.overrides)
    workflow = load_config_of(CaptionGenerateConfig, "gen-turbo ui --workflow", namespace.workflow)
    if not 0 <= namespace.port < 2**16:
        raise ConfigError(f"the port must be between 0 and {2**16 - 1}; got {namespace.port}")
    with tempfile.TemporaryDirectory(prefix="gen-turbo-") as folder:
        os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": folder, "HF_HUB_DISABLE_TELEMETRY": "1"}
        try:
            gradio: Any = import_module("gradio")
        except ImportError as error:
            raise ConfigError("the page needs Gradio; run: pip install 'gen_turbo[ui]'") from error
        from gen_turbo.commands.ui_work import Studio

        page = build(gradio, Studio(config, workflow), namespace.config)
        try:
            _, address, _ = page.launch(
                server_name=namespace.host,
                server_port=namespace.port or None,
                inbrowser=namespace.open,
                share=False,
                quiet=True,
                prevent_thread_lock=True,
                max_file_size=_MOST_UPLOAD,
                allowed_paths=[],
                ssr_mode=False,
                footer_links=[],
                css=_CSS,
                theme=gradio.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
            )
        except OSError as error:
            raise ConfigError(f"cannot listen on {namespace.host}:{namespace.port}: {error}") from error
        print(f"the page is at {address} (Ctrl-C ends it)", flush=True)
        page.block_thread()


def build(gradio: Any, studio: Any, name: str) -> Any:
    """Puts the page together."""
    with gradio.Blocks(title="gen_turbo", analytics_enabled=False, delete_cache=(600, 600)) as page:
        gradio.Markdown("# gen_turbo\nStock and accelerated, from the same noise.")
        with gradio.Tab("Generate"):
            _add_generate(gradio, studio, name)
        with gradio.Tab("Merged tokens"):
            _add_tokens(gradio, studio)
        with gradio.Tab("Caption, then generate"):
            _add_caption(gradio, studio)
    page.queue(max_size=_MOST_WAITING, default_concurrency_limit=1, api_open=False)
    return page


def _settings(gradio: Any) -> tuple[Any, Any]:
    from gen_turbo.commands.ui_wish import PRESETS

    preset = gradio.Dropdown(list(PRESETS), value="default", label="Setting")
    ratio = gradio.Slider(0.1, 0.75, 0.7, step=0.05, label="Ratio: fraction of tokens removed")
    return preset, ratio


def _add_generate(gradio: Any, studio: Any, name: str) -> None:
    from gen_turbo.commands.ui_code import as_python, as_yaml
    from gen_turbo.commands.ui_wish import MOST_PROMPT, MOST_STEPS, PRESETS, Wish, settings_of
    from gen_turbo.commands.ui_work import Stop

    config, wants_stop = studio.config, gradio.State(Stop())
    prompt = gradio.Textbox(_EXAMPLE, label="Prompt", max_length=MOST_PROMPT, elem_id="prompt")
    with gradio.Row(elem_classes="pair"):
        preset, ratio = _settings(gradio)
    with gradio.Accordion("Steps, seed, start image", open=False):
        steps = gradio.Slider(1, MOST_STEPS, min(config.steps, MOST_STEPS), step=1, label="Steps")
        seed = gradio.Number(0, label="Seed", precision=0, minimum=0)
        source = gradio.Image(label="Start from an image", type="pil", sources=["upload"], height=200)
        strength = gradio.Slider(0.1, 1.0, 0.6, step=0.05, label="Strength: how far to go from it")
    with gradio.Row():
        start = gradio.Button("Generate", variant="primary", elem_id="generate")
        stop = gradio.Button("Cancel", variant="stop", elem_id="cancel")
    status = gradio.Textbox(label="Status", interactive=False, elem_id="status")
    with gradio.Row(elem_classes="pair"):
        stock = gradio.Image(label="Stock", type="pil", format="png", elem_id="stock", buttons=["download"])
        image = gradio.Image(label="Accelerated", type="pil", format="png", elem_id="image", buttons=["download"])
    figures = gradio.Dataframe(
        headers=["", "stock", "accelerated"],
        column_widths=["34%", "26%", "40%"],
        wrap=True,
        label="Figures",
        interactive=False,
        elem_id="figures",
        type="array",
    )

    def go(*given: Any) -> Iterator[tuple[Any, ...]]:
        try:
            wish = Wish(given[0], given[1], given[2], int(given[3]), int(given[4] or 0), given[5], given[6])
            for shown in studio.compare(wish, given[7]):
                yield shown.status, shown.stock, shown.image, [list(row) for row in shown.rows]
        except Exception as error:
            raise gradio.Error(_said(error)) from None

    def code(prompt: str, preset: str, ratio: float, steps: float, seed: float | None) -> tuple[str, str]:
        settings = settings_of(preset, ratio)
        call = {**{key: getattr(config, setting) for setting, key in CALL_SETTINGS.items()}, "prompt": prompt}
        call["num_inference_steps"] = int(steps)
        return as_python(name, settings, call, int(seed or 0)), as_yaml(config, settings, int(steps))

    first = code(_EXAMPLE, "default", 0.7, min(config.steps, MOST_STEPS), 0)
    with gradio.Accordion("Copy as Python or YAML", open=False):
        python = gradio.Code(first[0], label="Python", language="python", elem_id="python", interactive=False)
        text = gradio.Code(first[1], label="YAML", language="yaml", elem_id="yaml", interactive=False)

    wanted = [prompt, preset, ratio, steps, seed]
    event = {"fn": go, "inputs": [*wanted, source, strength, wants_stop], "outputs": [status, stock, image, figures]}
    shared = {"concurrency_id": "model", "show_progress": "minimal"}
    for begun in (start.click, prompt.submit):
        begun(_begin, wants_stop, status, queue=False).then(**event, **shared)
    stop.click(_cancel, wants_stop, queue=False)
    preset.change(lambda name: PRESETS[name].get("ratio", 0.7), preset, ratio, queue=False)
    for one in wanted:
        one.change(code, wanted, [python, text], queue=False, show_progress="hidden")


def _add_tokens(gradio: Any, studio: Any) -> None:
    example = scenes.render(_EXAMPLE, 0)
    source = gradio.Image(example, label="Image", type="pil", sources=["upload"], height=220, elem_id="explained")
    reads = gradio.Radio(
        [("reads it (vision-language)", True), ("generates it", False)], value=True, label="While the model"
    )
    prompt = gradio.Textbox("", label="Prompt or question (optional)", max_length=500)
    with gradio.Row(elem_classes="pair"):
        preset, ratio = _settings(gradio)
    start = gradio.Button("Show merged tokens", variant="primary", elem_id="explain")
    overlay = gradio.Image(label="Tokens", type="pil", format="png", elem_id="overlay", buttons=["download"])

    def go(image: Any, prompt: str, preset: str, ratio: float, reads: bool) -> Any:
        return _safely(gradio, lambda: studio.explain(image, prompt, preset, ratio, reads))

    start.click(go, [source, prompt, preset, ratio, reads], overlay, concurrency_id="model")


def _add_caption(gradio: Any, studio: Any) -> None:
    from gen_turbo.commands.ui_work import Stop

    wants_stop = gradio.State(Stop())
    example = scenes.render(_EXAMPLE, 0)
    source = gradio.Image(example, label="Image", type="pil", sources=["upload"], height=220, elem_id="source")
    with gradio.Row():
        seed = gradio.Number(0, label="Seed", precision=0, minimum=0)
        is_accelerated = gradio.Checkbox(True, label="Accelerated")
    with gradio.Row():
        start = gradio.Button("Caption, then generate", variant="primary", elem_id="both")
        stop = gradio.Button("Cancel", variant="stop")
    caption = gradio.Textbox(label="Caption", interactive=False, elem_id="caption")
    image = gradio.Image(label="New image", type="pil", format="png", elem_id="new", buttons=["download"])
    figures = gradio.Textbox(label="Figures", interactive=False)

    def go(image: Any, seed: float | None, is_accelerated: bool, stop: Stop) -> Any:
        return _safely(gradio, lambda: studio.caption_generate(image, int(seed or 0), is_accelerated, stop))

    event = {"inputs": [source, seed, is_accelerated, wants_stop], "outputs": [caption, image, figures]}
    start.click(_begin, wants_stop, caption, queue=False).then(go, **event, concurrency_id="model")
    stop.click(_cancel, wants_stop, queue=False)


def _begin(stop: Any) -> str:
    stop.is_set = False
    return "waiting"


def _cancel(stop: Any) -> None:
    stop.is_set = True


def _safely(gradio: Any, work: Callable[[], Any]) -> Any:
    """Does the work; what goes wrong becomes one sentence on the page."""
    try:
        return work()
    except Exception as error:
        raise gradio.Error(_said(error)) from None


def _said(error: Exception) -> str:
    if is_out_of_memory(error):
        return "there is not enough memory; take fewer pixels"
    if isinstance(error, (ConfigError, ValueError)) or type(error).__name__ == "Stopped":
        return sentence(error)
    # Details may hold paths of the server; they belong into its log.
    print(f"gen-turbo: {type(error).__name__}: {sentence(error)}", file=sys.stderr)
    return f"something went wrong ({type(error).__name__}); the server's log has the details"
