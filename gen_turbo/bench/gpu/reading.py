"""Reading an image with a LLaVA-1.5 7B of random weights: the prompt alone, and with an answer."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor

from gen_turbo.bench import records
from gen_turbo.bench.gpu import meter
from gen_turbo.bench.gpu.apart import Announce
from gen_turbo.bench.gpu.cases import default_dtype
from gen_turbo.bench.gpu.journal import (
    BENCH,
    Wishes,
    check_device,
    described,
    device_name,
    is_finished,
    origin,
    sentence,
)
from gen_turbo.bench.gpu.variants import Mode
from gen_turbo.bench.settings import Method, Setting, Stock, selected
from gen_turbo.bench.vlm_step import NUM_IMAGE_TOKENS, SIDE_PX, make_model, num_bytes

NAME = "llava-1.5-7b"
SHARE = 1.6
PHASES = {"prefill": 1, "prefill + 24": 24}
"""Tokens that are generated in each."""
_BATCHES, _TINY_BATCHES = (16, 1), (2, 1)
_ROUNDS = {"prefill": 3, "prefill + 24": 2}
_MOST_SECONDS = 60.0
_IMAGE, _VOCABULARY, _TEXT_BEFORE, _TEXT_AFTER = 3, 64, 35, 20
_TINY = {"width_scale": 0.0625, "layers": 3, "tower_layers": 2}
_WHOLE = {"width_scale": 1.0, "layers": 32, "tower_layers": 24}


def catalogue() -> list[Setting]:
    """Every method, at the budgets that published methods are compared at."""

    def ratio(kept: int) -> dict[str, Any]:
        # Half a token more, so that rounding down removes exactly this number.
        return {"ratio": 1 - (kept - 0.5) / NUM_IMAGE_TOKENS}

    return [
        Method("turbo-192", "turbo", "turbo", ratio(192)),
        Method("turbo_vit-gate-64", "turbo_vit, gate", "turbo_vit", ratio(64) | {"place": "pre_llm"}),
        Method("turbo_vit-tower-64", "turbo_vit, tower", "turbo_vit", ratio(64)),
        Method("fastv-64", "fastv", "fastv", ratio(64) | {"layer": 2}),
        Method("divprune-64", "divprune", "divprune", ratio(64)),
        Method("visionzip-64", "visionzip", "visionzip", ratio(64)),
        Method("vistog_vit-64", "vistog_vit, untrained", "vistog_vit", {"num_tokens": 64}),
    ]


def measure(wishes: Wishes, announce: Announce, deadline: float) -> int:
    """Measures what has no record yet until a deadline, and returns how many cells are left."""
    if wishes.modes and Mode.EAGER not in wishes.modes:
        return 0
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    known = [Stock(), *catalogue()]
    # A denoiser's setting may be all that is asked for.
    patterns = [p for p in wishes.settings if any(fnmatchcase(s.name, p) for s in known)]
    wished = [] if wishes.settings and not patterns else selected(known, patterns)
    settings = [setting for setting in wished if not isinstance(setting, Stock)]
    model: Any = None
    left, measured = 0, list[_Cell]()
    for batch in _BATCHES if device.type == "cuda" else _TINY_BATCHES:
        for setting in settings:
            for phase in PHASES:
                cell = _Cell(wishes, setting, batch, phase, announce)
                if cell.is_finished():
                    continue
                if time.monotonic() > deadline:
                    left += 1
                    continue
                model = model or _made(device, wishes.seed)
                cell.measure(model)
                measured.append(cell)
    for cell in measured:
        cell.count(model)
    return left


def _made(device: torch.device, seed: int) -> Any:
    on_gpu = device.type == "cuda"
    sizes: dict[str, Any] = _WHOLE if on_gpu else _TINY
    with default_dtype(_dtype()), device:
        model = make_model(seed=seed, **sizes)
    return model.to(_dtype())


def _dtype() -> torch.dtype:
    return torch.bfloat16 if torch.cuda.is_available() else torch.float32


class _Cell:
    """One setting at one batch in one phase."""

    def __init__(self, wishes: Wishes, setting: Setting, batch: int, phase: str, announce: Announce) -> None:
        self._wishes, self._setting, self._batch, self._phase = wishes, setting, batch, phase
        self._announce = announce
        self._measured_as: records.BenchRecord | None = None
        self._rounds = wishes.rounds or _ROUNDS[phase]
        self._params = {
            "model": NAME,
            "pixels": f"{SIDE_PX}x{SIDE_PX}",
            "batch": batch,
            "dtype": str(_dtype()).removeprefix("torch."),
            "phase": phase,
            "mode": Mode.EAGER.value,
            "rounds": self._rounds,
            "device": device_name() or "cpu",
        } | setting.params()

    def is_finished(self) -> bool:
        """Whether it has a record."""
        return is_finished(self._wishes, self._setting.name, self._params)

    def measure(self, model: Any) -> None:
        """Times the setting in turn with stock and records it, or why it could not be timed."""
        failure = self._record(failure="the process ended while this was measured")
        self._announce(failure.to_line())
        try:
            with meter.limited(_MOST_SECONDS):
                record = self._measured(model)
        except Exception as error:
            record = replace(failure, failure=sentence(error))
            check_device(error)
        finally:
            self._announce("")
        records.append(self._wishes.records, record)
        print(described(record), flush=True)
        self._measured_as = record

    def count(self, model: Any) -> None:
        """Adds to its record the kernels of the prompt, its own and stock's."""
        record = self._measured_as
        if record is None or record.failure or self._phase != "prefill":
            return
        own, stock = (meter.launches(loop, 1) for loop in self._loops(model))
        counts = record.counts | own | {f"stock_{name}": number for name, number in stock.items()}
        records.append(self._wishes.records, replace(record, counts=counts))

    def _loops(self, model: Any) -> tuple[_Reading, _Reading]:
        own, stock = (_Reading(model, s.applied, self._batch, PHASES[self._phase]) for s in (self._setting, Stock()))
        return own, stock

    def _measured(self, model: Any) -> records.BenchRecord:
        own, stock = self._loops(model)
        stock_first, first = meter.first_run(stock, 1), meter.first_run(own, 1)
        traces = meter.alternated({"stock": (stock, 1), "own": (own, 1)}, self._rounds)
        counts = {"kv_bytes": own.cache_bytes, "stock_kv_bytes": stock.cache_bytes}
        gc.collect()
        return self._record(
            cpu_s=[trace.cpu_s for trace in traces["own"]],
            baseline_cpu_s=[trace.cpu_s for trace in traces["stock"]],
            wall_s=[trace.step_s for trace in traces["own"]],
            baseline_wall_s=[trace.step_s for trace in traces["stock"]],
            values={
                "eager_s": [trace.step_s for trace in traces["stock"]],
                "first_run_s": [first.seconds],
                "peak_mib": [first.peak_mib],
                "stock_peak_mib": [stock_first.peak_mib],
            },
            counts=counts,
        )

    def _record(self, **measured: Any) -> records.BenchRecord:
        nothing: dict[str, Any] = {"cpu_s": [], "baseline_cpu_s": [], "wall_s": [], "baseline_wall_s": []}
        return records.BenchRecord(
            bench=BENCH,
            setting=self._setting.name,
            family=self._setting.family,
            params=self._params,
            seed=self._wishes.seed,
            origin=origin(),
            **nothing | measured,
        )


