"""The centralised reference: a step's gradient in parts is the step, and every algorithm has its own kind."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import whole_runs

from fedpeat_ray import Simulation
from fedpeat_ray.aggregation.mean import WeightedMean
from fedpeat_ray.models.foundation import load_backbone
from fedpeat_ray.runtime import centralised
from fedpeat_ray.runtime.serial import Serial
from fedpeat_ray.training.one_client import TrainWithPeft
from fedpeat_ray.world import prepare


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_steps_in_parts_are_those_of_the_plain_peft_loop(gpt2_dir, text_dir, optimizer):
    config = whole_runs.tiny(
        gpt2_dir,
        text_dir,
        algorithm="fed-peft",
        foundation={"dtype": "float64"},
        local={"optimizer": optimizer, "learning_rate": 0.01 if optimizer == "adamw" else 0.3},
    )
    world = prepare(config, Path())
    adapter, serial = world.algorithm.reference.adapter, Serial(load_backbone(world.foundation))
    task = world.data.pooled_task(6, centralised.BATCH_SIZE)
    shorter = task.arrays["lengths"] - (torch.arange(8) % 3 == 0).numpy() * 5
    task = dataclasses.replace(task, arrays={**task.arrays, "lengths": shorter})
    start_P = adapter.init(0).double() + 0.05 * torch.randn(
        adapter.layout.num_elements, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    gradient = adapter.gradient()
    assert gradient is not None
    ours_P = centralised._step_by_step(gradient, start_P, task, config.local, serial, "driver")
    mean, _ = serial(TrainWithPeft(adapter.part, config.local), start_P, [task], WeightedMean())  # type: ignore
    assert ours_P is not None
    torch.testing.assert_close(ours_P - start_P, mean.result(), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("algorithm", ["fed-avg", "fed-peft", "fed-peat", "fed-pt"])
def test_each_algorithm_is_judged_by_what_it_trains_itself(algorithm, deep_gpt2_dir, text_dir):
    changes: dict[str, Any] = {"emulator": {"first": 1, "last": 1, "shares": (0.4,), "weights": "foundation"}}
    changes |= {"proxy": {"small": str(deep_gpt2_dir), "steps": 0}}
    world = prepare(whole_runs.tiny(deep_gpt2_dir, text_dir, algorithm=algorithm, **changes), Path())
    reference, layout = world.algorithm.reference, world.algorithm.layout
    assert reference.adapter.layout == layout
    assert reference.adapter.kind == ("all" if algorithm == "fed-avg" else "lora")
    assert reference.where == ("hosts" if algorithm == "fed-pt" else "driver")
    assert torch.equal(reference.adapter.init(3), world.algorithm.init(3).model_P)


def test_full_fine_tuning_is_held_against_full_fine_tuning(gpt2_dir, text_dir, tmp_path):
    config = whole_runs.tiny(
        gpt2_dir, text_dir, algorithm="fed-avg", out=tmp_path / "run", evaluation={"centralised": True}
    )
    perplexity = Simulation(config).run()["perplexity"]
    assert perplexity["centralised"] < perplexity["zero_shot"]
