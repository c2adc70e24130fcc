"""Where learned artefacts lie: inside the package or anywhere else."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

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
