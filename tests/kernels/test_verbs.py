"""The verbs on flat index tensors, in torch's form, and what tracing sees of them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from flat_maps import FlatMap, flat_map, random_map, unmerge, values
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from gen_turbo.kernels import merge, restore, verbs
from gen_turbo.tokens.token_map import TokenMap

PROPERTY = settings(max_examples=25, deadline=None, derandomize=True, database=None)
ROUNDING = {"rtol": 1e-5, "atol": 1e-6}
HAS_TRITON = pytest.mark.skipif(not verbs._HAS_TRITON, reason="triton is not installed")


@st.composite
def maps(draw: st.DrawFn) -> FlatMap:
    """Maps of one to three rows and up to 24 tokens."""
    num_tokens = draw(st.integers(1, 24))
    return random_map(draw(st.integers(1, 3)), num_tokens, draw(st.integers(1, num_tokens)), draw(st.integers(0, 999)))


def merged(x: Tensor, flat: FlatMap) -> Tensor:
    """The verb on a map."""
    return merge(x, flat.order, flat.offsets, flat.share)


def terms(flat: FlatMap, channels: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Every optional term."""
    batch, num_tokens = flat.slot_BN.shape
    made = {n: values(batch, m, channels, dtype=dtype) for n, m in (("base", num_tokens), ("minus", flat.num_slots))}
    return made | {"detail": values(2, batch, num_tokens, channels, dtype=dtype), "weights": torch.tensor([1.0, 3.0])}


def restored(y: Tensor, flat: FlatMap, given: dict[str, Tensor]) -> Tensor:
    """The sum that `restore` stands for, with plain indexing."""
    change = y - given["minus"] if "minus" in given else y
    total = torch.stack([row[slot] for row, slot in zip(change, flat.slot_BN, strict=True)])
    total = total + given["base"] if "base" in given else total
    for term, weight in zip(given.get("detail", ()), (1, 3), strict=False):
        total = total + term * weight
    return total


def token_map(flat: FlatMap) -> TokenMap:
    """The package's own map with the same slots; anchors do not matter to the verbs."""
    return TokenMap(flat.slot_BN, torch.zeros(len(flat.slot_BN), flat.num_slots, dtype=torch.int64))


@PROPERTY
@given(maps())
def test_both_are_bit_equal_to_the_token_map(flat: FlatMap) -> None:
    """Catches another order of summation, a mean taken by division, and slots numbered without the batch row."""
    batch, num_tokens = flat.slot_BN.shape
    x, y = values(batch, num_tokens, 5), values(batch, flat.num_slots, 5)
    assert torch.equal(merged(x, flat), token_map(flat).merge(x)) or flat.num_slots == num_tokens
    assert torch.equal(unmerge(y, flat.slot), token_map(flat).unmerge(y)) or flat.num_slots == num_tokens


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_summed_in_float32(dtype: torch.dtype) -> None:
    """Catches sums in half precision, which lose the small terms of a large slot."""
    flat = flat_map(torch.zeros(1, 3000, dtype=torch.int64), 1)
    x = values(1, 3000, 4, dtype=dtype) + 10
    exact = x.double().mean(1, keepdim=True)
    assert torch.equal(merged(x, flat), exact.to(dtype))


def test_float64_stays_float64() -> None:
    """Catches a fallback that narrows what it cannot pass to a kernel."""
    flat = random_map(2, 12, 5, 0, torch.float64)
    x = values(2, 12, 3).double() * (1 + 1e-12)
    expected = torch.stack([x[0][flat.slot_BN[0] == slot].mean(0) for slot in range(5)])
    torch.testing.assert_close(merged(x, flat)[0], expected, rtol=1e-14, atol=1e-14)
    assert torch.equal(unmerge(merged(x, flat), flat.slot), restored(merged(x, flat), flat, {}))


def test_an_empty_slot_gives_zeros() -> None:
    """Catches a division by its size."""
    flat = flat_map(torch.tensor([[0, 2, 2]]), 4)
    assert merged(values(1, 3, 2), flat)[0, [1, 3]].eq(0).all()


