"""What works on the items of a batch: one model that is loaded once, here or in the processes of a Ray cluster."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from PIL import Image

from gen_turbo.commands.batch_rows import Row
from gen_turbo.commands.failures import is_out_of_memory, sentence
from gen_turbo.config import CaptionConfig, PipelineConfig, Settings
from gen_turbo.inputs import as_rgb
from gen_turbo.lines import Line
from gen_turbo.output import png_of


@dataclass(frozen=True)
class Outcome:
    """What became of an item: values and perhaps a PNG file, or a sentence about what went wrong."""

    values: Line | None = None
    png: bytes | None = None
    error: str | None = None


@dataclass(frozen=True)
class Job:
    """All that a worker needs to know.

    Attributes:
        config: Of the pipeline.
        seed: Of the run, from which the seeds of the items follow.
        threads: Of torch on a CPU; another number may change results by rounding.
    """

    config: Settings
    seed: int
    threads: int


class Engine(Protocol):
    """Where the work is done: takes items while there is room, and gives outcomes as they come."""

    room: int

    def submit(self, row: Row, content: bytes | None) -> None:
        """Starts the work on an item, given the content of its image file."""

    def collect(self) -> list[tuple[Row, Outcome]]:
        """Waits until at least one item that was submitted is done."""

    def close(self) -> None:
        """Ends what works."""


class Worker:
    """A pipeline that was loaded once. Every item has a call of its own: what is beside it changes no bit of it."""

    def __init__(self, job: Job) -> None:
        import torch

        from gen_turbo.factory import build_pipeline, processors_of, quiet_loading

        torch.set_num_threads(job.threads)
        quiet_loading()
        self._job = job
        self._pipe = build_pipeline(job.config, processors_of(job.config))

    def work(self, row: Row, content: bytes | None) -> Outcome:
        """Works on one item; what goes wrong is an outcome as well."""
        start = time.perf_counter()
        try:
            values, image = self._make(row, _opened(content))
            png = None if image is None else png_of(image)
        # Models and image readers are other people's: what they raise has no common class.
        except Exception as error:
            if is_out_of_memory(error):
                _free_memory()
            return Outcome(error=sentence(error))
        return Outcome({**values, "seconds": round(time.perf_counter() - start, 4)}, png)

    def _make(self, row: Row, image: Image.Image | None) -> tuple[Line, Image.Image | None]:
        seed = row.seed_of(self._job.seed)
        config = self._job.config
        if isinstance(config, PipelineConfig):
            from gen_turbo.commands import generate

            prompt = row.prompt or ""
            made = generate.draw(self._pipe, config, generate.Job(prompt, seed), row.id)
            return {"prompt": prompt, "seed": seed}, made
        if isinstance(config, CaptionConfig):
            said = self._pipe([image], row.prompt)
            return {"caption": said.text, "tokens": said.num_tokens, "kept": said.num_kept}, None
        self._pipe.generate.set_progress_bar_config(disable=True)
        both = self._pipe([image], row.prompt, seeds=seed)
        return {"caption": both.captions[0], "prompt": both.prompts[0], "seed": seed}, both.images[0]


class LocalEngine:
    """One worker in this process."""

    room = 1

    def __init__(self, job: Job) -> None:
        self._worker = Worker(job)
        self._waiting: list[tuple[Row, bytes | None]] = []

    def submit(self, row: Row, content: bytes | None) -> None:
        """Keeps an item until `collect`."""
        self._waiting.append((row, content))

    def collect(self) -> list[tuple[Row, Outcome]]:
        """Works on everything that was submitted."""
        done = [(row, self._worker.work(row, content)) for row, content in self._waiting]
        self._waiting = []
        return done

    def close(self) -> None:
        """Has nothing to end."""


def engine_of(name: str, job: Job, options: dict[str, Any], say: Callable[[str], None]) -> Engine:
    """Makes an engine by name; raises ConfigError if its package is missing or a model cannot be loaded."""
    if name == "local":
        return LocalEngine(job)
    from gen_turbo.commands.batch_ray import RayEngine

    return RayEngine(job, say=say, **options)


def _opened(content: bytes | None) -> Image.Image | None:
    if content is None:
        return None
    with Image.open(io.BytesIO(content)) as file:
        from PIL import ImageOps

        file.load()
        return as_rgb(ImageOps.exif_transpose(file), file.format)


def _free_memory() -> None:
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
