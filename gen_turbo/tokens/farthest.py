"""Few tokens that are far apart, each standing for those next to it; for short sequences planned once.

Shape names: B batch, N tokens, C channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gen_turbo.tokens.token_map import TokenMap


def farthest_point_plan(x_BNC: Tensor, num_slots: int) -> TokenMap:
    """Keeps tokens that are farthest from those kept before, beginning with the first; the others join the nearest.

    Greedy k-centre clustering (Gonzalez, 1985): the largest distance of a token to the one that stands for it is at
    most twice the smallest possible. Equal tokens leave before any that differ. Costs `num_slots * N * C`.

    Args:
        x_BNC: Tokens; distances are Euclidean, in at least float32.
        num_slots: How many tokens stay, 1 to N.

    Raises:
        ValueError: If `num_slots` is out of range.
    """
    batch, num_tokens, _ = x_BNC.shape
    if not 1 <= num_slots <= num_tokens:
        raise ValueError(f"cannot keep {num_slots} of {num_tokens} tokens; lower the ratio")
    # Made contiguous, lest sums in another order choose otherwise.
    x = x_BNC.detach().to(torch.promote_types(x_BNC.dtype, torch.float32)).contiguous()
    row = torch.arange(batch, device=x.device)
    kept = torch.zeros(batch, dtype=torch.int64, device=x.device)
    nearest_BN = torch.zeros(batch, num_tokens, dtype=torch.int64, device=x.device)
    distance_BN = torch.full((batch, num_tokens), torch.inf, device=x.device, dtype=x.dtype)
    for _ in range(num_slots):
        to_kept_BN = (x - x[row, kept][:, None]).square().sum(-1)
        is_nearer = to_kept_BN < distance_BN
        nearest_BN = torch.where(is_nearer, kept[:, None], nearest_BN)
        distance_BN = torch.where(is_nearer, to_kept_BN, distance_BN)
        nearest_BN[row, kept] = kept
        distance_BN[row, kept] = -1
        kept = distance_BN.argmax(1)
    return TokenMap.from_destinations(nearest_BN, num_slots)
