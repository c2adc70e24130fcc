"""Where learned artefacts lie: inside the package or anywhere else."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from gen_turbo.output import write_file
from gen_turbo.schemas import reason

EMBEDDED = "embedded:"
MOST = 2**20
"""Nothing that is noted of a learned file is larger."""
_FLOATS, _WHOLES = ("F32", "F16", "BF16"), ("I64",)
ODD_NOTES = (KeyError, TypeError, AttributeError, RecursionError, OverflowError)
"""What reading notes of another form raises beside ValueError."""
T = TypeVar("T")
Notes = Mapping[str, str]
Size = tuple[int, ...]
Sizes = Callable[[Notes, Mapping[str, Size]], Mapping[str, Size]]
"""Gives the sizes that the tensors of a file must have from its notes and from those that it declares."""


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


def read_artefact(
    path: str | Path, form: str, what: str, remedy: str, sizes: Sizes, whole: str = "\0"
) -> tuple[Notes, dict[str, Tensor]]:
    """The notes and the tensors of an artefact, which are looked at before any of them is loaded.

    Args:
        path: A safetensors file.
        form: What its note `format` must say.
        what: What it should hold, for the error, such as `router`.
        remedy: Where it comes from, for the error.
        sizes: What its tensors must be, by its notes and by the sizes that the file declares.
        whole: How the names of tensors begin that hold whole numbers; others hold floating ones.

    Returns:
        The notes, and tensors of exactly these names and sizes, finite and in float32 or int64.

    Raises:
        ValueError: If there is no such file or it holds something else.
    """
    try:
        with safe_open(path, framework="pt") as file:
            notes: Notes = file.metadata() or {}
            is_one = notes.get("format") == form
            tensors = _loaded(file, notes, sizes, whole) if is_one else {}
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot read the {what} {path}: {error}") from error
    except (ValueError, *ODD_NOTES) as error:
        raise ValueError(f"{path} does not fit: {reason_of(error)}; {remedy}") from error
    if not is_one:
        raise ValueError(f"{path} holds no {what}; {remedy}")
    return notes, tensors


def _loaded(file: Any, notes: Notes, sizes: Sizes, whole: str) -> dict[str, Tensor]:
    slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
    found = {name: tuple(one.get_shape()) for name, one in slices.items()}
    needed = sizes(notes, found)
    lacking, foreign = sorted(set(needed) - set(found)), sorted(set(found) - set(needed))
    if lacking or foreign:
        raise ValueError(f"it lacks {lacking[0]}" if lacking else f"nothing takes its {foreign[0]}")
    for name, size in needed.items():
        if found[name] != size:
            raise ValueError(f"{name} has the size {found[name]}, not {size}")
        if slices[name].get_dtype() not in (_WHOLES if name.startswith(whole) else _FLOATS):
            raise ValueError(f"{name} is of the type {slices[name].get_dtype()}, which is not taken")
    tensors = {name: file.get_tensor(name) for name in found}
    tensors = {name: value.float() if value.is_floating_point() else value for name, value in tensors.items()}
    broken = sorted(name for name, value in tensors.items() if not value.isfinite().all())
    if broken:
        raise ValueError(f"{broken[0]} is not finite")
    return tensors


def reason_of(error: Exception) -> str:
    """Why what a file says does not fit, in words."""
    return f"it lacks {error}" if isinstance(error, KeyError) else reason(error)[:200]


def from_note(kind: type[T], value: Any) -> T:
    """Makes a dataclass of numbers and texts from what JSON gave.

    Raises:
        ValueError: If a value is of another type, not finite, or larger than anything of this kind.
    """
    hints = get_type_hints(kind)
    if not isinstance(value, dict) or not set(value) <= set(hints):
        raise ValueError(f"{kind.__name__} cannot be made from {str(value)[:80]}")
    for name, one in value.items():
        check_value(name, one, hints[name])
    return kind(**value)


def check_value(name: str, value: Any, hint: Any) -> None:
    """Refuses what is not of a type, not finite, or larger than anything of this kind; raises ValueError."""
    kinds = get_args(hint) or (hint,)
    wanted = (*kinds, int) if float in kinds else kinds
    is_small = not isinstance(value, int | float) or (math.isfinite(value) and abs(value) <= MOST)
    if isinstance(value, bool) or not isinstance(value, wanted) or not is_small:
        raise ValueError(f"{name} is {str(value)[:80]}")


def check_keys(tree: Any, keys: Sequence[str], more: Sequence[str] = ()) -> None:
    """Refuses what lacks a key, or has one that nobody reads; raises ValueError."""
    missing = [key for key in keys if not isinstance(tree, dict) or key not in tree]
    unread = [] if missing else [str(key)[:80] for key in tree if key not in (*keys, *more)]
    if missing or unread:
        raise ValueError(f"it lacks {', '.join(missing)}" if missing else f"nothing reads {', '.join(unread)}")


def save_artefact(path: str | Path, tensors: Mapping[str, Tensor], notes: Mapping[str, str]) -> None:
    """Writes a safetensors file, whole or not at all; folders are made."""
    content = save({name: value.contiguous() for name, value in tensors.items()}, dict(notes))
    write_file(Path(path), content)
