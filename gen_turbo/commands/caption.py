"""`gen-turbo caption` and `gen-turbo caption-generate`: many pictures, of which some may be bad, in runs that go on."""

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

from gen_turbo.config import CaptionConfig, CaptionGenerateConfig, ConfigError, load_config_of
from gen_turbo.factory import build_pipeline, processors_of, quiet_loading
from gen_turbo.inputs import find_pictures, open_picture
from gen_turbo.manifest import Item, Manifest, digest_of
from gen_turbo.output import check_writable, write_picture

MANIFEST = "manifest.jsonl"
SOME_FAILED = 1
_OVERRIDE = re.compile(r"[A-Za-z_][\w.]*=.*", re.DOTALL)

Entry = dict[str, Any]
Work = Callable[[list[Image.Image]], list[Entry]]
"""Makes an entry of each of some pictures; what is under `image` becomes a file."""


@dataclass
class Tally:
    """How many pictures were done in this run and before, and how many failed."""

    done: int = 0
    before: int = 0
    failed: int = 0

    def __str__(self) -> str:
        return f"{self.done} done, {self.before} finished before, {self.failed} failed"


def add_caption_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `gen-turbo caption`."""
    _add_inputs(parser, "caption")
    parser.add_argument("--output", help="a .jsonl file for the captions; a run with the same one goes on")
    parser.set_defaults(run=run_caption)


def add_caption_generate_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `gen-turbo caption-generate`."""
    _add_inputs(parser, "caption-generate")
    parser.add_argument("--output", default="outputs", help="a folder; a run with the same one goes on (outputs)")
    parser.add_argument("--seed", type=int, default=0, help="of the noise of every picture (0)")
    parser.add_argument("--strength", help="how far to leave the old picture, 0 to 1; draws from the caption without")
    parser.set_defaults(run=run_caption_generate)


def run_caption(namespace: argparse.Namespace) -> int:
    """Prints a caption of every picture; returns the exit code."""
    sources, overrides = split_inputs([*namespace.inputs, *namespace.overrides])
    if namespace.prompt is not None:
        overrides.append(f"prompt={_quoted(namespace.prompt)}")
    config = load_config_of(CaptionConfig, "gen-turbo caption", namespace.config, overrides)
    processor = processors_of(config)
    output = _manifest_path(namespace.output)
    run = _Run(find_pictures(sources), digest_of([asdict(config), repr(processor)]), Manifest.open(output))
    run.on_entry = lambda path, entry: print(f"{path}: {entry['caption']}", flush=True)
    if run.pending:
        quiet_loading()
        run.go(_captions(build_pipeline(config, processor)), config.batch_size)
    return run.finish()


def run_caption_generate(namespace: argparse.Namespace) -> int:
    """Draws a new picture of every picture; returns the exit code."""
    sources, overrides = split_inputs([*namespace.inputs, *namespace.overrides])
    if namespace.prompt is not None:
        overrides.append(f"caption.prompt={_quoted(namespace.prompt)}")
    if namespace.strength is not None:
        overrides.append(f"strength={namespace.strength}")
    config = load_config_of(CaptionGenerateConfig, "gen-turbo caption-generate", namespace.config, overrides)
    processors = processors_of(config)
    if not 0 <= namespace.seed < 2**63:
        raise ConfigError(f"the seed must be between 0 and {2**63 - 1}; got {namespace.seed}")
    folder = Path(namespace.output).expanduser()
    pictures = find_pictures(sources)
    check_writable(folder)
    settings = digest_of([asdict(config), repr(processors), namespace.seed])
    run = _Run(pictures, settings, Manifest.open(folder / MANIFEST))
    run.on_entry = lambda path, entry: print(folder / entry["output"], flush=True)
    if run.pending:
        quiet_loading()
        pipe = build_pipeline(config, processors)
        pipe.picture.set_progress_bar_config(disable=True)
        run.go(_new_pictures(pipe, namespace.seed), config.batch_size)
    return run.finish()


