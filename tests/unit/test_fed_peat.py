"""Whole runs of FedPEAT in this process: who trains what on which emulator, what it costs, and where it ends."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import whole_runs
from peft import PeftModel
from safetensors.torch import load_file, save, save_file
from sweeps import sweep
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM
from whole_runs import ENDS, EVERYBODY, Unsettled, assert_same_bits, changed, summary, table

from fedpeat_ray import Simulation, SimulationConfig
from fedpeat_ray.aggregation.mean import MeanOverLevels
from fedpeat_ray.algorithms.fed_peat import FedPEAT
from fedpeat_ray.config import (
    AvailabilityConfig,
    ControlConfig,
    DistilConfig,
    FleetConfig,
    FoundationConfig,
    LoraConfig,
    ServerConfig,
)
from fedpeat_ray.control.plan import Memory, Prospects
from fedpeat_ray.emulators import distillation
from fedpeat_ray.emulators.ladder import Ladder, Rung
from fedpeat_ray.emulators.on_emulators import InExactType
from fedpeat_ray.errors import ConfigError, DataError
from fedpeat_ray.files import user_cache_dir
from fedpeat_ray.fleet.memory import training_memory
from fedpeat_ray.fleet.tiers import TIERS
from fedpeat_ray.models.foundation import load, load_backbone, load_tokenizer
from fedpeat_ray.models.foundation import prepare as find_foundation
from fedpeat_ray.records import DROP_REASONS, SERVER, Arrays
from fedpeat_ray.runtime.run_log import RunLog, read_config
from fedpeat_ray.runtime.serial import Serial
from fedpeat_ray.tasks.task import Task
from fedpeat_ray.trainable.shape import model_shape
from fedpeat_ray.training.client_batch import ClientUpdate
from fedpeat_ray.training.map_clients import Call, MapClients
from fedpeat_ray.world import prepare

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT calls what transformers will rename

LEVELS = {1: (0, 3, 6), 2: (0, 1, 3, 5, 6), 3: (0, 1, 2, 3, 4, 5, 6)}  # of ENDS on seven blocks
BLOCKS = {"gpt2": "transformer.h", "llama": "model.layers"}


@pytest.fixture
def tiny(deep_gpt2_dir: Path, text_dir: Path) -> SimulationConfig:
    """Two emulators of a model of seven blocks."""
    return whole_runs.tiny(deep_gpt2_dir, text_dir, emulator=ENDS, control=ControlConfig("random"))


def perplexity(model: nn.Module, config: SimulationConfig) -> float:
    """Of the run's held-out text, by transformers."""
    loss, count = 0.0, 0
    for task in prepare(config, Path()).heldout:
        tokens = torch.from_numpy(task.arrays["tokens"]).long()
        labels = tokens.masked_fill(
            torch.arange(tokens.shape[1]) >= torch.from_numpy(task.arrays["lengths"])[:, None], -100
        )
        with torch.no_grad():
            logits = model(input_ids=tokens).logits[:, :-1].flatten(0, 1)
        loss += nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum").item()
        count += int((labels[:, 1:] != -100).sum())
    return math.exp(loss / count)


def plain(config: SimulationConfig, kept: Sequence[int] | None = None) -> Any:
    """The model as transformers loads it; of its blocks only those that are kept."""
    model = AutoModelForCausalLM.from_pretrained(config.foundation.name).eval()
    if kept is not None:
        name = BLOCKS[model.config.model_type]
        model.set_submodule(name, nn.ModuleList([model.get_submodule(f"{name}.{number}") for number in kept]))
        model.config.num_hidden_layers = len(kept)
        model.config.use_cache = False
    return model


def file_bytes(config: SimulationConfig, kept: Sequence[int]) -> int:
    """Size of a real file with the tensors of an emulator."""
    model = AutoModelForCausalLM.from_pretrained(config.foundation.name)
    name = BLOCKS[model.config.model_type] + "."
    tensors = {
        key: parameter.data.contiguous()
        for key, parameter in model.named_parameters()
        if not key.startswith(name) or int(key.removeprefix(name).split(".")[0]) in kept
    }
    return len(save(tensors))


# What a run leaves


