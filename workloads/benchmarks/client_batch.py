"""Client batches against the plain PEFT loop, side by side in one run on the same work.

    python workloads/benchmarks/client_batch.py [--repeats 3] [--shapes 4x128 6x256]

Every client trains its own LoRA (r = 8, all linear layers of the blocks) for a few AdamW steps on its
own tokens. Columns, in tokens per second:

    loop         one client after another by PEFT and transformers, torch's default number of threads
    2 loops      the same in two processes of one thread each, half of the clients each
    ours, 1 / 2  client batches on one and on two Ray hosts of one thread; batch size found by `auto`

`x loop` and `x 2 loops` are ratios of the last column; `peak` is the share of the machine's measured
matrix rate that two hosts reach, counting frozen products only (4 operations a weight and token).
The arms of a setting run one after another, `repeats` times over; the median counts.
"""

from __future__ import annotations

import dataclasses
import logging
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import peft
import ray
import torch
import transformers
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fedpeat_ray.aggregation.mean import WeightedMean
from fedpeat_ray.config import HostsConfig, LocalConfig, LoraConfig
from fedpeat_ray.models import foundation as foundations
from fedpeat_ray.records import ClientTask, sequences
from fedpeat_ray.runtime.knee import find_client_batch_size
from fedpeat_ray.runtime.process import keep_freed_memory
from fedpeat_ray.runtime.ray_hosts import RayHosts
from fedpeat_ray.trainable.lora import find_lora
from fedpeat_ray.trainable.peft_files import peft_config
from fedpeat_ray.training.client_batch import TrainClientBatch

VOCABULARY = 4096


@dataclass(frozen=True)
class BenchmarkConfig:
    shapes: tuple[str, ...] = ("4x128", "6x256")
    """GPT-2 shapes, blocks x width."""
    batch_sizes: tuple[int, ...] = (2, 8)
    """Sequences a step."""
    sequence_lengths: tuple[int, ...] = (32, 64)
    """Tokens a sequence."""
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    """Types of the frozen backbone of our side; the loop is in float32."""
    num_clients: int = 50
    """Clients of each measurement."""
    num_steps: int = 4
    """Steps of each client."""
    repeats: int = 3
    """Measurements of each arm."""


def save_model(folder: Path, shape: str) -> None:
    """A GPT-2 with random weights."""
    num_blocks, width = map(int, shape.split("x"))
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        n_layer=num_blocks, n_embd=width, n_head=width // 64, n_positions=128, vocab_size=VOCABULARY,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0, use_cache=False,
    )  # fmt: skip
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)


