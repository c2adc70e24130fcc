"""A resumable trainer for one CPU core: averaged weights, stages with budgets in CPU seconds, one helping process."""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from muon import optimisers, set_learning_rate
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

EXCHANGE_EVERY = 12
AVERAGE = 0.98
WARMUP = 15


def parsed(description: str, seconds: list[float], output: Path) -> argparse.Namespace:
    """Reads the command line of a training script, whose defaults are these budgets and this folder."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--seconds", type=float, nargs=len(seconds), default=seconds, help="of each stage")
    parser.add_argument("--output", type=Path, default=output, help="folder of checkpoints and the result")
    parser.add_argument("--scenes", type=int, default=5000, help="scenes to train on")
    parser.add_argument("--seed", type=int, default=2, help="of weights and scenes")
    parser.add_argument("--rank", type=int, default=0, choices=(0, 1), help="1 for the helping process")
    parser.add_argument("--ship", action="store_true", help="train nothing; put the result into the package")
    return parser.parse_args()


@dataclass(frozen=True)
class Stage:
    """One part of a training.

    Attributes:
        name: Names the stage in checkpoints and output.
        size: Which network is trained, as the script counts them.
        batch: Examples a step.
        learning_rate: For matrices; everything else takes half of it.
        decay_from: The part of the budget after which the rate falls to nothing along a cosine.
    """

    name: str
    size: int
    batch: int
    learning_rate: float
    decay_from: float


class Trainer:
    """Models, their averages and both optimisers, with a checkpoint that holds all of it but AdamW's moments."""

    def __init__(self, folder: Path, rank: int, keep_plain: tuple[str, ...]) -> None:
        self.folder, self.rank, self.keep_plain, self.seen = folder, rank, keep_plain, 0.0
        self.spent: dict[str, float] = {}
        self.steps = 0

    def use(self, models: list[nn.Module], size: int) -> None:
        """Trains these models from now on; averages and optimisers begin anew."""
        self.models, self.size = models, size
        self.parameters = [parameter for model in models for parameter in model.train().parameters()]
        self.muon, self.adam = optimisers(*models, keep_plain=self.keep_plain)
        self.average = [p.detach().clone() for p in self.parameters]

    def save(self) -> None:
        """Writes the checkpoint under a temporary name, then renames it."""
        tensors = {f"parameter.{i}": p.detach().contiguous() for i, p in enumerate(self.parameters)}
        tensors |= {f"average.{i}": p.contiguous() for i, p in enumerate(self.average)}
        tensors |= {f"muon.{i}": b.contiguous() for i, b in enumerate(self.muon.buffers)}
        save_file(tensors, self.folder / "state.tmp", {"json": json.dumps([self.spent, self.steps, self.size])})
        (self.folder / "state.tmp").replace(self.folder / "state.safetensors")

    def resume(self, make: Callable[[int], list[nn.Module]]) -> bool:
        """Goes on from the checkpoint, if there is one; `make` gives fresh models of a size."""
        path = self.folder / "state.safetensors"
        if not path.exists():
            return False
        header = int.from_bytes(path.read_bytes()[:8], "little")
        metadata = json.loads(path.read_bytes()[8 : 8 + header])["__metadata__"]
        self.spent, self.steps, size = json.loads(metadata["json"])
        self.use(make(size), size)
        tensors = load_file(path)
        with torch.no_grad():
            for name, rows in (("parameter", self.parameters), ("average", self.average), ("muon", self.muon.buffers)):
                for i, row in enumerate(rows):
                    row.copy_(tensors[f"{name}.{i}"])
        print("resumed", self.spent, self.steps, flush=True)
        return True

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The models with averaged weights inside the block, with their own after it."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for parameter, value in zip(self.parameters, self.average, strict=True):
            own = parameter.clone()
            parameter.copy_(value)
            value.copy_(own)

    def fit(
        self,
        stage: Stage,
        seconds: float,
        loss: Callable[[int, float], Tensor],
        export: Callable[[], None],
        save_every: float = 240.0,
    ) -> None:
        """Trains one stage until its CPU budget is spent.

        Args:
            stage: The stage.
            seconds: Its budget, with what earlier calls spent on it.
            loss: Gives the mean loss of a batch, from its size and the part of the budget that is spent.
            export: Called after each checkpoint of the first process.
            save_every: CPU seconds between checkpoints.
        """
        start = time.process_time() - self.spent.get(stage.name, 0.0)
        last_save, first_step, running = time.process_time(), self.steps, None
        if self.rank:
            self._exchange(stage, weight=1.0)
        while (spent := time.process_time() - start) < seconds and not (self.rank and self._is_behind(stage)):
            if (self.steps - first_step) % EXCHANGE_EVERY == EXCHANGE_EVERY - 1:
                self._exchange(stage)
            tail = max(0.0, spent / seconds - stage.decay_from) / max(1e-6, 1 - stage.decay_from)
            factor = min(1.0, (self.steps - first_step + 1) / WARMUP) * (0.51 + 0.49 * math.cos(math.pi * tail))
            set_learning_rate(self.muon, self.adam, stage.learning_rate * factor)
            value = self._update(loss(stage.batch, spent / seconds))
            running = value if running is None else 0.98 * running + 0.02 * value
            self.spent[stage.name] = time.process_time() - start
            if self.steps % 25 == 0:
                print(f"{stage.name} step {self.steps} {spent:.0f}s loss {running:.4f}", flush=True)
            if self.rank == 0 and time.process_time() - last_save > save_every:
                self.save()
                export()
                last_save = time.process_time()
        if self.rank == 0:
            self.save()
            export()

    def _update(self, loss: Tensor) -> float:
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.adam.step()
        self.muon.step()
        for parameter in self.parameters:
            parameter.grad = None
        self.steps += 1
        weight = 1 - min(AVERAGE, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], weight)
        return loss.item()

    @torch.no_grad()
    def _exchange(self, stage: Stage, weight: float = 0.5) -> None:
        """Offers the weights to the other process and moves towards what it offered since the last time."""
        own, other = (self.folder / f"peer_{rank}_{stage.name}.safetensors" for rank in (self.rank, 1 - self.rank))
        save_file({str(i): p.detach().contiguous() for i, p in enumerate(self.parameters)}, own.with_suffix(".tmp"))
        own.with_suffix(".tmp").replace(own)
        if other.exists() and other.stat().st_mtime > self.seen:
            self.seen = other.stat().st_mtime
            tensors = load_file(other)
            for i, parameter in enumerate(self.parameters):
                parameter.lerp_(tensors[str(i)], weight)

    def _is_behind(self, stage: Stage) -> bool:
        """Whether the first process has begun a later stage."""
        offered = [path for path in self.folder.glob("peer_0_*.safetensors") if path.stat().st_mtime > self.seen]
        return bool(self.seen) and any(path.stem != f"peer_0_{stage.name}" for path in offered)
