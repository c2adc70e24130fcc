"""Compiles the Triton kernels for a GPU that need not be there and prints what became of them, as JSON.

A script, since it puts a driver of its own into triton: that of compute capability 9.0, which launches nothing.
"""

import json
from typing import Any

import torch
import triton
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gen_turbo.kernels import merge, restore
from gen_turbo.kernels.merge_triton import merge_kernel, unmerge_kernel

TARGET = GPUTarget("cuda", 90, 32)
INDICES = {"order", "offsets", "slot"}
NUMBERS = {"stride", "shift", "channels", "length", "y_stride", "y_shift", "base_stride", "base_shift", "extent"}


class Driver:
    """What triton asks of a GPU before it compiles."""

    def get_current_target(self) -> GPUTarget:
        """Names the GPU to compile for."""
        return TARGET


def assembly(kernel: Any, constants: dict[str, Any]) -> str:
    """The kernel for float16 rows of 16 aligned bytes, as PTX."""
    names = kernel.arg_names
    kinds = {
        n: "*i64" if n in INDICES else "i32" if n in NUMBERS else "*fp32" if n == "weights" else "*fp16" for n in names
    }
    signature = {name: "constexpr" if name in constants else kinds[name] for name in names}
    places = {name: (index,) for index, name in enumerate(names)}
    aligned = {places[name]: [["tt.divisibility", 16]] for name in names if name not in constants}
    source = ASTSource(kernel, signature, {places[name]: value for name, value in constants.items()}, aligned)
    return str(triton.compile(source, target=TARGET, options={"num_warps": 2}).asm["ptx"])


def traced() -> list[dict[str, Any]]:
    """The kernels in the graph that inductor would get: which tensors each is thought to write, and its grid."""
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    def both(x: Tensor, order: Tensor, offsets: Tensor, share: Tensor, weights: Tensor, detail: Tensor) -> Any:
        y = merge(x, order, offsets, share)
        return restore([y, x], order, (0,), x, y, (), [detail, detail], weights)

    with FakeTensorMode(), torch.no_grad():
        ints = [torch.empty(n, dtype=torch.int64, device="cuda") for n in (24, 11)]
        floats = [torch.empty(24, device="cuda"), torch.empty(2, device="cuda")]
        x, detail = (torch.empty(*n, 2, 12, 320, dtype=torch.float16, device="cuda") for n in ((), (2,)))
        try:
            torch.compile(both, backend=aot_autograd(fw_compiler=keep), fullgraph=True)(x, *ints, *floats, detail)
        except RuntimeError as error:  # Calling the graph would need CUDA.
            assert graphs, error
    nodes = [node for node in graphs[0].graph.nodes if "triton_kernel_wrapper" in str(node.target)]
    return [{"written": node.kwargs["tensors_to_clone"], "grid": node.kwargs["grid"]} for node in nodes]


if __name__ == "__main__":
    torch.set_num_threads(1)
    triton.runtime.driver.set_active(Driver())
    tile = {"BLOCK": 512, "ROWS": 4}
    every = {"HAS_SLOT": True, "HAS_BASE": True, "HAS_MINUS": True, "TERMS": 2}
    added = {"HAS_SLOT": False, "HAS_BASE": False, "HAS_MINUS": False, "TERMS": 2}
    found = {"merge": assembly(merge_kernel, tile)}
    found |= {name: assembly(unmerge_kernel, flags | tile) for name, flags in (("unmerge", every), ("added", added))}
    print(json.dumps({"assembly": found, "traced": traced()}))