class PlainLoop:
    """The reference: one client after another, by PEFT and transformers alone."""

    def __init__(self, folder: Path, start_P: Tensor, num_threads: int | None = None):
        if num_threads:
            torch.set_num_threads(num_threads)
        keep_freed_memory()
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True)
        lora = find_lora(model, LoraConfig())
        self.start = list(lora.layout.unflatten(start_P.clone()).values())
        self.model = peft.get_peft_model(model, peft_config(lora, trainable=True))
        self.factors = [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def train(self, tasks: list[ClientTask]) -> None:
        """Train these clients."""
        for task in tasks:
            with torch.no_grad():
                for parameter, value in zip(self.factors, self.start, strict=True):
                    parameter.copy_(value)
            optimizer = torch.optim.AdamW(self.factors, lr=1e-3, weight_decay=0.0, fused=True)
            for tokens in torch.from_numpy(task.arrays["tokens"]):
                self.model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
                optimizer.step()
                optimizer.zero_grad()


def timed(work: Callable[[], object]) -> float:
    """Seconds."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


@ray.remote(num_cpus=1)
def _matrix_rate(dtype: torch.dtype) -> float:
    torch.set_num_threads(1)
    a, b = torch.randn(2048, 1024).to(dtype), torch.randn(1024, 1024).to(dtype)
    return 2 * 2048 * 1024 * 1024 / min(timed(lambda: a @ b) for _ in range(30))


def matrix_rate(dtype: torch.dtype) -> float:
    """Operations a second of two processes of one thread, large matrices."""
    return sum(ray.get([_matrix_rate.remote(dtype) for _ in range(2)]))


def measure(config: BenchmarkConfig, shape: str, folder: Path, console: Console, table: Table) -> None:
    save_model(folder, shape)
    model = foundations.load(foundations.prepare(str(folder), "float32"))
    lora = find_lora(model, LoraConfig())
    start_P = lora.init(0)
    weights = sum(i * o for _, i, o in lora.modules) + model.config.vocab_size * model.config.hidden_size
    train = TrainClientBatch(lora, LocalConfig(learning_rate=1e-3))
    loop = PlainLoop(folder, start_P)
    loops: list[Any] = [ray.remote(num_cpus=0)(PlainLoop).remote(folder, start_P, 1) for _ in range(2)]
    for dtype in config.dtypes:
        foundation, peak = foundations.prepare(str(folder), dtype), matrix_rate(getattr(torch, dtype))
        with (
            RayHosts(HostsConfig(num_hosts=1), foundation, lambda *_, **__: None) as one_host,
            RayHosts(HostsConfig(num_hosts=2), foundation, lambda *_, **__: None) as two_hosts,
        ):
            for batch_size in config.batch_sizes:
                for length in config.sequence_lengths:
                    tasks = make_tasks(config, batch_size, length)
                    sizes = [
                        find_client_batch_size(hosts, n, train, start_P, tasks, config.num_clients)
                        for n, hosts in ((1, one_host), (2, two_hosts))
                    ]
                    arms: list[Callable[[], object]] = [
                        lambda t=tasks: loop.train(t),
                        lambda t=tasks: ray.get([each.train.remote(t[i::2]) for i, each in enumerate(loops)]),
                        lambda t=tasks, k=sizes[0]: one_host(train, start_P, t, WeightedMean(), k),
                        lambda t=tasks, k=sizes[1]: two_hosts(train, start_P, t, WeightedMean(), k),
                    ]
                    loop.train(tasks[:2])
                    ray.get([each.train.remote(tasks[:2]) for each in loops])
                    runs = [[timed(arm) for arm in arms] for _ in range(config.repeats)]
                    num_tokens = sum(task.num_tokens for task in tasks)
                    loop_rate, loops_rate, one, two = (
                        num_tokens / statistics.median(arm) for arm in zip(*runs, strict=True)
                    )
                    row = [shape, dtype, f"{batch_size}x{length}", f"{sizes[0]}, {sizes[1]}"]
                    row += [f"{rate:,.0f}" for rate in (loop_rate, loops_rate, one, two)]
                    row += [f"{two / loop_rate:.2f}", f"{two / loops_rate:.2f}", f"{4 * weights * two / peak:.0%}"]
                    table.add_row(*row)
                    console.print("  ".join(row), soft_wrap=True)


def make_tasks(config: BenchmarkConfig, batch_size: int, length: int) -> list[ClientTask]:
    rng = np.random.default_rng(0)
    size = (config.num_steps, batch_size, length)
    lengths = np.full(size[:2], length)
    return [ClientTask(k, 1, sequences(rng.integers(0, VOCABULARY, size), lengths)) for k in range(config.num_clients)]


def main(config: BenchmarkConfig) -> None:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    console = Console(highlight=False)
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING)
    console.print(f"{torch.__version__}, {torch.get_num_threads()} threads by default, {dataclasses.asdict(config)}")
    headers = ("shape", "backbone", "batch", "clients at once", "loop", "2 loops", "ours, 1", "ours, 2")
    table = Table(*headers, "x loop", "x 2 loops", "peak")
    for shape in config.shapes:
        with tempfile.TemporaryDirectory() as folder:
            measure(config, shape, Path(folder), console, table)
    console.print(table)
    ray.shutdown()


if __name__ == "__main__":
    main(tyro.cli(BenchmarkConfig, description=__doc__))
