"""The settings of a pipeline: the YAML files that hold them and `key=value` overrides."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from gen_turbo.schemas import CALL_SETTINGS as CALL_SETTINGS
from gen_turbo.schemas import CaptionConfig as CaptionConfig
from gen_turbo.schemas import CaptionGenerateConfig as CaptionGenerateConfig
from gen_turbo.schemas import ConfigError as ConfigError
from gen_turbo.schemas import PipelineConfig as PipelineConfig
from gen_turbo.schemas import Settings as Settings
from gen_turbo.schemas import schema_of

T = TypeVar("T")
S = TypeVar("S", PipelineConfig, CaptionConfig, CaptionGenerateConfig)

_YAML_SUFFIXES = (".yaml", ".yml")
_OVERRIDE = re.compile(r"[A-Za-z_][\w.]*=.*", re.DOTALL)
HALVES = ("caption", "picture")
"""The parts of a configuration of picture to caption to new picture that are configurations of their own."""


def load_config(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Settings:
    """Reads the settings of a pipeline; what stands under `pipeline` says of which kind they are.

    Args:
        name_or_path: A file of configs/pipeline without its suffix, such as `tiny`, or the path of any YAML file.
        overrides: `key=value` texts that are applied in order, such as `steps=10`, `processor=tome` or
            `processor.ratio=0.3`; `caption.processor.ratio=0.3` for one half of two. Values are YAML.

    Raises:
        ConfigError: If the file is missing or no YAML, or a key or value does not fit.
    """
    tree = read_yaml("pipeline", name_or_path)
    _expand(tree)
    for text in overrides:
        _override(tree, text)
    return typed(schema_of(tree), tree, f"pipeline configuration {name_or_path}")


def load_config_of(schema: type[S], command: str, name_or_path: str | Path, overrides: Sequence[str] = ()) -> S:
    """Reads the settings of a pipeline that must be of one kind.

    Args:
        schema: The kind.
        command: What wants it, for the message.
        name_or_path: As for `load_config`.
        overrides: As for `load_config`.

    Raises:
        ConfigError: If the settings are of another kind, or for any reason that `load_config` has.
    """
    config = load_config(name_or_path, overrides)
    if not isinstance(config, schema):
        kind = config.pipeline
        raise ConfigError(f"{command} cannot use the configuration {name_or_path}, which is of the kind {kind!r}")
    return config


def processor_tree(processor: object) -> object:
    """The settings behind the path of a YAML file or a method's name; a mapping and None stay as they are."""
    if not isinstance(processor, str):
        return processor
    is_file = processor in config_files("method") or Path(processor).suffix in _YAML_SUFFIXES
    return read_yaml("method", processor) if is_file else {"method": processor}


def typed(schema: type[T], tree: Mapping[str, Any], what: str) -> T:
    """Makes an object of a dataclass from settings.

    Args:
        schema: The dataclass: its fields are the known keys and their types.
        tree: Values by key; what is left out keeps the dataclass's default.
        what: What the settings are of, for messages.

    Raises:
        ConfigError: If a key is unknown, or a value is missing or does not fit.
    """
    names = [field.name for field in fields(cast(Any, schema))]
    unknown = [str(key) for key in tree if key not in names]
    if unknown:
        raise ConfigError(f"{what} has no setting {', '.join(map(repr, unknown))}; known: {', '.join(names)}")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema), dict(tree))
        missing = sorted(OmegaConf.missing_keys(merged))
        if missing:
            raise ConfigError(f"{what} lacks {', '.join(missing)}; add it to the file or on the command line")
        return cast(T, OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{what}: {_sentence(error)}") from error
    except ConfigError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{what}: {error}") from error


def config_files(kind: str) -> dict[str, Path]:
    """The YAML files inside the package by name.

    Args:
        kind: "pipeline" or "method".
    """
    folder = Path(str(resources.files("gen_turbo.configs"))) / kind
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def describe(path: Path) -> str:
    """The comment on the first line of a YAML file, empty if there is none."""
    with path.open(encoding="utf-8") as file:
        first = file.readline().strip()
    return first.removeprefix("#").strip() if first.startswith("#") else ""


def read_yaml(kind: str, name_or_path: str | Path) -> dict[str, Any]:
    """Reads the mapping in a YAML file, named by its stem inside the package or by a path.

    Raises:
        ConfigError: If there is no such file, or it does not hold a mapping.
    """
    path = _find(kind, str(name_or_path))
    try:
        loaded = OmegaConf.load(path)
        if not isinstance(loaded, DictConfig):
            raise ConfigError(f"{path} must hold keys and values, such as 'steps: 25'")
        tree = OmegaConf.to_container(loaded, resolve=True)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {error}") from error
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"{path} is not valid YAML: {_sentence(error)}") from error
    assert isinstance(tree, dict)
    return {str(key): value for key, value in tree.items()}


def _find(kind: str, name_or_path: str) -> Path:
    known = config_files(kind)
    if name_or_path in known:
        return known[name_or_path]
    path = Path(name_or_path).expanduser()
    if path.suffix in _YAML_SUFFIXES:
        if path.is_file():
            return path
        raise ConfigError(f"there is no file {name_or_path}")
    raise ConfigError(
        f"unknown {kind} configuration {name_or_path!r}; known: {', '.join(known)}, or give the path of a .yaml file"
    )


def _expand(tree: dict[str, Any]) -> None:
    """Puts in place of names what they stand for: processors, and whole files for the halves of a combined pipeline."""
    if schema_of(tree) is not CaptionGenerateConfig:
        tree["processor"] = processor_tree(tree.get("processor"))
        return
    for half in HALVES:
        if isinstance(tree.get(half), str):
            tree[half] = read_yaml("pipeline", tree[half])
        if isinstance(tree.get(half), dict):
            tree[half]["processor"] = processor_tree(tree[half].get("processor"))


def _override(tree: dict[str, Any], text: str) -> None:
    """Applies one `key=value` to nested settings in place."""
    if not _OVERRIDE.fullmatch(text):
        raise ConfigError(f"expected key=value, such as processor.ratio=0.3; got {text!r}")
    key, _, value_text = text.partition("=")
    try:
        value = OmegaConf.to_container(OmegaConf.create({"value": yaml.safe_load(value_text)}), resolve=True)
    except (yaml.YAMLError, OmegaConfBaseException) as error:
        raise ConfigError(f"cannot read the value in {text!r}: {_sentence(error)}") from error
    assert isinstance(value, dict)
    *parents, last = key.split(".")
    node: Any = tree
    for parent in parents:
        node = node.setdefault(parent, {}) if isinstance(node, dict) else node
        if not isinstance(node, dict):
            raise ConfigError(f"cannot set {key}: {parent} is {node!r}, which has no settings; set {parent} first")
    names: dict[Any, Any] = {str(name): name for name in node}
    node[names.get(last, int(last) if last.isdigit() else last)] = value["value"]
    if last == "processor":
        node["processor"] = processor_tree(node["processor"])
    elif key in HALVES:
        _expand(tree)


def _sentence(error: Exception) -> str:
    """The first line of a message that OmegaConf or YAML spreads over several, with the key that it is about."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    key = next((line.partition(":")[2].strip() for line in lines if line.startswith("full_key:")), "")
    return f"{key}: {lines[0]}" if key and lines else " ".join(lines[:1]) or type(error).__name__
