"""Runs the Triton kernels by their interpreter beside torch's form and prints what differs, as JSON.

A script, since TRITON_INTERPRET must be set before triton is imported anywhere: it maps the name of each check to
its failures.
"""

import json
from collections.abc import Callable, Iterator
from itertools import product

import torch
from flat_maps import flat_map, random_map, unmerge, values
from torch import Tensor

from gen_turbo.kernels import merge, ops
from gen_turbo.kernels.merge_triton import launch_merge, launch_unmerge, merge_kernel, unmerge_kernel

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# One unit in the last place of a half type, a few of float32.
UNITS = {torch.float32: 8, torch.float16: 1, torch.bfloat16: 1}

Pairs = Iterator[tuple[str, Tensor, Tensor]]


def random_maps() -> Pairs:
    """Batches, sizes from one to many, and channels of less than a block to two blocks."""
    shapes = [(1, 1, 1, 1), (1, 24, 24, 3), (2, 24, 9, 70), (3, 17, 2, 64), (2, 40, 3, 300), (2, 6, 3, 1030)]
    for (batch, num_tokens, num_slots, channels), dtype in product(shapes, DTYPES):
        flat = random_map(batch, num_tokens, num_slots, num_tokens)
        x = values(batch, num_tokens, channels, dtype=dtype)
        name = f"{dtype} {tuple(x.shape)} to {num_slots}"
        y = launch_merge(merge_kernel, x, flat.order, flat.offsets)
        yield f"merge {name}", y, merge(x.float(), flat.order, flat.offsets, flat.share).to(dtype)
        restored = launch_unmerge(unmerge_kernel, y, flat.slot, *[None] * 4)
        yield f"unmerge {name}", restored, unmerge(y, flat.slot)
        detail = values(2, *x.shape, seed=1, dtype=dtype)
        weights = torch.tensor([1.0, 3.0])
        added = launch_unmerge(unmerge_kernel, x, None, None, None, detail, weights)
        yield f"no slots {name}", added, (x.double() + detail[0].double() + 3 * detail[1].double()).to(dtype)


def strides() -> Pairs:
    """A part of a longer sequence, of more channels, a transposed and an expanded tensor."""
    flat = random_map(2, 12, 5, 0)
    whole = values(2, 15, 8)
    views = {
        "tail of a sequence": whole[:, 3:],
        "middle of sequence and channels": whole[:, 1:13, 2:6],
        "transposed": values(2, 6, 12).transpose(1, 2),
        "expanded": whole[:1, :12].expand(2, -1, -1),
    }
    for name, x in views.items():
        merged = launch_merge(merge_kernel, x, flat.order, flat.offsets)
        yield f"merge {name}", merged, merge(x, flat.order, flat.offsets, flat.share)
        terms = {"base": x, "minus": x[:, 5:10], "detail": x.expand(2, *x.shape), "weights": torch.tensor([1.0, 2.0])}
        restored = launch_unmerge(unmerge_kernel, x[:, :5], flat.slot, **terms)
        yield f"unmerge {name}", restored, unmerge(x[:, :5], flat.slot, **terms)
        added = launch_unmerge(unmerge_kernel, x, None, None, None, terms["detail"], terms["weights"])
        yield f"no slots {name}", added, x * 4


def terms() -> Pairs:
    """Every combination of optional arguments, which the kernel rounds once."""
    flat = random_map(2, 11, 4, 0)
    for dtype, has_base, has_minus, last in product(DTYPES, (False, True), (False, True), (0, 1, 2)):
        given = {
            "base": values(2, 11, 6, seed=1, dtype=dtype) if has_base else None,
            "minus": values(2, 4, 6, seed=2, dtype=dtype) if has_minus else None,
            "detail": values(last, 2, 11, 6, seed=3, dtype=dtype) if last > 0 else None,
            "weights": torch.tensor([1.0, 3.0]),
        }
        y = values(2, 4, 6, dtype=dtype)
        wide = {name: term if term is None else term.float() for name, term in given.items()}
        got = launch_unmerge(unmerge_kernel, y, flat.slot, **given)
        name = " + ".join([f"{dtype} {last}", *(name for name, term in given.items() if term is not None)])
        yield name, got, unmerge(y.float(), flat.slot, **wide).to(dtype)
        if last and not has_minus:
            x = values(2, 11, 6, seed=4, dtype=dtype)
            added = launch_unmerge(unmerge_kernel, x, None, **given)
            terms = [(x, 1), (given["base"], 1), *zip(given["detail"], (1, 3), strict=False)]
            total = sum(weight * term.double() for term, weight in terms if term is not None)
            yield f"no slots {name}", added, total.to(dtype)


def empty_slots() -> Pairs:
    """Slots without a token."""
    flat = flat_map(torch.tensor([[0, 2, 2]]), 4)
    x = values(1, 3, 2)
    merged = launch_merge(merge_kernel, x, flat.order, flat.offsets)
    yield "merge", merged, merge(x, flat.order, flat.offsets, flat.share)


def operators() -> Pairs:
    """The registered operators, and torch's own check of their schema: nothing is written to or handed back."""
    flat = random_map(2, 12, 5, 0)
    x, weights = values(2, 12, 6), torch.tensor([1.0, 3.0])
    y = merge(x, flat.order, flat.offsets, flat.share)
    yield "merge", ops.merge(x, flat.order, flat.offsets), y
    for given in ([None] * 4, [x, y * 2, values(2, 2, 12, 6), weights]):
        terms = dict(zip(("base", "minus", "detail", "weights"), given, strict=True))
        yield f"unmerge {len(given)}", ops.unmerge(y, flat.slot, *given), unmerge(y, flat.slot, **terms)
        torch.library.opcheck(torch.ops.gen_turbo.unmerge, (y, flat.slot, *given), test_utils="test_schema")
    only_detail = (None, None, None, values(2, 2, 12, 6), weights)
    yield "no slots", ops.unmerge(x, *only_detail), x + only_detail[3][0] + 3 * only_detail[3][1]
    torch.library.opcheck(torch.ops.gen_turbo.unmerge, (x, *only_detail), test_utils="test_schema")
    torch.library.opcheck(torch.ops.gen_turbo.merge, (x, flat.order, flat.offsets), test_utils="test_schema")


def shapes() -> Pairs:
    """Terms of another size, which a kernel would read beyond their end."""
    flat = random_map(1, 12, 5, 0)
    y, x = values(1, 5, 4), values(1, 12, 4)
    for given in ([x[:, 1:], *[None] * 3], [None, x, None, None], [None, None, y[None], None]):
        try:
            got = launch_unmerge(unmerge_kernel, y, flat.slot, *given)
            yield "not refused", got, torch.zeros(())
        except ValueError as error:
            assert "is needed" in str(error), error
    try:
        yield "not refused", launch_unmerge(unmerge_kernel, x, None, None, None, y[None], None), torch.zeros(())
    except ValueError as error:
        assert "is needed" in str(error), error


def failures(check: Callable[[], Pairs]) -> list[str]:
    """What differs by more than the units in the last place that the result's type allows."""
    found = []
    for name, got, expected in check():
        unit = torch.finfo(expected.dtype).eps
        tolerance = {"rtol": UNITS[expected.dtype] * unit, "atol": UNITS[torch.float32] * torch.finfo().eps}
        try:
            torch.testing.assert_close(got, expected, **tolerance)
        except AssertionError as error:
            found.append(f"{name}: {error}")
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    checks = (random_maps, strides, terms, empty_slots, operators, shapes)
    print(json.dumps({check.__name__: failures(check) for check in checks}))