def test_a_run_leaves_its_five_numbers_and_what_every_device_had_to_pay(run, tiny):
    directory = run(rounds=4, evaluation={"centralised": True, "every": 2}, emulator={"give_foundation": True})
    result, rounds, clients = summary(directory), table(directory, "rounds"), table(directory, "clients")
    five = result["perplexity"]
    assert five.keys() == {"zero_shot", "tuned", "centralised", "plug_in", "emulator_zero_shot", "emulator_tuned"}
    assert five["plug_in"] == five["tuned"] == rounds["perplexity"].iloc[-1] < five["zero_shot"]
    assert five["centralised"] < five["zero_shot"]
    assert five["emulator_zero_shot"].keys() == five["emulator_tuned"].keys() == {"1", "2", "3"}
    assert all(five["emulator_tuned"][level] < five["emulator_zero_shot"][level] for level in "123")
    assert five["emulator_zero_shot"]["3"] == five["zero_shot"] and five["emulator_tuned"]["3"] == five["plug_in"]
    assert rounds["device_perplexity"].isna().tolist() == rounds["perplexity"].isna().tolist() == [True, False] * 2
    for level in (1, 2):
        assert five["emulator_zero_shot"][str(level)] == pytest.approx(
            perplexity(plain(tiny, LEVELS[level]), tiny), rel=1e-5
        )

    completed = clients[clients["outcome"] == "completed"]
    assert set(completed["level"]) == {1, 2, 3} and completed["train_loss"].notna().all()
    assert result["drop_reasons"] == {r: int((clients["drop_reason"] == r).sum()) for r in DROP_REASONS}
    for name in ("download_bytes", "emulator_bytes", "upload_bytes", "energy_j"):
        assert result[name] == pytest.approx(clients[name].sum()) == pytest.approx(rounds[name].sum())
    levels = read_config(directory)["resolved"]["levels"]
    assert {entry["level"]: tuple(entry["blocks"]) for entry in levels} == LEVELS


def test_bytes_and_memory_in_the_log_are_those_of_real_payloads_and_of_the_memory_model(run, tiny):
    directory = run(rounds=5)
    clients = table(directory, "clients")
    sizes = {level: file_bytes(tiny, LEVELS[level]) for level in (1, 2)}
    saved = load_file(directory / "adapter" / "adapter_model.safetensors")
    adapter_bytes = len(save({name.removeprefix("base_model.model."): tensor for name, tensor in saved.items()}))

    held: dict[int, int] = {}  # by those that received all that was sent
    seen: set[str] = set()
    for row in clients.itertuples():
        emulator_bytes = 0 if held.get(row.device_id) == row.level else sizes[row.level]
        if row.outcome == "completed":
            assert row.upload_bytes == adapter_bytes
            assert (row.emulator_bytes, row.download_bytes) == (emulator_bytes, emulator_bytes + adapter_bytes)
            seen.add("kept" if not emulator_bytes else "changed" if row.device_id in held else "first")
        elif row.drop_reason == "not needed":
            assert row.upload_bytes == 0 <= row.emulator_bytes <= row.download_bytes <= emulator_bytes + adapter_bytes
        else:
            assert row.drop_reason == "unavailable" and row.download_bytes == row.emulator_bytes == 0
        if row.download_bytes == emulator_bytes + adapter_bytes:
            held[row.device_id] = row.level
    assert seen == {"first", "kept", "changed"}

    shape = model_shape(load(find_foundation(tiny.foundation.name, "float32")), weight_bytes=4)
    for level in (1, 2):
        memory = training_memory(
            shape,
            batch_size=2,
            sequence_length=32,
            trainable="lora",
            lora_rank=2,
            num_blocks=len(LEVELS[level]),
            adapter_blocks=(1, 1),
        )
        assert set(clients.loc[clients["level"] == level, "memory_bytes"].tolist()) == {int(memory.peak_bytes)}


def test_greedy_gives_what_fits_and_those_that_nothing_fits_drop_out_for_memory(run):
    fleet = FleetConfig(num_devices=60, availability=AvailabilityConfig(kind="always"), memory_scale=8e-4)
    directory = run(control=ControlConfig("greedy"), fleet=fleet, rounds=2, cohort_size=20)
    clients = table(directory, "clients")
    need = clients.groupby("level")["memory_bytes"].first()
    assert need[1] < need[2]
    caps = clients["memory_cap_bytes"].to_numpy()
    fits = caps >= need[1]
    assert clients["level"].tolist() == np.where(caps >= need[2], 2, 1).tolist()
    assert (clients["drop_reason"].fillna("") == "memory").tolist() == (~fits).tolist()
    assert set(clients.loc[fits, "level"]) == {1, 2} and not fits.all()
    assert not clients.loc[~fits, ["download_bytes", "upload_bytes", "energy_j"]].any(axis=None)


