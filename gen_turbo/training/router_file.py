"""A trained router on disk: weights, the model it was trained for, and how it spends a budget."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gen_turbo.training.files import (
    Notes,
    Size,
    artefact_folder,
    artefact_path,
    check_value,
    from_note,
    read_artefact,
    save_artefact,
)
from gen_turbo.training.layouts import Layout, PromptCost
from gen_turbo.training.probe import is_same_model, weight_probe
from gen_turbo.training.router import Router, RouterShape

FORMAT = "gen_turbo.router.1"
FOLDER = "par"
_PROBE = "probe"
_WHAT, _REMEDY = "router", "make one with: gen-turbo calibrate par"


@dataclass
class RouterArtefact:
    """A router with what is needed to trust it.

    Attributes:
        router: The router, in evaluation mode.
        probe: The sample of the weights of the model trained for, see `weight_probe`.
        layouts: The best layout that was measured at each budget, budgets ascending.
        length: Tokens of a typical prompt.
        image_tokens: Image tokens among them.
        notes: What else is recorded: the training's settings, a hash of its prompts, what it reached.
    """

    router: Router
    probe: Tensor
    layouts: dict[float, Layout]
    length: int
    image_tokens: int
    notes: dict[str, str]

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file, at once or not at all."""
        weights = {name: weight.detach().float().cpu() for name, weight in self.router.state_dict().items()}
        known = {
            "format": FORMAT,
            "shape": json.dumps(asdict(self.router.shape)),
            "layouts": json.dumps({str(budget): asdict(layout) for budget, layout in self.layouts.items()}),
            "prompt": json.dumps([self.length, self.image_tokens]),
        }
        save_artefact(path, {**weights, _PROBE: self.probe}, {**self.notes, **known})

    def layout_at(self, budget: float, text: nn.Module) -> Layout:
        """How to spend a budget on a typical prompt: layers as measured, tokens as the budget allows.

        Raises:
            ValueError: If the budget is below all that was measured.
        """
        cost = PromptCost.of(text, self.length, self.image_tokens, self.router.flops(1, self.length) // 2)
        nearest = sorted(self.layouts, key=lambda other: (other < budget, abs(other - budget)))
        for measured in (self.layouts[other] for other in nearest):
            fitting = cost.fit(budget, measured.layers, measured.first)
            if fitting is not None:
                return fitting
        least = min(self.layouts, default=1.0)
        raise ValueError(f"this router cannot meet a budget of {budget}; the least it was calibrated for is {least}")

    @classmethod
    def load(cls, path: str | Path) -> RouterArtefact:
        """Reads what `save` wrote.

        Raises:
            ValueError: If there is no such file or it holds something else.
        """
        notes, tensors = read_artefact(path, FORMAT, _WHAT, _REMEDY, _sizes)
        probe = tensors.pop(_PROBE)
        router = _router(_shape(notes))
        router.load_state_dict(tensors)
        rest = {name: text for name, text in notes.items() if name not in ("format", "shape", "layouts", "prompt")}
        return cls(router.eval(), probe, _layouts(notes), *_prompt(notes), rest)

    def check_fits(self, text: nn.Module, path: str) -> None:
        """Refuses a router of another language model; raises ValueError."""
        config: Any = text.config
        own, other = (
            (self.router.shape.text_width, self.router.shape.num_layers),
            (
                config.hidden_size,
                config.num_hidden_layers,
            ),
        )
        if own != other:
            raise ValueError(
                f"{path} reads {own[0]} channels and {own[1]} layers, but {type(text).__name__} has {other[0]} and "
                f"{other[1]}; {_REMEDY}"
            )


def router_for(model: nn.Module, text: nn.Module, name_or_path: str | None) -> RouterArtefact:
    """The router of one model with its language model: from a file, or one that ships and was trained for it.

    Raises:
        ValueError: If there is none, or it was trained for another model.
    """
    probe, name = weight_probe([model]), type(model).__name__
    if name_or_path is not None:
        artefact = RouterArtefact.load(artefact_path(name_or_path))
        if not is_same_model(artefact.probe, probe):
            raise ValueError(
                f"{name_or_path} was trained for another model than this {name}; train one: gen-turbo calibrate par"
            )
        artefact.check_fits(text, name_or_path)
        return artefact
    for path in sorted((artefact_folder() / FOLDER).glob("*.safetensors")):
        artefact = RouterArtefact.load(path)
        if is_same_model(artefact.probe, probe):
            return artefact
    raise ValueError(f"no router ships for this {name}; train one: gen-turbo calibrate par, and give it as router=PATH")


def _shape(notes: Notes) -> RouterShape:
    return from_note(RouterShape, json.loads(notes["shape"]))


def _router(shape: RouterShape) -> Router:
    """A router whose weights are about to be replaced: the user's generator is left alone."""
    with torch.random.fork_rng(devices=[]):
        return Router(shape)


def _layouts(notes: Notes) -> dict[float, Layout]:
    """The layouts by budget; raises ValueError if one cannot be."""
    tree = json.loads(notes["layouts"])
    check_value("layouts", tree, dict)
    layouts = {float(budget): from_note(Layout, one) for budget, one in tree.items()}
    for budget, layout in layouts.items():
        is_layout = 0 < layout.tokens <= 1 and 1 <= layout.layers <= _shape(notes).num_layers and layout.first >= 0
        if not 0 < budget <= 1 or not is_layout:
            raise ValueError(f"at the budget {budget} it has {layout}")
    return layouts


def _prompt(notes: Notes) -> tuple[int, int]:
    length, image_tokens = json.loads(notes["prompt"])
    for name, value in (("length", length), ("image_tokens", image_tokens)):
        check_value(name, value, int)
    if not 0 <= image_tokens <= length:
        raise ValueError(f"{image_tokens} of {length} tokens are of the image")
    return length, image_tokens


def _sizes(notes: Notes, found: Mapping[str, Size]) -> dict[str, Size]:
    """The sizes of a router's weights; its notes are all read, and no larger router is made than the file holds."""
    _layouts(notes), _prompt(notes)
    shape = _shape(notes)
    depth = len({name.split(".")[1] for name in found if name.startswith("blocks.")})
    first = {
        "enter.weight": (shape.width, shape.text_width),
        "layer_tokens": (shape.num_layers, shape.width),
        "blocks.0.qkv.weight": (3 * shape.width, shape.width),
    }
    for name, size in first.items():
        if found.get(name) != size or shape.depth != depth:
            raise ValueError(f"{name} has the size {found.get(name)} in {depth} blocks, not {size} in {shape.depth}")
    made = _router(shape).state_dict()
    return {name: tuple(value.shape) for name, value in made.items()} | {_PROBE: found[_PROBE]}
