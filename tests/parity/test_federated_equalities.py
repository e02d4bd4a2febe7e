"""Rounds that must equal something simpler: centralised training, one client of many like it, a formula."""

from __future__ import annotations

import dataclasses
import functools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from plain_loops import train_all_weights, train_lora
from sweeps import sweep

from fedpeat_ray import SimulationConfig
from fedpeat_ray.aggregation.server_optimizer import ServerState, init_server, server_step
from fedpeat_ray.config import (
    AvailabilityConfig,
    ChannelConfig,
    DataConfig,
    EvaluationConfig,
    FleetConfig,
    FoundationConfig,
    HostsConfig,
    LocalConfig,
    LoraConfig,
    PartitionConfig,
    ServerConfig,
)
from fedpeat_ray.world import World, hosts, prepare

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT calls what transformers will rename

LORA = LoraConfig(rank=3, alpha=12.0)
ADAMW = functools.partial(torch.optim.AdamW, lr=2e-3, weight_decay=0.0)
SGD = functools.partial(torch.optim.SGD, lr=0.1)
HALF_ULP = 2**-25  # of a float32 below 1/2: adapters are sent in float32


def everybody_has_everything(model_dir: Path, text_dir: Path, num_devices: int, **settings) -> World:
    """Every device holds all documents and completes every round; in float64."""
    config = SimulationConfig(
        algorithm="fed-peft",
        cohort_size=num_devices,
        client_batch_size=2,
        lora=LORA,
        foundation=FoundationConfig(str(model_dir), dtype="float64"),
        data=DataConfig(
            str(text_dir), partition=PartitionConfig(kind="iid", documents_per_device=math.inf, quantity_sigma=0.5)
        ),
        fleet=FleetConfig(
            num_devices=num_devices,
            availability=AvailabilityConfig(kind="always"),
            channel=ChannelConfig(kind="nominal"),
        ),
        evaluation=EvaluationConfig(num_sequences=8, sequence_length=32, centralised=False),
        hosts=HostsConfig(backend="serial"),
    )
    config = dataclasses.replace(config, **settings)
    config.validate()
    return prepare(config, Path())


def rounds(world: World, num_rounds: int) -> list[ServerState]:
    """The states from the start to the end of the last round."""
    states = [world.algorithm.init(world.config.seed)]
    with hosts(world, lambda *_, **__: None) as (map_clients, _):
        for round in range(1, num_rounds + 1):
            now_s = 600.0 * round
            state, result = world.algorithm.run_round(
                states[-1], round, now_s, world.conditions, world.data, map_clients
            )
            assert len(result.reports) == world.config.cohort_size
            states.append(state)
    return states


@pytest.mark.parametrize("optimizer", sweep(["adamw", "sgd"], quick=["adamw"]))
def test_fed_peft_with_one_client_that_has_everything_is_centralised_lora(model_dir, text_dir, optimizer):
    rate = {"adamw": 2e-3, "sgd": 0.1}[optimizer]
    local = LocalConfig(4, sequence_length=32, max_steps=1000, optimizer=optimizer, learning_rate=rate)
    world = everybody_has_everything(model_dir, text_dir, 1, local=local)
    states = rounds(world, 2)
    layout = world.algorithm.layout
    for round in (1, 2):
        (task,) = world.data.tasks([0], round)
        start = layout.unflatten(states[round - 1].model_P)
        plain, _ = train_lora(
            model_dir,
            start,
            (task.arrays["tokens"], task.arrays["lengths"]),
            {"adamw": ADAMW, "sgd": SGD}[optimizer],
            rank=LORA.rank,
            alpha=LORA.alpha,
            dtype=torch.float64,
        )
        expected_P = layout.flatten(plain)
        assert (states[round].model_P - expected_P).abs().max() <= HALF_ULP
        assert (states[round].model_P - states[round - 1].model_P).abs().max() > 1e-3

    corpus = world.data.corpus
    private = np.concatenate(
        [corpus.tokens[corpus.offsets[d] : corpus.offsets[d + 1]] for d in np.flatnonzero(~corpus.heldout)]
    )
    (task,) = world.data.tasks([0], 1)
    valid = np.arange(32) < task.arrays["lengths"][..., None]
    trained_on = task.arrays["tokens"][valid]  # one pass over all there is (and what fills up the last batch)
    missing = np.bincount(private, minlength=257) - np.bincount(trained_on, minlength=257)
    assert missing.max() <= 1, "all private text but at most one last token"
    assert task.num_examples == math.ceil((len(private) - 1) / 32)


@pytest.mark.parametrize("algorithm", sweep(["fed-peft", "fed-avg"], quick=["fed-peft"]))
@pytest.mark.parametrize("optimizer", sweep(["adamw", "sgd"], quick=["adamw"]))
def test_the_mean_over_clients_that_are_alike_is_each_of_them(gpt2_dir, text_dir, algorithm, optimizer):
    local = LocalConfig(  # every step is the whole data, so the order in which a device takes it does not matter
        64, sequence_length=64, epochs=2, optimizer=optimizer, learning_rate={"adamw": 2e-3, "sgd": 0.1}[optimizer]
    )
    fleet = FleetConfig(num_devices=3, availability=AvailabilityConfig(kind="always"))
    one, many = (
        rounds(everybody_has_everything(gpt2_dir, text_dir, size, algorithm=algorithm, local=local, fleet=fleet), 2)
        for size in (1, 3)
    )
    assert (one[2].model_P.double() - many[2].model_P.double()).abs().max() <= HALF_ULP
    assert (one[2].model_P - one[0].model_P).abs().max() > 1e-3


