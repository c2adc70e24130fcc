"""A state of a training in forms that a full disk, a failing one or another program leave behind."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file


def damaged(path: Path, weight: str) -> Iterator[str]:
    """Puts each form in the file's place in turn, and gives its name; at the end the file is whole again."""
    # Copies: what is read stays in the file, which is about to be cut.
    whole, tensors = path.read_bytes(), {name: value.clone() for name, value in load_file(path).items()}
    with safe_open(path, "pt") as file:
        notes = file.metadata()
    for name, content in {"empty": b"", "cut": whole[:-10], "text": b"hello", "header alone": whole[:9]}.items():
        path.write_bytes(content)
        yield name
    without = {name: value for name, value in tensors.items() if name != weight}
    forms = {
        "not finite": ({**tensors, weight: tensors[weight] * float("nan")}, notes),
        "another size": ({**tensors, weight: tensors[weight].flatten()[:1]}, notes),
        "a tensor less": (without, notes),
        "a tensor more": ({**tensors, "zzz": torch.zeros(1)}, notes),
        "whole numbers": ({**tensors, weight: tensors[weight].long()}, notes),
        "no notes": (tensors, None),
        "no step": (tensors, {name: text for name, text in notes.items() if name != "step"}),
        "no number": (tensors, {**notes, "step": "x"}),
        "a step beyond": (tensors, {**notes, "step": "999999"}),
    }
    for name, (changed, said) in forms.items():
        save_file(changed, path, said)
        yield name
    path.write_bytes(whole)
