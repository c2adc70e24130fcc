"""Where learned artefacts lie: inside the package or anywhere else."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

EMBEDDED = "embedded:"


def artefact_path(name_or_path: str) -> Path:
    """The file of an artefact: a path, or `embedded:NAME` for one inside the package, such as `embedded:a/b`.

    Raises:
        ValueError: If there is no such file; the message lists what is inside the package.
    """
    if not name_or_path.startswith(EMBEDDED):
        path = Path(name_or_path).expanduser()
        if not path.is_file():
            raise ValueError(f"there is no file {name_or_path}; give a .safetensors file or {EMBEDDED}NAME")
        return path
    name = name_or_path.removeprefix(EMBEDDED)
    folder = artefact_folder()
    known = sorted(str(path.relative_to(folder).with_suffix("")) for path in folder.glob("*/*.safetensors"))
    if name not in known:
        raise ValueError(f"there is no artefact {name!r} inside this package; known: {', '.join(known) or 'none'}")
    return folder / f"{name}.safetensors"


def artefact_folder() -> Path:
    """The folder of artefacts inside the installed package."""
    spec = find_spec("gen_turbo.pipelines")
    assert spec is not None and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0]) / "weights" / "learned"


def read_artefact(path: str | Path, form: str, what: str, remedy: str) -> tuple[Mapping[str, str], dict[str, Tensor]]:
    """The notes and the tensors of an artefact.

    Args:
        path: A safetensors file.
        form: What its note `format` must say.
        what: What it should hold, for the error.
        remedy: Where it comes from, for the error.

    Raises:
        ValueError: If there is no such file or it holds something else.
    """
    try:
        with safe_open(path, framework="pt") as file:
            notes: Mapping[str, str] = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot read the {what} {path}: {error}") from error
    if notes.get("format") != form:
        raise ValueError(f"{path} holds no {what}; {remedy}")
    return notes, tensors
