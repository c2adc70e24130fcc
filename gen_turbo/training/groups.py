"""Which units of a denoiser calibration treats as one."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from gen_turbo.models.adapter import WHOLE, Adapter, Unit

_MOST_BLOCKS, _MOST_GROUPS = 12, 8


def groups_of(model: nn.Module, adapter: Adapter, units: Mapping[str, Unit]) -> dict[str, list[str]]:
    """Blocks of one resolution, in several groups where they are many; the whole; cuts between blocks of a UNet."""
    groups = {WHOLE: [WHOLE]}
    groups |= {name: [name] for name, unit in units.items() if unit.module.count(".") == 1 and unit.signature is None}
    by_level: dict[int, list[str]] = {}
    for layer in adapter.blocks(model):
        by_level.setdefault(layer.downsample, []).append(layer.name)
    for level, names in sorted(by_level.items()):
        size = len(names) if len(names) <= _MOST_BLOCKS and len(by_level) > 1 else -(-len(names) // _MOST_GROUPS)
        chunks = [names[start : start + size] for start in range(0, len(names), size)]
        groups |= {f"blocks of level {level}, part {part}": chunk for part, chunk in enumerate(chunks, 1)}
    return groups


def insides(groups: Mapping[str, list[str]], units: Mapping[str, Unit]) -> dict[str, list[str]]:
    """The groups that lie inside of another one, by its name."""
    inside = {WHOLE: [group for group in groups if group != WHOLE]}
    for group, names in groups.items():
        if group == WHOLE or units[names[0]].signature is not None:
            continue
        cut = units[names[0]]
        modules = (cut.module, *cut.idle)
        inside[group] = [
            other
            for other, members in groups.items()
            if other not in (WHOLE, group) and all(_is_within(units[name], modules) for name in members)
        ]
    return inside


def _is_within(unit: Unit, modules: tuple[str, ...]) -> bool:
    return any(unit.module == name or unit.module.startswith(f"{name}.") for name in modules)
