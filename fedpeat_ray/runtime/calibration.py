"""How fast this machine trains and evaluates a model of which there is the configuration alone: measured in seconds, on
as few of its blocks as that takes, with weights that mean nothing."""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from fedpeat_ray.aggregation.mean import WeightedMean
from fedpeat_ray.config import LocalConfig, LoraConfig
from fedpeat_ray.fleet.costs import forward_flops, training_flops
from fedpeat_ray.models import foundation as foundations
from fedpeat_ray.models import weight_files
from fedpeat_ray.models.foundation import Foundation
from fedpeat_ray.models.traits import examine
from fedpeat_ray.records import ClientTask
from fedpeat_ray.runtime.process import process_settings
from fedpeat_ray.runtime.serial import Serial
from fedpeat_ray.tasks.task import Task
from fedpeat_ray.trainable.lora import find_lora
from fedpeat_ray.trainable.shape import model_shape
from fedpeat_ray.training.adapters import Adapter, StackedAdapter, WeightsAdapter
from fedpeat_ray.training.evaluation import EvaluationTask, ScoreSum

MOST_PARAMETERS = 30_000_000
"""Of a model that is run; of a larger one only its largest product is."""
_WEIGHT = 1e-3  # of every parameter: how fast numbers are multiplied does not depend on them
_ENOUGH_S = 1.0
_ROWS, _SIDE = 512, 4096  # of the product that stands for a large model


@dataclass(frozen=True)
class Speed:
    """Of one host, in the operations that the cost model counts a second."""

    training_flops_per_s: float
    evaluation_flops_per_s: float
    """In the type of training."""
    exact_flops_per_s: float
    """Of evaluation in the exact type."""


def measured_speed(
    foundation: Foundation,
    lora: LoraConfig | None,
    local: LocalConfig,
    task: Task,
    tasks: Sequence[ClientTask],
    heldout: EvaluationTask,
    num_threads: int,
) -> Speed:
    """Measure one host with LoRA (None: all weights are trained) on a client batch of these tasks, and on this text."""
    model = foundations.empty(foundation.config_json)
    with process_settings(num_threads), tempfile.TemporaryDirectory() as directory:
        if sum(parameter.numel() for parameter in model.parameters()) > MOST_PARAMETERS:
            return _of_largest_product(foundation, model, heldout)
        return _of_model(_made_up(foundation, Path(directory)), lora, local, task, tasks, heldout)


def _made_up(foundation: Foundation, directory: Path) -> Foundation:
    """The model with a file of weights."""
    path = directory / "weights.safetensors"
    weight_files.write(path, foundation.shapes, lambda name: torch.full(foundation.shapes[name][1], _WEIGHT))
    values = {item.name: getattr(foundation, item.name) for item in dataclasses.fields(Foundation)}
    made_up = Foundation(**values | {"weights": path})
    return dataclasses.replace(made_up, traits=examine(foundations.load(made_up)))


def _of_model(
    foundation: Foundation,
    lora: LoraConfig | None,
    local: LocalConfig,
    task: Task,
    tasks: Sequence[ClientTask],
    heldout: EvaluationTask,
) -> Speed:
    backbone = foundations.load_backbone(foundation, "cuda" if torch.cuda.is_available() else "cpu")
    shape, length = model_shape(backbone.exact, 4), local.sequence_length
    if lora is None:
        adapter: Adapter = WeightsAdapter("all", foundations.weights_layout(backbone.exact), foundation, task)
    else:
        adapter = StackedAdapter(find_lora(backbone.exact, lora), task)
    hosts, start_P = Serial(backbone), adapter.init(0)
    elements = adapter.layout.num_elements if lora else 0
    num_tokens = sum(client.num_tokens for client in tasks)
    of_training = float(training_flops(shape, num_tokens, length, adapter.kind, elements))
    of_evaluation = heldout.num_tokens * forward_flops(shape, int(heldout.arrays["lengths"].max()))

    def train() -> None:
        hosts(adapter.trainer(local), start_P, tasks, WeightedMean(), len(tasks) if lora else 1)

    def evaluate(exact: bool) -> None:
        hosts(adapter.evaluator(exact), start_P, [heldout], ScoreSum())

    return Speed(
        of_training / _seconds(train),
        of_evaluation / _seconds(lambda: evaluate(False)),
        of_evaluation / _seconds(lambda: evaluate(True)),
    )


def _of_largest_product(foundation: Foundation, model: nn.Module, heldout: EvaluationTask) -> Speed:
    """Large models are multiplications: one with the largest matrix, or as much of it as is worth the time."""
    matrix = max((p for p in model.parameters() if p.ndim == 2), key=lambda p: min(p.shape))
    width, features, rows = min(matrix.shape[1], _SIDE), min(matrix.shape[0], _SIDE), min(heldout.num_tokens, _ROWS)
    rates = []
    for dtype in (getattr(torch, foundation.training_dtype), foundation.exact_dtype):
        some, weight = (torch.full((n, width), _WEIGHT, dtype=dtype) for n in (rows, features))
        rates.append(2 * rows * features * width / _seconds(lambda x=some, w=weight: x @ w.T))
    return Speed(rates[0], *rates)


def _seconds(work: Callable[[], object]) -> float:
    """The shortest of some times, the first of which warms up."""
    spent_s, best_s, started = 0.0, float("inf"), time.perf_counter()
    while spent_s < _ENOUGH_S or best_s == float("inf"):
        now = time.perf_counter()
        work()
        took_s = time.perf_counter() - now
        if spent_s or took_s > _ENOUGH_S:
            best_s = min(best_s, took_s)
        spent_s = time.perf_counter() - started
    return best_s
