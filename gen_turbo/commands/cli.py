"""The command `gen-turbo`: parse, call one function, print."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import version
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gen_turbo.commands.failures import is_out_of_memory, shown
from gen_turbo.commands.parsing import Parser, add_completion_arguments, add_model_arguments, model_overrides
from gen_turbo.config import ConfigError, PipelineConfig, load_config_of

if TYPE_CHECKING:
    from gen_turbo.commands.generate import Comparison, Job

_USAGE_ERROR = 2
_INTERRUPTED = 130
_REPORT_PROMPT = "a large red circle on a gray background"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
        0; 1 where some of many images failed; 2 after one sentence on standard error about what was wrong.
    """
    # A terminal that cannot print a name shows it escaped, and the run goes on.
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    shown_before, warnings.formatwarning = warnings.formatwarning, _warning
    try:
        namespace = _parse(sys.argv[1:] if arguments is None else list(arguments))
        code = namespace.run(namespace)
    except KeyboardInterrupt:
        return _fail("interrupted", _INTERRUPTED)
    except (ValueError, OSError, ImportError) as error:
        return _fail(str(error))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        return _fail("there is not enough memory; take a smaller height and width, or another device")
    finally:
        warnings.formatwarning = shown_before
    return int(code or 0)


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = _parser()
    namespace, rest = parser.parse_known_args(arguments)
    # argparse takes positional arguments from one place only; the others come back as unknown.
    is_override = hasattr(namespace, "overrides") and not any(text.startswith("-") for text in rest)
    if rest and not is_override:
        parser.error(f"unknown arguments: {' '.join(rest)}")
    if rest:
        namespace.overrides = [*namespace.overrides, *rest]
    return namespace


def _parser() -> argparse.ArgumentParser:
    from gen_turbo.bench.commands import add_arguments

    parser = Parser(prog="gen-turbo", description="Diffusion and vision-language models, faster without retraining.")
    parser.add_argument("--version", action="version", version=f"gen-turbo {version('gen_turbo')}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_generate(commands.add_parser("generate", help="make images from text", allow_abbrev=False))
    _add_captioning(commands)
    _add_batch_and_page(commands)
    listing = commands.add_parser("list", help="show methods and pipelines", allow_abbrev=False)
    listing.set_defaults(run=_list)
    _add_report(commands.add_parser("report", help="show which layers are reduced", allow_abbrev=False))
    bench = commands.add_parser("bench", help="measure speed and quality", allow_abbrev=False)
    add_arguments(bench)
    bench.set_defaults(run=_bench)
    _add_learning(commands)
    completion = commands.add_parser("completion", help="print a script that completes commands in a shell")
    add_completion_arguments(completion, parser)
    return parser


def _add_learning(commands: Any) -> None:
    from gen_turbo.commands.calibration import add_calibrate_arguments
    from gen_turbo.commands.explain import add_explain_arguments
    from gen_turbo.commands.tune import add_tune_arguments

    add_explain_arguments(commands.add_parser("explain", help="draw what a method does to an image's tokens"))
    tune = "search the settings that reach a target on your pipeline and device"
    add_tune_arguments(commands.add_parser("tune", help=tune, description=tune, allow_abbrev=False))
    add_calibrate_arguments(commands.add_parser("calibrate", help="learn or measure what a method needs"))


def _add_captioning(commands: Any) -> None:
    from gen_turbo.commands.caption import add_caption_arguments, add_caption_generate_arguments

    add_caption_arguments(commands.add_parser("caption", help="caption images", allow_abbrev=False))
    text = "caption images and generate new ones"
    add_caption_generate_arguments(commands.add_parser("caption-generate", help=text, allow_abbrev=False))


def _add_batch_and_page(commands: Any) -> None:
    from gen_turbo.commands.batch import add_batch_arguments

    text = "work on many prompts or images, here or on a cluster"
    add_batch_arguments(commands.add_parser("batch", help=text, allow_abbrev=False))
    from gen_turbo.commands.ui import add_ui_arguments

    add_ui_arguments(commands.add_parser("ui", help="compare stock and accelerated on a page", allow_abbrev=False))


def _add_generate(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompt", action="append", required=True, help="what to generate; may be given several times")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first image of each prompt (0)")
    parser.add_argument("--num-images", type=int, default=1, help="images of each prompt (1)")
    parser.add_argument("--output", default="outputs", help="a folder, or a .png file for one image (outputs)")
    parser.add_argument("--compare", action="store_true", help="also generate without the processor, side by side")
    for name, what in (("steps", "denoising steps"), ("height", "of images, in pixels"), ("width", "the same")):
        parser.add_argument(f"--{name}", type=int, help=f"{what} (default: as configured)")
    _add_config(parser)
    parser.set_defaults(run=_generate)


def _add_report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--prompt", default=_REPORT_PROMPT, help="what the image shows")
    parser.add_argument("--steps", type=int, default=4, help="denoising steps of the short run (4)")
    _add_config(parser)
    parser.set_defaults(run=_report, height=None, width=None)


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", help="the same as processor.preset=...: fidelity, balanced or fast (default: none)")
    add_model_arguments(parser, "tiny")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings, such as processor=tome or processor.ratio=0.3"
    )


