"""What every algorithm promises the engine, asked of ours and of the example in docs/own.md."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import own_examples
import pytest
import torch
from ray import cloudpickle
from task_models import tiny_task, write_family_for_tasks
from whole_runs import changed, tiny

from fedpeat_ray import SimulationConfig
from fedpeat_ray.aggregation.server_optimizer import ServerState
from fedpeat_ray.algorithms.find import OURS, find_algorithm
from fedpeat_ray.config import USES, ProxyConfig
from fedpeat_ray.models.foundation import load_backbone
from fedpeat_ray.records import Arrays
from fedpeat_ray.runtime.checkpoint import Facts, load_checkpoint, save_checkpoint
from fedpeat_ray.runtime.rows import client_columns, round_row
from fedpeat_ray.runtime.serial import Serial
from fedpeat_ray.simulation import evaluate
from fedpeat_ray.world import World, prepare

OF_TASKS = {"images": "vit", "sequence-to-sequence": "t5", "classification": "roberta"}
"""Tasks that devices tune for beside language modelling, and a model for each."""


@pytest.fixture(
    scope="module", params=[*OURS, "example", *(f"fed-peat {task}" for task in OF_TASKS), "fed-peft images"]
)
def config(
    request: pytest.FixtureRequest, deep_gpt2_dir: Path, text_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> SimulationConfig:
    """A tiny run of each algorithm, and of some for each task."""
    name, _, task = request.param.partition(" ")
    emulator = {"first": 1, "last": 1, "shares": (0.4, 0.8), "weights": "foundation"}
    if task:
        family = OF_TASKS[task]
        directory = write_family_for_tasks(tmp_path_factory.mktemp(family), family, num_blocks=5)
        config = tiny_task({family: directory}, family, "float32", algorithm=name)
        return changed(config, emulator={**emulator, "shares": (0.4,)})
    if name == "example":
        name = own_examples.write(tmp_path_factory.mktemp("mine"))["algorithm"]
    proxy = ProxyConfig(str(deep_gpt2_dir), steps=2, batch_size=2, sequence_length=16)
    return changed(tiny(deep_gpt2_dir, text_dir), algorithm=name, emulator=emulator, proxy=proxy)


@pytest.fixture(scope="module")
def world(config: SimulationConfig, tmp_path_factory: pytest.TempPathFactory) -> World:
    return prepare(config, tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def serial(world: World) -> Serial:
    driver = load_backbone(world.foundation) if world.held is not world.foundation else None
    return Serial(load_backbone(world.held), driver)


def run_round(world: World, serial: Serial, state: ServerState, round: int = 1) -> tuple[ServerState, Any]:
    return world.algorithm.run_round(state, round, 0.0, world.conditions, world.data, serial)


def tensors(state: ServerState) -> dict[str, torch.Tensor]:
    return {"model": state.model_P, **state.moments, **state.memory}


def with_labels(arrays: Arrays) -> dict[str, torch.Tensor]:
    """What transformers calls a batch."""
    labels = torch.from_numpy(arrays["labels"]) if "labels" in arrays else None
    if "pixels" in arrays:
        assert labels is not None
        return {"pixel_values": (torch.from_numpy(arrays["pixels"]).float() / 255 - 0.5) / 0.5, "labels": labels}
    tokens = torch.from_numpy(arrays["tokens"])
    valid = torch.arange(tokens.shape[1]) < torch.from_numpy(arrays["lengths"])[:, None]
    of_text = {"input_ids": tokens, "attention_mask": valid.long()}
    return {**of_text, "labels": tokens.masked_fill(~valid, -100) if labels is None else labels}


def assert_equal(one: ServerState, other: ServerState) -> None:
    assert tensors(one).keys() == tensors(other).keys()
    assert all(value.equal(tensors(other)[name]) for name, value in tensors(one).items())


def test_the_class_answers_before_anything_is_loaded(config):
    kind = find_algorithm(config.algorithm)
    kind.check(config)
    assert set(kind.uses(config)) <= USES and 0 < kind.learning_rate(config) < 1 and kind.about


def test_it_starts_from_the_foundation_alike_every_time(world, serial):
    one, other = (world.algorithm.init(3) for _ in range(2))
    assert_equal(one, other)
    assert one.model_P.shape == (world.algorithm.layout.num_elements,) and one.model_P.dtype == torch.float32
    scores = evaluate(world, serial, one, world.algorithm.levels)
    plain = serial.backbone if serial.driver is None else serial.driver
    with torch.no_grad():
        loss = plain.exact(**with_labels(world.heldout[0].arrays)).loss.double().item()
    first = evaluate(dataclasses.replace(world, heldout=world.heldout[:1]), serial, one)["all"]
    assert first.loss / first.num_tokens == pytest.approx(loss, rel=1e-5)
    assert len(scores) == 1 + len(world.algorithm.levels)


def test_a_round_is_a_function_of_its_state(world, serial):
    before = world.algorithm.init(3)
    kept = {name: value.clone() for name, value in tensors(before).items()}
    (one, result), (other, _) = (run_round(world, serial, before) for _ in range(2))
    assert_equal(one, other)
    assert all(value.equal(kept[name]) for name, value in tensors(before).items()), "what is handed in stays"
    assert not one.model_P.equal(before.model_P)
    learnt = world.algorithm.learn(one, result, 12.5)
    assert_equal(learnt, world.algorithm.learn(other, result, 12.5))


def test_a_round_accounts_for_every_device_that_was_sampled(world, serial):
    _, result = run_round(world, serial, world.algorithm.init(3))
    skipped = [task.device_id for task in result.skipped]
    assert sorted([*result.device_ids.tolist(), *skipped]) == world.conditions.sample(1).tolist()
    completed = result.device_ids[result.admission.completed].tolist()
    assert sorted(report.device_id for report in result.reports if report.device_id >= 0) == completed
    columns = client_columns(1, result, world.conditions.fleet, world.data.corpus)
    assert {len(values) for values in columns.values()} == {len(result.device_ids) + len(skipped)}
    assert set(columns["group"]) <= set(world.data.corpus.group_names)
    row = round_row(1, columns, 0.0)
    assert row["num_completed"] == len(completed) and row["num_skipped"] == len(skipped)


def test_its_state_survives_a_checkpoint(world, serial, tmp_path):
    state, result = run_round(world, serial, world.algorithm.init(3))
    state = world.algorithm.learn(state, result, None)
    save_checkpoint(tmp_path, state, Facts(1, 0.0, 0))
    found = load_checkpoint(tmp_path)
    assert found is not None
    assert_equal(found[0], state)
    (one, _), (other, _) = (run_round(world, serial, each, round=2) for each in (state, found[0]))
    assert_equal(one, other)


def test_hosts_can_receive_its_work(world):
    state = world.algorithm.init(3)
    for work in (world.algorithm.trainer(state), world.algorithm.evaluator(state)):
        sent: bytes = cloudpickle.dumps(work)
        assert callable(cloudpickle.loads(sent))


def test_what_it_saves_is_the_same_twice(world, tmp_path):
    state = world.algorithm.init(3)
    for name in ("one", "other"):
        world.algorithm.save(tmp_path / name, state.model_P)
    files = [path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.safetensors")]
    assert files
    assert all((tmp_path / "one" / file).read_bytes() == (tmp_path / "other" / file).read_bytes() for file in files)


def test_what_it_tells_the_engine_can_be_written_down(world, serial):
    algorithm, state = world.algorithm, world.algorithm.init(3)
    scores = evaluate(world, serial, state, algorithm.levels)
    json.dumps([algorithm.facts(), algorithm.digests(), algorithm.made(), algorithm.summary(scores, scores)])
    assert all(isinstance(value, str | None) for value in {**algorithm.digests(), **algorithm.made()}.values())
    needs = algorithm.memory_needs()
    assert needs and all(isinstance(need, int) and need > 0 for need in needs.values())
    level = algorithm.levels[-1] if algorithm.levels else None
    assert 0 < algorithm.weights_bytes(level) < max(needs.values())
    assert algorithm.layout == algorithm.reference.adapter.layout


def test_the_number_of_clients_a_batch_hardly_shows(world, serial):
    if not world.algorithm.batches_clients:
        pytest.skip("its clients are trained one by one")
    results = []
    for size in (1, 3):
        algorithm = world.algorithm.with_client_batch_size(size)
        state, _ = algorithm.run_round(algorithm.init(3), 1, 0.0, world.conditions, world.data, serial)
        results.append(state.model_P.numpy())
    moved = np.abs(results[0] - world.algorithm.init(3).model_P.numpy()).max()
    assert np.abs(results[0] - results[1]).max() < 0.05 * moved
