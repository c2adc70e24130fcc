"""The Triton kernels as operators gen_turbo::merge and gen_turbo::unmerge, which inductor opens.

Imported only while something traces: registering them imports inductor, which takes a second.
"""

from torch import Tensor
from torch.library import triton_op, wrap_triton

from gen_turbo.kernels.merge_triton import launch_merge, launch_unmerge, merge_kernel, unmerge_kernel


@triton_op("gen_turbo::merge", mutates_args=())
def merge(x: Tensor, order: Tensor, offsets: Tensor) -> Tensor:
    """`verbs.merge` on a GPU."""
    return launch_merge(wrap_triton(merge_kernel), x, order, offsets)


@triton_op("gen_turbo::unmerge", mutates_args=())
def unmerge(
    y: Tensor,
    slot: Tensor | None,
    base: Tensor | None,
    minus: Tensor | None,
    detail: Tensor | None,
    weights: Tensor | None,
) -> Tensor:
    """`verbs.restore` of one output on a GPU."""
    return launch_unmerge(wrap_triton(unmerge_kernel), y, slot, base, minus, detail, weights)