class _Reading:
    """One call of `generate` under a setting, which is applied anew before the clock starts.

    Attributes:
        cache_bytes: Keys and values held behind the last call.
    """

    def __init__(
        self, model: Any, applied: Callable[[Any], AbstractContextManager[object]], batch: int, new_tokens: int
    ) -> None:
        self._model, self._applied, self._new_tokens = model, applied, new_tokens
        self._inputs = _inputs(next(model.parameters()), batch)
        self.cache_bytes = 0

    @torch.inference_mode()
    def __call__(self, steps: int, before: Callable[[int], object]) -> Tensor:
        """Reads once and gives the tokens; there is one step."""
        with self._applied(self._model):
            before(0)
            done = self._model.generate(
                **self._inputs,
                max_new_tokens=self._new_tokens,
                min_new_tokens=self._new_tokens,
                do_sample=False,
                return_dict_in_generate=True,
            )
            before(1)
        self.cache_bytes = num_bytes(done.past_key_values)
        sequences: Tensor = done.sequences
        return sequences


def _inputs(like: Tensor, batch: int) -> dict[str, Tensor]:
    """Prompts as long as LLaVA-1.5's with a short question, each with another image."""
    generator = torch.Generator().manual_seed(0)
    length = _TEXT_BEFORE + NUM_IMAGE_TOKENS + _TEXT_AFTER
    ids = torch.randint(_IMAGE + 1, _VOCABULARY, (batch, length), generator=generator)
    ids[:, _TEXT_BEFORE : _TEXT_BEFORE + NUM_IMAGE_TOKENS] = _IMAGE
    pixels = torch.randn(batch, 3, SIDE_PX, SIDE_PX, generator=generator)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels.to(like.dtype)}
    return {name: tensor.to(like.device) for name, tensor in given.items()}
