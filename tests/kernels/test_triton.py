"""The Triton kernels, without a GPU: interpreted beside torch's form, compiled for a GPU, traced; and on one."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from flat_maps import random_map, unmerge, values

from gen_turbo.kernels import merge, restore, verbs

HERE = Path(__file__).parent
HAS_TRITON = pytest.mark.skipif(not verbs._HAS_TRITON, reason="triton is not installed")
GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def run(script: str, **variables: str) -> Any:
    """What a script of this folder prints, in a process of its own."""
    paths = os.pathsep.join([str(HERE.parents[1]), str(HERE.parent)])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **variables}
    done = subprocess.run([sys.executable, HERE / script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def interpreted() -> dict[str, list[str]]:
    """The failures of each check of the interpreted kernels."""
    return run("interpreted.py", TRITON_INTERPRET="1")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The kernels as PTX and in a traced graph."""
    return run("compiled.py", TRITON_CACHE_DIR=str(tmp_path_factory.mktemp("triton")), TRITON_DEFAULT_FP_FUSION="1")


@HAS_TRITON
def test_random_maps(interpreted):
    """Catches slots and rows numbered without the batch row, a last tile read beyond its slot, lost channel blocks."""
    assert interpreted["random_maps"] == []


@HAS_TRITON
def test_strides(interpreted):
    """Catches rows read as if the tensor were contiguous, or with the batch stride of a contiguous one."""
    assert interpreted["strides"] == []


@HAS_TRITON
def test_every_combination_of_terms(interpreted):
    """Catches a term left out or read from another row, and half types that are rounded after each term."""
    assert interpreted["terms"] == []


@HAS_TRITON
def test_an_empty_slot_gives_zeros(interpreted):
    """Catches a division by its size."""
    assert interpreted["empty_slots"] == []


@HAS_TRITON
def test_terms_of_another_size_are_refused(interpreted):
    """Catches memory read beyond the end of a residual that was made for another size."""
    assert interpreted["shapes"] == []


@HAS_TRITON
def test_operators(interpreted):
    """Catches an operator that passes its arguments on in another order, or hands back one of them."""
    assert interpreted["operators"] == []


@HAS_TRITON
@pytest.mark.parametrize(("kernel", "least"), [("merge", 5), ("unmerge", 5), ("added", 4)])
def test_rows_move_in_vectors_of_16_bytes(compiled, kernel, least):
    """Catches a kernel that only the interpreter accepts, loads of single numbers, and sums across threads."""
    assembly = compiled["assembly"][kernel]
    rows = re.findall(r"(?:ld|st)\.global\S*b16|(?:ld|st)\.global\.v4\.b32", assembly)
    assert len(rows) >= least and set(rows) == {"ld.global.v4.b32", "st.global.v4.b32"}
    assert "shfl" not in assembly and "bar.sync" not in assembly


@HAS_TRITON
def test_what_is_on_no_slots_reads_no_indices(compiled):
    """Catches a table of the tokens' own numbers that is made and read."""
    assert "ld.global.b64" in compiled["assembly"]["unmerge"] or "ld.global.v2.b64" in compiled["assembly"]["unmerge"]
    assert "b64" not in "".join(re.findall(r"ld\.global\S*", compiled["assembly"]["added"]))


@HAS_TRITON
def test_inductor_sees_kernels_that_write_their_result_alone(compiled):
    """Catches an operator that stays closed to inductor, and inputs that it would copy before each launch."""
    assert [kernel["written"] for kernel in compiled["traced"]] == [["out"]] * 3
    assert [kernel["grid"] for kernel in compiled["traced"]] == [[[5, 2, 1]], [[3, 2, 1]], [[3, 2, 1]]]


class TestOnAGpu:
    """The same on the device."""

    pytestmark = GPU

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
    def test_equals_the_torch_form(self, dtype):
        """Catches a kernel that the interpreter runs and a GPU does not."""
        flat = random_map(2, 300, 140, 0)
        x = values(2, 300, 320, dtype=dtype)
        maps = [index.cuda() for index in flat[2:]]
        terms = {"base": x, "detail": torch.stack([x, x]), "weights": torch.tensor([1.0, 3.0])}
        y = merge(x.cuda(), *maps[:3])
        rounding = {"rtol": torch.finfo(dtype).eps, "atol": 1e-5}
        torch.testing.assert_close(y.cpu(), merge(x.float(), *flat[2:5]).to(dtype), **rounding)
        wide = {name: term.float() for name, term in terms.items()}
        expected = unmerge(y.cpu().float(), flat.slot, **wide).to(dtype)
        got = unmerge(y, maps[3], **{name: term.cuda() for name, term in terms.items()})
        torch.testing.assert_close(got.cpu(), expected, **rounding)
        added = restore([x.cuda()], maps[3], (), details=[terms["detail"].cuda()], weights=terms["weights"].cuda())[0]
        torch.testing.assert_close(added.cpu(), (x.float() * 5).to(dtype), **rounding)

    def test_a_cuda_graph_follows_the_map(self):
        """Catches a launch that capture refuses, and values of the map or the weights baked into the graph."""
        first, second = random_map(2, 300, 140, 0), random_map(2, 300, 140, 1)
        maps, x = [index.cuda() for index in first[2:]], values(2, 300, 64).half().cuda()
        weights, detail = torch.tensor([1.0, 1.0], device="cuda"), torch.stack([x, x])

        def both():
            return unmerge(merge(x, *maps[:3]), maps[3], detail=detail, weights=weights)

        both()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = both()
        for mine, new in zip(maps, second[2:], strict=True):
            mine.copy_(new)
        weights[1] = 3.0
        graph.replay()
        assert torch.equal(out, both())