@pytest.mark.parametrize(
    ("control", "levels"), [(ControlConfig("greedy"), ["level 1", "level 2"]), (ControlConfig("fixed", 2), ["level 2"])]
)
def test_who_can_take_part_is_known_of_the_levels_that_devices_may_get(tiny, control, levels):
    world = prepare(changed(tiny, control=control), Path())
    assert isinstance(world.algorithm, FedPEAT)
    costs = world.algorithm.emulators.costs
    assert world.fits.memory_bytes == {level: costs.memory_bytes_L[int(level[-1]) - 1] for level in levels}
    smallest, largest = min(world.fits.memory_bytes.values()), max(TIERS, key=lambda tier: tier.memory_cap_bytes)
    fleet = FleetConfig(num_devices=14, spread=0.0, memory_scale=0.9 * smallest / largest.memory_cap_bytes)
    with pytest.raises(ConfigError, match=f"fleet.memory_scale = .* takes {smallest:,} bytes"):
        prepare(changed(tiny, control=control, fleet=fleet), Path())


def test_a_controller_may_leave_devices_out_or_all_of_them(tiny, tmp_path):
    class EvenOnesFromRound2On(Unsettled):
        def act(self, round: int, device_ids: np.ndarray, prospects: Prospects, memory: Memory) -> np.ndarray:
            return np.where((device_ids % 2 == 0) & (round > 1), 2, 0)

    directory = tmp_path / "run"
    config = changed(tiny, out=directory, **EVERYBODY)
    total = Simulation(config, controller=EvenOnesFromRound2On).run()
    rounds, clients = table(directory, "rounds"), table(directory, "clients")
    assert clients["round"].tolist() == [1] * 6 + [2] * 6 + [3] * 6 and clients["device_id"].tolist() == [*range(6)] * 3
    assert rounds["num_completed"].tolist() == [0, 3, 3] and rounds["num_dropped"].tolist() == [0, 0, 0]
    assert rounds["num_skipped"].tolist() == [6, 3, 3] and total["num_skipped"] == 12
    skipped = clients[clients["outcome"] == "skipped"]
    assert skipped["device_id"].tolist() == [*range(6), 1, 3, 5, 1, 3, 5]
    assert skipped[["level", "drop_reason", "train_loss"]].isna().all(axis=None)
    assert not skipped[["download_bytes", "upload_bytes", "energy_j", "compute_s", "flops"]].any(axis=None)
    clients = clients[clients["outcome"] == "completed"]
    assert clients["round"].tolist() == [2] * 3 + [3] * 3 and clients["device_id"].tolist() == [0, 2, 4] * 2
    assert set(clients["level"]) == {2} and rounds["train_loss"].isna().tolist() == [True, False, False]
    assert (clients["emulator_bytes"] > 0).tolist() == [True] * 3 + [False] * 3
    assert rounds["virtual_s"].iloc[0] == 600.0, "a slot of waiting"


def test_a_controller_is_told_what_a_level_will_cost_each_device(tiny, tmp_path):
    told: list[Prospects] = []

    class Alternating(Unsettled):
        def act(self, round: int, device_ids: np.ndarray, prospects: Prospects, memory: Memory) -> np.ndarray:
            told.append(prospects)
            return 1 + (device_ids + (round > 2)) % 2

    Simulation(changed(tiny, out=tmp_path / "run", **EVERYBODY), controller=Alternating).run()
    clients = table(tmp_path / "run", "clients")
    assert (clients["outcome"] == "completed").all()
    for round, prospects in enumerate(told, start=1):
        rows = clients[clients["round"] == round]
        index = rows["level"].to_numpy(int) - 1
        spent_s = (rows["download_s"] + rows["compute_s"] + rows["upload_s"]).tolist()
        assert prospects.total_s_NL[np.arange(6), index].tolist() == pytest.approx(spent_s)
        assert prospects.memory_bytes_L[index].tolist() == rows["memory_bytes"].tolist()
        assert prospects.memory_cap_bytes_N.tolist() == rows["memory_cap_bytes"].tolist()
        assert ((prospects.held_level_N == index + 1) == (rows["emulator_bytes"] == 0)).all()
        assert prospects.fits_NL.all() and prospects.in_time_NL.all() and prospects.total_s_NL.shape == (6, 2)
    assert [set(prospects.held_level_N.tolist()) for prospects in told] == [{0}, {1, 2}, {1, 2}]


