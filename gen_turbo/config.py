"""The settings of a pipeline: their schema, the YAML files that hold them and `key=value` overrides."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar, cast

import yaml
from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

T = TypeVar("T")

DTYPES = ("auto", "float32", "float16", "bfloat16")
SIZE_MULTIPLE = 8
_YAML_SUFFIXES = (".yaml", ".yml")
_DEVICE = re.compile(r"auto|cpu|mps|cuda(:\d+)?")
_OVERRIDE = re.compile(r"[A-Za-z_][\w.]*=.*", re.DOTALL)


class ConfigError(ValueError):
    """A setting, file or machine does not allow what was asked; the message is one sentence for the user."""


@dataclass
class PipelineConfig:
    """Everything that a YAML file under configs/pipeline says.

    Attributes:
        checkpoint: `embedded:NAME` for a model inside the package, a folder in diffusers' layout (relative to the
            current folder), or a repository on the hub, such as `owner/name`.
        pipeline: Name of the builder that makes a pipeline of the checkpoint.
        dtype: auto, float32, float16 or bfloat16; auto is float16 on cuda and float32 elsewhere.
        device: auto, cpu, mps, cuda or cuda:N; auto takes cuda, then mps, then cpu.
        variant: Which files of the checkpoint to take, such as fp16; None takes those without a variant.
        local_files_only: Whether the hub may be asked for nothing, so that only what was fetched before is used.
        processor: Settings of a method with its name under `method`, a method's name, the path of a YAML file, or None
            for the stock pipeline.
        steps: Denoising steps of a run.
        guidance_scale: Scale of classifier-free guidance; raising it follows the prompt more closely.
        height: Height of the pictures in pixels; None leaves it to the pipeline.
        width: Width of the pictures in pixels; None leaves it to the pipeline.
    """

    checkpoint: str = MISSING
    pipeline: str = "text-to-image"
    dtype: str = "auto"
    device: str = "auto"
    variant: str | None = None
    local_files_only: bool = False
    processor: Any = None
    steps: int = 25
    guidance_scale: float = 7.5
    height: int | None = None
    width: int | None = None

    def __post_init__(self) -> None:
        """Checks every setting; raises ConfigError naming it, its value and what it may be."""
        if self.dtype not in DTYPES:
            raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}; got {self.dtype!r}")
        if not _DEVICE.fullmatch(self.device):
            raise ConfigError(f"device must be auto, cpu, mps, cuda or cuda:N; got {self.device!r}")
        if self.steps < 1:
            raise ConfigError(f"steps must be at least 1; got {self.steps}")
        if not 0 <= self.guidance_scale < float("inf"):
            raise ConfigError(f"guidance_scale must be a number that is not negative; got {self.guidance_scale}")
        for name in ("height", "width"):
            size_px = getattr(self, name)
            if size_px is not None and (size_px < SIZE_MULTIPLE or size_px % SIZE_MULTIPLE):
                raise ConfigError(f"{name} must be a positive multiple of {SIZE_MULTIPLE} pixels; got {size_px}")


CALL_SETTINGS = {
    "steps": "num_inference_steps",
    "guidance_scale": "guidance_scale",
    "height": "height",
    "width": "width",
}
"""Settings of one run rather than of the pipeline, and what diffusers calls them."""


def load_config(name_or_path: str | Path, overrides: Sequence[str] = ()) -> PipelineConfig:
    """Reads the settings of a pipeline.

    Args:
        name_or_path: A file of configs/pipeline without its suffix, such as `tiny`, or the path of any YAML file.
        overrides: `key=value` texts that are applied in order, such as `steps=10`, `processor=tome` or
            `processor.ratio=0.3`. Values are YAML.

    Raises:
        ConfigError: If the file is missing or no YAML, or a key or value does not fit.
    """
    tree = read_yaml("pipeline", name_or_path)
    tree["processor"] = processor_tree(tree.get("processor"))
    for text in overrides:
        _override(tree, text)
    return typed(PipelineConfig, tree, f"pipeline configuration {name_or_path}")


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
    if key == "processor":
        tree["processor"] = processor_tree(tree["processor"])


def _sentence(error: Exception) -> str:
    """The first line of a message that OmegaConf or YAML spreads over several, with the key that it is about."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    key = next((line.partition(":")[2].strip() for line in lines if line.startswith("full_key:")), "")
    return f"{key}: {lines[0]}" if key and lines else " ".join(lines[:1]) or type(error).__name__
