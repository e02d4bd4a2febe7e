"""Training on the hosts' side against plain PyTorch and PEFT, a client at a time (plain_loops.py)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from plain_loops import TARGETS, Optimizer, train_all_weights, train_lora
from sweeps import sweep
from torch import Tensor
from transformers import AutoModelForCausalLM

from fedpeat_ray.config import LocalConfig, LoraConfig
from fedpeat_ray.models.foundation import Backbone, load_backbone, prepare, weights_layout
from fedpeat_ray.records import NON_FINITE, ClientTask, sequences
from fedpeat_ray.trainable.lora import Lora, find_lora
from fedpeat_ray.trainable.peft_files import peft_config
from fedpeat_ray.training.client_batch import ClientUpdate, TrainClientBatch
from fedpeat_ray.training.one_client import TrainAllWeights, TrainWithPeft

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT calls what transformers will rename

RANK, ALPHA, LEARNING_RATE = 3, 12.0, 2e-3
NUM_STEPS = (5, 1, 3, 4, 1, 2, 5, 3)  # of 8 clients, in no order
LOCAL = LocalConfig(learning_rate=LEARNING_RATE)
ADAMW = functools.partial(torch.optim.AdamW, lr=LEARNING_RATE, weight_decay=0.0)
SGD = functools.partial(torch.optim.SGD, lr=0.1)
Train = Callable[[Backbone, Tensor, Sequence[ClientTask]], list[ClientUpdate]]


def client_tasks() -> list[ClientTask]:
    """8 clients with data of their own, padding inside rows, and rows that are padding throughout."""
    rng = np.random.default_rng(0)
    tasks = []
    for device_id, num_steps in enumerate(NUM_STEPS):
        lengths_SB = rng.integers(2, 17, (num_steps, 3))
        lengths_SB[0, 0] = 16
        if device_id % 3 == 1:
            lengths_SB[:, 2] = 0
        tasks.append(
            ClientTask(device_id, device_id + 1, sequences(rng.integers(0, 250, (num_steps, 3, 16)), lengths_SB))
        )
    return tasks


def backbone_of(model_dir: Path, dtype: torch.dtype) -> Backbone:
    return load_backbone(prepare(str(model_dir), str(dtype).removeprefix("torch.")))


def start_of(lora: Lora) -> Tensor:
    """Both factors away from zero, as in the middle of a run."""
    return 0.1 * torch.randn(lora.layout.num_elements, generator=torch.Generator().manual_seed(1))


def largest_difference(
    model_dir: Path,
    train: type[TrainClientBatch | TrainWithPeft],
    local: LocalConfig,
    optimizer: Optimizer,
    **reference,
) -> float:
    """Over all clients and tensors, between our update and the reference's; losses are compared on the way."""
    dtype = reference["dtype"]
    backbone = backbone_of(model_dir, dtype)
    lora = find_lora(backbone.exact, LoraConfig(rank=RANK, alpha=ALPHA))
    start_P, tasks = start_of(lora), client_tasks()
    start = lora.layout.unflatten(start_P)
    updates = train(lora, local)(backbone, start_P, tasks)
    differences = []
    for task, update in zip(tasks, updates, strict=True):
        steps = (task.arrays["tokens"], task.arrays["lengths"])
        expected, loss = train_lora(model_dir, start, steps, optimizer, rank=RANK, alpha=ALPHA, **reference)
        assert update.report.device_id == task.device_id and update.weight == task.num_examples
        assert update.report.failure is None
        assert update.report.train_loss == pytest.approx(loss, rel=1e-5 if dtype == torch.float32 else 1e-12)
        for name, delta in lora.layout.unflatten(update.delta_P).items():
            assert delta.abs().max() > 1e-4, f"{name} was not trained"
            differences.append((start[name].double() + delta - expected[name].double()).abs().max().item())
    return max(differences)


@pytest.mark.parametrize("train", [TrainClientBatch, TrainWithPeft])
def test_adamw_in_float64_gives_each_client_what_plain_peft_gives_it_alone(model_dir, train):
    local = LocalConfig(optimizer="adamw", learning_rate=LEARNING_RATE)
    assert largest_difference(model_dir, train, local, ADAMW, dtype=torch.float64) <= 1e-9


