"""Decoder layers in prefill: image tokens leave from one layer on, and every later layer's mask and cache follow.

Shape names: B rows, L columns that reach the first layer, M of them that stay, C channels, H heads, D channels of one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import create_causal_mask

from gen_turbo.method import TokenReducer
from gen_turbo.tokens.token_map import TokenMap
from gen_turbo.vlm.cache import ShortenedCache
from gen_turbo.vlm.cache_argument import cache_in
from gen_turbo.vlm.call import Calls
from gen_turbo.vlm.columns import Columns
from gen_turbo.vlm.images import Group, Images, Semantic
from gen_turbo.vlm.masks import check_mask, per_token
from gen_turbo.vlm.run import Listener, reduce
from gen_turbo.vlm.running import Running
from gen_turbo.vlm.stage import Handle, Stage

Planner = Callable[[int, Tensor, Group, Semantic], TokenMap]
"""Plans for tokens (K, n, C) of K images of one size before a decoder layer."""


class Cut(Stage):
    """The decoder layers behind the first of one or more cuts.

    Attributes:
        listeners: Receive what is removed at every cut.

    Args:
        text: The language model.
        calls: The calls of the base model.
        firsts: The first layer without the dropped tokens, of each cut.
        planner: Plans the cuts. Semantic values are attention of the last token: "last" in the layer before the cut,
            "next" in the first one behind it, as it would run without the cut.
        shared: The method whose budget images share, or that gives each its own; None where all have one.
    """

    def __init__(
        self,
        text: nn.Module,
        calls: Calls[Running],
        firsts: list[int],
        planner: Planner,
        shared: TokenReducer | None = None,
    ) -> None:
        self.listeners: list[Listener] = []
        self._text, self._calls, self._firsts = text, calls, sorted(firsts)
        self._planner, self._shared = planner, shared
        stack: Any = text
        self._layers: list[nn.Module] = list(stack.layers)[: stack.config.num_hidden_layers]

    def place(self, model: nn.Module) -> Iterator[Handle]:
        """Puts hooks on the layer before the first cut and on all behind it."""
        for index in range(self._firsts[0] - 1, len(self._layers)):
            layer = self._layers[index]
            if index >= self._firsts[0]:
                yield layer.register_forward_pre_hook(self._hook(index), with_kwargs=True)
            if index + 1 in self._firsts:
                # Behind the hook above, so that it sees what the layer will.
                yield layer.register_forward_pre_hook(self._before_cut, with_kwargs=True)

    def _before_cut(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Remembers what enters the layer before a cut until the cut is made."""
        call = self._calls.now
        if call.images is None:
            return
        hidden = args[0] if args else kwargs["hidden_states"]
        real, rotary = _real(call, kwargs.get("attention_mask")), kwargs["position_embeddings"]
        call.attention = lambda: last_attention(layer, hidden, rotary, real)

    def _hook(self, index: int) -> Any:
        def before(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            call = self._calls.now
            hidden = args[0] if args else kwargs["hidden_states"]
            if index in self._firsts and call.images is not None:
                hidden = self._cut(index, layer, hidden, kwargs, call, call.images)
            total = _total(index, call, cache_in(kwargs))
            if total is None:
                return None
            changed = dict(kwargs)
            if call.left is not None:
                changed.update(_read(call, call.left, kwargs))
            if call.route is None or call.route.count(index):
                changed["attention_mask"] = self._mask(call, kwargs, hidden, total, index)
            changed.pop("hidden_states", None)
            return (hidden, *args[1:]), changed

        return before

    def _cut(
        self, first: int, layer: nn.Module, hidden: Tensor, kwargs: dict[str, Any], call: Running, images: Images
    ) -> Tensor:
        """Plans one cut; gives back the columns that enter its first layer."""
        mask, cache = kwargs.get("attention_mask"), cache_in(kwargs)
        real = _real(call, mask)
        attention, call.attention = call.attention, None

        def paid(kind: str) -> Tensor | None:
            if kind == "last" and attention is not None:
                return attention()
            if kind != "next":
                return None
            rotary = kwargs["position_embeddings"]
            rotary = rotary if call.left is None else _read(call, call.left, kwargs)["position_embeddings"]
            return last_attention(layer, hidden, rotary, real)

        def planner(tokens: Tensor, group: Group) -> TokenMap:
            def semantic(kind: str) -> Tensor | None:
                value = paid(kind)
                return None if value is None else images.tokens(value, group)

            return self._planner(first, tokens, group, semantic)

        reduction = reduce(images, hidden, planner, self._shared)
        check_mask(mask)
        reduction.num_columns = hidden.shape[0] * hidden.shape[1]
        if not reduction.is_identity:
            step = Columns.of_kept(reduction.keep_BL if real is None else reduction.keep_BL & real)
            reduction.num_columns = hidden.shape[0] * step.num_kept
            call.left = step if call.left is None else call.left.then(step)
            call.shorter = {}
            call.images = images.shortened(step, reduction.lengths())
            hidden = step.take(hidden, 1)
        for listener in self.listeners:
            listener(first, images, reduction)
        if call.left is not None:
            known = cache.cut_at(first) if isinstance(cache, ShortenedCache) else None
            held = Columns.all_of(len(hidden), call.held, hidden.device) if known is None else known
            call.cuts[first] = held.grown(call.held).beside(call.left)
        return hidden

    def _mask(self, call: Running, kwargs: dict[str, Any], hidden: Tensor, total: Columns, index: int) -> Tensor | None:
        mask = kwargs.get("attention_mask")
        if mask is None:
            if not total.is_ragged:
                return None
            cache = cache_in(kwargs)
            made: Tensor | None = create_causal_mask(
                self._text.config, hidden, total.valid_BM.long(), cache, layer_idx=index
            )
            return made
        if mask.ndim == 2:
            return total.mask(mask)
        keys = total.keys(mask)
        return keys if call.left is None else call.left.queries(keys)


def _total(index: int, call: Running, cache: Any) -> Columns | None:
    """Which of the first layer's columns, held and new, a layer works on; None if on all."""
    made = [first for first in call.cuts if first <= index]
    if made:
        return call.cuts[max(made)]
    known = cache.cut_at(index) if isinstance(cache, ShortenedCache) else None
    return known.grown(call.held + call.length) if known is not None else None


def _read(call: Running, left: Columns, kwargs: dict[str, Any]) -> dict[str, Any]:
    """What layers read of the columns that are left, taken once for all layers that are given the same positions."""
    given = tuple(map(id, kwargs["position_embeddings"]))
    if call.shorter.get("given") != given:
        rotary = tuple(left.take(table, -2, batch_dim=-3) for table in kwargs["position_embeddings"])
        positions = kwargs.get("position_ids")
        ids = None if positions is None else left.take(positions, -1, batch_dim=-2)
        of_tokens = per_token(kwargs, left)
        call.shorter = {"given": given, "position_embeddings": rotary, "position_ids": ids, **of_tokens}
    return {name: value for name, value in call.shorter.items() if name != "given"}


def last_attention(
    layer: nn.Module, hidden_BLC: Tensor, rotary: tuple[Tensor, Tensor], real_BL: Tensor | None
) -> Tensor:
    """Computes the attention that the last token of each row pays to every column of this call, averaged over heads.

    One row of queries against all keys, so that no attention matrix is made and any attention kernel will do: the
    score of FastV (Chen et al., 2024, arXiv 2403.06764, as released).

    Args:
        layer: A decoder layer whose attention has `q_proj`, `k_proj` and, in some models, norms on heads.
        hidden_BLC: What enters the layer.
        rotary: Cosine and sine of the positions, (b, L, D).
        real_BL: False where a column is padding.

    Returns:
        (B, L), every row summing to one.
    """
    attn: Any = layer.self_attn
    rotate = getattr(sys.modules[type(attn).__module__], "apply_rotary_pos_emb")  # noqa: B009  a name mypy cannot know
    batch, length = hidden_BLC.shape[:2]
    column = torch.arange(length, device=hidden_BLC.device).expand(batch, -1)
    last = column[:, -1] if real_BL is None else column.masked_fill(~real_BL, -1).amax(1)
    normed = layer.input_layernorm(hidden_BLC)  # type: ignore[operator]
    query = _heads(attn, "q", normed[torch.arange(batch, device=last.device), last][:, None])
    key = _heads(attn, "k", normed)
    tables = [table.expand(batch, -1, -1) for table in rotary]
    at_last = [table[torch.arange(batch, device=last.device), last][:, None] for table in tables]
    query, key = rotate(query, query, *at_last)[0], rotate(key, key, *tables)[0]
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    logits = (query @ key.transpose(-1, -2)).float()[:, :, 0] * attn.scaling
    if real_BL is not None:
        logits = logits.masked_fill(~real_BL[:, None], torch.finfo(logits.dtype).min)
    attention: Tensor = logits.softmax(-1).mean(1)
    return attention


def check_read(model: nn.Module, layer: nn.Module) -> None:
    """Says before anything is changed why `last_attention` does not hold for a layer of a model; raises ValueError."""
    attn: Any = layer.self_attn
    made = {name for name, child in attn.named_children() if any(True for _ in child.parameters())}
    if not {"q_proj", "k_proj"} <= made <= {"q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"}:
        raise ValueError(
            f"{type(model).__name__} makes queries and keys in a way of its own, so that a method cannot read its "
            "attention; use one that needs none, such as turbo or divprune"
        )


def has_windows(config: Any) -> bool:
    """Whether some layers of a language model see only the columns of a window or chunk."""
    return not {"sliding_attention", "chunked_attention"}.isdisjoint(getattr(config, "layer_types", None) or ())


def has_recurrences(config: Any) -> bool:
    """Whether some layers of a language model have a state, or convolve their columns."""
    return not {"linear_attention", "conv"}.isdisjoint(getattr(config, "layer_types", None) or ())


def check_cut(model: nn.Module, config: Any, first: int, setting: str, advice: str) -> None:
    """Says before anything is changed why tokens cannot leave at a layer, which the user gave as `setting`.

    Where they can leave at no layer, the advice follows.

    Raises:
        ValueError: If the layer is none of the model's, has a sliding window, comes before later image features, may be
            recurrent, or shares with others what it sees.
    """
    name = type(model).__name__
    if not first < config.num_hidden_layers:
        raise ValueError(f"{setting}={first} is not one of the {config.num_hidden_layers} layers of {name}")
    if has_windows(config):
        raise ValueError(f"{name} has layers with sliding windows, whose masks cannot follow a cut; {advice}")
    if getattr(config, "hidden_size_per_layer_input", 0):
        raise ValueError(f"{name} gives every layer inputs of its own, which cannot follow a cut; {advice}")
    if has_recurrences(config):
        raise ValueError(f"{name} has recurrent layers, whose state has read the tokens that a cut removes; {advice}")
    if getattr(config, "indexer_types", None):
        raise ValueError(f"{name} has layers that share which columns they see, which cannot follow a cut; {advice}")
    stacked = len(getattr(getattr(model.config, "vision_config", None), "deepstack_visual_indexes", None) or ())
    if first < stacked:
        raise ValueError(f"{name} adds image features up to layer {stacked - 1}; use {setting}={stacked} or later")


def _heads(attn: Any, kind: str, normed: Tensor) -> Tensor:
    """Queries or keys by head, (B, H, L, D), with the norm that some models put on them."""
    projected: Tensor = getattr(attn, f"{kind}_proj")(normed)
    heads = projected.reshape(*projected.shape[:2], -1, attn.head_dim)
    norm = getattr(attn, f"{kind}_norm", None)
    heads = norm(heads) if norm is not None else heads
    return heads.transpose(1, 2)


def _real(call: Running, mask: Tensor | None) -> Tensor | None:
    """Which columns that enter a layer are no padding, from what is left, the 2D mask, or what the last query sees."""
    if call.left is not None:
        return call.left.valid_BM if call.left.is_ragged else None
    if isinstance(call.real_BM, Tensor) and call.real_BM.ndim == 2:
        return call.real_BM[:, -call.length :].bool()
    if not isinstance(mask, Tensor) or mask.ndim != 4:
        return None
    seen = mask[:, 0, -1, -call.length :]
    return seen if seen.dtype == torch.bool else seen > torch.finfo(seen.dtype).min / 2
