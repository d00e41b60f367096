"""How fast a run trains: seconds and tokens, the share of the hardware that does useful work, memory, compilations.

    MFU = tokens/s * 3 * (F - F_router) / (number of devices * peak FLOP/s of one)

F are the forward FLOPs of a token as `models.cost` counts them: matmuls only, the K experts that the token uses and
not E, the causal half of attention. The backward pass is twice the forward. Left out, so that they lower the figure
and never raise it: routers, rows that pad an expert's block, what recomputation does twice, the optimizer. The peak is
the vendor's for dense bfloat16, whatever the dtype that the run computes in; where there is no entry, as for CPUs, it
is the best of a few square float32 matmuls, measured once.

All of it differs from run to run, so that it has a stage of its own, "timing", in the run's metrics.
"""

import functools
import resource
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.models.config import DecoderConfig
from moe_jax.models.cost import model_cost
from moe_jax.runs import MetricsWriter
from moe_jax.training.compiles import compile_counter

# Dense bfloat16 FLOP/s by `device_kind`, from the vendors' data sheets (without sparsity).
PEAK_FLOPS = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40S": 362e12,
    "Tesla T4": 65e12,
    "TPU v3": 61.5e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU7x": 1153.5e12,
}
MEASURED_SIZE = 1536  # rows and columns of the matmul that stands in for a data sheet


class Meter:
    """Writes the stage "timing": `start`, `record` for every step, `flush` where the run's other metrics are."""

    def __init__(
        self,
        writer: MetricsWriter,
        *,
        tokens_per_step: int,
        flops_per_token: float,
        every: int = 10,
        num_devices: int = 1,
    ) -> None:
        """Prepares a meter.

        Args:
          writer: of the stage "timing".
          tokens_per_step: of the global batch.
          flops_per_token: from `useful_flops`; NaN where they are not known.
          every: steps to a row.
          num_devices: that share the work.
        """
        self._writer, self._every = writer, every
        self._tokens, self._flops = tokens_per_step, flops_per_token
        self._peak = num_devices * peak_flops(jax.devices()[0])
        self._compiles = compile_counter()
        self._seconds: list[float] = []
        self._before = time.perf_counter()

    def start(self, step: int) -> None:
        """Cuts the record after this step and starts the clock."""
        self._writer.truncate_after(step)
        self._seconds.clear()
        self._before = time.perf_counter()

    def record(self, step: int) -> dict[str, float]:
        """Takes the time of a step.

        Returns:
          The row at multiples of `every`, nothing between them. It has the median step since the last row: checkpoints,
          evaluations and compilations between do not count.
        """
        now = time.perf_counter()
        self._seconds.append(now - self._before)
        self._before = now
        if step % self._every:
            return {}
        seconds = float(np.median(self._seconds))
        self._seconds.clear()
        row = {
            "seconds_per_step": seconds,
            "tokens_per_second": self._tokens / seconds,
            "mfu": self._tokens / seconds * self._flops / self._peak,
            "peak_memory_mib": peak_memory() / 2**20,
            "programs_compiled": float(self._compiles.count),
            "compile_seconds": self._compiles.seconds,
        }
        self._writer.append(step, row)
        return row

    def flush(self) -> None:
        """Writes the rows so far."""
        self._writer.flush()


def useful_flops(config: DecoderConfig, sequence_length: int) -> float:
    """FLOPs of training on one token, forward and backward, without routers; NaN for Soft MoE, which has no K."""
    if config.is_soft:
        return float("nan")
    cost = model_cost(config, sequence_length)
    return 3.0 * (cost.flops - cost.flops_by_part["router"])


@functools.cache
def peak_flops(device: jax.Device) -> float:
    """FLOP/s that a device could do at best: the table's, or measured."""
    return PEAK_FLOPS.get(device.device_kind) or _measure_peak(device)


def _measure_peak(device: jax.Device) -> float:
    """The best of a few float32 matmuls."""
    matrix = jax.device_put(jnp.ones((MEASURED_SIZE, MEASURED_SIZE), jnp.float32), device)
    multiply = jax.jit(jnp.matmul)
    seconds = []
    for _ in range(6):
        start = time.perf_counter()
        multiply(matrix, matrix).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return 2 * MEASURED_SIZE**3 / min(seconds[1:])


def peak_memory() -> float:
    """Bytes at the highest so far: of the first device, or where a device does not say, as on CPU, of the process."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        return float(stats["peak_bytes_in_use"])
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
