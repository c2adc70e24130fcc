"""What kinds of device there are, as the cost model sees them: a small table, so that equal cards choose alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from gen_turbo.engine.costs.work import Work


@dataclass(frozen=True)
class DeviceClass:
    """What a kind of device reaches on kernels of denoisers.

    Attributes:
        name: As reports say it.
        half: FLOPs per second of matrix products of half types.
        single: The same of float32.
        softmax: Fraction of those that attention kernels reach.
        bandwidth: Bytes per second.
        kernel_s: Least seconds of a kernel on the device.
        launch_s: Seconds of a launch on the host, with the Python around it.
        needs_launches: Whether the host launches while the device works, and may be the slower of the two.
    """

    name: str
    half: float
    single: float
    softmax: float
    bandwidth: float
    kernel_s: float
    launch_s: float
    needs_launches: bool = True

    def seconds(self, work: Work, itemsize: int, is_captured: bool = False) -> float:
        """Expected seconds of some work; of captured work the host's launches are one."""
        peak = self.half if itemsize < 4 else self.single
        arithmetic = work.matrix / peak + work.softmax / (peak * self.softmax)
        device = arithmetic + work.moved / self.bandwidth + work.kernels * self.kernel_s
        host = work.kernels * self.launch_s
        if not self.needs_launches:
            return device + host
        return device if is_captured else max(device, host)


# What is reached, not what is printed: on the H200 the shares below make the model's times of eight denoisers, in full,
# refreshed and reduced, least different from gen_turbo/bench/records/gpu.jsonl: 49 % of the printed 989 TFLOPS for
# matrices, three quarters of that for attention, 83 % of the printed 4.8 TB/s, 21 us a launch. Others have the same
# shares of what their data sheets print.
_HOPPER = DeviceClass("data-centre GPU", 480e12, 33e12, 0.77, 4.0e12, 3e-6, 21e-6)
"""H100 and H200 data sheets: 989 TFLOPS in half types without sparsity, 67 in float32; 3.35 and 4.8 TB/s."""
_AMPERE = DeviceClass("data-centre GPU (Ampere)", 152e12, 9.6e12, 0.77, 1.7e12, 3e-6, 21e-6)
"""A100 data sheet: 312 and 19.5 TFLOPS, 2.0 TB/s."""
_CONSUMER = DeviceClass("consumer GPU", 80e12, 40e12, 0.77, 0.84e12, 3e-6, 15e-6)
"""RTX 4090 data sheet: 165 TFLOPS in half types with float32 sums, 82.6 in float32; 1.008 TB/s."""
_CPU = DeviceClass("CPU", 68e9, 68e9, 0.75, 9e9, 2e-6, 8e-6, needs_launches=False)
"""One older core with AVX-512: 43 GFLOP of attention and 7 of projections took 0.99 s, a merge of 17 MB 1.8 ms. More
cores divide all but launches. A newer core, that of gen_turbo/bench/records/layer.jsonl, is more than twice as fast at
both products and hardly at passes over memory, so merging attention gains less than expected of small models there."""


def device_class(device: torch.device) -> DeviceClass:
    """The class of a device, by its kind and its CUDA capability; nothing is timed."""
    if device.type == "cpu" or device.type == "meta":
        return _CPU
    if device.type != "cuda":
        return _CONSUMER
    cuda: Any = torch.cuda
    major, minor = cuda.get_device_capability(device)
    if (major, minor) == (8, 0):
        return _AMPERE
    return _HOPPER if major in (9, 10) else _CONSUMER


CLASSES = {"cpu": _CPU, "consumer": _CONSUMER, "a100": _AMPERE, "h200": _HOPPER}
"""By the names that the benchmark takes."""
