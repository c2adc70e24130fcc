"""Reduced layers whose tokens lie in memory in another way than (batch, tokens, channels)."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from torch import Tensor

from gen_turbo.engine.layer import MergedKeysLayer, ReducedLayer
from gen_turbo.engine.state import Phase


class OtherLayoutLayer(ReducedLayer):
    """A layer that is given tokens in a layout of its own, and gives them so.

    Attributes:
        num_axes: Of what it takes for tokens; with another number it runs as it came.
    """

    num_axes = 3

    @abstractmethod
    def sequence(self, x: Tensor) -> Tensor:
        """Tokens (B, N, C) of what the layer reads or gives."""

    @abstractmethod
    def laid_out(self, tokens: Tensor, like: Tensor | None = None) -> Tensor:
        """The layout of any number of tokens (B, M, C), or the one that `like` has of as many."""

    def install(self) -> None:
        """Replaces the forward; the layer's own is called on its layout of the merged tokens."""
        super().install()
        own = self.inner

        def on_sequences(**given: Any) -> Tensor:
            return self.sequence(own(**{**given, self.tokens: self.laid_out(given[self.tokens])}))

        self._own, self.inner, self.attention = own, on_sequences, None

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        """As every one; its own forward is called by another name."""
        off: Any = super().__deepcopy__(memo)
        off._own = off.inner
        return off

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the layer as the phase says."""
        if self.phase is Phase.FULL:
            return self._own(*args, **kwargs)
        given = dict(zip(self.names[: len(args)], args, strict=True))
        given.update(kwargs)
        x = given[self.tokens]
        if not isinstance(x, Tensor) or x.ndim != self.num_axes:
            return self._own(**given)
        return self.laid_out(super().forward(**{**given, self.tokens: self.sequence(x)}), x)


class FeatureMapLayer(OtherLayoutLayer):
    """Attention that reads and gives feature maps (B, C, h, w), as in Kandinsky and DeepFloyd IF."""

    num_axes = 4

    def sequence(self, x: Tensor) -> Tensor:
        """Positions in raster order."""
        return x.flatten(2).transpose(1, 2)

    def laid_out(self, tokens: Tensor, like: Tensor | None = None) -> Tensor:
        """A map of one column, or one of the sizes of `like`."""
        columns = tokens.transpose(1, 2)
        return columns[..., None].contiguous() if like is None else columns.reshape(like.shape)


class FeatureMapKeysLayer(FeatureMapLayer, MergedKeysLayer):
    """Feature maps of which keys and values alone are merged."""


class TokensFirstLayer(OtherLayoutLayer):
    """A block that reads and gives (N, B, C), as in ERNIE-Image."""

    def sequence(self, x: Tensor) -> Tensor:
        """The batch first."""
        return x.transpose(0, 1)

    def laid_out(self, tokens: Tensor, like: Tensor | None = None) -> Tensor:
        """The tokens first."""
        return tokens.transpose(0, 1)
