"""What a call of a verb is: one Python frame, few operators, one graph for all maps, and on a GPU one kernel."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from flat_maps import merged, random_map, terms, unmerge, values
from op_names import OpNames
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from gen_turbo.kernels import merge, restore, verbs

HAS_TRITON = pytest.mark.skipif(not verbs._HAS_TRITON, reason="triton is not installed")


def frames(function: Callable[[], Any]) -> list[str]:
    """The Python functions that run inside a call."""
    names: list[str] = []

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event == "call":
            names.append(frame.f_code.co_qualname)

    sys.setprofile(note)
    try:
        function()
    finally:
        sys.setprofile(None)
    return names[1:]


VIEWS = {"view", "_unsafe_view", "t", "select", "unbind", "detach", "device"}


def operators(function: Callable[[], Any]) -> list[str]:
    """The operators that a call runs; views and questions for the device are left out."""
    with OpNames() as ops:
        function()
    return [name for name in ops.names if name not in VIEWS]


def test_each_is_one_python_frame_and_few_operators() -> None:
    """Catches a helper function, a generator or a wrapper of torch in the hot path, and a value read by the host."""
    flat = random_map(2, 12, 5, 0)
    given = terms(flat, 4)
    x, y = values(2, 12, 4), values(2, 5, 4)
    all_terms = given["base"], given["minus"], (), [given["detail"]], given["weights"]
    sums = ["sub", "index_select", "add_", "addmv_"]
    for function, name, expected in [
        (lambda: merged(x, flat), "merge", ["_embedding_bag_forward_only"]),
        (lambda: restore([y], flat.slot), "restore", ["index_select"]),
        (lambda: restore([y], flat.slot, (0,), *all_terms), "restore", sums),
    ]:
        assert [frame for frame in frames(function) if frame != "merged"] == [name]
        assert operators(function) == expected


def test_tracing_gives_one_graph_for_all_maps_and_gaps() -> None:
    """Catches a graph break, and a graph that depends on the values of the map or on the number of steps."""
    flat, other = random_map(2, 12, 5, 0), random_map(2, 12, 5, 1)
    x, given = values(2, 12, 4), terms(flat, 4)
    graphs = []

    def count(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    def layer(x: Tensor) -> Tensor:
        return unmerge(merged(x, flat) * 2, flat.slot, **given)

    torch.compiler.reset()
    compiled = torch.compile(layer, backend=count, fullgraph=True)
    for _ in range(2):
        with torch.no_grad():
            assert torch.equal(compiled(x), layer(x))
        for mine, new in zip(flat[2:], other[2:], strict=True):
            mine.copy_(new)
        given["weights"][1] = 5.0
    assert len(graphs) == 1


def on_gpu(dtype: torch.dtype) -> tuple[Tensor, ...]:
    """A token tensor, the map's tensors, weights and details, of no memory, that say they are on a GPU."""
    ints = [torch.empty(n, dtype=torch.int64, device="cuda") for n in (24, 11)]
    floats = [torch.empty(24, device="cuda"), torch.empty(2, device="cuda")]
    tokens, detail = (torch.empty(*n, 2, 12, 320, dtype=dtype, device="cuda") for n in ((), (2,)))
    return tokens, *ints, *floats, detail


def both(
    x: Tensor, order: Tensor, offsets: Tensor, share: Tensor, weights: Tensor, detail: Tensor
) -> list[Tensor | None]:
    """Both verbs with every argument, and an output of which something is missed that is on no slots, such as text."""
    y = merge(x, order, offsets, share)
    return restore([y, x], order, (0,), x, y, (), [detail, detail], weights)


@HAS_TRITON
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_gpu_gets_one_kernel_each(dtype: torch.dtype) -> None:
    """Catches tensors widened or copied before the kernel, and a wait for the device, which has no values here."""
    with FakeTensorMode(), torch.no_grad():
        given = on_gpu(dtype)
        assert operators(lambda: both(*given)) == ["merge", "unmerge", "unmerge"]


class OnGpu(Tensor):
    """A tensor that says it is on a GPU; autograd aborts on one of no memory where torch has no CUDA."""

    is_cuda = True


@HAS_TRITON
def test_gradients_and_float64_on_a_gpu_take_the_torch_form() -> None:
    """Catches a kernel without a backward that cuts the graph, and float64 summed in float32."""
    for dtype, is_recorded in ((torch.float32, True), (torch.float64, False)):
        flat = random_map(2, 12, 5, 0, dtype)
        x = values(2, 12, 4, dtype=dtype).as_subclass(OnGpu).requires_grad_(is_recorded)
        y = merged(x, flat)
        assert y.requires_grad == unmerge(y.detach(), flat.slot, base=x).requires_grad == is_recorded
        assert torch.equal(y, merged(x.as_subclass(Tensor), flat))


def test_without_triton_half_types_on_a_gpu_are_not_widened(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a float32 copy of the whole tensor, and an error where Triton is missing."""
    monkeypatch.setattr(verbs, "_HAS_TRITON", False)
    with FakeTensorMode(), torch.no_grad():
        given = on_gpu(torch.float16)
        names = operators(lambda: both(*given))
    on_slots = ["sub", "index_select", "add_", "add_", "addcmul_"]
    assert names == ["_embedding_bag_forward_only", *on_slots, "add", "addcmul_"]


@HAS_TRITON
def test_tracing_on_a_gpu_gives_one_operator_each() -> None:
    """Catches a launch that tracing cannot see."""
    graphs = []

    def keep(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    with FakeTensorMode(), torch.no_grad():
        torch.compile(both, backend=keep, fullgraph=True)(*on_gpu(torch.float16))
    targets = [str(node.target) for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert targets == ["gen_turbo.merge.default", *["gen_turbo.unmerge.default"] * 2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="Triton may run here")
def test_a_gpu_on_which_triton_fails_is_tried_once() -> None:
    """Catches a package that breaks on a machine without a C compiler, and a warning in every step."""
    launchers = verbs._Launchers()
    with pytest.warns(UserWarning, match="Triton does not run on GPU 0"):
        assert launchers[0] is None
    assert launchers[0] is None


@pytest.mark.parametrize("prelude", ["", "sys.modules['triton'] = None"], ids=["as installed", "without triton"])
def test_import_loads_no_triton(prelude: str) -> None:
    """Catches the import of a compiler at start, and an error where Triton is not installed."""
    code = f"""
import sys
{prelude}
import torch
before = set(sys.modules)
from gen_turbo.kernels import merge
added = sorted(name for name in set(sys.modules) - before if name.split('.')[0] in ('triton', 'torch'))
assert not added, added
assert sys.modules.get('triton') is None
x = torch.ones(1, 2, 3)
assert merge(x, torch.arange(2), torch.tensor([0, 2]), torch.full((2,), 0.5)).tolist() == [[[1.0] * 3]]
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
