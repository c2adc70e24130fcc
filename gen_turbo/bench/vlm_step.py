"""`gen-turbo bench vlm-step`: reading images with a LLaVA-1.5 of real widths, few layers or all, and random weights."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import CLIPVisionConfig, DynamicCache, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from gen_turbo.bench import records
from gen_turbo.bench.arithmetic import counted, operators
from gen_turbo.bench.settings import Method, Setting, Stock, selected
from gen_turbo.bench.timing import Timing, alternate
from gen_turbo.vlm.cache_argument import cache_in

BENCH = "vlm-step"
KEPT = (448, 192, 128, 64)
"""Image tokens of 576: those that published methods are compared at, and a ratio just above 0.2."""
SIDE_PX, PATCH_PX = 336, 14
NUM_IMAGE_TOKENS = (SIDE_PX // PATCH_PX) ** 2
PHASES = ("tower", "prefill", "generate")
"""The vision tower alone, the whole prompt, the prompt and the answer."""
BATCHED = "batch"
"""The phase of records of whole batches: the prompt, without a cache."""
OPERATORS = "operators"
"""The phase of records that count the operators of one call."""
BATCHES = (1, 8, 16)
"""At which operators are counted."""
_WHOLE: dict[str, Any] = {"layers": 32, "tower_layers": 24, "scale": 0.0625}
"""As many layers as LLaVA-1.5 7B, of which operators depend, at the smallest width, of which they do not."""
_IMAGE = 3
_TEXT_BEFORE, _TEXT_AFTER = 35, 20
_TOWER, _TEXT = (1024, 4096, 64), (4096, 11008, 128)
"""Width, width of the MLP, width of a head: of CLIP-L and of Vicuna 7B."""
_VOCABULARY = 32064


def catalogue(tower_layers: int = 24) -> list[Setting]:
    """Every method at every budget; the baseline is stock. Late semantic tokens pass a third of the tower."""
    settings: list[Setting] = []
    for kept in KEPT:
        # Half a token more, so that rounding down removes exactly this number.
        options: dict[str, Any] = {"ratio": 1 - (kept - 0.5) / NUM_IMAGE_TOKENS}
        settings.append(Method(f"turbo_vit-tower-{kept}", "turbo_vit, tower", "turbo_vit", options))
        gate = options | {"place": "pre_llm"}
        settings.append(Method(f"turbo_vit-gate-{kept}", "turbo_vit, gate", "turbo_vit", gate))
        settings += [Method(f"{name}-{kept}", name, name, options) for name in ("pool", "resize", "divprune")]
        groups = {"num_tokens": kept}
        settings.append(Method(f"vistog_vit-{kept}", "vistog_vit, untrained", "vistog_vit", groups))
        late = groups | {"first_block": tower_layers * 2 // 3}
        settings.append(Method(f"vistog_vit-late-{kept}", "vistog_vit, late, untrained", "vistog_vit", late))
        # From the second layer on, because there may be no more than two.
        settings.append(Method(f"fastv-{kept}", "fastv", "fastv", options | {"layer": 1}))
    return settings


def run(options: argparse.Namespace) -> None:
    """Times the selected settings in alternating rounds with stock, by phase, or in batches, or counts operators."""
    torch.set_num_threads(options.threads)
    if options.operators:
        _count_operators(options)
        return
    if options.batch:
        _time_batches(options)
        return
    params = {
        "layers": options.layers,
        "tower_layers": options.tower_layers,
        "scale": options.width_scale,
        "new_tokens": options.new_tokens,
        "rounds": options.rounds,
    }
    settings = selected(catalogue(options.tower_layers), options.settings)
    missing = {phase: [s for s in settings if not _is_finished(options, s, params, phase)] for phase in PHASES}
    missing = {phase: pending for phase, pending in missing.items() if pending}
    if not missing:
        print(f"{BENCH}: finished before; delete the records to measure again")
        return
    model = make_model(options.width_scale, options.layers, options.tower_layers, options.seed)
    runs = [Stock(), *(setting for setting in settings if any(setting in every for every in missing.values()))]
    counts = {setting.name: _counted(model, setting, options.new_tokens) for setting in tqdm(runs, desc="counting")}
    for phase, pending in missing.items():
        functions = {s.name: _running(model, s, phase, options.new_tokens) for s in [Stock(), *pending]}
        with tqdm(total=len(functions) * options.rounds, desc=phase) as bar:
            timings = alternate(functions, options.rounds, warmup=0, progress=bar.update)
        for setting in pending:
            own, stock = counts[setting.name], counts["stock"]
            found = {"flops": own[phase], "stock_flops": stock[phase]}
            found |= {"kv_bytes": own["kv_bytes"], "stock_kv_bytes": stock["kv_bytes"]}
            all_params = params | setting.params() | {"phase": phase}
            records.append(options.records, _record(setting, all_params, timings, found, options.seed))


def _time_batches(options: argparse.Namespace) -> None:
    """Times prompts of several images in bfloat16 beside stock, unless others are selected the gate and the tower."""
    settings = selected(catalogue(options.tower_layers), options.settings or ["turbo_vit-*-192", "turbo_vit-*-64"])
    params = {"layers": options.layers, "tower_layers": options.tower_layers, "scale": options.width_scale}
    params |= {"batch": options.batch, "rounds": options.rounds}
    missing = [s for s in settings if not _is_finished(options, s, params, BATCHED)]
    if not missing:
        print(f"{BENCH}: finished before; delete the records to measure again")
        return
    model = make_model(options.width_scale, options.layers, options.tower_layers, options.seed, torch.bfloat16)
    one, batch = _inputs(), _inputs(options.batch)

    def reading(setting: Setting, given: dict[str, Tensor]) -> Callable[[], Any]:
        def read() -> Any:
            with torch.inference_mode(), setting.applied(model):
                return model(**given, use_cache=False, logits_to_keep=1).logits

        return read

    runs = [Stock(), *missing]
    flops = {setting.name: counted(reading(setting, one))[1] for setting in tqdm(runs, desc="counting")}
    with tqdm(total=len(runs) * options.rounds, desc=BATCHED) as bar:
        functions = {setting.name: reading(setting, batch) for setting in runs}
        timings = alternate(functions, options.rounds, warmup=0, progress=bar.update)
    for setting in missing:
        counts = {"flops": flops[setting.name], "stock_flops": flops["stock"]}
        own = params | setting.params() | {"phase": BATCHED}
        records.append(options.records, _record(setting, own, timings, counts, options.seed))


def make_model(
    width_scale: float, layers: int, tower_layers: int, seed: int, dtype: torch.dtype = torch.float32
) -> LlavaForConditionalGeneration:
    """A CLIP-L/336 tower and a Llama of 4,096 channels, all widths scaled, with random weights.

    Raises:
        ValueError: If a scaled width is no multiple of a head's width.
    """
    (tower, tower_mlp, tower_head), (text, text_mlp, text_head) = _TOWER, _TEXT
    tower, tower_mlp, text, text_mlp = (int(width * width_scale) for width in (tower, tower_mlp, text, text_mlp))
    if not text or text % text_head or tower % tower_head:
        raise ValueError(f"--width-scale {width_scale} gives widths {tower} and {text}; take 1, 0.5, 0.25 or 0.0625")
    vision = CLIPVisionConfig(
        hidden_size=tower,
        intermediate_size=tower_mlp,
        num_hidden_layers=tower_layers,
        num_attention_heads=tower // tower_head,
        image_size=SIDE_PX,
        patch_size=PATCH_PX,
    )
    language = LlamaConfig(
        vocab_size=max(64, int(_VOCABULARY * width_scale)),
        hidden_size=text,
        intermediate_size=text_mlp,
        num_hidden_layers=layers,
        num_attention_heads=text // text_head,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=None,
    )
    torch.manual_seed(seed)
    config = LlavaConfig(vision_config=vision, text_config=language, image_token_index=_IMAGE, tie_word_embeddings=True)
    # As loaded: frozen weights have PyTorch copy the vocabulary's for each row of a batch, stock's and ours.
    model: LlavaForConditionalGeneration = LlavaForConditionalGeneration._from_config(config, dtype=dtype)
    return model.eval()


def _inputs(batch: int = 1) -> dict[str, Tensor]:
    """Prompts as long as LLaVA-1.5's with a short question, each with another image."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, 64, (batch, _TEXT_BEFORE + NUM_IMAGE_TOKENS + _TEXT_AFTER), generator=generator)
    ids[:, _TEXT_BEFORE : _TEXT_BEFORE + NUM_IMAGE_TOKENS] = _IMAGE
    pixels = torch.randn(batch, 3, SIDE_PX, SIDE_PX, generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def _running(model: LlavaForConditionalGeneration, setting: Setting, phase: str, new_tokens: int) -> Callable[[], Any]:
    """One phase under a setting, which is applied anew each time; gives the cache, where there is one."""
    inputs, steps = _inputs(), new_tokens if phase == "generate" else 1

    def encode() -> Any:
        with torch.inference_mode(), setting.applied(model):
            return model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True)

    def read() -> Any:
        with torch.inference_mode(), setting.applied(model):
            done = model.generate(
                **inputs,
                max_new_tokens=steps,
                min_new_tokens=steps,
                do_sample=False,
                return_dict_in_generate=True,
            )
        return cache_in(done)

    return encode if phase == "tower" else read


