"""The default method with its scope told: what a test sees does not depend on what the model of costs chooses."""

from dataclasses import dataclass

import gen_turbo


@dataclass
class TurboProcessor(gen_turbo.TurboProcessor):
    scope: str = "attention"
