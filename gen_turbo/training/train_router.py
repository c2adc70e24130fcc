"""Training PAR's router without labels: a frozen model judges prunings of its own prompts by its own answers.

Shape names: K routes of each prompt, B prompts.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from gen_turbo.schemas import check_finite
from gen_turbo.training import objectives
from gen_turbo.training.files import Notes, Size, read_artefact, save_artefact
from gen_turbo.training.probe import weight_probe
from gen_turbo.training.router import Router
from gen_turbo.vlm.routes import Routing, Scores
from gen_turbo.vlm.teacher import Lesson, Teacher

Prompts = Callable[[int], Mapping[str, Tensor]]
"""Gives the inputs of a batch of prompts, by number; the same number gives the same batch."""
OBJECTIVES = ("preference", "reward", "divergence")
_LAYERS_EVERY = 4
_STATE, _FORMAT, _MOMENTS = "state.safetensors", "gen_turbo.router_state.1", ("step", "exp_avg", "exp_avg_sq")
_ANOTHER = "give another folder or delete it"


@dataclass(frozen=True)
class RouterTraining:
    """Settings of a training.

    PAR (ICCV 2025, Section 3 and figure 3) fixes noise on the router's attention, the ranking of prunings by KL to the
    unpruned output and a preference loss on best and worst; formulas and figures are ours.

    Attributes:
        objective: "preference" learns the best of several prunings against the worst; "reward" learns each by its
            advantage over their mean; "divergence" follows the gradient of the KL through soft weights.
        tokens: Share of the image tokens that is kept in training. Any share can be asked for later.
        layers: Decoder layers that run in training; 0 skips as many as the paper, one in eight.
        first: The first decoder layer without the dropped tokens.
        samples: Prunings of each prompt, the first without noise; "divergence" takes one.
        noise: Scale of normal noise on the router's attention logits.
        spread: Scale of Gumbel noise on its scores; with 0 only `noise` explores, as in the paper. Prunings
            of one step differ in tokens or in layers.
        beta: Sharpness of the preference.
        margin: Smallest difference in KL that a preference is drawn from.
        sparsity: Weight of the distance between mean probabilities and the shares to be kept.
        temperature: Of the soft weights.
        learning_rate: Of AdamW; warms up over 10 steps and falls to nothing along a cosine.
        steps: Updates.
        seed: Of the noise.
    """

    objective: str = "preference"
    tokens: float = 0.4
    layers: int = 0
    first: int = 2
    samples: int = 8
    noise: float = 1.0
    spread: float = 1.0
    beta: float = 2.0
    margin: float = 1e-4
    sparsity: float = 0.1
    temperature: float = 0.5
    learning_rate: float = 2e-3
    steps: int = 300
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks every setting; raises ValueError."""
        check_finite(self)
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}; got {self.objective!r}")
        if not 0 < self.tokens <= 1:
            raise ValueError(f"tokens must be the share of image tokens kept, 0 < tokens <= 1; got {self.tokens}")
        if self.objective != "divergence" and self.samples < 2:
            raise ValueError(f"at least 2 samples are needed to compare prunings; got {self.samples}")
        for setting in ("layers", "first", "noise", "spread", "beta", "margin", "sparsity", "steps"):
            if getattr(self, setting) < 0:
                raise ValueError(f"{setting} must not be negative; got {getattr(self, setting)}")

    def layers_of(self, num_layers: int) -> int:
        """Decoder layers that run, of so many."""
        return self.layers or max(1, num_layers - max(1, num_layers // 8))


class RouterTrainer:
    """A training that can be stopped and continued.

    Args:
        router: The router; it is trained in place.
        teacher: The frozen model.
        prompts: The prompts by step.
        training: Settings.
        folder: Where the checkpoint `state.safetensors` goes; None keeps none.

    Raises:
        ValueError: If the folder holds a checkpoint of other settings, another router or another model.
    """

    def __init__(
        self, router: Router, teacher: Teacher, prompts: Prompts, training: RouterTraining, folder: Path | None = None
    ) -> None:
        self.router, self.teacher, self.prompts, self.training, self.folder = router, teacher, prompts, training, folder
        self.step, self.data_hash = 0, ""
        self.layers = training.layers_of(router.shape.num_layers)
        self._weights = list(router.parameters())
        self._optimiser = torch.optim.AdamW(self._weights, lr=training.learning_rate, weight_decay=0.0)
        if folder is not None and (folder / _STATE).exists():
            self._resume(folder / _STATE)

    @property
    def routing(self) -> Routing:
        """The budget of the training."""
        mode = "soft" if self.training.objective == "divergence" else "drop"
        return Routing(self.router, 1 - self.training.tokens, self.layers, self.training.first, mode)

    def fit(self, on_step: Callable[[int, float, float], None], save_every: int = 25) -> None:
        """Trains what is left of the steps; `on_step` receives the step, its loss and its mean KL."""
        self.router.train()
        while self.step < self.training.steps:
            inputs = self.prompts(self.step)
            self.data_hash = _chained(self.data_hash, inputs)
            # A step's noise depends on its number alone, so that a continued training is the same training.
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(self.training.seed * 1_000_003 + self.step)
                loss, divergence = self._loss(self.teacher.lesson(inputs))
            self._update(loss)
            self.step += 1
            on_step(self.step, loss.item(), divergence)
            if self.folder is not None and (self.step % save_every == 0 or self.step == self.training.steps):
                self._save(self.folder)
        self.router.eval()

    def _loss(self, lesson: Lesson) -> tuple[Tensor, float]:
        training, prompt = self.training, lesson.prompt
        if training.objective == "divergence":
            noisy = objectives.perturbed(self.router(prompt, training.noise), training.spread)
            routing = self._step_routing
            weights = objectives.soft_weights(noisy, prompt, training.tokens, routing.num_layers, training.temperature)
            each = self.teacher.divergence(lesson, weights, routing)
            plain = self.router(prompt)
            return each.mean() + self._budget(plain, lesson), each.mean().item()
        with torch.no_grad():
            own = self.router.choose(prompt)
            drawn = [own, *(self._drawn(lesson, own) for _ in range(training.samples - 1))]
            routes = Scores(torch.cat([one.token_BL for one in drawn]), torch.cat([one.layer_BD for one in drawn]))
            each = self.teacher.divergence(lesson, routes, self._step_routing)
            action = objectives.kept(routes, prompt, training.tokens, self.layers)
        scores = self.router(prompt)
        token, layer = objectives.log_probability(scores, action, prompt)
        log_pi = (layer if self._is_about_layers else token).reshape(training.samples, -1)
        if training.objective == "reward":
            learned = objectives.reward_loss(log_pi, each)
        else:
            learned = objectives.preference_loss(log_pi, each, training.beta, training.margin)
        return learned + self._budget(scores, lesson), each[0].mean().item()

    @property
    def _is_about_layers(self) -> bool:
        """Whether the prunings of this step differ in layers, the other steps' in tokens, with every layer run.

        A wrong layer costs far more than a wrong token: where both differ, tokens would learn from layers' mistakes.
        """
        if self.layers == self.router.shape.num_layers:
            return False
        return self.training.tokens == 1 or self.step % _LAYERS_EVERY == 0

    @property
    def _step_routing(self) -> Routing:
        return self.routing if self._is_about_layers else replace(self.routing, num_layers=self.router.shape.num_layers)

    def _drawn(self, lesson: Lesson, own: Scores) -> Scores:
        """What the router would route by itself, with noise on layers or on tokens."""
        noisy = objectives.perturbed(self.router(lesson.prompt, self.training.noise), self.training.spread)
        if self._is_about_layers:
            return Scores(own.token_BL, noisy.layer_BD)
        return Scores(noisy.token_BL, own.layer_BD)

    def _budget(self, scores: Scores, lesson: Lesson) -> Tensor:
        distance = objectives.budget_loss(scores, lesson.prompt, self.training.tokens, self.layers)
        return self.training.sparsity * distance

    def _update(self, loss: Tensor) -> None:
        """One step on the router alone: the model's own weights get no gradient."""
        warm, done = min(1.0, (self.step + 1) / 10), self.step / self.training.steps
        for group in self._optimiser.param_groups:
            group["lr"] = self.training.learning_rate * warm * (0.5 + 0.5 * math.cos(math.pi * done))
        for weight, gradient in zip(self._weights, torch.autograd.grad(loss, self._weights), strict=True):
            weight.grad = gradient
        torch.nn.utils.clip_grad_norm_(self._weights, 1.0)
        self._optimiser.step()
        self._optimiser.zero_grad(set_to_none=True)

    def _save(self, folder: Path) -> None:
        tensors = {f"weight.{index}": weight.detach() for index, weight in enumerate(self._weights)}
        for index, weight in enumerate(self._weights):
            state = self._optimiser.state.get(weight, {})
            tensors |= {f"{name}.{index}": value for name, value in state.items()}
        notes = {"format": _FORMAT, "settings": self._settings(), "step": str(self.step), "data": self.data_hash}
        save_artefact(folder / _STATE, tensors, notes)

    def _resume(self, path: Path) -> None:
        notes, tensors = read_artefact(path, _FORMAT, "state of a training", _ANOTHER, self._sizes)
        with torch.no_grad():
            for index, weight in enumerate(self._weights):
                weight.copy_(tensors[f"weight.{index}"])
                names = [name for name in _MOMENTS if f"{name}.{index}" in tensors]
                self._optimiser.state[weight] = {name: tensors[f"{name}.{index}"] for name in names}
        self.step, self.data_hash = int(notes["step"]), notes["data"]

    def _sizes(self, notes: Notes, found: Mapping[str, Size]) -> dict[str, Size]:
        if notes["settings"] != self._settings():
            raise ValueError("it is of a training with other settings or of another model")
        if not 0 <= int(notes["step"]) <= self.training.steps:
            raise ValueError(f"it is of step {notes['step']} of {self.training.steps}")
        sizes: dict[str, Size] = {}
        for index, weight in enumerate(self._weights):
            size = tuple(weight.shape)
            sizes |= {f"weight.{index}": size}
            if int(notes["step"]):
                sizes |= {f"step.{index}": (), f"exp_avg.{index}": size, f"exp_avg_sq.{index}": size}
        return sizes

    def _settings(self) -> str:
        model = hashlib.sha256(weight_probe([self.teacher.model]).numpy().tobytes()).hexdigest()
        return json.dumps([asdict(self.training), asdict(self.router.shape), model], sort_keys=True)


@torch.no_grad()
def mean_divergence(
    teacher: Teacher, lessons: list[Lesson], choose: Callable[[Lesson], Scores], routing: Routing
) -> float:
    """Mean KL of the model's answers from its own on the routes that `choose` scores highest."""
    total = [teacher.divergence(lesson, choose(lesson), routing).mean() for lesson in lessons]
    return float(torch.stack(total).mean())


def _chained(before: str, inputs: Mapping[str, Tensor]) -> str:
    """A hash of all prompts seen so far."""
    hasher = hashlib.sha256(before.encode())
    for name in sorted(inputs):
        hasher.update(name.encode())
        hasher.update(inputs[name].detach().cpu().contiguous().numpy().tobytes())
    return hasher.hexdigest()
