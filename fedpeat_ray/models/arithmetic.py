"""What the last bits of a computed result depend on besides what it was computed from."""

from __future__ import annotations

import os
import platform

import torch
import transformers

from fedpeat_ray.models.foundation import fast_training_dtype

CACHE_VERSION = 1  # of all results that are cached: raise it when the same settings give something else


def arithmetic_key() -> dict[str, str | int | None]:
    """Versions, threads and instruction set of this process, for keys of cached results; plain values for JSON.

    To be asked where the result is computed, within `process_settings`: the number of threads is that of now.
    """
    return {
        "cache": CACHE_VERSION,
        "torch": str(torch.__version__),  # with its build, such as +cpu
        "transformers": transformers.__version__,
        "num_threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "machine": platform.machine(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "onednn": os.environ.get("ONEDNN_MAX_CPU_ISA"),
        "fast_dtype": fast_training_dtype(),  # tells apart what a capability leaves open
    }
