"""Training of VisToG's learned parts without labels: grouped, a model should say what it says with every patch."""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from gen_turbo.training.files import Notes, Size, read_artefact, save_artefact
from gen_turbo.training.lessons import Taught
from gen_turbo.training.vistog import VisToGArtefact
from gen_turbo.training.vistog_training import VisToGTraining
from gen_turbo.vlm.attachment import VlmPart
from gen_turbo.vlm.grouping import Grouping
from gen_turbo.vlm.teacher import Teacher

Batches = Callable[[int], Mapping[str, Tensor]]
"""Gives the inputs of a step: prompts with images, padded on the left. The same number, the same inputs."""
_STATE, _RESULT, _ADAPTER, _ROWS = "state.safetensors", "vistog.safetensors", "adapter", "rows:"
_FORMAT, _MOMENTS = "gen_turbo.vistog_state.1", ("exp_avg", "exp_avg_sq", "step")
_ANOTHER = "choose another folder or delete it"


class VisToGTrainer:
    """The learned parts of an attachment, their optimiser and a folder from which an interrupted training goes on.

    Args:
        part: The attachment of an untrained `VisToGVisionProcessor`; the model must be in float32.
        batches: The data; steps take numbers from 0.
        settings: How long and how fast.
        folder: Where state and result are; a state of other settings there is an error.
        start: Weights to begin from where the folder has no state; their tokens may enter the tower at another block.
    """

    def __init__(
        self,
        part: VlmPart,
        batches: Batches,
        settings: VisToGTraining,
        folder: Path,
        start: VisToGArtefact | None = None,
    ) -> None:
        stage = part.stage(Grouping)
        if stage is None or stage.grouping is None or stage.connector is not None:
            raise ValueError("attach an untrained VisToGVisionProcessor that removes tokens, without weights")
        if next(part.model.parameters()).dtype != torch.float32:
            raise ValueError("train in float32; load the model with dtype=float32")
        self.part, self.batches, self.settings, self.folder = part, batches, settings, folder
        self._stage = stage
        self.step = 0
        self._model: Any = part.model
        self._teacher = Teacher(self._model, settings.max_new_tokens)
        self._grouping, self._probe = stage.grouping, stage.probe(part.model)
        learned: dict[str, nn.Module] = {"grouping": stage.grouping}
        if start is not None:
            self._check(start)
            stage.grouping.load_state_dict(start.grouping.state_dict())
        if settings.has_connector:
            learned["connector"] = stage.copy_connector(part.model)
            if start is not None and start.connector:
                learned["connector"].load_state_dict(start.connector)
        self._weights = {
            f"{name}.{path}": weight for name, module in learned.items() for path, weight in module.named_parameters()
        }
        self._lessons: dict[int, Taught] = {}
        self._rows: dict[int, Tensor] = {}
        self._optimiser = torch.optim.AdamW(self._weights.values(), betas=(0.9, 0.99), weight_decay=0.0)
        self._resume()

    @property
    def num_steps(self) -> int:
        """Steps of both stages."""
        return self.settings.align_steps + self.settings.tune_steps

    def run(self, notes: Mapping[str, str], until: int | None = None) -> Path | None:
        """Trains from where the folder's state is.

        Args:
            notes: What is recorded in the result beside the settings.
            until: The step to stop at, to go on another time; None trains to the end.

        Returns:
            The file of learned weights; None if the end was not reached.
        """
        saved_s = time.monotonic()
        end = self.num_steps if until is None else min(until, self.num_steps)
        with self._training(), tqdm(total=self.num_steps, initial=self.step, desc="vistog", disable=None) as bar:
            while self.step < end:
                loss = self._train()
                bar.set_postfix(divergence=f"{loss:.4f}")
                bar.update()
                if time.monotonic() - saved_s > self.settings.save_every_s:
                    self.save()
                    saved_s = time.monotonic()
        self.save()
        return self._export(notes) if self.step == self.num_steps else None

    def divergence(self, batches: Batches, count: int) -> float:
        """Mean divergence from the full model, nats a word, over `count` batches from the first, in evaluation mode."""
        self._grouping.eval()
        with torch.no_grad():
            taught = [self._taught(batches(index)) for index in range(count)]
            return float(sum(one.divergence(self._model).sum() / one.counts_BT.sum() for one in taught) / count)

    def save(self) -> None:
        """Writes the state, whole or not at all."""
        tensors = {name: weight.detach() for name, weight in self._weights.items()}
        for name, weight in self._weights.items():
            state = self._optimiser.state.get(weight, {})
            tensors |= {f"{key}:{name}": state[key] for key in _MOMENTS if key in state}
        tensors |= {f"{_ROWS}{index}": rows for index, rows in self._rows.items()}
        notes = {"format": _FORMAT, "settings": json.dumps(asdict(self.settings)), "step": str(self.step)}
        save_artefact(self.folder / _STATE, tensors, notes)

    def _check(self, start: VisToGArtefact) -> None:
        own, other = ((s.num_groups, s.width) for s in (self._grouping.shape, start.grouping.shape))
        if other != own:
            raise ValueError(f"expected weights of {own[0]} tokens of {own[1]} channels to begin from, got {other}")
        if start.connector and not self.settings.has_connector:
            raise ValueError("the weights to begin from have a projector; train it too, or take some without")

    def _resume(self) -> None:
        path = self.folder / _STATE
        if not path.is_file():
            return
        notes, tensors = read_artefact(path, _FORMAT, "state of a training", _ANOTHER, self._sizes, _ROWS)
        self._rows = {int(name.removeprefix(_ROWS)): rows for name, rows in tensors.items() if name.startswith(_ROWS)}
        self.step = int(notes["step"])
        if self.step > self.settings.align_steps:
            self._add_adapter()
        with torch.no_grad():
            for name, weight in self._weights.items():
                if name not in tensors or tensors[name].shape != weight.shape:
                    raise ValueError(f"{path} has no {name} of this size; {_ANOTHER}")
                weight.copy_(tensors[name])
                state = {key: tensors[f"{key}:{name}"].clone() for key in _MOMENTS if f"{key}:{name}" in tensors}
                if state:
                    self._optimiser.state[weight] = state

    def _sizes(self, notes: Notes, found: Mapping[str, Size]) -> dict[str, Size]:
        """What a state of this training holds; an adapter is checked once there is one."""
        before, now = json.loads(notes["settings"]), asdict(self.settings)
        changed = sorted(name for name in now if name != "save_every_s" and before.get(name) != now[name])
        if changed:
            raise ValueError(f"it is of a training with another {', '.join(changed)}")
        if not 0 <= int(notes["step"]) <= self.num_steps:
            raise ValueError(f"it is of step {notes['step']} of {self.num_steps}")
        sizes = {name: tuple(weight.shape) for name, weight in self._weights.items()}
        moments = {f"{key}:{name}": () if key == "step" else size for key in _MOMENTS for name, size in sizes.items()}
        free = {name: size for name, size in found.items() if name.split(":")[-1].startswith(_ADAPTER)}
        rows = {name: size for name, size in found.items() if re.fullmatch(f"{_ROWS}[0-9]+", name)}
        return {**sizes, **{name: size for name, size in moments.items() if name in found}, **free, **rows}

    @contextmanager
    def _training(self) -> Iterator[None]:
        """The model frozen, the learned parts not."""
        needed = [weight for weight in self._model.parameters() if weight.requires_grad]
        own = {id(weight) for weight in self._weights.values()}
        for weight in needed:
            weight.requires_grad_(id(weight) in own)
        try:
            yield
        finally:
            self._grouping.eval()
            for weight in needed:
                weight.requires_grad_(True)

    @contextmanager
    def _stock(self) -> Iterator[None]:
        """The model as it was before anything was attached."""
        has_adapter = any(name.startswith(_ADAPTER) for name in self._weights)
        self.part.remove()
        if has_adapter:
            self._model.disable_adapters()
        try:
            yield
        finally:
            if has_adapter:
                self._model.enable_adapters()
            self.part.install()

    def _train(self) -> float:
        if self.step == self.settings.align_steps:
            self._add_adapter()
        for group in self._optimiser.param_groups:
            group["lr"] = self.settings.rate(self.step)
        self._grouping.train()
        # What is read is assigned without noise, so the noise goes, lest the rest gets used to wrong assignments.
        self._grouping.noise = max(0.0, 1 - self.step / max(1, self.settings.align_steps))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.settings.seed * 1_000_003 + self.step)
            loss = self._loss(self._lesson(self.settings.lesson(self.step)))
        self._optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(self._weights.values(), 1.0)
        self._optimiser.step()
        self.step += 1
        return float(loss.detach())

    def _lesson(self, index: int) -> Taught:
        """A batch and the full model's answers, which are held until the next ones are due."""
        if index not in self._lessons:
            first = index - index % self.settings.num_lessons
            self._lessons = {number: lesson for number, lesson in self._lessons.items() if number >= first}
            self._rows = {number: rows for number, rows in self._rows.items() if number >= first}
            self._lessons[index] = self._hardest(index, self._taught(self.batches(index)))
        return self._lessons[index]

    def _taught(self, inputs: Mapping[str, Tensor]) -> Taught:
        with self._stock():
            return Taught.of(inputs, self._teacher.lesson(inputs))

    def _hardest(self, index: int, taught: Taught) -> Taught:
        if self.settings.num_drawn == 1:
            return taught
        if index not in self._rows:
            self._grouping.eval()
            self._rows[index] = taught.hardest(self._model, math.ceil(len(taught.answer_BT) / self.settings.num_drawn))
            self._grouping.train()
        return taught.of_rows(self._rows[index])

    def _loss(self, taught: Taught) -> Tensor:
        """KL(full || grouped) of the full model's own answers, mean over answers: one wrong word spoils a long one."""
        loss: Tensor = taught.divergence(self._model).sum(1).mean()
        return loss

    def _add_adapter(self) -> None:
        if not self.settings.lora_rank:
            return
        from peft import LoraConfig

        targets = r".*language_model.*\.(q_proj|v_proj)"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.settings.seed)
            config = LoraConfig(r=self.settings.lora_rank, lora_alpha=self.settings.lora_rank, target_modules=targets)
            self._model.add_adapter(config, _ADAPTER)
        found = {name: weight for name, weight in self._model.named_parameters() if "lora_" in name}
        self._weights |= {f"{_ADAPTER}.{name}": weight.requires_grad_(True) for name, weight in found.items()}
        self._optimiser.add_param_group({"params": list(found.values())})

    def _export(self, notes: Mapping[str, str]) -> Path:
        settings = {"settings": json.dumps(asdict(self.settings)), "step": str(self.step)}
        connector = self._stage.connector.state_dict() if self._stage.connector is not None else {}
        path = self.folder / _RESULT
        VisToGArtefact(self._grouping, connector, self._probe, {**settings, **notes}).save(path)
        if self.settings.lora_rank:
            self._model.save_pretrained(self.folder / _ADAPTER)
        return path
