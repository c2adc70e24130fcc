"""PAR's router: a small transformer that reads a prompt once and scores image tokens and decoder layers together.

Shape names: B prompts, L columns of a prompt, D decoder layers, S = L + D places, C channels, H heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gen_turbo.vlm.routes import Prompt, Scores

ATTENTION = ("full", "causal")
_ROTARY_BASE = 10_000.0
_START = 0.02
_GOLDEN = (5**0.5 - 1) / 2


@dataclass(frozen=True)
class RouterShape:
    """What fixes the sizes of a router.

    Attributes:
        text_width: Channels of the language model.
        num_layers: Decoder layers of the language model.
        width: Channels of the router. The released one has the language model's; a narrow one costs a few percent of
            a prompt instead of a layer.
        depth: Blocks of the router.
        num_heads: Heads of each block.
        attention: "full" lets image tokens see the question behind them; "causal" is as released.
        dither: Scale of fixed noise on the scores of image tokens, which is spread evenly; 0 is as released.
            Neighbours have similar scores and say similar things: with noise, scores set how densely a region is
            kept, not whether.
    """

    text_width: int
    num_layers: int
    width: int = 64
    depth: int = 1
    num_heads: int = 4
    attention: str = "full"
    dither: float = 1.0

    def __post_init__(self) -> None:
        """Checks every size; raises ValueError."""
        if self.attention not in ATTENTION:
            raise ValueError(f"attention must be one of {', '.join(ATTENTION)}; got {self.attention!r}")
        if min(self.text_width, self.num_layers, self.width, self.depth, self.num_heads) < 1:
            raise ValueError(f"every size of a router must be at least 1; got {self}")
        if self.width % (2 * self.num_heads):
            raise ValueError(f"the width {self.width} must be a multiple of twice the {self.num_heads} heads")


class Router(nn.Module):
    """PAR's router (Pruning All-Rounder, ICCV 2025, Section 3, and its released code).

    Reads the embeddings of the prompt, image tokens in place, and behind them one learnable token per decoder layer;
    scores both by one head. A column is scored the same whatever padding its row has.

    Differs from the paper: width and depth are free, layer tokens begin as small random vectors (zero ones differ by
    their place alone), attention is full by default, so that image tokens see a question that comes after them, and
    fixed noise spreads what is kept; an untrained router keeps tokens at even distances.
    """

    def __init__(self, shape: RouterShape) -> None:
        super().__init__()
        self.shape = shape
        self.enter = nn.Linear(shape.text_width, shape.width, bias=False)
        self.norm_in = nn.RMSNorm(shape.text_width, eps=1e-6)
        self.layer_tokens = nn.Parameter(_START * torch.randn(shape.num_layers, shape.width))
        self.blocks = nn.ModuleList(_Block(shape) for _ in range(shape.depth))
        self.norm = nn.RMSNorm(shape.width, eps=1e-6)
        self.head = nn.Linear(shape.width, 1, bias=False)
        nn.init.zeros_(self.head.weight)

    def forward(self, prompt: Prompt, noise: float = 0.0) -> Scores:
        """Scores prompts in float32.

        Args:
            prompt: Embeddings (B, L, C) with what is image and what is padding.
            noise: Scale of normal noise on the attention logits of every head, drawn from the global generator; it
                makes prunings to choose from in training.

        Returns:
            Logits, whose sigmoid is the probability of staying, of columns (B, L) and of layers (B, D).
        """
        batch, length, _ = prompt.embeds_BLC.shape
        x = self.enter(self.norm_in(prompt.embeds_BLC.to(self.head.weight)))
        x = torch.cat([x, self.layer_tokens.expand(batch, -1, -1)], 1)
        real = F.pad(prompt.real_BL, (0, self.shape.num_layers), value=True)
        mask = self._mask(real)
        rotary = _rotary(real.cumsum(1) - 1, self.shape.width // self.shape.num_heads)
        for block in self.blocks:
            x = block(x, mask, rotary, noise)
        logits = self.head(self.norm(x))[..., 0]
        return Scores(logits[:, :length], logits[:, length:])

    def choose(self, prompt: Prompt) -> Scores:
        """Scores prompts as they are routed: without noise of the moment, with the fixed one."""
        scores: Scores = self(prompt)
        if not self.shape.dither:
            return scores
        place_BL = prompt.is_image_BL.cumsum(1)
        gumbel_BL = -(-even_draws(place_BL).clamp(1e-9, 1 - 1e-9).log()).log()
        return Scores(scores.token_BL + self.shape.dither * gumbel_BL.to(scores.token_BL), scores.layer_BD)

    def flops(self, batch: int, length: int) -> int:
        """Operations that scoring such a prompt costs."""
        places, width = length + self.shape.num_layers, self.shape.width
        block = sum(weight.numel() for one in self.blocks for weight in one.parameters() if weight.ndim == 2)
        linear = places * block + length * self.enter.weight.numel() + places * width
        return 2 * batch * (linear + 2 * self.shape.depth * places**2 * width)

    def _mask(self, real_BS: Tensor) -> Tensor:
        """Which keys each place sees, (B, 1, S, S); padding sees itself, so that no row is empty."""
        places = real_BS.shape[1]
        seen = real_BS[:, None, None, :].expand(-1, 1, places, -1)
        own = torch.eye(places, dtype=torch.bool, device=real_BS.device)
        return (seen.tril() if self.shape.attention == "causal" else seen) | own


def even_draws(place: Tensor) -> Tensor:
    """A number in [0, 1) for each place: multiples of the golden section, of which the largest lie evenly."""
    return (place.double() * _GOLDEN).frac()


class _Block(nn.Module):
    """A decoder layer as in LLaMA: attention with rotary positions and a gated MLP, each behind a norm."""

    def __init__(self, shape: RouterShape) -> None:
        super().__init__()
        width = shape.width
        self.num_heads = shape.num_heads
        self.norm1, self.norm2 = nn.RMSNorm(width, eps=1e-6), nn.RMSNorm(width, eps=1e-6)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(2 * width, width, bias=False)

    def forward(self, x_BSC: Tensor, mask: Tensor, rotary: tuple[Tensor, Tensor], noise: float) -> Tensor:
        """One block on (B, S, C)."""
        mixed = self.qkv(self.norm1(x_BSC)).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        query, key = _rotate(mixed[0], rotary), _rotate(mixed[1], rotary)
        added = torch.zeros_like(mask, dtype=x_BSC.dtype)
        if noise:
            shape = (len(x_BSC), self.num_heads, *mask.shape[2:])
            added = noise * torch.randn(shape, dtype=x_BSC.dtype, device=x_BSC.device)
        bias = added.masked_fill(~mask, torch.finfo(x_BSC.dtype).min)
        heard = F.scaled_dot_product_attention(query, key, mixed[2], attn_mask=bias)
        x = x_BSC + self.out(heard.transpose(1, 2).flatten(2))
        gate, value = self.up(self.norm2(x)).chunk(2, -1)
        y: Tensor = x + self.down(F.silu(gate) * value)
        return y


def _rotary(position_BS: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine of positions, each (B, 1, S, width)."""
    power = torch.arange(0, width, 2, device=position_BS.device, dtype=torch.float32) / width
    angle = position_BS.clamp(min=0)[..., None].float() * _ROTARY_BASE**-power
    both = torch.cat([angle, angle], -1)[:, None]
    return both.cos(), both.sin()


def _rotate(x_BHSC: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    first, second = x_BHSC.chunk(2, -1)
    turned: Tensor = x_BHSC * rotary[0] + torch.cat([-second, first], -1) * rotary[1]
    return turned
