"""Isolated attention: semantic tokens pass through a vision tower and read it, while it does not see them.

Shape names: B images, T tokens of the tower (class tokens first), N patches, M semantic tokens, D channels, H heads.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gen_turbo.method import Grid
from gen_turbo.tokens.token_map import TokenMap
from gen_turbo.training.vistog import SemanticGrouping
from gen_turbo.vlm.call import CallState, begin_anew
from gen_turbo.vlm.family import TowerFacts, square


class SemanticStream:
    """The semantic tokens on their way through one vision tower.

    The tower runs as it always does; its tensors are read, never written, so its output is bit-identical. Behind
    each block the semantic tokens run through the same weights in a call of their own, whose queries are theirs alone
    and whose keys and values are those that the block has just made, with theirs behind. No mask is needed.

    Attributes:
        slots: The group of each patch of the images seen last, (B, N); None before the first.
    """

    slots: CallState[Tensor | None] = CallState(lambda: None)
    _tokens_BMD: CallState[Tensor | None] = CallState(lambda: None)
    _image: CallState[dict[str, Tensor]] = CallState(dict)
    _is_own: CallState[bool] = CallState(bool)

    def __init__(self, model: nn.Module, facts: TowerFacts, grouping: SemanticGrouping) -> None:
        self._facts, self._grouping = facts, grouping
        tower = model.get_submodule(facts.module)
        encoder = tower.get_submodule(facts.encoder) if facts.encoder else tower
        blocks: list[Any] = list(getattr(encoder, facts.blocks))
        first, last = grouping.shape.first_block, facts.last_block(model) % len(blocks)
        if first > last:
            raise ValueError(f"first_block must be one of the {last + 1} blocks that the projector reads; got {first}")
        self._blocks = blocks[first : last + 1]
        self._leading = facts.num_leading(model)
        self._norm = getattr(tower, facts.output_norm) if facts.output_norm else nn.Identity()

    def install(self) -> list[Any]:
        """Puts the hooks in place and gives back their handles."""
        handles: list[Any] = [self._blocks[0].register_forward_pre_hook(self._enter, with_kwargs=True)]
        for block in self._blocks:
            attention = getattr(block, self._facts.attention)
            for name in ("qkv",) if self._facts.has_qkv else ("k_proj", "v_proj"):
                handles.append(getattr(attention, name).register_forward_hook(self._see(name)))
            handles.append(block.register_forward_hook(self._follow))
        return handles

    def groups(self, patches_BND: Tensor, grid: Grid) -> tuple[Tensor, TokenMap]:
        """The groups (B, M, D) of the images that the tower has just seen, and the cells where they take place.

        Raises:
            ValueError: If the patches are not of the images that the tower saw last.
        """
        tokens, self._tokens_BMD, self._image = self._tokens_BMD, None, {}
        if tokens is None or len(tokens) != len(patches_BND):
            raise ValueError("these patches were not made by this model's tower in this call; pass pixel_values")
        groups, self.slots = self._grouping(self._norm(tokens), patches_BND, grid)
        return groups, self._grouping.cells(grid, patches_BND.device)

    def _enter(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        begin_anew(self)
        self._image = {}
        hidden = args[0] if args else kwargs["hidden_states"]
        patches = hidden[:, self._leading :]
        weight = self._grouping.tokens
        if not self._grouping.training and (weight.device != hidden.device or weight.dtype != hidden.dtype):
            self._grouping.to(hidden.device, hidden.dtype)
        self._tokens_BMD = self._grouping.enter(patches, square(patches.shape[1]) or (1, patches.shape[1]))

    def _see(self, name: str) -> Any:
        def after(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            if not self._is_own:
                self._image[name] = output

        return after

    def _follow(self, block: Any, args: tuple[Any, ...], output: Any) -> None:
        """Takes the semantic tokens through a block that the image has just left."""
        tokens = self._tokens_BMD
        assert tokens is not None
        self._is_own = True
        try:
            attention = getattr(block, self._facts.attention)
            attended = self._attend(attention, block.layer_norm1(tokens))
            tokens = tokens + attended
            self._tokens_BMD = tokens + block.mlp(getattr(block, self._facts.norm2)(tokens))
        finally:
            self._is_own = False

    def _attend(self, attention: Any, x_BMD: Tensor) -> Tensor:
        if self._facts.has_qkv:
            query, *own = attention.qkv(x_BMD).chunk(3, -1)
            image = list(self._image["qkv"].chunk(3, -1))[1:]
            out = attention.projection
        else:
            query, own = attention.q_proj(x_BMD), [attention.k_proj(x_BMD), attention.v_proj(x_BMD)]
            image, out = [self._image["k_proj"], self._image["v_proj"]], attention.out_proj
        key, value = (torch.cat(pair, 1) for pair in zip(image, own, strict=True))
        heads = [x.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for x in (query, key, value)]
        mixed = F.scaled_dot_product_attention(heads[0], heads[1], heads[2], scale=attention.scale)
        return out(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]
