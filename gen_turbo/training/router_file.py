"""A trained router on disk: weights, the model it was trained for, and how it spends a budget."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor, nn

from gen_turbo.training.files import EMBEDDED, artefact_folder, artefact_path, read_artefact
from gen_turbo.training.layouts import Layout, PromptCost
from gen_turbo.training.probe import is_same_model, weight_probe
from gen_turbo.training.router import Router, RouterShape

FORMAT = "gen_turbo.router.1"
FOLDER = "par"
_PROBE = "probe"


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
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        weights = {
            name: weight.detach().float().cpu().contiguous() for name, weight in self.router.state_dict().items()
        }
        known = {
            "format": FORMAT,
            "shape": json.dumps(asdict(self.router.shape)),
            "layouts": json.dumps({str(budget): asdict(layout) for budget, layout in self.layouts.items()}),
            "prompt": json.dumps([self.length, self.image_tokens]),
        }
        partial = path.with_name(path.name + ".partial")
        save_file({**weights, _PROBE: self.probe}, partial, metadata={**self.notes, **known})
        partial.replace(path)

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
        notes, tensors = _read(path)
        probe = tensors.pop(_PROBE)
        router = Router(RouterShape(**json.loads(notes["shape"])))
        router.load_state_dict(tensors)
        layouts = {float(budget): Layout(**one) for budget, one in json.loads(notes["layouts"]).items()}
        length, image_tokens = json.loads(notes["prompt"])
        rest = {name: text for name, text in notes.items() if name not in ("format", "shape", "layouts", "prompt")}
        return cls(router.eval(), probe, layouts, length, image_tokens, rest)


def router_for(model: nn.Module, name_or_path: str | None) -> RouterArtefact:
    """The router of one model: from a file, or the one inside the package that was trained for it.

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
        return artefact
    for path in sorted((artefact_folder() / FOLDER).glob("*.safetensors")):
        if is_same_model(_read(path)[1][_PROBE], probe):
            return RouterArtefact.load(artefact_path(f"{EMBEDDED}{FOLDER}/{path.stem}"))
    raise ValueError(f"no router ships for this {name}; train one: gen-turbo calibrate par, and give it as router=PATH")


def _read(path: str | Path) -> tuple[Mapping[str, str], dict[str, Tensor]]:
    return read_artefact(path, FORMAT, "router", "make one with: gen-turbo calibrate par")