@pytest.mark.parametrize("train", [TrainClientBatch, TrainWithPeft])
def test_sgd_in_float32_gives_each_client_what_plain_peft_gives_it_alone(model_dir, train):
    local = LocalConfig(optimizer="sgd", learning_rate=0.1)
    assert largest_difference(model_dir, train, local, SGD, dtype=torch.float32) <= 1e-5


@pytest.mark.parametrize("train", [TrainClientBatch, TrainWithPeft])
@pytest.mark.parametrize("name", sweep(["adamw", "sgd"], quick=["adamw"]))
def test_weight_decay_is_that_of_torch(gpt2_dir, train, name):
    kind = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[name]
    local = LocalConfig(optimizer=name, learning_rate=0.01, weight_decay=0.3)
    optimizer = functools.partial(kind, lr=0.01, weight_decay=0.3)
    assert largest_difference(gpt2_dir, train, local, optimizer, dtype=torch.float64) <= 1e-9


@pytest.mark.parametrize("train", [TrainClientBatch, TrainWithPeft])
def test_the_fedprox_term_is_the_gradient_of_half_mu_times_the_squared_distance(gpt2_dir, train):
    local = LocalConfig(optimizer="sgd", learning_rate=0.1, prox_mu=2.0)
    assert largest_difference(gpt2_dir, train, local, SGD, dtype=torch.float64, mu=2.0) <= 1e-9


@pytest.mark.parametrize(
    ("optimizer", "mu"), sweep([("adamw", 0.0), ("sgd", 0.0), ("sgd", 2.0)], quick=[("adamw", 0.0)])
)
def test_full_fine_tuning_gives_what_a_plain_loop_gives(model_dir, optimizer, mu):
    backbone = backbone_of(model_dir, torch.float64)
    layout = weights_layout(backbone.exact)
    kept = {name: tensor.clone() for name, tensor in backbone.exact.state_dict().items()}
    start_P = layout.flatten(backbone.exact.state_dict())
    start_P = start_P + 0.01 * torch.randn(len(start_P), generator=torch.Generator().manual_seed(1))
    rate = {"adamw": LEARNING_RATE, "sgd": 0.1}[optimizer]
    local = LocalConfig(optimizer=optimizer, learning_rate=rate, prox_mu=mu)
    tasks = client_tasks()[:3]
    updates = TrainAllWeights(layout, local)(backbone, start_P, tasks)
    for task, update in zip(tasks, updates, strict=True):
        start, steps = layout.unflatten(start_P), (task.arrays["tokens"], task.arrays["lengths"])
        plain = {"adamw": ADAMW, "sgd": SGD}[optimizer]
        expected, loss = train_all_weights(model_dir, start, steps, plain, dtype=torch.float64, mu=mu)
        assert update.report.train_loss == pytest.approx(loss, rel=1e-12)
        difference = start_P + update.delta_P - layout.flatten(expected)
        assert difference.abs().max() <= 1e-9 and update.delta_P.abs().max() > 1e-4
    for name, tensor in backbone.exact.state_dict().items():
        assert tensor.equal(kept[name]) and not tensor.requires_grad, f"{name} is not as it was"


@pytest.mark.parametrize("train", [TrainClientBatch, TrainWithPeft])
def test_training_leaves_the_backbone_as_it_was(model_dir, train):
    backbone = backbone_of(model_dir, torch.float32)
    lora = find_lora(backbone.exact, LoraConfig(rank=RANK))
    modules = {name: type(module) for name, module in backbone.exact.named_modules()}
    kept = {name: tensor.clone() for name, tensor in backbone.exact.state_dict().items()}
    train(lora, LOCAL)(backbone, lora.init(0), client_tasks())
    assert {name: type(module) for name, module in backbone.exact.named_modules()} == modules
    assert all(tensor.equal(kept[name]) for name, tensor in backbone.exact.state_dict().items())
    assert not any(parameter.requires_grad for parameter in backbone.exact.parameters())
    assert all(parameter.grad is None for parameter in backbone.exact.parameters())


