"""`gen-turbo caption` and `gen-turbo caption-generate`: many images, of which some may be bad, in runs that go on."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from gen_turbo.commands.failures import is_about_name, is_out_of_memory, sentence, shown
from gen_turbo.commands.parsing import add_model_arguments, model_overrides
from gen_turbo.config import HALVES, CaptionConfig, CaptionGenerateConfig, ConfigError, load_config_of
from gen_turbo.factory import build_pipeline, processors_of, quiet_loading
from gen_turbo.inputs import find_images, open_image
from gen_turbo.lines import Item, Line, as_json, digest_of
from gen_turbo.manifest import Manifest
from gen_turbo.output import check_writable, png_of
from gen_turbo.schemas import check_seed

MANIFEST = "manifest.jsonl"
SOME_FAILED = 1
_OVERRIDE = re.compile(r"[A-Za-z_][\w.]*=.*", re.DOTALL)

_NO_MATTER = ("batch_size", "device", "local_files_only", "max_size", "max_steps")

Made = tuple[Line, Image.Image | None]
"""What is noted of an image, and the new one that was made of it."""
Work = Callable[[list[Image.Image]], list[Made]]


@dataclass
class Tally:
    """What became of the images: done in this run, before or by others, failed, and in the hands of other runs."""

    done: int = 0
    before: int = 0
    failed: int = 0
    elsewhere: int = 0

    def __str__(self) -> str:
        others = f", {self.elsewhere} in other runs" if self.elsewhere else ""
        return f"{self.done} done, {self.before} finished before, {self.failed} failed{others}"


def add_caption_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `gen-turbo caption`."""
    _add_inputs(parser, "caption")
    parser.add_argument("--output", help="a .jsonl file; a run with the same one continues (default: print only)")
    parser.set_defaults(run=run_caption)


def add_caption_generate_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `gen-turbo caption-generate`."""
    _add_inputs(parser, "caption-generate")
    parser.add_argument("--output", default="outputs", help="a folder; a run with the same one continues (outputs)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise of every image (0)")
    parser.add_argument(
        "--strength", help="how far to go from the old image, 0 to 1 (default: generate from the caption)"
    )
    parser.set_defaults(run=run_caption_generate)


def run_caption(namespace: argparse.Namespace) -> int:
    """Prints a caption of every image; returns the exit code."""
    sources, overrides = split_inputs([*namespace.inputs, *namespace.overrides])
    name, given = model_overrides(namespace)
    asked = [] if namespace.prompt is None else [("prompt", namespace.prompt)]
    config = load_config_of(CaptionConfig, "gen-turbo caption", name, [*given, *overrides, *asked])
    processor = processors_of(config)
    with Manifest(_manifest_path(namespace.output)) as manifest:
        run = _Run(find_images(sources), settings_digest(asdict(config), processor), manifest)
        run.on_entry = lambda path, line: print(f"{shown(path)}: {line['caption']}", flush=True)
        if run.pending:
            quiet_loading()
            run.go(_captions(build_pipeline(config, processor)), config.batch_size)
    return run.finish()


def run_caption_generate(namespace: argparse.Namespace) -> int:
    """Draws a new image of every image; returns the exit code."""
    sources, overrides = split_inputs([*namespace.inputs, *namespace.overrides])
    given = {"caption.prompt": namespace.prompt, "strength": namespace.strength}
    flags = [(key, value) for key, value in given.items() if value is not None]
    config = load_config_of(CaptionGenerateConfig, "gen-turbo caption-generate", namespace.config, [*overrides, *flags])
    processors = processors_of(config)
    check_seed(namespace.seed)
    folder = Path(namespace.output).expanduser()
    images = find_images(sources)
    check_writable(folder)
    with Manifest(folder / MANIFEST) as manifest:
        run = _Run(images, settings_digest(asdict(config), processors, namespace.seed), manifest)
        run.on_entry = lambda path, line: print(shown(folder / line["output"]), flush=True)
        if run.pending:
            quiet_loading()
            pipe = build_pipeline(config, processors)
            pipe.generate.set_progress_bar_config(disable=True)
            run.go(_new_images(pipe, namespace.seed), config.batch_size)
    return run.finish()


def settings_digest(config: dict[str, Any], *rest: Any) -> str:
    """A digest of what results depend on: not of how many are made at once, nor of where."""
    kept = {name: value for name, value in config.items() if name not in _NO_MATTER}
    halves = {half: {k: v for k, v in kept[half].items() if k not in _NO_MATTER} for half in HALVES if half in kept}
    return digest_of([{**kept, **halves}, *map(repr, rest)])


def split_inputs(texts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Separates images from `key=value`; a file whose name has an equals sign is an image."""
    overrides = [text for text in texts if _OVERRIDE.fullmatch(text) and not Path(text).exists()]
    return [text for text in texts if text not in overrides], overrides


