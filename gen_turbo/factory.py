"""The one place where settings become objects: processors and pipelines."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from dataclasses import fields
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from gen_turbo.config import (
    CALL_SETTINGS,
    HALVES,
    CaptionGenerateConfig,
    ConfigError,
    PipelineConfig,
    Settings,
    config_files,
    describe,
    load_config,
    processor_tree,
    typed,
)
from gen_turbo.registry import METHODS, PIPELINES

_PLUGINS = "gen_turbo.plugins"


def load_pipeline(name_or_yaml: str | Path, **overrides: Any) -> Any:
    """Loads a pipeline, with the processor that its configuration names already attached.

    Args:
        name_or_yaml: A configuration inside the package, such as `"tiny"`, or the path of a YAML file.
        **overrides: Settings that replace those of the file. `processor` may be None for the stock pipeline, a
            processor object, a method's name or a mapping with `method` and its settings; for a pipeline of two
            halves it goes to both, and `caption` and `generate` are mappings of the settings of one.

    Returns:
        A stock diffusers pipeline, or for a configuration of another kind what its builder makes. Steps, size and
        guidance are given to the call of a diffusers pipeline, as always.

    Raises:
        ValueError: If a setting, file, checkpoint or device is not there or does not fit.
    """
    config, processor = _overridden(load_config(name_or_yaml), overrides, f"pipeline configuration {name_or_yaml}")
    return build_pipeline(config, processor)


def build_pipeline(config: Settings, processor: Any | None = None) -> Any:
    """Builds the pipeline of a configuration and attaches a processor, if one is given.

    Args:
        config: The settings; their `processor` is not looked at.
        processor: What `pipe.set_attn_processor` takes; for a pipeline of two halves one of each by name.

    Raises:
        ValueError: If the builder is unknown, the checkpoint or device is not there, or the processor does not fit.
    """
    for plugin in entry_points(group=_PLUGINS):
        plugin.load()
    pipe = _entry(PIPELINES, config.pipeline)(config)
    if processor is not None:
        pipe.set_attn_processor(processor)
    return pipe


def processors_of(config: Settings) -> Any:
    """Makes what a configuration has under `processor`: one processor or None, or for two halves one of each by name.

    Raises:
        ValueError: If a method or a field is unknown, or a value does not fit.
    """
    if isinstance(config, CaptionGenerateConfig):
        return {half: build_processor(getattr(config, half).processor) for half in HALVES}
    return build_processor(config.processor)


def quiet_loading() -> None:
    """Turns off the progress bars of loading where nobody looks at them."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    if not sys.stderr.isatty():
        diffusers_logging.disable_progress_bar()
        transformers_logging.disable_progress_bar()


def _overridden(config: Settings, overrides: dict[str, Any], what: str) -> tuple[Settings, Any]:
    """Replaces settings by what a caller of `load_pipeline` gave, and makes the processors."""
    tree = {field.name: getattr(config, field.name) for field in fields(config)}
    if isinstance(config, CaptionGenerateConfig):
        return _overridden_halves(config, tree, overrides, what)
    if isinstance(config, PipelineConfig):
        _refuse_call_settings(overrides)
    processor = build_processor(overrides.pop("processor", config.processor))
    return typed(type(config), {**tree, "processor": None, **overrides}, what), processor


def _overridden_halves(
    config: CaptionGenerateConfig, tree: dict[str, Any], overrides: dict[str, Any], what: str
) -> tuple[Settings, Any]:
    both = {"processor": overrides.pop("processor")} if "processor" in overrides else {}
    halves: dict[str, Any] = {}
    processors: dict[str, Any] = {}
    for half in HALVES:
        given = overrides.pop(half, {})
        if not isinstance(given, Mapping):
            raise ConfigError(f"{half} must be a mapping of settings, such as {{'processor': None}}; got {given!r}")
        halves[half], processors[half] = _overridden(tree.pop(half), {**both, **given}, f"{what}, {half}")
    return typed(type(config), {**tree, **overrides, **halves}, what), processors


def _refuse_call_settings(overrides: Mapping[str, Any]) -> None:
    in_vain = sorted(set(overrides) & set(CALL_SETTINGS))
    if in_vain:
        call = ", ".join(f"{CALL_SETTINGS[name]}=..." for name in in_vain)
        raise ConfigError(f"{', '.join(in_vain)} would have no effect on loading; call the pipeline with {call}")


def build_processor(settings: Any) -> Any | None:
    """Makes a processor from settings.

    Args:
        settings: A mapping with `method` and any of the method's fields, the name or path of a method's YAML, None,
            or a processor, which is returned as it is.

    Raises:
        ValueError: If the method or a field is unknown, or a value does not fit.
    """
    from gen_turbo.method import TokenReducer

    if settings is None or isinstance(settings, TokenReducer):
        return settings
    import_module("gen_turbo.methods")
    tree = processor_tree(settings)
    if not isinstance(tree, Mapping):
        raise ConfigError(f"processor must be a method's name, a mapping with 'method', or null; got {settings!r}")
    if not isinstance(tree.get("method"), str):
        raise ConfigError(f"processor lacks a method; add processor.method, one of {', '.join(METHODS.names())}")
    method = tree["method"]
    values = {key: value for key, value in tree.items() if key != "method"}
    return typed(_entry(METHODS, method), values, f"method {method!r}")


def list_methods() -> dict[str, str]:
    """The first sentence about each method, by name."""
    import_module("gen_turbo.methods")
    return {name: (inspect.getdoc(METHODS[name]) or "").split("\n")[0] for name in METHODS.names()}


def list_pipelines() -> dict[str, str]:
    """The first comment of each pipeline configuration inside the package, by name."""
    return {name: describe(path) for name, path in config_files("pipeline").items()}


def _entry(registry: Any, name: str) -> Any:
    try:
        return registry[name]
    except KeyError as error:
        raise ConfigError(str(error.args[0])) from None
