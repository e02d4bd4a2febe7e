"""Emulators of a model that is no language model: a vision transformer, from its ladder to the plug-in."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers import ViTConfig, ViTForImageClassification

from fedpeat_ray.aggregation.mean import MeanOverLevels
from fedpeat_ray.config import EmulatorConfig, LoraConfig
from fedpeat_ray.emulators.ladder import Ladder, build_ladder, emulated
from fedpeat_ray.records import ClientReport
from fedpeat_ray.trainable.lora import Lora, find_lora
from fedpeat_ray.trainable.part import stacked
from fedpeat_ray.training.adapters import StackedAdapter
from fedpeat_ray.training.client_batch import ClientUpdate

ENDS = EmulatorConfig(first=1, last=1, shares=(0.5,))
NUM_CLIENTS, NUM_IMAGES = 2, 6


@pytest.fixture
def model() -> ViTForImageClassification:
    """Six blocks on images of 16 tiles, in float64; frozen."""
    config = ViTConfig(
        hidden_size=32,
        num_hidden_layers=6,
        num_attention_heads=2,
        intermediate_size=48,
        image_size=16,
        patch_size=4,
        id2label=dict(enumerate(["red", "green", "blue"])),
    )
    model, rng = ViTForImageClassification(config), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if bool((parameter == 1).all()) else 0.0, 0.15, generator=rng)
    return model.double().requires_grad_(False).eval()


@pytest.fixture
def ladder(model: ViTForImageClassification) -> Ladder:
    return build_ladder(model, ENDS)


@pytest.fixture
def lora(model: ViTForImageClassification, ladder: Ladder) -> Lora:
    return find_lora(model, LoraConfig(rank=2, blocks=(*ladder.adapter_blocks, 3)))


def images(seed: int) -> tuple[Tensor, Tensor]:
    """Random images of three classes, which differ in how bright each colour is."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.arange(NUM_IMAGES) % 3
    bright = nn.functional.one_hot(labels, 3).double()[:, :, None, None]
    return bright + 0.5 * torch.randn(NUM_IMAGES, 3, 16, 16, generator=rng, dtype=torch.float64), labels


def losses(model: nn.Module, data: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Of each client (K,)."""
    logits = model(pixel_values=torch.cat([pixels for pixels, _ in data])).logits
    labels = torch.cat([labels for _, labels in data])
    each = nn.functional.cross_entropy(logits, labels, reduction="none")
    return each.view(len(data), -1).mean(dim=1)


def tune(model: ViTForImageClassification, lora: Lora, start_P: Tensor, data: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Eight steps of SGD of all clients at once."""
    theta_KP = start_P.double().repeat(len(data), 1).requires_grad_(True)
    optimizer = torch.optim.SGD([theta_KP], lr=0.2)
    with stacked(model, lora) as set_factors:
        for _ in range(8):
            set_factors(theta_KP)
            losses(model, data).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    return theta_KP.detach()


def test_a_ladder_keeps_both_ends_of_a_vision_transformer_and_a_view_is_the_shallower_model(model, ladder):
    assert [rung.blocks for rung in ladder.rungs] == [(0, 1, 4, 5), (0, 1, 2, 3, 4, 5)]
    pixels, _ = images(0)
    shallow = copy.deepcopy(model)
    blocks = shallow.get_submodule(ladder.block_list)
    shallow.set_submodule(ladder.block_list, nn.ModuleList([blocks.get_submodule(str(i)) for i in (0, 1, 4, 5)]))
    whole = model(pixel_values=pixels).logits
    with emulated(model, ladder.block_list, ladder.rungs[0]):
        assert model(pixel_values=pixels).logits.equal(shallow(pixel_values=pixels).logits)
        assert not model(pixel_values=pixels).logits.equal(whole)
    with emulated(model, ladder.block_list, ladder.rungs[-1]):
        assert model(pixel_values=pixels).logits.equal(whole)
    assert model(pixel_values=pixels).logits.equal(whole), "it is whole again"


def test_clients_of_a_batch_are_tuned_on_an_emulator_as_each_would_be_alone(model, ladder, lora):
    part = lora.within(ladder.block_list, ladder.rungs[0].blocks)
    assert {name.split(".")[2] for name, _, _ in part.modules} == {"0", "5"} and len(part.modules) == 2 * 6
    data = [images(seed) for seed in range(NUM_CLIENTS)]
    with emulated(model, ladder.block_list, ladder.rungs[0]):
        together = tune(model, part, part.init(0), data)
        alone = [tune(model, part, part.init(0), [own]) for own in data]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-9)
    assert not together[0].allclose(together[1])


def test_what_was_tuned_on_two_emulators_lowers_the_loss_of_the_whole_model(model, ladder, lora):
    adapter, start_P = StackedAdapter(lora), lora.init(0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trained, updates, places = {}, [], {}
    for level in (1, 2):
        part = ladder.part(adapter, level)
        places[level] = lora.layout.part(part.layout.names)[1]
        trained[level] = torch.zeros(lora.layout.num_elements, dtype=torch.bool)
        trained[level][places[level]] = True
        data = [images(10 * level + client) for client in range(NUM_CLIENTS)]
        with emulated(model, ladder.block_list, ladder.rungs[level - 1]):
            theta_KP = tune(model, part.part, start_P[places[level]], data)
        for client, theta_P in enumerate(theta_KP):
            delta_P = theta_P.double() - start_P[places[level]].double()
            report = ClientReport(client, None, None, 0.0)
            updates.append(ClientUpdate(report, float(level), delta_P, level))
    mean_P = MeanOverLevels(trained).add(updates).result()
    assert mean_P is not None and len(places[1]) < len(places[2]) == len(mean_P)
    in_block_3 = trained[2] & ~trained[1]
    whole = torch.zeros(4, lora.layout.num_elements, dtype=torch.float64)
    for row_P, update in zip(whole, updates, strict=True):
        row_P[places[update.level]] = update.delta_P
    by_hand = torch.where(in_block_3, (whole[2] + whole[3]) / 2, (whole[:2].sum(0) + 2 * whole[2:].sum(0)) / 6)
    torch.testing.assert_close(mean_P, by_hand, rtol=1e-12, atol=1e-15)

    unseen = [images(99)]
    untuned = losses(model, unseen)
    with torch.no_grad(), adapter.plugged(model, start_P.double() + mean_P):
        tuned = losses(model, unseen)
    assert tuned < 0.9 * untuned
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())
    assert losses(model, unseen).equal(untuned)
