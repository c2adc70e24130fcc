"""What a router learns from: prunings that are compared by how far they move the frozen model's answers.

Shape names: K routes of each prompt, B prompts, L columns, D decoder layers.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gen_turbo.tokens.ratios import num_removed
from gen_turbo.vlm.routes import Prompt, Scores

_TINY = 1e-6


def keep_counts(prompt: Prompt, tokens: float) -> tuple[int, int]:
    """Image tokens of every prompt, and how many of them a share keeps.

    Raises:
        ValueError: If prompts have different numbers of image tokens.
    """
    counts = prompt.is_image_BL.sum(1).tolist()
    if len(set(counts)) > 1:
        raise ValueError(f"prompts of {sorted(set(counts))} image tokens; train on one image of one size a prompt")
    return counts[0], counts[0] - num_removed(counts[0], 1 - tokens)


def perturbed(scores: Scores, spread: float) -> Scores:
    """Adds Gumbel noise to the logits: the highest of them are then a draw without replacement by softmax."""

    def noisy(logits: Tensor) -> Tensor:
        uniform = torch.rand_like(logits).clamp(_TINY, 1 - _TINY)
        return logits - spread * (-uniform.log()).log()

    return Scores(noisy(scores.token_BL), noisy(scores.layer_BD))


def kept(scores: Scores, prompt: Prompt, tokens: float, layers: int) -> Scores:
    """What scores keep, as ones and zeros: image tokens and layers of highest score, the first layer always."""
    _, count = keep_counts(prompt, tokens)
    is_image = prompt.is_image_BL.repeat(len(scores.token_BL) // len(prompt.is_image_BL), 1)
    token = scores.token_BL.masked_fill(~is_image, -torch.inf)
    token_BL = torch.zeros_like(token).scatter(1, token.topk(count, dim=1).indices, 1.0)
    layer = torch.cat([torch.full_like(scores.layer_BD[:, :1], torch.inf), scores.layer_BD[:, 1:]], 1)
    return Scores(token_BL, torch.zeros_like(layer).scatter(1, layer.topk(layers, dim=1).indices, 1.0))


def log_probability(scores: Scores, action: Scores, prompt: Prompt) -> tuple[Tensor, Tensor]:
    """Mean log-probability of what an action does to tokens and to layers, each kept on its own: (K * B,) both.

    Args:
        scores: Logits of B prompts.
        action: Ones and zeros of K * B rows, the prompts K times over.
        prompt: The prompts; only their image tokens count.
    """
    times = len(action.token_BL) // len(scores.token_BL)
    is_image = prompt.is_image_BL.repeat(times, 1)
    token = -F.binary_cross_entropy_with_logits(scores.token_BL.repeat(times, 1), action.token_BL, reduction="none")
    layer = -F.binary_cross_entropy_with_logits(scores.layer_BD.repeat(times, 1), action.layer_BD, reduction="none")
    return (token * is_image).sum(1) / is_image.sum(1), layer[:, 1:].mean(1)


def preference_loss(log_pi_KB: Tensor, divergence_KB: Tensor, beta: float, margin: float) -> Tensor:
    """The best pruning of each prompt against its worst, as in DPO without a reference model.

    Prompts whose prunings differ by no more than `margin` teach nothing.
    """
    best, worst = divergence_KB.argmin(0, keepdim=True), divergence_KB.argmax(0, keepdim=True)
    gap = (divergence_KB.gather(0, worst) - divergence_KB.gather(0, best)) > margin
    preferred = log_pi_KB.gather(0, best) - log_pi_KB.gather(0, worst)
    return -(F.logsigmoid(beta * preferred) * gap).mean()


def reward_loss(log_pi_KB: Tensor, divergence_KB: Tensor) -> Tensor:
    """Every pruning by how much better it is than the mean of its prompt's (policy gradient with that baseline)."""
    reward = -divergence_KB
    advantage = (reward - reward.mean(0)) / (reward.std(0) + _TINY)
    return -(advantage * log_pi_KB).mean()


def budget_loss(scores: Scores, prompt: Prompt, tokens: float, layers: int) -> Tensor:
    """How far the mean probabilities are from the shares to be kept."""
    token = scores.token_BL.sigmoid()[prompt.is_image_BL].mean()
    layer = scores.layer_BD.sigmoid().mean()
    return (token - tokens).abs() + (layer - layers / scores.layer_BD.shape[1]).abs()


def soft_weights(scores: Scores, prompt: Prompt, tokens: float, layers: int, temperature: float) -> Scores:
    """Weights in (0, 1) of tokens and layers, one half where the budget ends."""
    _, count = keep_counts(prompt, tokens)
    token = scores.token_BL.masked_fill(~prompt.is_image_BL, -torch.inf)
    token_BL = torch.sigmoid((scores.token_BL - _border(token, count)) / temperature)
    layer_BD = torch.sigmoid((scores.layer_BD - _border(scores.layer_BD[:, 1:], layers - 1)) / temperature)
    return Scores(token_BL.clamp(min=_TINY), layer_BD)


def _border(logits: Tensor, count: int) -> Tensor:
    """A value between the `count` highest logits of each row and the next: (rows, 1), without a gradient."""
    order = logits.detach().sort(dim=1, descending=True).values
    if count >= int((order > -torch.inf).sum(1).min()):
        return order[:, count - 1 : count] - 4.0 if count else order[:, :1] + 4.0
    return (order[:, count - 1 : count] + order[:, count : count + 1]) / 2 if count else order[:, :1] + 4.0
