"""Kernels by name, sizes and full queries inside the attention call, and what cannot be reached."""

from __future__ import annotations

import re
import sys

import pytest
import torch
from diffusers.models import attention_dispatch
from diffusers.models.attention_processor import AttnProcessor, IPAdapterAttnProcessor2_0, SlicedAttnProcessor
from stated import TurboProcessor

from gen_turbo import IdentityProcessor, attach
from gen_turbo.engine.attention import AttentionMode
from gen_turbo.models.adapter import Geometry, ModelCall
from tests.engine.families import NAMES, Keys, family, relative
from tests.snapshots import differences, model_state
from tests.tiny_transformers import random


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3", "pixart-alpha", "flux", "kandinsky"])
@pytest.mark.parametrize("processor", [IdentityProcessor, TurboProcessor])
def test_a_kernel_by_name_computes_every_attention(name, processor, monkeypatch):
    """Catches the silence of UNet, SD3 and PixArt, whose own processors know no kernels."""
    math = attention_dispatch.AttentionBackendName._NATIVE_MATH
    backends = attention_dispatch._AttentionBackendRegistry._backends
    original, calls = backends[math], []
    monkeypatch.setitem(backends, math, lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs))
    model, run = family(name)
    with Keys() as keys:
        stock = run(times=(900,))
    with attach(model, processor(0.4, attention_backend="_native_math")):
        calls.clear()
        outputs = run(times=(900,))
    assert len(calls) >= len(keys.seen)
    assert torch.allclose(outputs, stock, atol=1e-4)


def test_an_ip_adapter_in_cross_attention_stays_where_it_is():
    """Catches wrapping a processor with weights, which leaves the module tree."""
    model, _ = family("sd15")
    layer = model.down_blocks[0].attentions[0].transformer_blocks[0].attn2
    adapter = IPAdapterAttnProcessor2_0(hidden_size=16, cross_attention_dim=32, num_tokens=(4,))
    layer.set_processor(adapter)
    with attach(model, IdentityProcessor(attention_backend="native")):
        assert layer.processor is adapter