def test_lora_starts_and_scales_as_in_peft(model_dir):
    base = AutoModelForCausalLM.from_pretrained(model_dir)
    family = base.config.model_type
    lora = find_lora(base, LoraConfig(rank=64, alpha=ALPHA))
    ours = lora.layout.unflatten(lora.init(0))
    config = PeftLoraConfig(r=64, lora_alpha=12, target_modules=TARGETS[family], fan_in_fan_out=family == "gpt2")
    theirs = get_peft_model(base, config).state_dict()
    assert {name for name in theirs if "lora_" in name} == {
        f"base_model.model.{name.removesuffix('weight')}default.weight" for name in ours
    }
    for name, width_in, _ in lora.modules:
        factor, bound = ours[f"{name}.lora_A.weight"], width_in**-0.5
        other = theirs[f"base_model.model.{name}.lora_A.default.weight"]
        assert factor.shape == other.shape
        for a in (factor, other):  # the same statistics of either: uniform in +-1/sqrt(I)
            assert 0.99 * bound < a.abs().max() <= bound
            assert a.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
            assert abs(a.mean().item()) < 0.05 * bound
        assert not ours[f"{name}.lora_B.weight"].any()
        assert not theirs[f"base_model.model.{name}.lora_B.default.weight"].any()
    layer = get_peft_model(AutoModelForCausalLM.from_pretrained(model_dir), config).get_submodule(
        f"base_model.model.{lora.modules[0][0]}"
    )
    assert layer.scaling["default"] == lora.scaling  # type: ignore[index]  # a dict, not a module


def test_every_module_starts_with_draws_of_its_own_whatever_else_is_adapted(gpt2_dir):
    model = backbone_of(gpt2_dir, torch.float32).exact
    everything, some = (find_lora(model, LoraConfig(targets=targets)) for targets in ((), ("c_fc",)))
    tensors = everything.layout.unflatten(everything.init(3))
    for name, tensor in some.layout.unflatten(some.init(3)).items():
        assert tensor.equal(tensors[name])
    factors = [tensors[f"transformer.h.{block}.mlp.c_fc.lora_A.weight"] for block in (0, 1)]
    assert not factors[0].equal(factors[1])
    assert not everything.init(3).equal(everything.init(4))
    assert set(peft_config(some).to_dict()["target_modules"] or ()) == {name for name, _, _ in some.modules}


@pytest.mark.parametrize("train", [TrainClientBatch, TrainWithPeft])
def test_what_stands_in_padding_changes_nothing(model_dir, train):
    backbone = backbone_of(model_dir, torch.float32)
    lora = find_lora(backbone.exact, LoraConfig(rank=RANK))
    train_batch, start_P, tasks = train(lora, LOCAL), start_of(lora), client_tasks()
    other = []
    for task in tasks:
        padding = np.arange(16) >= task.arrays["lengths"][..., None]
        assert padding.any()
        other.append(
            dataclasses.replace(
                task, arrays=sequences(np.where(padding, 99, task.arrays["tokens"]), task.arrays["lengths"])
            )
        )
    one, two = train_batch(backbone, start_P, tasks), train_batch(backbone, start_P, other)
    for a, b in zip(one, two, strict=True):
        assert a.delta_P.equal(b.delta_P) and a.report.train_loss == b.report.train_loss


@pytest.mark.parametrize("train", [TrainClientBatch, TrainWithPeft])
def test_more_padding_changes_nothing(gpt2_dir, train):
    backbone = backbone_of(gpt2_dir, torch.float64)
    lora = find_lora(backbone.exact, LoraConfig(rank=RANK))
    train_batch, start_P, tasks = train(lora, LOCAL), start_of(lora), client_tasks()
    padded = [
        dataclasses.replace(
            task,
            arrays=sequences(
                np.pad(task.arrays["tokens"], ((0, 0), (0, 2), (0, 5))),
                np.pad(task.arrays["lengths"], ((0, 0), (0, 2))),
            ),
        )
        for task in tasks
    ]
    for a, b in zip(train_batch(backbone, start_P, tasks), train_batch(backbone, start_P, padded), strict=True):
        assert (a.delta_P - b.delta_P).abs().max() <= 1e-9


