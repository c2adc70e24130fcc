"""Decoder layers by route: each layer runs for the rows that chose it, in prefill and in every later call.

Shape names: B rows, L columns of the call, D decoder layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from gen_turbo.tokens.ratios import num_removed
from gen_turbo.tokens.select import keep_highest
from gen_turbo.tokens.token_map import TokenMap
from gen_turbo.vlm.cache import ShortenedCache, shortened
from gen_turbo.vlm.cache_argument import cache_in
from gen_turbo.vlm.call import CallState
from gen_turbo.vlm.hooks import InstanceMethod
from gen_turbo.vlm.routes import Prompt, Route, Routing, Scores
from gen_turbo.vlm.run import Group, Images
from gen_turbo.vlm.static import refuse_static


class Choice:
    """What is chosen for the call that is running: the scores of its prompt, asked for once.

    Attributes:
        routing: The chooser and its budget.
        scores: Scores of the call's prompt; None in calls that bring no image.
        images: The images of that prompt.
    """

    scores: CallState[Scores | None] = CallState(lambda: None)
    images: CallState[Images | None] = CallState(lambda: None)

    def __init__(self, routing: Routing) -> None:
        self.routing = routing

    def forget(self) -> None:
        """Drops what was known of the prompt."""
        self.scores, self.images = None, None

    def ask(self, images: Images, embeds_BLC: Tensor, mask: Any) -> None:
        """Has a prompt scored."""
        real = real_columns(mask, embeds_BLC)
        self.images = images
        self.scores = self.routing.chooser(Prompt(embeds_BLC, images.is_image_BL, real))

    def plan(self, tokens: Tensor, group: Group) -> TokenMap:
        """Keeps the tokens of highest score of each image of one size."""
        leaving = num_removed(group.length, self.routing.ratio)
        if leaving == 0:
            return TokenMap.identity(1, group.length, tokens.device)
        assert self.scores is not None and self.images is not None
        score = self.scores.token_BL[self.images.is_image_BL][self.images.index(group)]
        return keep_highest(score, group.length - leaving)

    def route(self) -> Route:
        """Which rows run which layers."""
        assert self.scores is not None and self.images is not None
        return Route.of_scores(self.scores.layer_BD, self.routing.num_layers, self.images.is_image_BL.any(1))


class Skipping:
    """The hooks that run each decoder layer for the rows that chose it only.

    A layer's cache holds those rows alone, so nothing has to be masked. The choice stays with the cache: later calls
    that go on with it, later images included, run the layers that its first prompt chose. Without a cache every call
    is a prompt and chooses anew.

    Attributes:
        on_route: Receives the route of a prompt; None where every row runs every layer.
    """

    _route: CallState[Route | None] = CallState(lambda: None)
    _is_new: CallState[bool] = CallState(bool)

    def __init__(self, text: nn.Module, choice: Choice) -> None:
        self.on_route: Callable[[Route | None], None] = lambda route: None
        self._text, self._choice = text, choice

    def install(self) -> Iterator[Any]:
        """Puts the hooks in place, one after the other, and gives what takes each off, with a method `remove`."""
        layers: Any = self._text.layers
        yield self._text.register_forward_pre_hook(self._before_text, with_kwargs=True)
        yield self._text.register_forward_hook(self._after_text, with_kwargs=True)
        for index, layer in list(enumerate(layers))[1:]:
            yield InstanceMethod(layer, "forward", self._run(index))

    def is_skipped(self, layer: int) -> bool:
        """Whether no row of this call runs a layer."""
        return self._route is not None and self._route.count(layer) == 0

    def _before_text(self, text: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cache = cache_in(kwargs)
        self._route = cache.route if isinstance(cache, ShortenedCache) else None
        self._is_new = self._choice.scores is not None and (cache is None or cache.get_seq_length() == 0)
        if self._is_new:
            route = self._choice.route()
            self._route = None if route.is_whole else route
            if cache is not None and (self._route is not None or self._choice.routing.ratio):
                if self._route is not None or self._choice.routing.first:
                    refuse_static(cache)
                shortened(cache)
        if self._choice.scores is not None:
            self.on_route(self._route)

    def _after_text(self, text: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        cache = cache_in(kwargs)
        if self._is_new and self._route is not None and cache is not None:
            shortened(cache).route = self._route
        self._route, self._is_new = None, False
        self._choice.forget()

    def _run(self, index: int) -> Any:
        def run(forward: Any, hidden_states: Tensor, **kwargs: Any) -> Any:
            rows = self._route.rows(index, hidden_states.device) if self._route is not None else None
            if rows is None:
                return forward(hidden_states, **kwargs)
            if len(rows) == 0:
                return hidden_states
            taken = {name: _rows(name, value, rows, len(hidden_states)) for name, value in kwargs.items()}
            return hidden_states.index_copy(0, rows, forward(hidden_states.index_select(0, rows), **taken))

        return run


def real_columns(mask: Any, embeds_BLC: Tensor) -> Tensor:
    """Which columns of a call are no padding, (B, L), from its 2D mask or from what the last query may see."""
    batch, length = embeds_BLC.shape[:2]
    if isinstance(mask, dict):
        # A sliding window hides columns that are no padding.
        mask = mask.get("full_attention", next(iter(mask.values())))
    if mask is None:
        return torch.ones(batch, length, dtype=torch.bool, device=embeds_BLC.device)
    seen: Tensor = mask[..., -length:] if mask.ndim == 2 else mask[:, 0, -1, -length:]
    is_added = seen.is_floating_point() and mask.ndim == 4
    seen = seen > torch.finfo(seen.dtype).min / 2 if is_added else seen.bool()
    return seen.expand(batch, -1)


def _rows(name: str, value: Any, rows: Tensor, batch: int) -> Any:
    """The rows of one argument of a decoder layer; a batch axis of 1 serves every row."""
    if isinstance(value, tuple):
        return tuple(_rows(name, one, rows, batch) for one in value)
    if not isinstance(value, Tensor):
        return value
    dim = value.ndim - {"position_embeddings": 3, "position_ids": 2}.get(name, value.ndim)
    return value.index_select(dim, rows) if value.shape[dim] == batch else value
