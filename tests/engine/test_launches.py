"""What a reduced layer launches on a GPU beside the layer itself, by the interpreted Triton kernels."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gen_turbo.kernels import verbs

HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif(not verbs._HAS_TRITON, reason="triton is not installed")
ON_SLOTS, TEXT = ["merge_kernel", "unmerge_kernel"], ["unmerge_kernel"]


@pytest.fixture(scope="module")
def launches() -> Any:
    """What each kind of layer launched, and how far the result is from that of torch's form."""
    paths = os.pathsep.join([str(HERE.parents[1]), str(HERE.parent)])
    environment = os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    command = [sys.executable, HERE / "launches.py", "sd3", "flux"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_a_residual_layer_that_gives_text_launches_three_kernels(launches, name):
    """Catches operators of torch that add what is remembered of the text, and positions taken by every layer."""
    for kind in ("residual", "blocks"):
        (first, *others), _ = launches[f"{name} {kind}"]
        # The first of a step takes the rows of positions, for all.
        assert [launch for launch in first if launch != "index_select"] == ON_SLOTS + TEXT
        assert {tuple(other) for other in others} <= {tuple(ON_SLOTS), tuple(ON_SLOTS + TEXT)}


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_layers_that_remember_nothing_launch_two(launches, name):
    """Catches launches for text of which nothing is missed."""
    (first, *others), _ = launches[f"{name} copied"]
    assert [launch for launch in first if launch != "index_select"] == ON_SLOTS
    assert {tuple(other) for other in others} == {tuple(ON_SLOTS)}


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_the_kernels_compute_what_torch_does(launches, name):
    """Catches a term that the kernels leave out or take from another row, over whole runs of models."""
    assert all(distance < 1e-6 for kind, (_, distance) in launches.items() if kind.startswith(name))
