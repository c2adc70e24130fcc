"""The settings of a pipeline: the YAML files that hold them and `key=value` overrides."""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar, cast, get_type_hints

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from gen_turbo.schemas import CALL_SETTINGS as CALL_SETTINGS
from gen_turbo.schemas import CaptionConfig as CaptionConfig
from gen_turbo.schemas import CaptionGenerateConfig as CaptionGenerateConfig
from gen_turbo.schemas import ConfigError as ConfigError
from gen_turbo.schemas import PipelineConfig as PipelineConfig
from gen_turbo.schemas import Settings as Settings
from gen_turbo.schemas import reason, schema_of

T = TypeVar("T")
S = TypeVar("S", PipelineConfig, CaptionConfig, CaptionGenerateConfig)

_YAML_SUFFIXES = (".yaml", ".yml")
_OVERRIDE = re.compile(r"[A-Za-z_][\w.]*=.*", re.DOTALL)
_FLOAT = re.compile(r"[-+]?([0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)[eE][-+]?[0-9]+")
"""Numbers such as 1e-3, which YAML 1.1 takes for texts."""
Override = str | tuple[str, Any]
"""`key=value`, where the value is YAML; or a key and a value, which is taken exactly as it is."""
HALVES = ("caption", "generate")
"""The parts of a configuration of image to caption to new image that are configurations of their own."""


def load_config(name_or_path: str | Path, overrides: Sequence[Override] = ()) -> Settings:
    """Reads the settings of a pipeline; what stands under `pipeline` says of which kind they are.

    Texts mean what they say: nothing like `${name}` is filled in, so no file can read the environment.

    Args:
        name_or_path: A file of configs/pipeline without its suffix, such as `tiny`, or the path of any YAML file.
        overrides: Applied in order: `key=value` texts such as `steps=10`, `processor=tome` or `processor.ratio=0.3`,
            `caption.processor.ratio=0.3` for one half of two, whose values are YAML; or pairs of a key and a value.

    Raises:
        ConfigError: If the file is missing or no YAML, or a key or value does not fit.
    """
    tree = _tree(name_or_path, overrides)
    return typed(schema_of(tree), tree, f"pipeline configuration {name_or_path}")


def load_config_of(schema: type[S], command: str, name_or_path: str | Path, overrides: Sequence[Override] = ()) -> S:
    """Reads the settings of a pipeline that must be of one kind.

    Args:
        schema: The kind.
        command: What wants it, for the message.
        name_or_path: As for `load_config`.
        overrides: As for `load_config`.

    Raises:
        ConfigError: If the settings are of another kind, or for any reason that `load_config` has.
    """
    tree = _tree(name_or_path, overrides)
    # Before the settings are checked: those of the command are none of another kind's.
    if schema_of(tree) is not schema:
        kind = tree.get("pipeline")
        raise ConfigError(f"{command} cannot use the configuration {name_or_path}, which is of the kind {kind!r}")
    return typed(schema, tree, f"pipeline configuration {name_or_path}")


def _tree(name_or_path: str | Path, overrides: Sequence[Override]) -> dict[str, Any]:
    """The settings of a YAML file with the overrides in place, unchecked."""
    tree = read_yaml("pipeline", name_or_path)
    _expand(tree)
    for override in overrides:
        _set(tree, *(_parsed(override) if isinstance(override, str) else override))
    return tree


def processor_tree(processor: object) -> object:
    """The settings behind the path of a YAML file, a method's name or a `preset`; None stays as it is."""
    if isinstance(processor, dict) and "preset" in processor:
        rest = {key: value for key, value in processor.items() if key != "preset"}
        return read_yaml("preset", str(processor["preset"])) | rest
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
    hints = get_type_hints(schema)
    names = [field.name for field in fields(cast(Any, schema))]
    unknown = [str(key) for key in tree if key not in names]
    if unknown:
        halves = [half for half in HALVES if half in names]
        inside = [f"{half}.{key}" for key in unknown for half in halves if key in get_type_hints(hints[half])]
        known = f"write {' or '.join(inside)}" if inside else f"known: {', '.join(names)}"
        raise ConfigError(f"{what} has no setting {', '.join(map(repr, unknown))}; {known}")
    given = _exact(tree, hints, what)
    rest = {name: value for name, value in tree.items() if name not in given}
    needed = OmegaConf.missing_keys(OmegaConf.structured(schema))
    missing = sorted(name for name in needed if name.partition(".")[0] not in tree)
    if missing:
        raise ConfigError(f"{what} lacks {', '.join(missing)}; add it to the file or on the command line")
    try:
        for name, value in rest.items():
            _refuse_references(name, value)
        converted = OmegaConf.to_container(OmegaConf.merge(OmegaConf.structured(schema), rest))
        return schema(**given, **{name: cast(Any, converted)[name] for name in rest})
    except OmegaConfBaseException as error:
        raise ConfigError(f"{what}: {_sentence(error)}") from error
    except ConfigError:
        raise
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{what}: {error}") from error