class _Run:
    """Images that are worked through in batches, each finished one noted at once."""

    def __init__(self, images: Sequence[Path], settings: str, manifest: Manifest) -> None:
        own = manifest.outputs()
        found = [Item.of(path, settings) for path in images if path.resolve() not in own]
        self.items = list({item.path: item for item in found}.values())
        self.manifest = manifest
        self.pending = [item for item in self.items if not manifest.finished(item)]
        self.tally = Tally(before=len(self.items) - len(self.pending))
        self.on_entry: Callable[[Path, Line], None] = lambda path, line: None
        self._batch_size = 1

    def go(self, work: Work, batch_size: int) -> None:
        """Works on everything that no other run works on."""
        self._batch_size = batch_size
        with tqdm(total=len(self.items), initial=self.tally.before, unit="image", disable=None, leave=False) as bar:
            # Once more at the end, for another run may have died meanwhile.
            while taken := self._round(work, bar):
                self.pending = [item for item in self.pending if item not in taken]
        left = [item for item in self.pending if not self.manifest.finished(item)]
        self.tally.before, self.tally.elsewhere = self.tally.before + len(self.pending) - len(left), len(left)

    def finish(self) -> int:
        """Says on standard error how it went; returns the exit code."""
        print(f"gen-turbo: {self.tally}", file=sys.stderr)
        return SOME_FAILED if self.tally.failed else 0

    def _round(self, work: Work, bar: Any) -> set[Item]:
        """Works on what can be had now, and gives it."""
        taken: set[Item] = set()
        items = iter(self.pending)
        while batch := self.manifest.claim(items, self._batch_size):
            self._batch(work, [pair for item in batch if (pair := self._opened(item)) is not None])
            bar.update(len(batch))
            taken.update(batch)
        return taken

    def _opened(self, item: Item) -> tuple[Item, Image.Image] | None:
        try:
            return item, open_image(item.path)
        except ConfigError as error:
            self._fail(item, error)
            return None

    def _batch(self, work: Work, pairs: list[tuple[Item, Image.Image]]) -> None:
        """Works on a batch, and where that fails on its halves, down to the image that makes it fail."""
        if not pairs:
            return
        try:
            results = list(zip(pairs, work([read for _, read in pairs]), strict=True))
        # Models and preparers are other people's: what they raise has no common class.
        except Exception as error:
            # Without the traceback, whose frames hold the memory of the batch.
            failure = error.with_traceback(None)
        else:
            for (item, _), (values, made) in results:
                self._keep(item, values, made)
            return
        half = (len(pairs) + 1) // 2
        if is_out_of_memory(failure):
            self._batch_size = min(self._batch_size, half)
            _free_memory()
        if len(pairs) == 1:
            self._fail(pairs[0][0], failure)
            return
        for first in range(0, len(pairs), half):
            self._batch(work, pairs[first : first + half])

    def _keep(self, item: Item, values: Line, image: Image.Image | None) -> None:
        """Commits a result; only what is wrong with this one is its failure, a full disk ends the run."""
        try:
            as_json(values)
            encoded = None if image is None else png_of(image)
        except Exception as error:
            self._fail(item, error)
            return
        try:
            line = self.manifest.keep(item, values, encoded)
        except OSError as error:
            if not is_about_name(error):
                raise
            self._fail(item, error)
            return
        self.tally.done += 1
        self.on_entry(item.path, line)

    def _fail(self, item: Item, error: Exception) -> None:
        message = sentence(error)
        self.manifest.fail(item, message)
        self.tally.failed += 1
        where = "" if str(item.path) in message else f"{shown(item.path)}: "
        print(f"gen-turbo: {where}{shown(message)}", file=sys.stderr)


def _free_memory() -> None:
    """Gives back what a failed batch held."""
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _captions(pipe: Any) -> Work:
    def work(images: list[Image.Image]) -> list[Made]:
        said = pipe(images)
        figures = _shared(len(images), caption_s=said.seconds, tokens=said.num_tokens, kept=said.num_kept)
        return [({"caption": text, **figures}, None) for text in said.texts]

    return work


def _new_images(pipe: Any, seed: int) -> Work:
    def work(images: list[Image.Image]) -> list[Made]:
        made = pipe(images, seeds=seed)
        figures = _shared(
            len(images),
            caption_s=made.caption_seconds,
            generate_s=made.generate_seconds,
            tokens=made.num_tokens,
            kept=made.num_kept,
        )
        figures |= {"drawn_tokens": made.drawn_tokens, "drawn_kept": made.drawn_kept, "seed": seed}
        return [
            ({"caption": text, "prompt": prompt, **figures}, image)
            for text, prompt, image in zip(made.captions, made.prompts, made.images, strict=True)
        ]

    return work


def _shared(count: int, **figures: float) -> dict[str, float]:
    """Figures of a batch as an image's share of them."""
    return {name: round(value / count, 4) for name, value in figures.items()}


def _add_inputs(parser: argparse.ArgumentParser, config: str) -> None:
    parser.add_argument("inputs", nargs="+", metavar="IN", help="images, folders and patterns, and key=value")
    if config == "caption":
        add_model_arguments(parser, config)
    else:
        parser.add_argument("--config", default=config, help="a name that `gen-turbo list` shows, or a YAML file")
    parser.add_argument("--prompt", help="a question about every image (default: as configured)")
    parser.set_defaults(overrides=[])


def _manifest_path(output: str | None) -> Path | None:
    if output is None:
        return None
    path = Path(output).expanduser()
    if path.suffix != ".jsonl":
        raise ConfigError(f"captions are written as JSON lines; got the output {output}, name a .jsonl file")
    check_writable(path.parent)
    return path