def _counted(model: LlavaForConditionalGeneration, setting: Setting, new_tokens: int) -> dict[str, int]:
    """Operations of every phase, and bytes of the cache right after the prompt."""
    counts = {}
    for phase in PHASES:
        cache, counts[phase] = counted(_running(model, setting, phase, new_tokens))
        if phase == "prefill":
            counts["kv_bytes"] = num_bytes(cache)
    return counts


def _count_operators(options: argparse.Namespace) -> None:
    """Records the operators of one call, stock and the settings of the smallest budget unless others are selected."""
    settings = selected(catalogue(_WHOLE["tower_layers"]), options.settings or [f"*-{KEPT[-1]}"])
    missing = [s for s in settings if not _is_finished(options, s, _WHOLE, OPERATORS)]
    model = make_model(_WHOLE["scale"], _WHOLE["layers"], _WHOLE["tower_layers"], options.seed)
    stock = _operators(model, Stock()) if missing else {}
    for setting in tqdm(missing, desc="counting"):
        counts = _operators(model, setting) | {f"stock_{name}": number for name, number in stock.items()}
        record = records.BenchRecord(
            bench=BENCH,
            setting=setting.name,
            family=setting.family,
            params=_WHOLE | setting.params() | {"phase": OPERATORS},
            counts=counts,
            seed=options.seed,
        )
        records.append(options.records, record)