# What is trained, and where


def test_on_the_whole_foundation_it_is_fed_peft_on_the_adapter_blocks_bit_for_bit(run):
    top = {"control": ControlConfig("fixed", level=3), "emulator": {"give_foundation": True}}
    peat = run("peat", **top, **EVERYBODY)
    peft = run("peft", algorithm="fed-peft", lora=LoraConfig(rank=2, blocks=(0, 6)), **EVERYBODY)
    assert summary(peat)["adapter_sha256"] == summary(peft)["adapter_sha256"]
    assert summary(peat)["perplexity"]["tuned"] == summary(peft)["perplexity"]["tuned"]
    assert table(peat, "rounds")["train_loss"].tolist() == table(peft, "rounds")["train_loss"].tolist()
    smaller = run("smaller", control=ControlConfig("fixed", level=2), **EVERYBODY)
    assert summary(smaller)["adapter_sha256"] != summary(peft)["adapter_sha256"]


def test_adapters_in_middle_blocks_are_trained_by_the_devices_that_have_these_blocks(run, tiny):
    middle = {"lora": LoraConfig(rank=2, blocks=(0, 1, 3, 6)), "rounds": 2}
    start = prepare(changed(tiny, **middle), Path()).algorithm
    start = start.layout.unflatten(start.init(tiny.seed).model_P)
    for control, trained in ((ControlConfig("fixed", 1), {0, 3, 6}), (ControlConfig("fixed", 2), {0, 1, 3, 6})):
        directory = run(f"level{control.level}", control=control, **middle)
        saved = load_file(directory / "adapter" / "adapter_model.safetensors")
        moved = {int(name.split(".")[2]) for name in start if not saved[f"base_model.model.{name}"].equal(start[name])}
        assert moved == trained and len(start) == 4 * 4 * 2
    sizes = table(run("both", **middle), "clients").query("outcome == 'completed'").groupby("level")["upload_bytes"]
    assert (sizes.nunique() == 1).all() and sizes.first()[1] < sizes.first()[2]


@pytest.mark.parametrize("trained", ["lora", "bias", "blocks"])
def test_what_was_saved_plugged_into_the_plain_foundation_gives_the_logged_perplexity(run, tiny, trained):
    changes = {"emulator": {"trained": trained}, "evaluation": {"centralised": True}, "rounds": 2}
    directory = run(**changes)
    model, result = plain(tiny), summary(directory)["perplexity"]
    if trained == "lora":
        assert load_file(directory / "adapter" / "adapter_model.safetensors").keys() == {
            f"base_model.model.transformer.h.{block}.{layer}.lora_{factor}.weight"
            for block in (0, 6)
            for layer in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
            for factor in "AB"
        }
        model = PeftModel.from_pretrained(model, str(directory / "adapter"))
    else:
        weights = load_file(directory / "adapter" / "weights.safetensors")
        expected = {name for name, _ in model.named_parameters() if re.match(r"transformer\.h\.[06]\.", name)}
        assert weights.keys() == {name for name in expected if trained == "blocks" or name.endswith(".bias")}
        assert all(not model.get_parameter(name).equal(tensor) for name, tensor in weights.items())
        model.load_state_dict(weights, strict=False)
        clients = table(directory, "clients")
        assert clients["lora_rank"].isna().all() and clients["upload_bytes"].max() == len(save(weights))
    assert result["plug_in"] == pytest.approx(perplexity(model, tiny), rel=1e-5)
    assert max(result["plug_in"], result["centralised"]) < result["zero_shot"]


# What the server does


class Recorded(MapClients):
    """The serial side of the seam, which remembers what was trained by whom."""

    def __init__(self, serial: Serial):
        self.serial = serial
        self.updates: list[tuple[str, Any, Any]] = []

    def run(self, call: Call) -> tuple[Any, list[Any]]:
        def remembered(backbone, shared, tasks):
            updates = call.train(backbone, shared, tasks)
            trained = [update for update in updates if isinstance(update, ClientUpdate)]
            self.updates += [(call.where, task, update) for task, update in zip(tasks, trained, strict=bool(trained))]
            return updates

        return self.serial.run(dataclasses.replace(call, train=remembered))


