"""What the page does: one pipeline, one run at a time, shown step by step and stopped on request."""

from __future__ import annotations

import inspect
import queue
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from PIL import Image

from gen_turbo.api import attach, detach
from gen_turbo.commands.explain import draw_trace, explain_drawing, explain_reading
from gen_turbo.commands.generate import finest_layer
from gen_turbo.commands.ui_wish import Wish, check_image, settings_of
from gen_turbo.config import CALL_SETTINGS, CaptionGenerateConfig, ConfigError, PipelineConfig
from gen_turbo.engine.report import report
from gen_turbo.factory import build_pipeline, build_processor, processors_of
from gen_turbo.inputs import as_rgb
from gen_turbo.metrics.image import psnr

_WARM_STEPS = 2


class Stopped(Exception):
    """A run was stopped by its user."""


@dataclass
class Stop:
    """Whether the user of one session wants the run to end."""

    is_set: bool = False

    def check(self) -> None:
        """Raises Stopped."""
        if self.is_set:
            raise Stopped("cancelled")


@dataclass(frozen=True)
class Shown:
    """What is on the page while a run goes on.

    Attributes:
        status: One sentence.
        stock: The stock image, once it is there.
        image: The accelerated one, once it is there.
        rows: Figures: name, stock, accelerated.
    """

    status: str
    stock: Image.Image | None = None
    image: Image.Image | None = None
    rows: tuple[tuple[str, str, str], ...] = ()