@pytest.mark.parametrize(
    ("backend", "words"),
    [
        ("turbo", "attention_backend must be one of flash.*xformers; got 'turbo'"),
        ("flash", "attention_backend='flash' does not run on cpu in float32: .*flash-attn.*; try 'native'"),
        ("sage", "attention_backend='sage' does not run on cpu in float32: .*sageattention.*; try 'native'"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_a_kernel_that_cannot_run_says_why_and_changes_nothing(backend, words):
    """Catches a kernel that is ignored, and a failure in the middle of a run."""
    model, _ = family("sd15")
    before = model_state(model)
    with pytest.raises(ValueError, match=words):
        attach(model, TurboProcessor(0.4, attention_backend=backend))
    assert differences(before, model_state(model)) == []


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore")
def test_every_family_refuses_a_kernel_that_is_not_here(name):
    """Catches a family whose attention drops the name of a kernel, or is left changed by one that cannot run."""
    model, _ = family(name)
    before = model_state(model)
    for backend in ("flash", "_flash_3", "flash_hub", "sage", "sage_hub", "xformers"):
        with pytest.raises(ValueError, match=f"attention_backend='{backend}' does not run on cpu .*; try 'native'"):
            attach(model, TurboProcessor(0.4, attention_backend=backend))
    assert differences(before, model_state(model)) == []


BUILT = {
    "flash_attn/__init__.py": "raise ImportError('flash_attn_2_cuda.so: undefined symbol: _ZN3c104cuda9SetDeviceEa')",
    "sageattention/__init__.py": "import a_package_that_nobody_has",
    "xformers/__init__.py": "",
    "xformers/ops.py": "def memory_efficient_attention(*_, **__): raise NotImplementedError('No operator found')",
    "xformers/_cpp_lib.py": "class Why(Exception):\n    class build_info: torch_version = '2.10.0+cu128'\n"
    "_cpp_library_load_exception = Why()",
}
"""Packages of kernels as they are where their libraries do not load."""


@pytest.mark.parametrize(
    ("backend", "words"),
    [
        ("flash", "flash-attn 9.9 was built for another PyTorch, and this is {}; install one built for it"),
        ("xformers", r"xformers 9.9 was built for PyTorch 2.10.0\+cu128, and this is {}; install one built for it"),
        ("sage", "sageattention needs a_package_that_nobody_has, which is not installed"),
    ],
)
def test_a_wheel_built_for_another_torch_is_refused_in_words(backend, words, tmp_path, monkeypatch):
    """Catches "missing or too old" for a package that is there, and an operator that was not found."""
    for place, code in BUILT.items():
        (tmp_path / place).parent.mkdir(exist_ok=True)
        (tmp_path / place).write_text(code)
    for name in ("flash_attn", "sageattention", "xformers"):
        about = tmp_path / f"{name}-9.9.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(f"Name: {name.replace('_', '-')}\nVersion: 9.9\n")
        for module in [module for module in sys.modules if module.partition(".")[0] == name]:
            monkeypatch.delitem(sys.modules, module)
    monkeypatch.syspath_prepend(tmp_path)
    known, loaded = family("sd15")[0], set(sys.modules)
    here = re.escape(torch.__version__)
    try:
        with pytest.raises(ValueError, match=f"attention_backend='{backend}' .* {words.format(here)}; try 'native'"):
            attach(known, TurboProcessor(0.4, attention_backend=backend))
    finally:
        for module in set(sys.modules) - loaded:
            del sys.modules[module]


@pytest.mark.parametrize("setting", ["kv_only", "proportional_attention"])
@pytest.mark.parametrize("inner", [AttnProcessor(), SlicedAttnProcessor(2)])
def test_a_processor_without_a_kernel_cannot_be_reached_into(setting, inner):
    """Catches a setting that does nothing on attention slicing."""
    model, _ = family("sd15")
    model.set_attn_processor(inner)
    with pytest.raises(ValueError, match=rf"{setting} cannot reach into {type(inner).__name__} at "):
        attach(model, TurboProcessor(0.4, **{setting: True}))


@pytest.mark.parametrize("name", ["sd15", "sd3"])
@pytest.mark.parametrize("full_queries", [False, True])
@pytest.mark.parametrize("backend", [None, "native"])
def test_sizes_make_the_merging_of_equal_tokens_exact(name, full_queries, backend):
    """Catches sizes at the wrong keys: tokens that are equal lose nothing when they merge, if sizes count.

    Without a kernel by name the sizes are a mask here, with one they are channels.
    """
    model, _ = family(name)
    cells, text = random(1, 16, 32 if name == "sd3" else 16), random(1, 5, 32, seed=2)
    tokens = cells.reshape(1, 4, 1, 4, 1, -1).expand(1, 4, 2, 4, 2, -1).reshape(1, 64, -1)
    given = {"encoder_hidden_states": text} if name == "sd3" else {}
    errors = {}
    for weighted in (False, True):
        settings = {"kv_only": full_queries, "proportional_attention": weighted, "attention_backend": backend}
        with attach(model, TurboProcessor(0.5, restore="copy", semantic="none", **settings)) as attachment:
            layer = model.get_submodule(attachment.layers[0])
            stock = layer(tokens, **given)
            merged = _alone(attachment.parts[0], layer, tokens, given)
        pairs = zip(merged, stock, strict=True) if name == "sd3" else [(merged, stock)]
        errors[weighted] = max(relative(a, b) for a, b in pairs)
    assert errors[True] < 1e-5 < 1e-3 < errors[False]


def _alone(part, layer, tokens, given):
    """One reduced call of a layer on 8 x 8 tokens, as in the first step of a run."""
    root = part.root
    call = ModelCall(tokens, 900.0, None)
    root.runs.find(call)
    context = root.runs.open(call, Geometry((8, 8), num_text=5))
    root.program.enter(context)
    root.beginning.context = context
    root.program.begin(context, frozenset())
    merged = layer(tokens, **given)
    root.program.end(context, frozenset())
    return merged


@pytest.mark.parametrize("backend", [None, "native"])
def test_sizes_do_not_leave_the_fast_kernel(backend):
    """Catches keys with more channels than values, which PyTorch computes by its slow formula, 5 times the time."""
    sizes = torch.ones(1, 16).index_fill_(1, torch.tensor([3]), 4)
    query, key, value = (random(2, 2, 16, 8, seed=seed) for seed in range(3))
    with torch.profiler.profile() as profile, AttentionMode(sizes=sizes, backend=backend):
        output = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    repeated = [tensor.repeat_interleave(sizes[0].long(), 2) for tensor in (key, value)]
    expected = torch.nn.functional.scaled_dot_product_attention(query, *repeated)
    assert torch.allclose(output, expected, atol=1e-6)
    names = {event.key for event in profile.key_averages()}
    assert "aten::_scaled_dot_product_flash_attention_for_cpu" in names
    assert not any("_math" in name for name in names)


@pytest.mark.parametrize("settings", [{"kv_only": True}, {"proportional_attention": True}])
def test_block_scope_refuses_what_concerns_attention_alone(settings):
    """Catches a combination of settings of which one is dropped."""
    with pytest.raises(ValueError, match="can only be set with scope='attention'"):
        TurboProcessor(0.4, scope="block", **settings)