def test_fed_avg_with_one_client_is_plain_training_of_all_weights(model_dir, text_dir):
    local = LocalConfig(4, sequence_length=32, max_steps=3, optimizer="sgd", learning_rate=0.1)
    world = everybody_has_everything(model_dir, text_dir, 1, local=local, algorithm="fed-avg")
    before, after = rounds(world, 1)
    (task,) = world.data.tasks([0], 1)
    layout = world.algorithm.layout
    start, steps = layout.unflatten(before.model_P), (task.arrays["tokens"], task.arrays["lengths"])
    plain, _ = train_all_weights(model_dir, start, steps, SGD, dtype=torch.float64)
    assert (after.model_P - layout.flatten(plain)).abs().max() <= 1e-9


@pytest.mark.parametrize("algorithm", sweep(["fed-peft", "fed-avg"], quick=["fed-peft"]))
def test_the_mean_is_weighted_by_examples(gpt2_dir, text_dir, algorithm):
    data = DataConfig(str(text_dir), partition=PartitionConfig(documents_per_device=6, quantity_sigma=1.0))
    local = LocalConfig(2, sequence_length=32, max_steps=3, optimizer="sgd", learning_rate=0.1)
    world = everybody_has_everything(gpt2_dir, text_dir, 3, local=local, algorithm=algorithm, data=data)
    before, after = rounds(world, 1)
    layout, tasks = world.algorithm.layout, world.data.tasks([0, 1, 2], 1)
    assert len({task.num_examples for task in tasks}) == 3
    mean = torch.zeros(layout.num_elements, dtype=torch.float64)
    for task in tasks:
        start, steps = layout.unflatten(before.model_P), (task.arrays["tokens"], task.arrays["lengths"])
        if algorithm == "fed-avg":
            plain, _ = train_all_weights(gpt2_dir, start, steps, SGD, dtype=torch.float64)
        else:
            plain, _ = train_lora(gpt2_dir, start, steps, SGD, rank=LORA.rank, alpha=LORA.alpha, dtype=torch.float64)
        mean += task.num_examples / sum(task.num_examples for task in tasks) * layout.flatten(plain)
    assert (after.model_P - mean).abs().max() <= HALF_ULP


def test_client_batches_of_any_size_give_the_same_round_up_to_rounding(gpt2_dir, text_dir):
    local = LocalConfig(2, sequence_length=32, max_steps=3, learning_rate=2e-3)
    data = DataConfig(str(text_dir), partition=PartitionConfig(documents_per_device=6))
    ends = [
        rounds(everybody_has_everything(gpt2_dir, text_dir, 7, local=local, data=data, client_batch_size=size), 2)[2]
        for size in (1, 3, 7)
    ]
    assert all((end.model_P - ends[0].model_P).abs().max() <= HALF_ULP for end in ends)


DELTAS = (0.3, -0.02, 0.0, -1.5, 0.004)


def by_hand(config: ServerConfig, start: float) -> list[float]:
    """Reddi et al. 2021, algorithm 2, for one number; sgd is FedAvgM (Hsu et al. 2019, section 4)."""
    x, m, v, path = start, 0.0, config.tau**2, []
    for delta in DELTAS:
        if config.optimizer == "sgd":
            m = config.momentum * m + delta
            x = x + config.learning_rate * m
        else:
            m = config.momentum * m + (1 - config.momentum) * delta
            if config.optimizer == "adam":
                v = config.beta2 * v + (1 - config.beta2) * delta**2
            else:
                sign = (v > delta**2) - (v < delta**2)
                v = v - (1 - config.beta2) * delta**2 * sign
            x = x + config.learning_rate * m / (math.sqrt(v) + config.tau)
        path.append(x)
    return path


@pytest.mark.parametrize(
    "config",
    [
        ServerConfig(),
        ServerConfig("sgd", 0.5),
        ServerConfig("sgd", 0.7, momentum=0.9),
        ServerConfig("adam", 0.1, momentum=0.9, beta2=0.99, tau=1e-3),
        ServerConfig("adam", 0.1, momentum=0.0, beta2=0.9, tau=0.5),
        ServerConfig("yogi", 0.1, momentum=0.9, beta2=0.99, tau=1e-3),
        ServerConfig("yogi", 0.01, momentum=0.0, beta2=0.5, tau=1.0),
    ],
    ids=lambda config: f"{config.optimizer}-{config.momentum}-{config.tau}",
)
def test_the_server_steps_as_written_down(config):
    state = init_server(config, torch.tensor([1.0, -2.0], dtype=torch.float64))
    expected = [by_hand(config, start) for start in (1.0, -2.0)]
    for step, delta in enumerate(DELTAS):
        kept = state.model_P.clone(), {name: tensor.clone() for name, tensor in state.moments.items()}
        after = server_step(config, state, torch.full((2,), delta, dtype=torch.float64))
        assert state.model_P.equal(kept[0]), "a state is never changed"
        assert all(tensor.equal(kept[1][name]) for name, tensor in state.moments.items())
        assert after.model_P.tolist() == pytest.approx([path[step] for path in expected], rel=1e-13)
        state = after
    assert server_step(config, state, None) is state, "nobody completed: nothing moves"


def test_the_plain_mean_is_exact_to_the_last_bit_of_what_is_sent():
    start = torch.tensor([0.1, 3.0, -1e-8])
    state = init_server(ServerConfig(), start)
    target = torch.tensor([0.3, 2.9, 1e-8])
    after = server_step(ServerConfig(), state, target.double() - start.double())
    assert after.model_P.dtype == torch.float32 and after.model_P.equal(target) and not after.moments