def _config(namespace: argparse.Namespace) -> PipelineConfig:
    given = {name: getattr(namespace, name) for name in ("steps", "height", "width")}
    flags = [(name, value) for name, value in given.items() if value is not None]
    preset = [("processor", {"preset": namespace.preset})] if namespace.preset is not None else []
    command = f"gen-turbo {namespace.command}"
    name, given_model = model_overrides(namespace)
    overrides = [*given_model, *preset, *namespace.overrides, *flags]
    return load_config_of(PipelineConfig, command, name, overrides)


def _generate(namespace: argparse.Namespace) -> None:
    """Checks everything that can be wrong, then loads, then draws."""
    config = _config(namespace)
    from gen_turbo.commands.generate import draw, plan_jobs, prompt_notes
    from gen_turbo.factory import build_pipeline, build_processor, quiet_loading
    from gen_turbo.output import check_writable, image_paths, record_path, write_image

    jobs = plan_jobs(namespace.prompt, namespace.seed, namespace.num_images)
    paths = image_paths(namespace.output, [f"{job.prompt[:30]}-{job.seed}" for job in jobs])
    check_writable(paths[0].parent)
    processor = build_processor(config.processor)
    if namespace.compare and processor is None:
        raise ConfigError("there is no processor to compare with the stock pipeline; add processor=turbo")
    quiet_loading()
    pipe = build_pipeline(config, processor)
    for note in dict.fromkeys(note for job in jobs for note in prompt_notes(pipe, job.prompt)):
        print(f"gen-turbo: note: {note}", file=sys.stderr)
    if namespace.compare:
        _compare(pipe, config, processor, dict(zip(paths, jobs, strict=True)), record_path(namespace.output))
        return
    for index, (job, path) in enumerate(zip(jobs, paths, strict=True), 1):
        write_image(path, draw(pipe, config, job, f"{index}/{len(jobs)}"))
        print(path)


def _compare(pipe: Any, config: PipelineConfig, processor: Any, jobs: dict[Path, Job], record: Path) -> None:
    """Draws every image twice; an image is on disk as soon as it is done, the figures follow at the end."""
    from gen_turbo.commands.generate import compare, warm_up
    from gen_turbo.output import write_image, write_json

    pipe.reset_attn_processor()
    warm_up(pipe, config, processor, next(iter(jobs.values())))
    done = {}
    for index, (path, job) in enumerate(jobs.items(), 1):
        done[path] = compare(pipe, config, processor, job, f"{index}/{len(jobs)}")
        write_image(path, done[path].side_by_side())
    settings = {**asdict(config), "processor": {"name": type(processor).__name__, **asdict(processor)}}
    images = [{"file": path.name, **comparison.record()} for path, comparison in done.items()]
    write_json(record, {"config": settings, "device": str(pipe.device), "images": images})
    _print_comparisons(list(done.values()), type(processor).__name__.removesuffix("Processor"))
    print(*done, record, sep="\n")


def _print_comparisons(comparisons: list[Comparison], name: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("prompt", "seed", "stock s", f"{name} s", "speed-up", "tokens kept", "PSNR dB")
    for item in comparisons:
        table.add_row(
            item.job.prompt,
            str(item.job.seed),
            f"{item.stock_s:.2f}",
            f"{item.image_s:.2f}",
            f"{item.stock_s / item.image_s:.2f}",
            f"{item.num_kept}/{item.num_tokens}" if item.num_tokens else "all",
            f"{item.psnr_db:.1f}",
        )
    Console().print(table)


def _list(namespace: argparse.Namespace) -> None:
    from gen_turbo.bench.presets import list_presets
    from gen_turbo.factory import list_methods, list_pipelines

    listed = (("methods", list_methods()), ("pipelines", list_pipelines()), ("presets", list_presets()))
    for title, entries in listed:
        width = max(map(len, entries), default=0)
        print(f"{title}:")
        for name, text in entries.items():
            print(f"  {name:{width}}  {text}")


def _report(namespace: argparse.Namespace) -> None:
    """Draws one image in a few steps and prints what was reduced on the way."""
    config = _config(namespace)
    from gen_turbo.commands.generate import Job, draw
    from gen_turbo.engine.report import report
    from gen_turbo.factory import build_pipeline, build_processor, quiet_loading

    processor = build_processor(config.processor)
    if processor is None:
        raise ConfigError("there is no processor to report on; add processor=turbo")
    quiet_loading()
    pipe = build_pipeline(config, processor)
    draw(pipe, config, Job(namespace.prompt, 0), "report")
    print(report(pipe))


def _bench(namespace: argparse.Namespace) -> None:
    from gen_turbo.bench.commands import run

    run(namespace)


def _warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """A warning as one sentence: its line in the source says nothing to whoever types a command."""
    return f"gen-turbo: warning: {shown(' '.join(str(message).split()))}\n"


def _fail(message: str, code: int = _USAGE_ERROR) -> int:
    # Standard error may be a file on the disk that is full.
    with suppress(OSError):
        print(f"gen-turbo: error: {shown(' '.join(message.split()))}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())