def _exact(tree: Mapping[str, Any], hints: Mapping[str, Any], what: str) -> dict[str, Any]:
    """The settings whose values are taken as they are: texts, other dataclasses, and what may be anything."""
    given: dict[str, Any] = {}
    for name, value in tree.items():
        if is_dataclass(hints[name]) and isinstance(value, Mapping):
            given[name] = typed(cast(type[Any], hints[name]), value, f"{what}, {name}")
        elif hints[name] in (str, str | None):
            given[name] = _text(name, value, what, is_needed=hints[name] is str)
        elif hints[name] is Any or (is_dataclass(hints[name]) and isinstance(value, cast(type, hints[name]))):
            given[name] = value
    return given


def config_files(kind: str) -> dict[str, Path]:
    """The YAML files inside the package by name.

    Args:
        kind: "pipeline", "method" or "preset".
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
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {path}: {reason(error)}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid YAML: {_sentence(error)}") from error
    if not isinstance(tree, dict | None):
        raise ConfigError(f"{path} must hold keys and values, such as 'steps: 25'")
    return {str(key): value for key, value in (tree or {}).items()}


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """YAML in which 1e-3 is a number, and a key that stands twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Makes a mapping; raises where a key stands twice."""
        seen: set[Hashable] = set()
        for key in (self.construct_object(name, deep=True) for name, _ in node.value):
            if isinstance(key, Hashable) and key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"found duplicate key {key}", node.start_mark)
            seen |= {key} if isinstance(key, Hashable) else set()
        made: dict[Hashable, Any] = super().construct_mapping(node, deep)
        return made


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", _FLOAT, list("-+.0123456789"))


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


def _parsed(text: str) -> tuple[str, Any]:
    """The key and the value of a `key=value`."""
    if not _OVERRIDE.fullmatch(text):
        raise ConfigError(f"expected key=value, such as processor.ratio=0.3; got {text!r}")
    key, _, value_text = text.partition("=")
    try:
        return key, yaml.load(value_text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"cannot read the value in {text!r:.200}: {_sentence(error)}") from error


def _set(tree: dict[str, Any], key: str, value: Any) -> None:
    """Puts a value into nested settings in place."""
    *parents, last = key.split(".")
    node: Any = tree
    for parent in parents:
        node = node.setdefault(parent, {}) if isinstance(node, dict) else node
        if not isinstance(node, dict):
            raise ConfigError(f"cannot set {key}: {parent} is {node!r}, which has no settings; set {parent} first")
    names: dict[Any, Any] = {str(name): name for name in node}
    node[names.get(last, int(last) if last.isdecimal() else last)] = value
    if last == "preset" and parents and parents[-1] == "processor":
        # It stands in place of all settings that were there before it.
        whole = read_yaml("preset", str(value))
        node.clear()
        node.update(whole)
    elif last == "processor":
        node["processor"] = processor_tree(node["processor"])
    elif key in HALVES:
        _expand(tree)


def _text(name: str, value: Any, what: str, is_needed: bool) -> str | None:
    """A text exactly as it was given; what YAML reads as something else would come back changed, so it is refused."""
    if isinstance(value, str) or (value is None and not is_needed):
        return value
    raise ConfigError(f"{what}: {name} must be a text; YAML reads this one as {value!r}, write it in quotes")


def _refuse_references(name: str, value: Any) -> None:
    """Refuses what the library that converts numbers would fill in; raises ConfigError."""
    if isinstance(value, Mapping | list | tuple):
        for one in value.values() if isinstance(value, Mapping) else value:
            _refuse_references(name, one)
    elif isinstance(value, str) and ("${" in value or value == "???"):
        raise ConfigError(f"{name}: nothing is filled in for {value!r}; write what is meant")


def _sentence(error: Exception) -> str:
    """The first line of a message that OmegaConf or YAML spreads over several, with the key that it is about."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    key = next((line.partition(":")[2].strip() for line in lines if line.startswith("full_key:")), "")
    return f"{key}: {lines[0]}" if key and lines else " ".join(lines[:1]) or type(error).__name__
