"""The route as weights: dropped tokens are hidden and skipped layers are computed in vain, as in PAR's released code.

Saves nothing. It is what dropping and skipping are checked against, and what a router can be trained through.

Shape names: B rows, L columns of the call, C channels, D decoder layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gen_turbo.vlm.cache_argument import cache_in
from gen_turbo.vlm.call import Calls
from gen_turbo.vlm.hooks import InstanceMethod
from gen_turbo.vlm.layers import Choice
from gen_turbo.vlm.run import reduce
from gen_turbo.vlm.running import Running
from gen_turbo.vlm.stage import Handle, Stage


@dataclass
class _Weights:
    """Weights of keys and of decoder layers in one call of the language model; None where all are 1."""

    key_BL: Tensor | None = None
    layer_BD: Tensor | None = None


class Weighing(Stage):
    """Weighs keys and layers.

    A key of weight w has log w added to its logits from the first layer of the routing on; a layer of weight w gives
    `h + w (layer(h) - h)`. Weights of 0 and 1 are hiding and skipping exactly.
    """

    def __init__(self, text: nn.Module, calls: Calls[Running], choice: Choice) -> None:
        self._text, self._calls, self._choice = text, calls, choice
        self._reads: Calls[_Weights] = Calls(_Weights)

    def place(self, model: nn.Module) -> Iterator[Handle]:
        """Puts hooks on the language model and takes the place of its layers' `forward`."""
        layers: Any = self._text.layers
        yield self._text.register_forward_pre_hook(self._before_text, with_kwargs=True)
        yield self._text.register_forward_hook(lambda text, args, output: self._reads.end(), always_call=True)
        for index, layer in enumerate(layers):
            yield InstanceMethod(layer, "forward", self._run(index))

    def _before_text(self, text: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        now, cache, found = self._reads.begin(), cache_in(kwargs), self._calls.now.scores
        if cache is not None and cache.get_seq_length():
            raise ValueError("hidden tokens are known to the call that brings them only; pass use_cache=False")
        if found is None:
            return
        scores, images = found
        if self._choice.routing.mode == "soft":
            now.key_BL = torch.where(images.is_image_BL, scores.token_BL, 1.0)
            has_image = images.is_image_BL.any(1, keepdim=True)
            layer_BD = torch.where(has_image, scores.layer_BD, 1.0)
            now.layer_BD = torch.cat([torch.ones_like(layer_BD[:, :1]), layer_BD[:, 1:]], 1)
            return
        embeds: Tensor = kwargs["inputs_embeds"]
        route = self._choice.route()
        assert route is not None
        now.key_BL = reduce(images, embeds, self._choice.plan).keep_BL.float()
        now.layer_BD = route.runs_BD.to(embeds.device).float()

    def _run(self, index: int) -> Any:
        def run(forward: Any, hidden_states: Tensor, **kwargs: Any) -> Any:
            now = self._reads.now
            if now.key_BL is None or now.layer_BD is None:
                return forward(hidden_states, **kwargs)
            if index >= self._choice.routing.first:
                kwargs["attention_mask"] = _hidden(kwargs.get("attention_mask"), now.key_BL, hidden_states)
            output = forward(hidden_states, **kwargs)
            weight = now.layer_BD[:, index, None, None].to(output.dtype)
            return torch.lerp(hidden_states, output, weight.expand_as(output))

        return run


def _hidden(mask: Tensor | None, key_BL: Tensor, hidden_BLC: Tensor) -> Tensor:
    """The mask of a layer with the logarithm of each key's weight added: (B, 1, L, L), floating point."""
    length, dtype = hidden_BLC.shape[1], hidden_BLC.dtype
    least = torch.finfo(dtype).min
    if mask is not None and mask.ndim != 4:
        raise ValueError("hiding tokens needs a kernel that takes masks; load with attn_implementation='sdpa'")
    if mask is None:
        mask = torch.ones(length, length, dtype=torch.bool, device=hidden_BLC.device).tril()[None, None]
    if mask.dtype == torch.bool:
        mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, least)
    smallest = torch.finfo(key_BL.dtype).tiny
    added = torch.where(key_BL > 0, key_BL.clamp(min=smallest).log(), least).to(dtype)
    return (mask + added[:, None, None, :]).clamp(min=least)