def test_a_round_with_the_server_in_it_is_the_mean_of_each_element_by_those_that_trained_it(tiny, tmp_path):
    (tmp_path / "public").mkdir()
    (tmp_path / "public" / "own.txt").write_text("\n\n".join("PUBLIC WORDS ONLY " * n for n in range(1, 12)))
    config = changed(
        tiny,
        lora=LoraConfig(rank=2, blocks=(0, 1, 6)),
        emulator={"server_steps": 2},
        data={"public_name": str(tmp_path / "public")},
        **EVERYBODY,
    )
    world = prepare(config, tmp_path)
    before = world.algorithm.init(0)
    record = Recorded(Serial(load_backbone(world.held)))
    after, _ = world.algorithm.run_round(before, 1, 0.0, world.conditions, world.data, record)

    ((place, own, update),) = [entry for entry in record.updates if entry[1].device_id == SERVER]
    assert place == "driver" and own.level is None and own.num_steps == 2 and own.num_examples == 4
    text = load_tokenizer(Path(tiny.foundation.name)).decode(
        own.arrays["tokens"][np.arange(32) < own.arrays["lengths"][..., None]].tolist(), skip_special_tokens=True
    )
    assert set("PUBLIC") < set(text) <= set("PUBLIC WORDS ONLY"), "no word of a device"
    levels = {task.level for _, task, _ in record.updates}
    assert levels == {1, 2, None} and len(record.updates) == 7

    layout = world.algorithm.layout
    sums = {
        name: torch.zeros(shape, dtype=torch.float64) for name, shape in zip(layout.names, layout.shapes, strict=True)
    }
    weights = dict.fromkeys(layout.names, 0.0)
    for _, task, update in record.updates:
        names = [n for n in layout.names if task.level is None or int(n.split(".")[2]) in LEVELS[task.level]]
        for name, delta in layout.part(names)[0].unflatten(update.delta_P).items():
            sums[name] += task.num_examples * delta
            weights[name] += task.num_examples
    assert len(set(weights.values())) == 2, "block 1 by fewer"
    moved = layout.unflatten(after.model_P.double() - before.model_P.double())
    for name in layout.names:
        torch.testing.assert_close(moved[name], sums[name] / weights[name], rtol=0, atol=2**-24)


def test_the_server_makes_a_difference_and_without_public_text_there_is_one_clear_line(run, tiny, tmp_path):
    alone, helped = run("alone", rounds=1), run("helped", rounds=1, emulator={"server_steps": 2})
    assert summary(alone)["adapter_sha256"] != summary(helped)["adapter_sha256"]
    for needs in ({"server_steps": 1}, {"weights": "elastic"}, {"choice": "influence"}, {"realign_every": 1}):
        with pytest.raises(DataError, match="has no public part: name the server's text by data.public_name") as caught:
            run("none", emulator=needs, data={"public_name": None})
        assert "\n" not in str(caught.value) and not (tmp_path / "none").exists()


# Emulators with weights of their own


DISTILLED = [("gpt2", "elastic"), ("gpt2", "per_level"), ("llama", "elastic")]


@pytest.mark.parametrize(("family", "weights"), sweep(DISTILLED, quick=[("gpt2", "elastic")]))
def test_distilled_emulators_are_made_once_and_devices_train_on_them(run, tiny, request, monkeypatch, family, weights):
    model_dir = request.getfixturevalue(f"deep_{family}_dir")
    changes = {
        "emulator": {"weights": weights},
        "foundation": FoundationConfig(str(model_dir), dtype="float32"),
        "rounds": 2,
    }
    directory = run("one", **changes)
    config, result = changed(tiny, **changes), summary(directory)["perplexity"]
    names = [level["weights"] for level in read_config(directory)["resolved"]["levels"]]
    assert names[2] is None and (names[0] == names[1]) == (weights == "elastic")
    for level, name in ((1, names[0]), (2, names[1])):
        model, tensors = plain(config), load_file(user_cache_dir() / name)
        blocks = {int(key.split(".")[2]) for key in tensors}
        assert blocks == ({1, 3, 5} if weights == "elastic" else set(LEVELS[level]) - {0, 6})
        assert all(not model.get_parameter(key).equal(tensor) for key, tensor in tensors.items())
        model.load_state_dict(tensors, strict=False)
        model.set_submodule(
            block_list := BLOCKS[model.config.model_type],
            nn.ModuleList([model.get_submodule(f"{block_list}.{number}") for number in LEVELS[level]]),
        )
        model.config.num_hidden_layers, model.config.use_cache = len(LEVELS[level]), False
        assert result["emulator_zero_shot"][str(level)] == pytest.approx(perplexity(model, config), rel=1e-5)
    assert result["plug_in"] < result["zero_shot"]
    monkeypatch.setattr("fedpeat_ray.emulators.workshop.distil", None)
    assert_same_bits(directory, run("again", **changes))