def _operators(model: LlavaForConditionalGeneration, setting: Setting) -> dict[str, int]:
    """Operators of one call by batch, once a call has made what the setting keeps between calls of that shape."""
    with torch.inference_mode(), setting.applied(model):
        counts = {}
        for batch in BATCHES:
            given = _inputs(batch)
            model(**given)
            counts[f"operators_{batch}"] = operators(lambda given=given: model(**given))  # type: ignore[misc]
    return counts


def num_bytes(cache: DynamicCache) -> int:
    """Bytes of all keys and values."""
    return sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))


def _is_finished(options: argparse.Namespace, setting: Setting, params: dict[str, Any], phase: str) -> bool:
    own = params | setting.params() | {"phase": phase}
    return records.is_finished(options.records, BENCH, setting.name, own, options.seed)


def _record(
    setting: Setting, params: dict[str, Any], timings: dict[str, list[Timing]], counts: dict[str, int], seed: int
) -> records.BenchRecord:
    own, stock = timings[setting.name], timings["stock"]
    return records.BenchRecord(
        bench=BENCH,
        setting=setting.name,
        family=setting.family,
        params=params,
        cpu_s=[t.cpu_s for t in own],
        baseline_cpu_s=[t.cpu_s for t in stock],
        wall_s=[t.wall_s for t in own],
        baseline_wall_s=[t.wall_s for t in stock],
        counts=counts,
        seed=seed,
    )