@pytest.mark.parametrize("train", [TrainClientBatch, TrainWithPeft])
def test_a_step_without_a_token_to_predict_trains_nothing(gpt2_dir, train):
    backbone = backbone_of(gpt2_dir, torch.float32)
    lora = find_lora(backbone.exact, LoraConfig(rank=RANK))
    empty = ClientTask(0, 1, sequences(np.zeros((2, 3, 16), np.int64), np.array([[0, 1, 0], [0, 0, 0]])))
    (update, other) = train(lora, LOCAL)(backbone, start_of(lora), [empty, client_tasks()[0]])
    assert not update.delta_P.any() and update.report.train_loss == 0.0 and update.report.failure is None
    assert other.delta_P.any()


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_client_that_diverges_is_reported_and_the_others_keep_every_bit(llama_dir, poison):
    backbone = backbone_of(llama_dir, torch.float32)
    lora = find_lora(backbone.exact, LoraConfig(rank=RANK))
    train_batch, start_P, tasks = (
        TrainClientBatch(lora, LOCAL),
        start_of(lora),
        client_tasks(),
    )
    tasks[3].arrays["tokens"][0, 0, 2] = 255  # in nobody else's data
    healthy = train_batch(backbone, start_P, tasks)
    with torch.no_grad():
        backbone.training.get_parameter("model.embed_tokens.weight")[255] = poison
    poisoned = train_batch(backbone, start_P, tasks)
    for task, before, after in zip(tasks, healthy, poisoned, strict=True):
        assert before.report.failure is None
        if task.device_id == 3:
            assert after.report.failure == NON_FINITE
        else:
            assert after.report.failure is None and after.report.train_loss == before.report.train_loss
            assert after.delta_P.equal(before.delta_P)


@pytest.mark.parametrize("train", [TrainClientBatch, TrainWithPeft])
def test_a_learning_rate_that_is_far_too_high_fails_only_who_goes_on_from_there(gpt2_dir, train):
    backbone = backbone_of(gpt2_dir, torch.float32)
    lora = find_lora(backbone.exact, LoraConfig(rank=RANK))
    local = LocalConfig(optimizer="sgd", learning_rate=1e7)
    updates = train(lora, local)(backbone, start_of(lora), client_tasks())
    assert [update.report.failure for update in updates] == [None if n == 1 else NON_FINITE for n in NUM_STEPS]
    assert all(update.delta_P.isfinite().all() for update in updates if update.report.failure is None)


@pytest.mark.parametrize("train", [TrainClientBatch, TrainWithPeft])
def test_a_huge_update_is_no_update_even_if_it_is_finite(gpt2_dir, train):
    backbone = backbone_of(gpt2_dir, torch.float32)
    lora = find_lora(backbone.exact, LoraConfig(rank=RANK))
    updates = train(lora, LocalConfig(learning_rate=3e37))(backbone, start_of(lora), client_tasks()[1:2])
    assert [update.report.failure for update in updates] == [NON_FINITE] and updates[0].delta_P.isfinite().all()


def test_full_fine_tuning_that_diverges_is_reported_and_the_next_client_starts_clean(gpt2_dir):
    backbone = backbone_of(gpt2_dir, torch.float32)
    layout = weights_layout(backbone.exact)
    start_P, tasks = layout.flatten(backbone.exact.state_dict()), client_tasks()
    train_all = TrainAllWeights(layout, LocalConfig(optimizer="sgd", learning_rate=1e5))
    failed, alone = train_all(backbone, start_P, [tasks[0], tasks[1]])
    assert failed.report.failure == NON_FINITE
    (expected,) = train_all(backbone, start_P, [tasks[1]])
    assert alone.report.failure is None and alone.delta_P.equal(expected.delta_P)
