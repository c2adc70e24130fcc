"""Merging and restoring on index tensors: `merge` averages tokens into slots, `restore` copies slots to tokens.

Both take flat indices of fixed address and keep no state, so that a caller may write the next map into the same
tensors: neither torch.compile nor a CUDA graph notices. On a GPU with Triton each is one kernel, elsewhere one to
a few operators of torch.
"""

from gen_turbo.kernels.verbs import merge, restore

__all__ = ["merge", "restore"]
