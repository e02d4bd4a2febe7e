"""Emulators: which blocks a level keeps, what the view computes, what it weighs, and how it learns."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import math
import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from fedpeat_ray.aggregation.mean import MeanOverLevels
from fedpeat_ray.config import DistilConfig, EmulatorConfig, LocalConfig, LoraConfig
from fedpeat_ray.control.fixed import Fixed
from fedpeat_ray.control.greedy import Greedy
from fedpeat_ray.control.plan import Prospects
from fedpeat_ray.control.random import Random
from fedpeat_ray.emulators.distillation import distil, distillation_loss, learning_rate_factor
from fedpeat_ray.emulators.ladder import (
    Ladder,
    Rung,
    build_ladder,
    eight_bit,
    emulated,
    emulator_shapes,
    load_blocks,
    numbers,
    on_emulator,
    uniform_blocks,
)
from fedpeat_ray.emulators.on_emulators import BlockInfluence, MiddleOutput, OnEmulators
from fedpeat_ray.errors import ConfigError, ModelError
from fedpeat_ray.models import foundation as foundations
from fedpeat_ray.models import weight_files
from fedpeat_ray.models.layout import Layout
from fedpeat_ray.records import NON_FINITE, Arrays, ClientReport, ClientTask, sequences
from fedpeat_ray.tasks.language_modelling import LANGUAGE_MODELLING
from fedpeat_ray.trainable.lora import find_lora
from fedpeat_ray.training.adapters import StackedAdapter
from fedpeat_ray.training.client_batch import ClientUpdate

ENDS = EmulatorConfig(first=1, last=1, shares=(0.2, 0.6))  # of five blocks between: one, three, all
BLOCKS = {"gpt2": "transformer.h", "llama": "model.layers"}


def plain(model_dir: Path) -> PreTrainedModel:
    """The model as transformers loads it, with the kernels that are taken here."""
    kernels = {} if torch.cuda.is_available() else {"attn_implementation": "eager"}
    config = {"activation_function": "gelu_pytorch_tanh"} if "gpt2" in str(model_dir) else {}
    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, **kernels, **config).eval()


def plain_emulator(model_dir: Path, kept: tuple[int, ...], stand_ins: dict[int, nn.Module] | None = None) -> nn.Module:
    """A plain model that was never deeper: its blocks are copies of those that are kept."""
    whole = plain(model_dir)
    config = copy.deepcopy(whole.config)
    config.num_hidden_layers = len(kept)
    model = type(whole)._from_config(config).eval()
    name = BLOCKS[config.model_type]
    state = {key: tensor for key, tensor in whole.state_dict().items() if not key.startswith(name)}
    for number, block in enumerate(kept):
        source = (stand_ins or {}).get(block) or whole.get_submodule(f"{name}.{block}")
        state |= {f"{name}.{number}.{key}": tensor for key, tensor in source.state_dict().items()}
    model.load_state_dict(state)
    return model


def text(num_batches: int, batch_size: int = 4, length: int = 20, seed: int = 0) -> list[Arrays]:
    """Random tokens, the last row of each batch half padding."""
    rng = np.random.default_rng(seed)
    lengths = np.full(batch_size, length)
    lengths[-1] = length // 2
    return [sequences(rng.integers(0, 250, (batch_size, length)), lengths) for _ in range(num_batches)]


def valid(batch: Arrays) -> Tensor:
    return torch.from_numpy(np.arange(batch["tokens"].shape[1]) < batch["lengths"][:, None])


@pytest.fixture
def model(deep_dir: Path) -> PreTrainedModel:
    return foundations.load(foundations.prepare(str(deep_dir), "float32"))


@pytest.fixture
def ladder(model: PreTrainedModel) -> Ladder:
    return build_ladder(model, ENDS)


# Which blocks are kept


@pytest.mark.parametrize(
    ("depth", "kept", "expected"),
    [
        (12, 4, (0, 4, 7, 11)),
        (12, 6, (0, 2, 4, 7, 9, 11)),
        (8, 3, (0, 4, 7)),
        (7, 2, (0, 6)),
        (5, 5, (0, 1, 2, 3, 4)),
        (5, 1, (2,)),
        (1, 1, (0,)),
        (5, 0, ()),
    ],
)
def test_evenly_spread_blocks_are_those_of_offsite_tuning(depth, kept, expected):
    assert uniform_blocks(depth, kept) == expected


@pytest.mark.parametrize(
    ("num_blocks", "expected"),
    [
        (2, (1, 0, (0.25,))),
        (3, (1, 1, (0.25,))),
        (4, (1, 1, (0.25, 0.5))),
        (6, (1, 1, (0.25, 0.5, 0.75))),
        (7, (1, 1, (0.25, 0.5, 0.75))),
        (8, (2, 2, (0.25, 0.5, 0.75))),
        (80, (2, 2, (0.25, 0.5, 0.75))),
    ],
)
def test_the_ladder_suits_the_depth_of_the_model(num_blocks, expected):
    first, last, shares = numbers(EmulatorConfig(), num_blocks)
    assert (first, last, shares) == expected
    kept = [round(share * (num_blocks - first - last)) for share in shares]
    assert sorted({*kept}) == kept and kept[-1] < num_blocks - first - last
    assert numbers(EmulatorConfig(first=first, last=last, shares=(0.9,)), num_blocks) == (first, last, (0.9,))


def test_a_ladder_that_does_not_fit_names_the_numbers_that_work():
    with pytest.raises(ConfigError, match=r"use --emulator\.first 1 --emulator\.last 1, or --algorithm fed-peft$"):
        numbers(EmulatorConfig(first=2, last=2), 4)
    with pytest.raises(ConfigError, match=r"emulator\.first = 2 .* 1 blocks, .*; use --algorithm fed-peft$"):
        numbers(EmulatorConfig(), 1)


def test_evenly_spread_blocks_have_both_ends_and_lie_within_half_a_block_of_even():
    for depth in range(2, 25):
        for kept in range(2, depth + 1):
            blocks = uniform_blocks(depth, kept)
            assert len(set(blocks)) == kept and list(blocks) == sorted(blocks)
            assert (blocks[0], blocks[-1]) == (0, depth - 1)
            even = [Fraction(i * (depth - 1), kept - 1) for i in range(kept)]
            assert all(abs(block - place) <= Fraction(1, 2) for block, place in zip(blocks, even, strict=True))


def test_a_ladder_keeps_the_adapter_blocks_on_every_level_and_ends_with_the_foundation(model, ladder):
    assert ladder.block_list == BLOCKS[model.config.model_type]
    assert [rung.blocks for rung in ladder.rungs] == [(0, 3, 6), (0, 1, 3, 5, 6), (0, 1, 2, 3, 4, 5, 6)]
    assert (ladder.top, ladder.adapter_blocks, ladder.middle_blocks) == (3, (0, 6), (1, 2, 3, 4, 5))
    assert [ladder.kept_middle(level) for level in (1, 2, 3)] == [(3,), (1, 3, 5), (1, 2, 3, 4, 5)]
    one_sided = build_ladder(model, EmulatorConfig(first=0, last=2, shares=(0.0, 0.4)))
    assert [rung.blocks for rung in one_sided.rungs] == [(5, 6), (0, 4, 5, 6), (0, 1, 2, 3, 4, 5, 6)]
    assert one_sided.adapter_blocks == (5, 6)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"first": 4, "last": 3}, "emulator.first = 4 is not allowed: with emulator.last = 3, fewer than 7 blocks"),
        ({"shares": (0.6, 0.2)}, "emulator.shares = (0.6, 0.2) is not allowed: rising shares"),
        ({"shares": (0.4, 0.42)}, "different numbers of the 5 middle blocks, not [2, 2]"),
        ({"shares": (0.5, 0.95)}, "different numbers of the 5 middle blocks, not [2, 5]"),
    ],
)
def test_levels_that_the_depth_does_not_allow_are_refused(model, settings, said):
    config = EmulatorConfig(**({"first": 1, "last": 1} | settings))
    with pytest.raises(ConfigError, match=re.escape(said)) as caught:
        build_ladder(model, config)
    assert "\n" not in str(caught.value)


def test_blocks_of_several_kinds_are_refused():
    config = Qwen2Config(
        vocab_size=50,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        use_sliding_window=True,
        max_window_layers=2,
    )
    with pytest.raises(ModelError, match=r"^Qwen2ForCausalLM has blocks of several kinds: none can be left out$"):
        build_ladder(Qwen2ForCausalLM(config), ENDS)


def test_influence_is_how_far_a_block_turns_what_goes_through_it(deep_dir, ladder):
    backbone = foundations.load_backbone(foundations.prepare(str(deep_dir), "float32"))
    batches = text(2)
    results = BlockInfluence(ladder, LANGUAGE_MODELLING)(backbone, None, batches)
    reference, ends = plain(deep_dir), []
    norm = reference.get_submodule("transformer.ln_f" if "gpt2" in str(deep_dir) else "model.norm")
    norm.register_forward_pre_hook(lambda _, arguments: ends.append(arguments[0]))  # the last block's own output
    for result, batch in zip(results, batches, strict=True):
        with torch.no_grad():
            states = reference(input_ids=torch.from_numpy(batch["tokens"]), output_hidden_states=True).hidden_states
        states = [*states[:-1], ends.pop()]
        expected = []
        for before, after in itertools.pairwise(states):
            a, b = before[valid(batch)].double(), after[valid(batch)].double()
            expected.append((1 - (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))).mean().item())
        assert result.value == pytest.approx(expected, abs=1e-5) and len(expected) == 7
        assert max(expected) > 1.2 * min(expected) > 0


def test_a_ladder_by_influence_keeps_the_middle_blocks_with_the_highest_scores(model):
    influence = [9.0, 0.1, 0.4, 0.2, 0.4, 0.3, 9.0]
    ladder = build_ladder(model, ENDS, influence)
    assert [rung.blocks for rung in ladder.rungs] == [(0, 2, 6), (0, 2, 4, 5, 6), (0, 1, 2, 3, 4, 5, 6)]


# What the view computes


def assert_same_weights(ours: PreTrainedModel, theirs: nn.Module) -> None:
    """Bit for bit, under the same names."""
    state, expected = ours.state_dict(), theirs.state_dict()
    assert state.keys() == expected.keys() and all(state[name].equal(tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("level", [1, 2, 3])
def test_an_emulator_is_the_plain_model_that_has_its_blocks_only(deep_dir, model, ladder, level):
    rung = ladder.rungs[level - 1]
    model.double()  # products of matrices have last bits that depend on where in memory these lie
    before = dict(model.named_parameters())
    tokens = torch.from_numpy(text(1)[0]["tokens"])
    with torch.no_grad(), emulated(model, ladder.block_list, rung):
        logits = model(input_ids=tokens).logits
        kept = {name for name, _ in model.named_parameters()}
    assert {int(name.split(".")[2]) for name in kept if name.startswith(ladder.block_list)} == set(rung.blocks)
    assert kept <= before.keys(), "the view has the foundation's names"
    reference = plain_emulator(deep_dir, rung.blocks).double()
    with torch.no_grad():
        whole = model(input_ids=tokens).logits
        for found, theirs in ((logits, reference), (whole, plain(deep_dir).double())):
            # LLaMA rounds to float32 on the way, which a sum in another order can tip
            torch.testing.assert_close(found, theirs(input_ids=tokens).logits, rtol=0, atol=2**-20)
    assert logits.equal(whole) == (level == ladder.top)
    after = dict(model.named_parameters())
    assert list(after) == list(before) and all(after[name] is before[name] for name in before)


def test_the_model_is_whole_again_after_an_error_on_an_emulator(model, ladder):
    blocks = model.get_submodule(ladder.block_list)
    with pytest.raises(KeyError), emulated(model, ladder.block_list, ladder.rungs[0]):
        raise KeyError
    assert model.get_submodule(ladder.block_list) is blocks and len(list(blocks.children())) == 7


def test_blocks_with_weights_of_their_own_stand_in_for_the_models_in_both_types(deep_dir, ladder, tmp_path):
    backbone = foundations.load_backbone(foundations.prepare(str(deep_dir), "bfloat16"))
    weights, other = {}, plain(deep_dir)
    for number in (1, 3, 5):
        for name, parameter in other.get_submodule(f"{ladder.block_list}.{number}").named_parameters():
            parameter.data = parameter.data * 1.5 + 0.01
            weights[f"{ladder.block_list}.{number}.{name}"] = parameter.data.contiguous()
    save_file(weights, tmp_path / "blocks.safetensors")
    other.save_pretrained(tmp_path / "other")
    expected = foundations.load_backbone(foundations.prepare(str(tmp_path / "other"), "bfloat16"))
    rung = Rung(2, ladder.rungs[1].blocks, tmp_path / "blocks.safetensors")
    own, tokens = Rung(2, rung.blocks), torch.from_numpy(text(1)[0]["tokens"])
    with torch.no_grad():
        with on_emulator(expected, ladder.block_list, own):
            logits = expected.exact(input_ids=tokens).logits
            for _ in range(2):  # the second time they are there already
                with on_emulator(backbone, ladder.block_list, rung):
                    assert_same_weights(backbone.exact, expected.exact)
                    assert_same_weights(backbone.training, expected.training)
                    assert backbone.training(input_ids=tokens).logits.dtype == torch.bfloat16
                    # sums of up to 128 products in float32, each of them rounded, of numbers not far from 1
                    torch.testing.assert_close(backbone.exact(input_ids=tokens).logits, logits, rtol=0, atol=2**-14)
                    names = dict(backbone.exact.named_parameters()).keys()
                    assert weights.keys() <= names, "under the foundation's names"
        assert_same_weights(backbone.exact, plain(deep_dir))


def test_a_block_that_stands_in_is_made_like_the_one_of_its_number(deep_gpt2_dir, tmp_path):
    foundation = foundations.prepare(str(deep_gpt2_dir), "float32")
    values = json.loads(foundation.config_json) | {"scale_attn_by_inverse_layer_idx": True}
    model = foundations.load(dataclasses.replace(foundation, config_json=json.dumps(values)))
    own = {
        name: t for name, t in model.state_dict().items() if name.startswith(("transformer.h.2.", "transformer.h.4."))
    }
    save_file(own, tmp_path / "blocks.safetensors")
    rung, tokens = Rung(1, (0, 2, 4, 6)), torch.from_numpy(text(1)[0]["tokens"])
    with torch.no_grad():
        with emulated(model, "transformer.h", rung):
            expected = model(input_ids=tokens).logits
        with emulated(
            model, "transformer.h", rung, load_blocks(model, "transformer.h", tmp_path / "blocks.safetensors")
        ):
            assert model(input_ids=tokens).logits.equal(expected)


# What it weighs


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_eight_bits_are_off_by_half_a_step_of_the_row_at_most(scale):
    matrix = scale * torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    matrix[2] = 0.0
    matrix[3, 1:] *= 1e-3
    entries = eight_bit("m", matrix)
    codes, scales = entries["m"], entries["m.scale"]
    assert (codes.dtype, scales.dtype, scales.shape) == (torch.int8, torch.float32, (6,))
    step = matrix.abs().amax(dim=1) / 127
    error = (codes.double() * scales.double()[:, None] - matrix.double()).abs()
    assert (error <= 0.5 * step[:, None].double() * (1 + 1e-5)).all() and not error[2].any()
    assert (codes.abs().amax(dim=1) == torch.tensor([127, 127, 0, 127, 127, 127])).all()
    vector = torch.randn(4)
    assert list(eight_bit("v", vector)) == ["v"] and eight_bit("v", vector)["v"] is vector


def test_blocks_from_an_eight_bit_file_are_the_models_up_to_half_a_step_of_each_row(model, ladder, tmp_path):
    entries, bytes_of_data = {}, 0
    block = model.get_submodule(f"{ladder.block_list}.3")
    for name, tensor in block.state_dict().items():
        entries |= eight_bit(f"{ladder.block_list}.3.{name}", tensor)
        bytes_of_data += tensor.numel() + 4 * len(tensor) if tensor.ndim == 2 else 4 * tensor.numel()
    save_file(entries, tmp_path / "8bit.safetensors")
    assert sum(tensor.nbytes for tensor in load_file(tmp_path / "8bit.safetensors").values()) == bytes_of_data
    (number,), (loaded,) = zip(
        *load_blocks(model, ladder.block_list, tmp_path / "8bit.safetensors").items(), strict=True
    )
    assert number == 3 and not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    for name, tensor in block.state_dict().items():
        got = loaded.state_dict()[name]
        bound = tensor.abs().amax(dim=-1, keepdim=True) / 254 * (1 + 1e-5) if tensor.ndim == 2 else 0.0
        assert got.dtype == tensor.dtype and ((got - tensor).abs() <= bound).all()
        assert tensor.ndim == 1 or not got.equal(tensor)


@pytest.mark.parametrize("quantise", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("level", [1, 2, 3])
def test_the_size_of_an_emulator_is_that_of_a_file_with_its_tensors(deep_dir, ladder, level, dtype, quantise, tmp_path):
    model, kept = plain(deep_dir), ladder.rungs[level - 1].blocks
    real = {}
    for name, parameter in model.named_parameters():  # a tied head once
        block = int(name.split(".")[2]) if name.startswith(ladder.block_list) else None
        if block is None or block in kept:
            quantised = quantise and block in (1, 2, 3, 4, 5)
            real |= eight_bit(name, parameter.data) if quantised else {name: parameter.data}
    held = {n: t if n + ".scale" in real or n.endswith(".scale") else t.to(dtype) for n, t in real.items()}
    save_file({name: tensor.contiguous() for name, tensor in held.items()}, tmp_path / "emulator.safetensors")
    whole = weight_files.shapes_of(foundations.prepare(str(deep_dir), "float32").weights)
    shapes = emulator_shapes(whole, ladder, level, dtype, quantise)
    assert shapes == {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in held.items()}
    assert weight_files.num_bytes(shapes) == (tmp_path / "emulator.safetensors").stat().st_size


# What is trained where


def test_a_part_of_a_layout_has_its_tensors_in_their_order_and_knows_their_places():
    layout = Layout(("a", "b", "c", "d"), ((2, 2), (3,), (1, 2), (1,)))
    part, places = layout.part(("d", "b"))
    assert part == Layout(("b", "d"), ((3,), (1,))) and places.tolist() == [4, 5, 6, 9]
    assert part.unflatten(torch.arange(10.0)[places])["d"].tolist() == [9.0]
    nothing, places = layout.part(())
    assert nothing.num_elements == len(places) == 0
    assert layout.part(layout.names)[0] == layout


def test_lora_within_some_blocks_is_what_lora_on_these_blocks_alone_would_be(model, ladder):
    everywhere = find_lora(model, LoraConfig(rank=3))
    within = everywhere.within(ladder.block_list, (1, 5))
    assert within == find_lora(model, LoraConfig(rank=3, blocks=(1, 5)))
    places = everywhere.layout.part(within.layout.names)[1]
    assert everywhere.init(seed=4)[places].equal(within.init(seed=4))
    adapter = StackedAdapter(everywhere)
    assert [len(ladder.part(adapter, level).part.modules) for level in (1, 2, 3)] == [
        len(everywhere.modules) * kept // 7 for kept in (3, 5, 7)
    ]


TRAINED = {1: torch.tensor([True, False, True]), 2: torch.tensor([True, True, True])}


def update(weight: float, delta: list[float], level: int | None, failure: str | None = None) -> ClientUpdate:
    report = ClientReport(0, 1.0, failure, 0.0)
    return ClientUpdate(report, weight, torch.tensor(delta, dtype=torch.float64), level)


def test_a_mean_over_levels_counts_for_each_element_only_those_that_trained_it():
    zero = MeanOverLevels(TRAINED)
    updates = [
        update(2.0, [1.0, -4.0], 1),  # what its level has
        update(6.0, [3.0, 5.0, 0.0], 2),
        update(8.0, [9.0, 9.0, 9.0], 2, NON_FINITE),
        update(4.0, [0.0, 1.0, 6.0], None),  # the server's own
    ]
    mean = zero.add(updates[:2]).merge(zero.add(updates[2:])).result()
    assert mean is not None
    assert mean.tolist() == [(2 + 18 + 0) / 12, (30 + 4) / 10, (-8 + 0 + 24) / 12]
    only_small = zero.add(updates[:1]).result()
    assert only_small is not None and only_small.tolist() == [1.0, 0.0, -4.0], "what nobody trained does not move"
    assert zero.result() is None and zero.add([updates[2]]).result() is None


def test_the_mean_over_levels_is_a_monoid_that_is_never_changed():
    zero, rng = MeanOverLevels(TRAINED), np.random.default_rng(0)
    updates = [  # small integers: exact in any order
        update(float(rng.integers(1, 9)), rng.integers(-9, 9, 2 if level == 1 else 3).astype(float).tolist(), level)
        for level in (1, 2, None, 1, 2, 2, 1, None, 1)
    ]
    a, b, c = (zero.add(updates[i : i + 3]) for i in (0, 3, 6))
    results = [
        zero.add(updates).result(),
        a.merge(b).merge(c).result(),
        a.merge(b.merge(c)).result(),
        zero.merge(c).merge(a).merge(b).merge(zero).result(),
    ]
    assert all(result is not None and result.equal(results[0]) for result in results)  # type: ignore[arg-type]
    assert zero.result() is None and not zero.means


def test_the_work_on_a_level_comes_back_as_what_that_level_has_and_no_more(deep_dir, ladder):
    backbone = foundations.load_backbone(foundations.prepare(str(deep_dir), "float32"))
    adapter = StackedAdapter(find_lora(backbone.exact, LoraConfig(rank=2, blocks=(0, 1, 6))))
    local = LocalConfig(optimizer="sgd", learning_rate=0.5)
    parts = [ladder.part(adapter, level) for level in (1, 2, 3)]
    places = [adapter.layout.part(part.layout.names)[1] for part in parts]
    train = OnEmulators(
        ladder,
        adapter.trainer(local),
        tuple((part.trainer(local), where) for part, where in zip(parts, places, strict=True)),
    )
    batch, start_P = text(1)[0], adapter.init(0)
    tasks = [
        ClientTask(i, 4, sequences(batch["tokens"][None], batch["lengths"][None]), level)
        for i, level in enumerate((1, 2, 2, None))
    ]
    updates = train(backbone, start_P, tasks)
    assert [(update.report.device_id, update.level) for update in updates] == [(0, 1), (1, 2), (2, 2), (3, None)]
    layouts = [parts[update.level - 1].layout if update.level else adapter.layout for update in updates]
    moved = [layout.unflatten(update.delta_P) for layout, update in zip(layouts, updates, strict=True)]
    blocks = [{name.split(".")[2] for name in delta if delta[name].any()} for delta in moved]
    assert len(updates[0].delta_P) < len(updates[1].delta_P) == adapter.layout.num_elements
    assert blocks == [{"0", "6"}, {"0", "1", "6"}, {"0", "1", "6"}, {"0", "1", "6"}]
    assert updates[1].delta_P.allclose(updates[2].delta_P) and not updates[2].delta_P.allclose(updates[3].delta_P)


# Who decides


def prospects(
    memory: list[int], caps: list[int], total_s: Sequence[Sequence[float]], deadline_s: float | None
) -> Prospects:
    return Prospects(np.array(memory), np.array(caps), np.array(total_s), np.zeros(len(caps), int), deadline_s)


def test_a_fixed_level_is_everybodys_whatever_they_are():
    seen = prospects([5, 9], [1, 7, 10], [[1.0, 2.0]] * 3, 1.5)
    assert Fixed(2).act(1, np.array([3, 4, 8]), seen, {}).tolist() == [2, 2, 2]


def test_greedy_takes_the_largest_that_fits_memory_and_deadline_and_else_the_smallest():
    seen = prospects([5, 9, 12], [4, 5, 11, 12, 99, 99], [[1, 2, 3]] * 4 + [[1, 8, 9], [8, 9, 9]], None)
    ids = np.arange(6)
    assert Greedy().act(1, ids, seen, {}).tolist() == [1, 1, 2, 3, 3, 3]
    hurried = prospects([5, 9, 12], [4, 5, 11, 12, 99, 99], [[1, 2, 3]] * 4 + [[1, 8, 9], [8, 9, 9]], 2.0)
    assert Greedy().act(1, ids, hurried, {}).tolist() == [1, 1, 2, 2, 1, 1]


def test_random_draws_evenly_from_the_levels_that_fit_and_alike_every_time():
    caps = [4, 5, 10, 99] * 500
    seen, ids = prospects([5, 9, 12], caps, [[0.0] * 3] * 2000, None), np.arange(2000)
    levels = Random(seed=7).act(3, ids, seen, {})
    assert set(levels[0::4]) == set(levels[1::4]) == {1}
    for fitting, chosen in ((2, levels[2::4]), (3, levels[3::4])):
        counts = np.bincount(chosen, minlength=fitting + 1)[1:]
        assert len(counts) == fitting and (abs(counts - 500 / fitting) < 4 * math.sqrt(500 / fitting)).all()
    assert levels.tolist() == Random(seed=7).act(3, ids, seen, {}).tolist()
    some = prospects([5, 9, 12], caps[1000:], [[0.0] * 3] * 1000, None)
    assert levels[1000:].tolist() == Random(seed=7).act(3, ids[1000:], some, {}).tolist(), "whoever else is asked"
    assert (
        levels.tolist()
        != Random(seed=7).act(4, ids, seen, {}).tolist()
        != Random(seed=8).act(4, ids, seen, {}).tolist()
    )


# How it learns


@pytest.fixture
def teacher(deep_dir: Path) -> Callable[[Arrays], Tensor]:
    """What the last middle block of the plain model puts out, of which the first end block is not part."""
    return middle_output(plain(deep_dir))


def middle_output(reference: PreTrainedModel) -> Callable[[Arrays], Tensor]:
    def output(batch: Arrays) -> Tensor:
        with torch.no_grad():
            states = reference(input_ids=torch.from_numpy(batch["tokens"]), output_hidden_states=True).hidden_states
        return states[6]

    return output


def by_hand(student: nn.Module, batch: Arrays, target_BTD: Tensor, output_weight: float) -> float:
    """The loss of offsite-tuning on a plain model with one block behind its middle."""
    tokens = torch.from_numpy(batch["tokens"])
    with torch.no_grad():
        out = student(input_ids=tokens, labels=tokens.masked_fill(~valid(batch), -100), output_hidden_states=True)
    error = (out.hidden_states[-2] - target_BTD)[valid(batch)].double()
    rms = math.sqrt(target_BTD[valid(batch)].double().square().mean())
    return out.loss.item() + output_weight * error.square().mean().item() / rms


def middle(model: PreTrainedModel, ladder: Ladder, level: int) -> dict[int, nn.Module]:
    return {i: model.get_submodule(f"{ladder.block_list}.{i}") for i in ladder.kept_middle(level)}


def test_the_teacher_gives_what_the_last_middle_block_puts_out(deep_dir, ladder):
    backbone = foundations.load_backbone(foundations.prepare(str(deep_dir), "float64"))
    expected = middle_output(plain(deep_dir).double())
    batches, adapter = text(2), StackedAdapter(find_lora(backbone.exact, LoraConfig(rank=2)))
    results = MiddleOutput(ladder, adapter, "float32")(backbone, None, batches)
    for result, batch in zip(results, batches, strict=True):
        # the result is rounded to float32, as some of what LLaMA computes on the way is
        torch.testing.assert_close(result.value.double(), expected(batch), rtol=2**-23, atol=2**-20)


@pytest.mark.parametrize("level", [1, 2])
def test_the_loss_is_that_of_language_and_of_the_middles_output(deep_dir, model, ladder, teacher, level):
    batch, rung = text(1)[0], ladder.rungs[level - 1]
    with emulated(model, ladder.block_list, rung):
        loss = distillation_loss(model, ladder, rung, LANGUAGE_MODELLING, batch, teacher(batch), 30.0)
    assert loss.item() == pytest.approx(by_hand(plain_emulator(deep_dir, rung.blocks), batch, teacher(batch), 30.0))
    with emulated(model, ladder.block_list, ladder.rungs[-1]):
        nothing_missing = distillation_loss(
            model, ladder, ladder.rungs[-1], LANGUAGE_MODELLING, batch, teacher(batch), 30.0
        ).item()
    assert nothing_missing == pytest.approx(by_hand(plain(deep_dir), batch, teacher(batch), 0.0), rel=1e-4)


def test_distilled_blocks_stand_in_better_and_nothing_else_changes(deep_dir, model, ladder, teacher):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config, steps = DistilConfig(learning_rate=3e-3), []
    start = middle(model, ladder, 1)
    targets = [teacher(batch) for batch in text(30)]
    blocks = distil(
        model, ladder, ladder.rungs[:1], LANGUAGE_MODELLING, start, text(30), targets, config, "float32", steps.append
    )
    assert steps == list(range(1, 31))
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())
    assert blocks.keys() == {3} and blocks[3] is not start[3]
    assert not any(p.requires_grad for p in (*blocks[3].parameters(), *model.parameters()))
    assert all(not new.equal(old) for new, old in zip(blocks[3].parameters(), start[3].parameters(), strict=True))
    (unseen,) = text(1, seed=9)
    losses = [
        by_hand(plain_emulator(deep_dir, (0, 3, 6), stand_ins), unseen, teacher(unseen), 30.0)
        for stand_ins in (None, blocks)
    ]
    assert losses[1] < 0.9 * losses[0]
    again = distil(model, ladder, ladder.rungs[:1], LANGUAGE_MODELLING, start, text(30), targets, config, "float32")
    assert all(a.equal(b) for a, b in zip(blocks[3].parameters(), again[3].parameters(), strict=True))


def test_elastic_training_draws_a_level_a_step_and_serves_all_of_them(deep_dir, model, ladder, teacher):
    def run(seed: int) -> tuple[dict[int, nn.Module], list[int]]:
        depths: list[int] = []
        count = model.base_model.register_forward_pre_hook(
            lambda *_: depths.append(len(list(model.get_submodule(ladder.block_list).children())))
        )
        config = DistilConfig(learning_rate=3e-3, seed=seed)
        start = middle(model, ladder, 1) | middle(model, ladder, 2)
        blocks = distil(
            model,
            ladder,
            ladder.rungs[:2],
            LANGUAGE_MODELLING,
            start,
            text(40),
            map(teacher, text(40)),
            config,
            "float32",
        )
        count.remove()
        return blocks, depths

    blocks, depths = run(seed=0)
    assert blocks.keys() == {1, 3, 5}
    assert len(depths) == 40 and set(depths) == {3, 5} and 10 <= depths.count(3) <= 30
    assert depths != run(seed=1)[1]
    (unseen,) = text(1, seed=9)
    for kept in ((0, 3, 6), (0, 1, 3, 5, 6)):
        before, after = (
            by_hand(plain_emulator(deep_dir, kept, stand_ins), unseen, teacher(unseen), 30.0)
            for stand_ins in (None, blocks)
        )
        assert after < before


def test_the_learning_rate_rises_over_a_tenth_and_falls_in_half_a_cosine():
    factors = [learning_rate_factor(step, 100) for step in range(100)]
    assert factors[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert factors[10] == 1.0 and factors[55] == pytest.approx(0.5) and 0 < factors[99] < 0.001
    assert factors[10:] == sorted(factors[10:], reverse=True)
    assert [learning_rate_factor(0, steps) for steps in (1, 2, 5)] == [1.0, 1.0, 1.0]