def test_a_level_without_middle_blocks_has_nothing_to_distil(run):
    emulator = {"shares": (0.0, 0.4), "weights": "per_level", "realign_every": 1}
    directory = run(emulator=emulator, rounds=1)
    levels = read_config(directory)["resolved"]["levels"]
    assert [level["blocks"] for level in levels] == [[0, 6], [0, 1, 5, 6], [0, 1, 2, 3, 4, 5, 6]]
    assert [bool(level["weights"]) for level in levels] == [False, True, False]
    assert [path.name for path in (directory / "emulators").iterdir()] == ["00001-level2.safetensors"]
    assert run("elastic", emulator=emulator | {"weights": "elastic"}, rounds=1)


def test_blocks_are_chosen_by_influence_on_public_text(run):
    levels = read_config(run(emulator={"choice": "influence"}, rounds=1))["resolved"]["levels"]
    kept = [set(level["blocks"]) for level in levels]
    assert [len(blocks) for blocks in kept] == [3, 5, 7] and kept[0] < kept[1] < kept[2]
    assert {0, 6} < kept[0]


def test_in_eight_bits_emulators_are_smaller_and_the_foundation_is_as_it_was(run, tiny):
    directory = run(emulator={"eight_bit": True, "give_foundation": True}, client_batch_size="auto", rounds=2)
    result = summary(directory)["perplexity"]["emulator_zero_shot"]
    levels = read_config(directory)["resolved"]["levels"]
    for level in (1, 2):
        entry, own = levels[level - 1], perplexity(plain(tiny, LEVELS[level]), tiny)
        assert result[str(level)] == pytest.approx(own, rel=0.02) and result[str(level)] != pytest.approx(own, rel=1e-6)
        quantised = load_file(user_cache_dir() / entry["weights"])
        exact = dict(plain(tiny).named_parameters())
        real = {
            name: tensor.data.contiguous()
            for name, tensor in exact.items()
            if not name.startswith("transformer.h.") or name.split(".")[2] in "06"
        }
        middle = LEVELS[level][1:-1]
        real |= {name: tensor for name, tensor in quantised.items() if int(name.split(".")[2]) in middle}
        assert entry["emulator_bytes"] == len(save(real)) < 0.85 * file_bytes(tiny, LEVELS[level])
    assert levels[2]["emulator_bytes"] == file_bytes(tiny, LEVELS[3]) and levels[2]["weights"] is None
    assert result["3"] == summary(directory)["perplexity"]["zero_shot"]


# Re-alignment


REALIGNED = {"weights": "elastic", "realign_every": 2}


def test_emulators_that_were_re_aligned_are_new_files_and_are_sent_again(run, tiny):
    changes = {"rounds": 5, "control": ControlConfig("fixed", 2)}
    directory = run(emulator=REALIGNED, **changes, **EVERYBODY)
    clients = table(directory, "clients")
    per_round = clients.groupby("round")["emulator_bytes"].agg(["min", "max"])
    whole = file_bytes(tiny, LEVELS[2])
    assert per_round["min"].tolist() == per_round["max"].tolist() == [whole, 0, whole, 0, whole]
    files = sorted((directory / "emulators").iterdir())
    assert [path.name for path in files] == ["00001.safetensors", "00002.safetensors"]
    (first, second), start = map(load_file, files), load_file(user_cache_dir() / weights_of(directory, level=2))
    assert start.keys() == first.keys() == second.keys()
    assert all(not start[name].equal(first[name]) and not first[name].equal(second[name]) for name in start)
    never = run("never", emulator={"weights": "elastic"}, **changes, **EVERYBODY)
    one, other = summary(directory)["perplexity"], summary(never)["perplexity"]
    assert one["emulator_zero_shot"] == other["emulator_zero_shot"]
    assert one["emulator_tuned"]["2"] != other["emulator_tuned"]["2"] and one["plug_in"] != other["plug_in"]


