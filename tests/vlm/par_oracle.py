"""A chooser that is a plain function of each row, and slow right answers for what it chooses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gen_turbo.method import LayerInfo, StepInfo
from gen_turbo.methods.base import ReductionProcessor
from gen_turbo.tokens.token_map import TokenMap
from gen_turbo.vlm.routes import Prompt, Routed, Routing, Scores
from tests.vlm import oracle
from tests.vlm.tiny_kit import IMAGE, TinyVlm


class Linear:
    """Scores by fixed random directions: tokens one by one, layers from the mean of a row's real tokens."""

    def __init__(self, width: int, num_layers: int) -> None:
        generator = torch.Generator().manual_seed(5)
        self.token_C = torch.randn(width, generator=generator)
        self.layer_CD = torch.randn(width, num_layers, generator=generator)
        self.asked = 0

    def __call__(self, prompt: Prompt) -> Scores:
        self.asked += 1
        real = prompt.real_BL[..., None].float()
        mean = (prompt.embeds_BLC * real).sum(1) / real.sum(1)
        return Scores(prompt.embeds_BLC @ self.token_C, mean @ self.layer_CD)

    def flops(self, batch: int, length: int) -> int:
        return batch * length


@dataclass
class Forced(ReductionProcessor, Routed):
    """Routes by any chooser at any budget."""

    chooser: Any = None
    removed: float = 0.5
    num_layers: int = 3
    first: int = 2
    mode: str = "drop"

    def plan(self, tokens: Tensor, site: LayerInfo, frame: StepInfo) -> TokenMap:
        raise AssertionError("a routed method plans by its chooser")

    def routing(self, model: nn.Module, text: nn.Module) -> Routing:
        return Routing(self.chooser, self.removed, self.num_layers, self.first, self.mode)


def chooser_for(model: nn.Module) -> Linear:
    """A chooser of the model's width and depth."""
    text = model.config.get_text_config()
    return Linear(text.hidden_size, text.num_hidden_layers)


def choice_of(hidden_LC: Tensor, ids: Tensor, size: int, processor: Forced) -> tuple[list[int], set[int]]:
    """The columns that one unpadded prompt keeps and the layers it skips, by sorting."""
    token, layer = hidden_LC @ processor.chooser.token_C, hidden_LC.mean(0) @ processor.chooser.layer_CD
    kept, at = [], 0
    while at < len(ids):
        end = at + (size if ids[at] == IMAGE else 1)
        columns = list(range(at, end))
        if ids[at] == IMAGE:
            best = sorted(columns, key=lambda column: (-float(token[column]), column))
            columns = sorted(best[: size - int(size * processor.removed)])
        kept += columns
        at = end
    depth = len(layer)
    if not (ids == IMAGE).any():
        return kept, set()
    best = sorted(range(1, depth), key=lambda index: (-float(layer[index]), index))
    return kept, set(best[processor.num_layers - 1 :])


@torch.no_grad()
def next_logits(
    model: nn.Module, vlm: TinyVlm, ids: Tensor, own: list, deep: list, prompt: int, processor: Forced
) -> Tensor:
    """Logits after one unpadded row whose first `prompt` tokens are the prompt, by which it is routed."""
    text = model.get_submodule(vlm.text)
    hidden, added = oracle.embedded(model, ids, own, deep)
    kept, skip = choice_of(hidden[:prompt], ids[:prompt], vlm.num_tokens, processor)
    columns = kept + list(range(prompt, len(ids)))
    positions = oracle.positions_of(model, ids, len(own))
    is_prefix = "PaliGemma" in type(model).__name__
    depth, first = text.config.num_hidden_layers, processor.first
    own = {"experts": oracle.experts_of(model, ids)}
    whole = oracle.run_layers(text, hidden[None], positions, 0, first, prompt * is_prefix, added, skip, **own)
    hidden, own = whole[:, columns], {"experts": oracle.experts_of(model, ids[columns])}
    added = [one[columns] for one in added]
    prefix = len(kept) * is_prefix
    hidden = oracle.run_layers(text, hidden, positions[..., columns], first, depth, prefix, added, skip, **own)
    return oracle.logits_of(model, text, hidden)


def generated_logits(
    model: nn.Module, vlm: TinyVlm, inputs: dict[str, Tensor], tokens: Tensor, processor: Forced
) -> Tensor:
    """Logits (B, steps, V) before each of the tokens (B, steps) that were generated after a prompt."""
    return oracle.generated_logits(model, vlm, inputs, tokens, processor, logits=next_logits)
