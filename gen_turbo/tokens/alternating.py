"""Bipartite soft matching with every other token a destination, as vision encoders merge: in few operators.

Shape names: B batch, N tokens, P of them patches, C channels, S sources, M slots.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gen_turbo.tokens.tables import counting, ranks
from gen_turbo.tokens.token_map import TokenMap

_LEAST_LENGTH = 1e-12
"""Shorter vectors are not made longer than that."""


def alternating_soft_matching(
    metric_BNC: Tensor, num_removed: int, penalty_BP: Tensor | None = None, num_leading: int = 0
) -> TokenMap:
    """Merges as `bipartite_soft_matching` does with every other token a destination, in few operators.

    The split of ToMe in vision encoders (Bolya et al., 2022, arXiv 2210.09461, Section 3): the first token, the third
    and so on receive.

    Args:
        metric_BNC: What similarity is measured on, by cosine in at least float32.
        num_removed: How many tokens leave in each row, at most half of them, rounded down. Ties leave in token order.
        penalty_BP: Is taken off the similarity of each token behind the leading ones, finite. One row serves any batch.
        num_leading: Class tokens in front, which neither leave nor receive.

    Raises:
        ValueError: If more are to leave than there are sources.
    """
    batch, num_tokens, _ = metric_BNC.shape
    num_patches = num_tokens - num_leading
    if not 0 <= num_removed <= num_patches // 2:
        raise ValueError(f"cannot remove {num_removed} of {num_patches} tokens: {num_patches // 2} are sources")
    if num_removed == 0:
        return TokenMap.identity(batch, num_tokens, metric_BNC.device)
    with torch.no_grad():
        metric = metric_BNC if metric_BNC.dtype in (torch.float32, torch.float64) else metric_BNC.float()
        metric = metric / torch.linalg.vector_norm(metric, dim=-1, keepdim=True).clamp_min(_LEAST_LENGTH)
        sources, destinations = metric[:, num_leading + 1 :: 2], metric[:, num_leading::2]
        best_BS, nearest_BS = torch.bmm(sources, destinations.mT).max(-1)
        if penalty_BP is not None:
            best_BS = best_BS - penalty_BP[:, 1::2]
        order = best_BS.argsort(dim=1, descending=True, stable=True)[:, :num_removed]
        # Each is 2 * index + first, in one operator.
        leaving = torch.rsub(order, num_leading + 1, alpha=-2)
        target = torch.rsub(nearest_BS.gather(1, order), num_leading, alpha=-2)
        # The first token stays and is counted as none, so that the sum up to each one that stays is its slot.
        rank_BN = ranks(batch, num_tokens, metric.device).scatter(1, leaving, 0).cumsum(1)
        slot_BN = rank_BN.scatter(1, leaving, rank_BN.gather(1, target))
        return TokenMap(slot_BN, torch.searchsorted(rank_BN, counting(batch, num_tokens - num_removed, metric.device)))