def test_what_the_server_does_costs_what_pytorch_counts(run, tiny, tmp_path):
    emulator = {"realign_every": 2, "server_steps": 2, "shares": (0.6,)}
    world = prepare(changed(tiny, emulator=emulator), tmp_path)
    peat, serial = world.algorithm, Serial(load_backbone(world.held))
    assert isinstance(peat, FedPEAT)
    state, costs = peat.init(0), peat.emulators.costs
    with FlopCounterMode(display=False) as realigning:
        peat.emulators.workshop.realign(peat.emulators.ladder, 1, state.model_P, serial)
    own = peat.emulators.workshop.public_text.task(2, tiny.local, np.random.default_rng(0))
    with FlopCounterMode(display=False) as tuning:
        serial(InExactType(peat.trainer(state)), state.model_P, [own], MeanOverLevels({}))
    assert costs.realignment.flops == pytest.approx(realigning.get_total_flops(), rel=0.1)
    assert costs.server_tuning.flops == pytest.approx(tuning.get_total_flops(), rel=0.1)
    rounds = table(run(emulator=emulator, rounds=2), "rounds")
    tuned, both = costs.server_tuning, costs.server_tuning.then(costs.realignment)
    assert rounds["server_flops"].tolist() == [tuned.flops, both.flops]
    assert rounds["server_memory_bytes"].tolist() == [tuned.memory_bytes, both.memory_bytes]
    assert both.memory_bytes == costs.realignment.memory_bytes > tuned.memory_bytes


def weights_of(directory: Path, level: int) -> str:
    return read_config(directory)["resolved"]["levels"][level - 1]["weights"]


def test_a_re_alignment_goes_on_from_the_emulators_of_the_one_before(run, tiny):
    directory = run(emulator=REALIGNED, rounds=2)
    path = directory / "emulators" / "00001.safetensors"
    other = {name: tensor + 1.0 for name, tensor in load_file(path).items()}
    save_file(other, path)
    Simulation(changed(tiny, resume=directory, emulator=REALIGNED, rounds=4)).run()
    after = load_file(directory / "emulators" / "00002.safetensors")
    most = 1.1 * 3 * ENDS.distil.learning_rate  # what AdamW moves an element in three steps
    assert all(0 < (after[name] - tensor).abs().max() < most for name, tensor in other.items())


def test_a_run_that_was_stopped_between_re_alignments_goes_on_to_the_same_bits(run, tiny, tmp_path, monkeypatch):
    changes = {"emulator": REALIGNED | {"server_steps": 1}, "rounds": 5, "server": ServerConfig("yogi", 0.01)}
    whole = run("whole", **changes)
    write = RunLog.write_round
    for stopped_in, checkpoint_every in ((3, 2), (5, 3)):
        name = f"stopped{stopped_in}"

        def write_or_stop(log: RunLog, round: int, *arguments: Any, last: int = stopped_in) -> None:
            if round == last:
                raise KeyboardInterrupt
            write(log, round, *arguments)

        with monkeypatch.context() as patch:
            patch.setattr(RunLog, "write_round", write_or_stop)
            with pytest.raises(KeyboardInterrupt):
                run(name, **changes, checkpoint_every=checkpoint_every)
        Simulation(changed(tiny, resume=tmp_path / name, **changes)).run()
        assert_same_bits(whole, tmp_path / name)
        for path in (whole / "emulators").iterdir():
            assert path.read_bytes() == (tmp_path / name / "emulators" / path.name).read_bytes()


def test_re_alignment_has_the_adapter_plugged_into_both_sides_in_middle_blocks_too(run, tiny, monkeypatch):
    seen: list[tuple[Rung, Arrays, Tensor, float]] = []
    true_loss = distillation.distillation_loss

    def remembered(
        student: Any, ladder: Ladder, rung: Rung, task: Task, batch: Arrays, target: Tensor, weight: float
    ) -> Tensor:
        loss = true_loss(student, ladder, rung, task, batch, target, weight)
        seen.append((rung, batch, target, loss.item()))
        return loss

    monkeypatch.setattr(distillation, "distillation_loss", remembered)
    directory = run(
        emulator={"realign_every": 1, "shares": (0.6,)}, lora=LoraConfig(rank=2, blocks=(0, 1, 2, 6)), rounds=1
    )
    rung, batch, target, loss = seen[0]
    assert rung.blocks == LEVELS[2]
    tokens = torch.from_numpy(batch["tokens"]).long()
    valid = torch.arange(tokens.shape[1]) < torch.from_numpy(batch["lengths"])[:, None]
    tuned = PeftModel.from_pretrained(plain(tiny), str(directory / "adapter")).eval()
    shallow: Any = tuned.base_model.model
    kept = [shallow.get_submodule(f"transformer.h.{number}") for number in rung.blocks]
    with torch.no_grad():
        middle = tuned(input_ids=tokens, output_hidden_states=True).hidden_states[6]
        shallow.set_submodule("transformer.h", nn.ModuleList(kept))
        labels = tokens.masked_fill(~valid, -100)
        out = tuned(input_ids=tokens, labels=labels, output_hidden_states=True, use_cache=False)
    torch.testing.assert_close(target, middle, rtol=1e-4, atol=1e-4)
    error = (out.hidden_states[4] - middle)[valid].square().mean()
    assert loss == pytest.approx((out.loss + 30 * error / middle[valid].square().mean().sqrt()).item(), rel=1e-4)