def split_inputs(texts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Tells pictures from `key=value`; a file whose name has an equals sign is a picture."""
    overrides = [text for text in texts if _OVERRIDE.fullmatch(text) and not Path(text).exists()]
    return [text for text in texts if text not in overrides], overrides


class _Run:
    """Pictures that are worked through in batches, each finished one noted at once."""

    def __init__(self, pictures: Sequence[Path], settings: str, manifest: Manifest) -> None:
        own = manifest.outputs()
        self.items = [Item.of(path, settings) for path in pictures if path.resolve() not in own]
        self.manifest = manifest
        self.pending = [item for item in self.items if manifest.finished(item) is None]
        self.tally = Tally(before=len(self.items) - len(self.pending))
        self.on_entry: Callable[[Path, Entry], None] = lambda path, entry: None

    def go(self, work: Work, batch_size: int) -> None:
        with tqdm(total=len(self.items), initial=self.tally.before, unit="picture", disable=None, leave=False) as bar:
            for first in range(0, len(self.pending), batch_size):
                batch = self.pending[first : first + batch_size]
                self._batch(work, [pair for item in batch if (pair := self._opened(item)) is not None])
                bar.update(len(batch))

    def finish(self) -> int:
        """Says on standard error how it went; returns the exit code."""
        print(f"gen-turbo: {self.tally}", file=sys.stderr)
        return SOME_FAILED if self.tally.failed else 0

    def _opened(self, item: Item) -> tuple[Item, Image.Image] | None:
        try:
            return item, open_picture(item.path)
        except ConfigError as error:
            self._fail(item, error)
            return None

    def _batch(self, work: Work, pairs: list[tuple[Item, Image.Image]]) -> None:
        """Works on a batch, and picture by picture where one of them makes all fail."""
        if not pairs:
            return
        try:
            entries = work([picture for _, picture in pairs])
        except (ValueError, RuntimeError, OSError) as error:
            if "out of memory" in str(error) or "allocate memory" in str(error):
                raise
            if len(pairs) == 1:
                self._fail(pairs[0][0], error)
            for pair in pairs if len(pairs) > 1 else ():
                self._batch(work, [pair])
            return
        for (item, _), entry in zip(pairs, entries, strict=True):
            self._keep(item, entry)

    def _keep(self, item: Item, entry: Entry) -> None:
        image = entry.pop("image", None)
        if image is not None and self.manifest.path is not None:
            entry = {"output": self.manifest.output_name(item, ".png"), **entry}
            write_picture(self.manifest.path.parent / entry["output"], image)
        self.manifest.add(item, entry)
        self.tally.done += 1
        self.on_entry(item.path, entry)

    def _fail(self, item: Item, error: Exception) -> None:
        message = " ".join(str(error).split()) or type(error).__name__
        self.manifest.add(item, {"error": message})
        self.tally.failed += 1
        print(f"gen-turbo: {item.path}: {message}", file=sys.stderr)


def _captions(pipe: Any) -> Work:
    def work(pictures: list[Image.Image]) -> list[Entry]:
        said = pipe(pictures)
        figures = _shared(len(pictures), caption_s=said.seconds, tokens=said.num_tokens, kept=said.num_kept)
        return [{"caption": text, **figures} for text in said.texts]

    return work


def _new_pictures(pipe: Any, seed: int) -> Work:
    def work(pictures: list[Image.Image]) -> list[Entry]:
        made = pipe(pictures, seeds=seed)
        figures = _shared(
            len(pictures),
            caption_s=made.caption_seconds,
            picture_s=made.picture_seconds,
            tokens=made.num_tokens,
            kept=made.num_kept,
        )
        figures |= {"drawn_tokens": made.drawn_tokens, "drawn_kept": made.drawn_kept, "seed": seed}
        return [
            {"caption": text, "prompt": prompt, "image": image, **figures}
            for text, prompt, image in zip(made.captions, made.prompts, made.images, strict=True)
        ]

    return work


def _shared(count: int, **figures: float) -> dict[str, float]:
    """Figures of a batch as a picture's share of them."""
    return {name: round(value / count, 4) for name, value in figures.items()}


def _add_inputs(parser: argparse.ArgumentParser, config: str) -> None:
    parser.add_argument("inputs", nargs="+", metavar="IN", help="pictures, folders and patterns, and key=value")
    parser.add_argument(
        "--config", default=config, help=f"a name that `gen-turbo list` shows, or a YAML file ({config})"
    )
    parser.add_argument("--prompt", help="what to ask about every picture")
    parser.set_defaults(overrides=[])


def _manifest_path(output: str | None) -> Path | None:
    if output is None:
        return None
    path = Path(output).expanduser()
    if path.suffix != ".jsonl":
        raise ConfigError(f"captions are written as JSON lines; got the output {output}, name a .jsonl file")
    check_writable(path.parent)
    return path


def _quoted(text: str) -> str:
    """A text as YAML reads it back, whatever it contains."""
    return "'" + text.replace("'", "''") + "'"