@PROPERTY
@given(maps(), st.sets(st.sampled_from(["base", "minus", "detail"])), st.integers(1, 2), st.booleans())
def test_every_combination_is_added(flat: FlatMap, names: set[str], num_terms: int, is_recorded: bool) -> None:
    """Catches a term left out, taken from the wrong rows or subtracted after the copy, and inputs overwritten."""
    given = {name: term for name, term in terms(flat, 4).items() if name in names | {"weights"}}
    if "detail" in given:
        given["detail"] = given["detail"][:num_terms]
    y = values(len(flat.slot_BN), flat.num_slots, 4, seed=9).requires_grad_(is_recorded)
    before = {name: term.clone() for name, term in given.items()}
    torch.testing.assert_close(unmerge(y, flat.slot, **given), restored(y, flat, given), **ROUNDING)
    assert all(torch.equal(term, before[name]) for name, term in given.items())


def test_terms_are_added_in_the_order_of_the_engine() -> None:
    """Catches a sum that differs in the last bit from adding base, residual and the slope's steps one by one."""
    flat = random_map(2, 24, 7, 0)
    given, y = terms(flat, 4), values(2, 7, 4)
    expected = given["base"] + token_map(flat).unmerge(y - given["minus"])
    expected.add_(given["detail"][0]).add_(given["detail"][1], alpha=3)
    assert torch.equal(unmerge(y, flat.slot, **given), expected)


def test_strides_do_not_matter() -> None:
    """Catches rows read as if the tensor were contiguous: a part of a sequence, of the channels, a transposed one."""
    flat = random_map(2, 12, 5, 0)
    whole = values(2, 15, 8)
    for x in (whole[:, 3:], whole[:, 1:13, 2:6], values(2, 6, 12).transpose(1, 2), whole[:1, :12].expand(2, -1, -1)):
        assert torch.equal(merged(x, flat), merged(x.contiguous(), flat))
        y, given = x[:, :5], {"base": x, "minus": x[:, 5:10]}
        packed = {name: term.contiguous() for name, term in given.items()}
        assert torch.equal(unmerge(y, flat.slot, **given), unmerge(y.contiguous(), flat.slot, **packed))


def test_a_map_of_another_size_is_refused() -> None:
    """Catches an image of a new size merged by the map of the last one."""
    with pytest.raises(ValueError, match="24 entries for 2 x 11 tokens; make a map for this size"):
        merged(values(2, 11, 3), random_map(2, 12, 5, 0))


def test_gradients_pass_through_every_term() -> None:
    """Catches an addition in place that cuts the graph, and a kernel without a backward."""
    flat = random_map(2, 6, 3, 0, torch.float64)
    double = {name: term.double().requires_grad_(name != "weights") for name, term in terms(flat, 2).items()}
    x, y = values(2, 6, 2).double().requires_grad_(), values(2, 3, 2).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: merged(x, flat), (x,))
    restored = lambda y, *given: unmerge(y, flat.slot, **dict(zip(double, given, strict=True)))  # noqa: E731
    assert torch.autograd.gradcheck(restored, (y, *double.values()))


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


class OpNames(TorchDispatchMode):
    """Writes down the kernels that run."""

    def __init__(self) -> None:
        """Begins an empty list."""
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operation and notes its name."""
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


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


def both(x: Tensor, order: Tensor, offsets: Tensor, share: Tensor, weights: Tensor, detail: Tensor) -> Tensor:
    """Both verbs with every argument."""
    y = merge(x, order, offsets, share)
    return unmerge(y, order, base=x, minus=y, detail=detail, weights=weights)


@HAS_TRITON
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_gpu_gets_one_kernel_each(dtype: torch.dtype) -> None:
    """Catches tensors widened or copied before the kernel, and a wait for the device, which has no values here."""
    with FakeTensorMode(), torch.no_grad():
        given = on_gpu(dtype)
        assert operators(lambda: both(*given)) == ["merge", "unmerge"]


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
    assert names == ["_embedding_bag_forward_only", "sub", "index_select", "add_", "add_", "addcmul_"]


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
    assert targets == ["gen_turbo.merge.default", "gen_turbo.unmerge.default"]


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
