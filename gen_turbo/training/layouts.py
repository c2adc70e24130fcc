"""How a budget is spent: which share of the image tokens and how many decoder layers, and what that costs.

A layout costs the arithmetic of one prompt in the decoder layers, as a share of the stock model's: linear layers and
attention, both as in FastV (arXiv 2403.06764, equation 5), and the router's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gen_turbo.tokens.ratios import num_removed

BUDGETS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
"""What calibration measures; budgets between take the layers of the next one."""


@dataclass(frozen=True)
class Layout:
    """One way to spend a budget.

    Attributes:
        tokens: Share of the image tokens that is kept, in (0, 1].
        layers: Decoder layers that run.
        first: The first decoder layer without the dropped tokens.
        divergence: Mean KL from the stock model's answers on the prompts of calibration; None where not measured.
    """

    tokens: float
    layers: int
    first: int
    divergence: float | None = None


@dataclass(frozen=True)
class PromptCost:
    """What one prompt costs a language model.

    Attributes:
        num_layers: Its decoder layers.
        weights: Weights of the linear layers of one of them.
        width: Its channels.
        length: Tokens of the prompt.
        image_tokens: Image tokens among them.
        router: Multiplications of the router.
    """

    num_layers: int
    weights: int
    width: int
    length: int
    image_tokens: int
    router: int = 0

    @classmethod
    def of(cls, text: Any, length: int, image_tokens: int, router: int = 0) -> PromptCost:
        """The cost in a transformers language model, whose layers are `text.layers`."""
        count = text.config.num_hidden_layers
        linear = sum(layer_multiplications(layer, text.config) for layer in text.layers)
        return cls(count, linear // count, text.config.hidden_size, length, image_tokens, router)

    def share(self, layout: Layout) -> float:
        """Cost as a share of the stock model's."""
        short = self.length - num_removed(self.image_tokens, 1 - layout.tokens)
        whole = min(layout.first, layout.layers)
        spent = whole * self._layer(self.length) + (layout.layers - whole) * self._layer(short) + self.router
        return spent / (self.num_layers * self._layer(self.length))

    def fit(self, budget: float, layers: int, first: int) -> Layout | None:
        """The most image tokens that a budget allows beside these layers; None if not even one."""
        for kept in range(self.image_tokens, 0, -1):
            # Half a token less, so that rounding down the number of removed tokens keeps exactly `kept`.
            layout = Layout((kept - 0.5) / self.image_tokens if kept < self.image_tokens else 1.0, layers, first)
            if self.share(layout) <= budget:
                return layout
        return None

    def _layer(self, length: int) -> int:
        return length * self.weights + 2 * length**2 * self.width


def candidates(cost: PromptCost, budget: float, firsts: Sequence[int]) -> list[Layout]:
    """Layouts that spend a budget, from all layers to half of them; only those that drop or skip something."""
    found = []
    for first in firsts:
        for layers in range(cost.num_layers, max(cost.num_layers // 2, 1) - 1, -1):
            layout = cost.fit(budget, layers, first)
            if layout is not None and (layout.tokens < 1 or layers < cost.num_layers):
                found.append(layout)
            if layout is not None and layout.tokens == 1:
                break
    return found


def layer_multiplications(layer: Any, config: Any) -> int:
    """Multiplications of one token in the linear layers of one decoder layer.

    Of experts, whose weights are stacked as (experts, rows, columns), those count that a token is sent to.
    """
    dense = sum(weight.numel() for weight in layer.parameters() if weight.ndim == 2)
    experts = sum(weight[0].numel() for weight in layer.parameters() if weight.ndim == 3)
    return int(dense + experts * getattr(config, "num_experts_per_tok", 1))
