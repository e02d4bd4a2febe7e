"""What the levels of emulators cost devices, as numbers: those of a ladder of emulators, or any others.

Legend: N devices, L levels, from 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fedpeat_ray.fleet.costs import ServerCosts, Task


@dataclass(frozen=True)
class EmulatorCosts:
    """What a level costs any device, and what the server does itself."""

    emulator_bytes_L: np.ndarray
    adapter_bytes_L: np.ndarray
    """One way."""
    memory_bytes_L: np.ndarray
    """Peak of training."""
    weights_bytes_L: np.ndarray
    """Of these the weights."""
    flops_per_token_L: np.ndarray
    server_tuning: ServerCosts
    """Of its local steps in a round."""
    realignment: ServerCosts
    """Of one re-alignment of all emulators."""

    def exchange_bytes(self, level_N: np.ndarray, held_N: np.ndarray) -> np.ndarray:
        """(N,) of emulators that must be sent: a device that holds that of its level (0: none) needs no other."""
        return self.emulator_bytes_L[level_N - 1] * (held_N != level_N)

    def task(self, level_N: np.ndarray, exchange_bytes_N: np.ndarray, num_tokens_N: np.ndarray) -> Task:
        """What a round asks of each device: the emulators that must be sent, the adapter both ways, training."""
        row_N = level_N - 1
        adapter_bytes = self.adapter_bytes_L[row_N]
        return Task(
            download_bytes=exchange_bytes_N + adapter_bytes,
            upload_bytes=adapter_bytes,
            flops=self.flops_per_token_L[row_N] * num_tokens_N,
            memory_bytes=self.memory_bytes_L[row_N],
        )
