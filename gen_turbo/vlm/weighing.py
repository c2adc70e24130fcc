"""The route as weights: dropped tokens are hidden and skipped layers are computed in vain, as in PAR's released code.

Saves nothing. It is what dropping and skipping are checked against, and what a router can be trained through.

Shape names: B rows, L columns of the call, C channels, D decoder layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from gen_turbo.vlm.cache_argument import cache_in
from gen_turbo.vlm.call import CallState
from gen_turbo.vlm.hooks import InstanceMethod
from gen_turbo.vlm.layers import Choice
from gen_turbo.vlm.run import reduce


class Weighing:
    """The hooks that weigh keys and layers.

    A key of weight w has log w added to its logits from the first layer of the routing on; a layer of weight w gives
    `h + w (layer(h) - h)`. Weights of 0 and 1 are hiding and skipping exactly.
    """

    _key_BL: CallState[Tensor | None] = CallState(lambda: None)
    _layer_BD: CallState[Tensor | None] = CallState(lambda: None)

    def __init__(self, text: nn.Module, choice: Choice) -> None:
        self._text, self._choice = text, choice

    def install(self) -> Iterator[Any]:
        """Puts the hooks in place, one after the other, and gives what takes each off, with a method `remove`."""
        layers: Any = self._text.layers
        yield self._text.register_forward_pre_hook(self._before_text, with_kwargs=True)
        yield self._text.register_forward_hook(lambda text, args, output: self._choice.forget())
        for index, layer in enumerate(layers):
            yield InstanceMethod(layer, "forward", self._run(index))

    def _before_text(self, text: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cache = cache_in(kwargs)
        if cache is not None and cache.get_seq_length():
            raise ValueError("hidden tokens are known to the call that brings them only; pass use_cache=False")
        self._key_BL = self._layer_BD = None
        if self._choice.scores is not None:
            self._weigh(kwargs["inputs_embeds"])

    def _weigh(self, embeds_BLC: Tensor) -> None:
        choice = self._choice
        assert choice.scores is not None and choice.images is not None
        is_image = choice.images.is_image_BL
        if choice.routing.mode == "soft":
            self._key_BL = torch.where(is_image, choice.scores.token_BL, 1.0)
            has_image = is_image.any(1, keepdim=True)
            layer_BD = torch.where(has_image, choice.scores.layer_BD, 1.0)
            self._layer_BD = torch.cat([torch.ones_like(layer_BD[:, :1]), layer_BD[:, 1:]], 1)
            return
        self._key_BL = reduce(choice.images, embeds_BLC, choice.plan).keep_BL.float()
        self._layer_BD = choice.route().runs_BD.to(embeds_BLC.device).float()

    def _run(self, index: int) -> Any:
        def run(forward: Any, hidden_states: Tensor, **kwargs: Any) -> Any:
            if self._key_BL is None or self._layer_BD is None:
                return forward(hidden_states, **kwargs)
            if index >= self._choice.routing.first:
                kwargs["attention_mask"] = _hidden(kwargs.get("attention_mask"), self._key_BL, hidden_states)
            output = forward(hidden_states, **kwargs)
            weight = self._layer_BD[:, index, None, None].to(output.dtype)
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
