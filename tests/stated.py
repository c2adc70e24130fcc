"""The default method with its scope told: what a test sees does not depend on what the model of costs chooses."""

from dataclasses import dataclass, replace

import gen_turbo
from gen_turbo.engine.costs.devices import CLASSES

FAST = replace(CLASSES["cpu"], kernel_s=0.0, launch_s=0.0, bandwidth=1e15)
"""A device on which merging gains at any size."""


@dataclass
class TurboProcessor(gen_turbo.TurboProcessor):
    scope: str = "attention"