# What is refused


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"emulator": {"shares": ()}}, "emulator.shares = () is not allowed: at least one"),
        ({"emulator": {"shares": (0.5, 1.0)}}, "emulator.shares = (0.5, 1.0) is not allowed: at least one, each"),
        ({"emulator": {"shares": (-0.1,)}}, "emulator.shares = (-0.1,) is not allowed"),
        ({"emulator": {"shares": (0.6, 0.2)}}, "emulator.shares = (0.6, 0.2) is not allowed: rising shares"),
        ({"emulator": {"first": 0, "last": 0}}, "emulator.last = 0 is not allowed: at least 1 if emulator.first = 0"),
        ({"emulator": {"first": -1}}, "emulator.first = -1 is not allowed: an integer of at least 0"),
        ({"emulator": {"first": 6}}, "emulator.first = 6 is not allowed: with emulator.last = 1, fewer than 7 blocks"),
        ({"emulator": {"trained": "all"}}, "emulator.trained = 'all' is not allowed: lora, bias, blocks"),
        ({"emulator": {"choice": "best"}}, "emulator.choice = 'best' is not allowed: uniform, influence"),
        ({"emulator": {"weights": "own"}}, "emulator.weights = 'own' is not allowed: elastic, per_level, foundation"),
        ({"emulator": {"realign_every": 2, "eight_bit": True}}, "emulator.realign_every = 2 is not allowed: 0 if"),
        (
            {"emulator": {"weights": "elastic", "distil": DistilConfig(sequence_length=65)}},
            "emulator.distil.sequence_length = 65 is not allowed: at most 64",
        ),
        ({"control": ControlConfig("fixed", 3)}, "control.level = 3 is not allowed: at most 2"),
        ({"control": ControlConfig("fixed", 0)}, "control.level = 0 is not allowed: an integer of at least 1"),
        ({"control": {"kind": "best"}}, "control.kind = 'best' is not allowed: one of fixed, random, greedy"),
        (
            {"lora": LoraConfig(blocks=(0, 7))},
            "lora.blocks = 7 is not allowed: numbers of blocks of this model, 0 to 6",
        ),
        (
            {"lora": LoraConfig(blocks=(2, 3))},
            "lora.blocks = (2, 3) is not allowed: at least one block that every emulator has: 0 6",
        ),
        (
            {"algorithm": "fed-peft", "foundation": {"num_shards": 2}},
            "foundation.num_shards = 2 is not allowed: 1, as devices of fed-peft hold all of it",
        ),
        (
            {"foundation": {"num_shards": 2}, "emulator": {"give_foundation": True}},
            "foundation.num_shards = 2 is not allowed: 1 if emulator.give_foundation",
        ),
        (
            {"foundation": {"num_shards": 2}, "emulator": {"trained": "bias"}},
            "foundation.num_shards = 2 is not allowed: 1 if emulator.trained = 'bias'",
        ),
    ],
    ids=lambda value: value.split(" is ")[0] if isinstance(value, str) else "",
)
def test_settings_that_do_not_go_together_are_refused_and_nothing_is_written(run, tmp_path, changes, said):
    with pytest.raises(ConfigError, match=re.escape(said)) as caught:
        run(**changes)
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_biases_are_refused_where_there_are_none(run, deep_llama_dir):
    said = r"^emulator.trained = 'bias' is not allowed: another one, as LlamaForCausalLM has no biases$"
    with pytest.raises(ConfigError, match=said):
        run(emulator={"trained": "bias"}, foundation=FoundationConfig(str(deep_llama_dir)))
