"""From a model and prompts to a trained router that knows how to spend any budget."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from gen_turbo.training.choosers import RandomChooser, Trained, UniformChooser
from gen_turbo.training.layouts import BUDGETS, Layout, PromptCost, candidates
from gen_turbo.training.probe import weight_probe
from gen_turbo.training.router import Router, RouterShape
from gen_turbo.training.router_file import RouterArtefact
from gen_turbo.training.train_router import Prompts, RouterTrainer, RouterTraining, mean_divergence
from gen_turbo.vlm.routes import Chooser, Routing, Scores
from gen_turbo.vlm.teacher import Lesson, Teacher

_HELD_BACK = 1_000_000
"""Number of the first batch of prompts that is measured on and never trained on."""


@dataclass(frozen=True)
class RouterSizes:
    """Sizes of a router that are free.

    Attributes:
        width: Channels; 0 takes the language model's, as released.
        depth: Blocks.
        attention: "full", or "causal" as released.
    """

    width: int = 64
    depth: int = 1
    attention: str = "full"

    def shape_for(self, text: Any) -> RouterShape:
        """The router's sizes for one language model."""
        config = text.config
        width = self.width or config.hidden_size
        return RouterShape(
            config.hidden_size, config.num_hidden_layers, width, self.depth, max(1, width // 32), self.attention
        )


class RouterCalibration:
    """Trains a router for one model and measures how it spends budgets.

    Args:
        model: A frozen vision-language model.
        prompts: Batches of prompts of one image each, by number.
        training: How the router is trained.
        sizes: How large it is.
        folder: Where an interrupted training goes on; None keeps nothing.
        max_new_tokens: The longest answer of the model.
        num_batches: Batches of other prompts that budgets are measured on.
    """

    def __init__(
        self,
        model: Any,
        prompts: Prompts,
        training: RouterTraining,
        sizes: RouterSizes | None = None,
        folder: Path | None = None,
        max_new_tokens: int = 16,
        num_batches: int = 8,
    ) -> None:
        self.model, self.training = model, training
        self._text = model.get_decoder()
        self._prompts, self._num_batches = prompts, num_batches
        self._teacher = Teacher(model, max_new_tokens)
        self.untrained, router = (self._fresh(sizes or RouterSizes()) for _ in range(2))
        self.trainer = RouterTrainer(router, self._teacher, prompts, training, folder)

    def run(self, on_step: Callable[[int, float, float], None], note: Callable[[str], None]) -> RouterArtefact:
        """Trains what is left to train, then measures.

        Args:
            on_step: Receives the step, its loss and its mean KL.
            note: Receives messages about what was measured.
        """
        self.trainer.fit(on_step)
        lessons = [self._teacher.lesson(self._prompts(_HELD_BACK + index)) for index in range(self._num_batches)]
        reached = self._compared(lessons)
        note("mean KL at the budget of training: " + ", ".join(f"{name} {kl:.4f}" for name, kl in reached.items()))
        length = max(int(lesson.prompt.real_BL.sum(1).max()) for lesson in lessons)
        image_tokens = int(lessons[0].prompt.is_image_BL.sum(1).max())
        layouts = self._layouts(lessons, length, image_tokens, note)
        notes = {
            "training": json.dumps(asdict(self.training)),
            "steps": str(self.trainer.step),
            "data": self.trainer.data_hash,
            "divergence": json.dumps(reached),
        }
        probe = weight_probe([self.model])
        return RouterArtefact(self.trainer.router.eval(), probe, layouts, length, image_tokens, notes)

    def _fresh(self, sizes: RouterSizes) -> Router:
        """An untrained router, the same for the same seed; the global generator is left alone."""
        shape = sizes.shape_for(self._text)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.training.seed)
            return Router(shape).to(self.model.device).eval()

    def _compared(self, lessons: list[Lesson]) -> dict[str, float]:
        """Mean KL of the trained router and of controls at the budget of the training."""
        depth = self.untrained.shape.num_layers
        choosers: dict[str, Chooser] = {
            "router": Trained(self.trainer.router),
            "untrained": Trained(self.untrained),
            "random": RandomChooser(depth),
            "uniform": UniformChooser(depth),
        }
        routing = replace(self.trainer.routing, mode="drop")
        return {name: self._measured(lessons, chooser, routing) for name, chooser in choosers.items()}

    def _layouts(
        self, lessons: list[Lesson], length: int, image_tokens: int, note: Callable[[str], None]
    ) -> dict[float, Layout]:
        """The best layout at each budget."""
        router = self.trainer.router
        cost = PromptCost.of(self._text, length, image_tokens, router.flops(1, length) // 2)
        stacked = len(
            getattr(getattr(self.model.config, "vision_config", None), "deepstack_visual_indexes", None) or ()
        )
        firsts = sorted({max(first, stacked) for first in (0, 1, 2, self.training.first)})
        best = {}
        for budget in BUDGETS:
            measured = [
                replace(layout, divergence=self._at(lessons, router, layout))
                for layout in candidates(cost, budget, firsts)
            ]
            if measured:
                best[budget] = one = min(measured, key=lambda layout: layout.divergence or 0.0)
                note(
                    f"budget {budget:.0%}: {one.tokens:.1%} of the image tokens from layer {one.first} on, "
                    f"{one.layers} layers, mean KL {one.divergence:.4f}"
                )
        return best

    def _at(self, lessons: list[Lesson], router: Router, layout: Layout) -> float:
        routing = Routing(router, 1 - layout.tokens, layout.layers, layout.first)
        return self._measured(lessons, Trained(router), routing)

    def _measured(self, lessons: list[Lesson], chooser: Chooser, routing: Routing) -> float:
        def choose(lesson: Lesson) -> Scores:
            return chooser(lesson.prompt)

        return mean_divergence(self._teacher, lessons, choose, routing)