class Studio:
    """The models behind the page. They are loaded on first use, and one run goes on at a time.

    Args:
        config: Of the pipeline that generates.
        workflow: Of the pipeline that captions and generates.
    """

    def __init__(self, config: PipelineConfig, workflow: CaptionGenerateConfig) -> None:
        self.config, self._workflow = config, workflow
        self._turn = threading.Lock()
        self._warm: list[Any] = []

    def compare(self, wish: Wish, stop: Stop) -> Iterator[Shown]:
        """Generates the stock image, then the accelerated one, and gives what to show after every step."""
        try:
            yield from self._compare(wish, stop)
        except Stopped as error:
            yield Shown(str(error))

    def _compare(self, wish: Wish, stop: Stop) -> Iterator[Shown]:
        processor: Any = build_processor(settings_of(wish.preset, wish.ratio))
        with self._turn:
            yield Shown("loading the model")
            pipe = self._pipe if wish.source is None else self._from_image
            detach(pipe)
            # The first run of a model allocates and loads kernels, and a GPU captures each attachment's first run.
            if pipe not in self._warm:
                yield Shown("warming up")
                self._call(pipe, replace(wish, steps=min(_WARM_STEPS, wish.steps)), lambda step: stop.check())
                self._warm.append(pipe)
            stock, stock_s = None, 0.0
            for status, made in self._steps("stock", pipe, wish, stop):
                stock, stock_s = made or (None, 0.0)
                yield Shown(status, stock)
            with attach(pipe, processor):
                if pipe.device.type == "cuda":
                    yield Shown("accelerated: warming up", stock)
                    self._call(pipe, wish, lambda step: stop.check())
                image, image_s = None, 0.0
                for status, made in self._steps("accelerated", pipe, wish, stop):
                    image, image_s = made or (None, 0.0)
                    yield Shown(status, stock, image)
                result = report(pipe)
            assert stock is not None and image is not None
            layer = finest_layer(result.layers)
            rows = (
                ("CPU seconds" if pipe.device.type == "cpu" else "seconds", f"{stock_s:.2f}", f"{image_s:.2f}"),
                ("times faster", "1.00", f"{stock_s / image_s:.2f}"),
                ("tokens, finest layer", str(layer.num_tokens), str(layer.num_kept)),
                ("FLOPs of reached layers", "100%", f"{1 - result.flops_saved:.0%}"),
                ("PSNR to stock", "", f"{psnr(stock, image):.1f} dB"),
            )
            yield Shown("done", stock, image, rows)

    def explain(self, image: Image.Image | None, prompt: str, preset: str, ratio: float, reads: bool) -> Image.Image:
        """Draws which tokens of an image are merged, while it is read or while it is generated."""
        if image is None:
            raise ConfigError("choose an image first")
        check_image(image)
        settings = settings_of(preset, ratio)
        # Scope and restoration are of denoisers.
        processor: Any = build_processor({"method": settings["method"], "ratio": ratio} if reads else settings)
        with self._turn:
            pipe = self._both.caption if reads else self._pipe
            detach(pipe)
            trace = (explain_reading if reads else explain_drawing)(pipe, processor, _rgb(image), prompt or None)
        return draw_trace(_rgb(image), trace)

    def caption_generate(
        self, image: Image.Image | None, seed: int, is_accelerated: bool, stop: Stop
    ) -> tuple[str, Image.Image, str]:
        """A caption of an image, a new image from it, and a sentence of figures."""
        if image is None:
            raise ConfigError("choose an image first")
        check_image(image)
        with self._turn:
            both = self._both
            both.set_attn_processor(processors_of(self._workflow) if is_accelerated else None)
            try:
                made = both(_rgb(image), seeds=seed, **_after_steps(both.generate, lambda _: stop.check()))
            finally:
                both.reset_attn_processor()
        figures = (
            f"read in {made.caption_seconds:.2f} s ({made.num_tokens} -> {made.num_kept} image tokens), "
            f"generated in {made.generate_seconds:.2f} s"
        )
        return made.captions[0], made.images[0], figures

    @cached_property
    def _pipe(self) -> Any:
        pipe = build_pipeline(self.config)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    @cached_property
    def _from_image(self) -> Any:
        from diffusers import AutoPipelineForImage2Image

        try:
            pipe = AutoPipelineForImage2Image.from_pipe(self._pipe)
        except ValueError as error:
            raise ConfigError(f"a {type(self._pipe).__name__} cannot start from an image") from error
        pipe.set_progress_bar_config(disable=True)
        return pipe

    @cached_property
    def _both(self) -> Any:
        both = build_pipeline(self._workflow)
        both.generate.set_progress_bar_config(disable=True)
        return both

    def _steps(
        self, name: str, pipe: Any, wish: Wish, stop: Stop
    ) -> Iterator[tuple[str, tuple[Image.Image, float] | None]]:
        """Runs a pipeline in a thread and gives a sentence after every step, at last the image and its seconds.

        A generator that is closed stops the run at its next step.
        """
        news: queue.Queue[Any] = queue.Queue()
        closed = Stop()
        # What else runs on the machine changes seconds that pass, and on a CPU by more than merging does.
        clock = time.process_time if pipe.device.type == "cpu" else time.perf_counter

        def on_step(step: int) -> None:
            stop.check()
            closed.check()
            news.put(f"{name}: step {step} of {wish.steps}")

        def go() -> None:
            try:
                start = clock()
                image = self._call(pipe, wish, on_step)
                news.put((image, clock() - start))
            except BaseException as error:
                news.put(error)

        thread = threading.Thread(target=go, name=f"gen-turbo {name}", daemon=True)
        thread.start()
        try:
            yield f"{name}: starting", None
            while True:
                one = news.get()
                if isinstance(one, BaseException):
                    raise one
                if isinstance(one, tuple):
                    yield f"{name}: done", one
                    return
                yield one, None
        finally:
            closed.is_set = True
            thread.join()

    def _call(self, pipe: Any, wish: Wish, on_step: Callable[[int], None]) -> Image.Image:
        settings = {call: getattr(self.config, name) for name, call in CALL_SETTINGS.items()}
        settings |= {"num_inference_steps": wish.steps, "prompt": wish.prompt}
        settings["generator"] = torch.Generator().manual_seed(wish.seed)
        known = inspect.signature(type(pipe).__call__).parameters
        settings |= _after_steps(pipe, on_step)
        if wish.source is not None:
            size = (self.config.width or wish.source.width, self.config.height or wish.source.height)
            settings |= {"image": _rgb(wish.source).resize(size), "strength": wish.strength}
        given = {name: value for name, value in settings.items() if value is not None and name in known}
        image: Image.Image = pipe(**given).images[0]
        return image


def _after_steps(pipe: Any, on_step: Callable[[int], None]) -> dict[str, Any]:
    """The arguments by which a pipeline calls back after every step; none where it cannot."""
    known = inspect.signature(type(pipe).__call__).parameters
    if "callback_on_step_end" in known:

        def after(_: Any, step: int, time_: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            on_step(step + 1)
            return tensors

        return {"callback_on_step_end": after}
    if "callback" in known:
        return {"callback": lambda step, *_: on_step(step + 1), "callback_steps": 1}
    return {}


def _rgb(image: Image.Image) -> Image.Image:
    return as_rgb(image, image.format)
