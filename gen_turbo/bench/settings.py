"""What the quality and step benchmarks compare: each setting has a name and knows how to apply itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from gen_turbo.api import adapter_of, attach, denoiser
from gen_turbo.bench.output_cache import cached_outputs
from gen_turbo.factory import build_processor
from gen_turbo.methods.par import PARProcessor


@dataclass(frozen=True)
class Setting(ABC):
    """One way to make the same image in less time.

    Attributes:
        name: Unique in a catalogue; --settings selects by it.
        family: Settings of one family form one curve.
    """

    name: str
    family: str

    @abstractmethod
    def applied(self, target: Any) -> AbstractContextManager[object]:
        """Applies the setting to a pipeline or UNet inside the `with` block, for exactly one run."""

    def misfit(self, model: nn.Module) -> str:
        """Why the setting means nothing on a denoiser; empty if it does."""
        return ""

    @property
    def is_adaptive(self) -> bool:
        """Whether what it skips depends on the image."""
        return False

    def num_steps(self, steps: int) -> int:
        """Denoising steps to run where stock runs `steps`."""
        return steps

    def params(self) -> dict[str, Any]:
        """What defines the setting, for the record."""
        return {key: value for key, value in asdict(self).items() if key not in ("name", "family")}


@dataclass(frozen=True)
class Stock(Setting):
    """Nothing is changed."""

    name: str = "stock"
    family: str = "stock"

    def applied(self, target: Any) -> AbstractContextManager[object]:
        """Changes nothing."""
        return nullcontext()


@dataclass(frozen=True)
class Method(Setting):
    """A registered method of this package, made anew for each run."""

    method: str = "turbo"
    options: dict[str, Any] = field(default_factory=dict)

    def applied(self, target: Any) -> AbstractContextManager[object]:
        """Attaches the method's processor; for one run on a GPU nothing is captured."""
        return attach(target, self._processor(), graphs=False)

    def misfit(self, model: nn.Module) -> str:
        """Schedules are of one model, and several levels need a model that has them."""
        processor = self._processor()
        if isinstance(processor, PARProcessor):
            try:
                processor.schedules(model)
            except ValueError as error:
                return str(error)
        host: Any = adapter_of(model)
        levels = {layer.downsample for layer in host.layers(model) if not layer.left_alone}
        wanted: int = processor.max_downsample or min(levels)
        return f"it merges to downsample {wanted}, and the model has {sorted(levels)}" if wanted not in levels else ""

    def _processor(self) -> Any:
        # What says how to restore is of attention where it names no scope; what does not is the user's own line.
        stated = {"scope": "attention"} if "restore" in self.options else {}
        return build_processor({"method": self.method, **stated, **self.options})


@dataclass(frozen=True)
class FewerSteps(Setting):
    """The stock pipeline with fewer denoising steps: what every acceleration has to beat."""

    num_steps_run: int = 20

    def applied(self, target: Any) -> AbstractContextManager[object]:
        """Changes nothing."""
        return nullcontext()

    def num_steps(self, steps: int) -> int:
        """The setting's own number, whatever stock runs."""
        return self.num_steps_run


@dataclass(frozen=True)
class MethodOnFewerSteps(Method, FewerSteps):
    """A method on a run of fewer denoising steps than stock."""


@dataclass(frozen=True)
class Tomesd(Setting):
    """The published package tomesd with its own defaults."""

    ratio: float = 0.5
    max_downsample: int = 1
    is_whole: bool = False

    def applied(self, target: Any) -> AbstractContextManager[object]:
        """Patches the UNet's blocks: self-attention, or where it is whole, cross-attention and feed-forward too."""
        from gen_turbo.bench.tomesd_baseline import patched

        return patched(getattr(target, "unet", target), self.ratio, self.max_downsample, self.is_whole)

    def misfit(self, model: nn.Module) -> str:
        """The package knows UNets alone."""
        return _unless_unet(model)


@dataclass(frozen=True)
class OutputCache(Setting):
    """Attention outputs of the finest level repeated between steps."""

    interval: int = 2

    def applied(self, target: Any) -> AbstractContextManager[object]:
        """Replaces the processors of the finest level."""
        return cached_outputs(denoiser(target), self.interval)


@dataclass(frozen=True)
class DeepCache(Setting):
    """The published package DeepCache at its fastest branch."""

    interval: int = 2

    def applied(self, target: Any) -> AbstractContextManager[object]:
        """Wraps the UNet's blocks."""
        from gen_turbo.bench.deepcache_baseline import deep_features_cached

        return deep_features_cached(target, self.interval)

    def misfit(self, model: nn.Module) -> str:
        """The package knows UNets alone."""
        return _unless_unet(model)


def selected(settings: Sequence[Setting], patterns: Sequence[str]) -> list[Setting]:
    """Those whose name matches one of the shell patterns; all where there is no pattern.

    Raises:
        ValueError: If a pattern matches nothing.
    """
    for pattern in patterns:
        if not any(fnmatchcase(setting.name, pattern) for setting in settings):
            known = ", ".join(setting.name for setting in settings)
            raise ValueError(f"no setting matches {pattern!r}; there are: {known}")
    return [s for s in settings if not patterns or any(fnmatchcase(s.name, pattern) for pattern in patterns)]


def fitting(settings: Sequence[Setting], patterns: Sequence[str], model: nn.Module) -> list[Setting]:
    """Those of the selected settings that mean something on a denoiser.

    Raises:
        ValueError: If a pattern matches nothing, or nothing that does.
    """
    chosen = selected(settings, patterns)
    reasons = {setting.name: setting.misfit(model) for setting in chosen}
    for pattern in patterns:
        matching = [name for name in reasons if fnmatchcase(name, pattern)]
        if all(reasons[name] for name in matching):
            raise ValueError(f"{matching[0]} does not fit this {type(model).__name__}: {reasons[matching[0]]}")
    return [setting for setting in chosen if not reasons[setting.name]]


def _unless_unet(model: nn.Module) -> str:
    return "" if hasattr(model, "up_blocks") else "the package works on UNets alone; leave it out"
