"""Whole runs in this process: what they write, what is refused, and that stopping and going on leaves no trace."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import whole_runs
from peft import PeftModel
from safetensors.torch import load_file
from sweeps import sweep
from transformers import AutoModelForCausalLM
from whole_runs import assert_same_bits, events, summary, table

from fedpeat_ray import Simulation, SimulationConfig
from fedpeat_ray.config import (
    AvailabilityConfig,
    ChannelConfig,
    DataConfig,
    EvaluationConfig,
    FleetConfig,
    FoundationConfig,
    LocalConfig,
    LoraConfig,
    PartitionConfig,
    ServerConfig,
)
from fedpeat_ray.data.corpus import load_corpus
from fedpeat_ray.errors import ConfigError, RunDirError, RunFailedError
from fedpeat_ray.models.foundation import load_tokenizer
from fedpeat_ray.records import CLIENT_COLUMNS, DROP_REASONS, ROUND_COLUMNS
from fedpeat_ray.runtime.run_log import RunLog, read_config
from fedpeat_ray.simulation import gap_closed

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT calls what transformers will rename

ALWAYS = AvailabilityConfig(kind="always")


@pytest.fixture
def tiny(gpt2_dir: Path, text_dir: Path) -> SimulationConfig:
    """Four rounds of six of forty devices, judged after each: less than a second."""
    return tiny_config(gpt2_dir, text_dir)


def tiny_config(gpt2_dir: Path, text_dir: Path) -> SimulationConfig:
    return whole_runs.tiny(
        gpt2_dir,
        text_dir,
        algorithm="fed-peft",
        rounds=4,
        checkpoint_every=2,
        fleet=FleetConfig(num_devices=40),
        data={"public_name": None},
        evaluation={"every": 1},
    )


def test_a_run_leaves_what_is_promised(tiny, tmp_path):
    config = dataclasses.replace(
        tiny, out=tmp_path / "run", evaluation=dataclasses.replace(tiny.evaluation, centralised=True, every=3)
    )
    simulation = Simulation(config)
    assert simulation.directory is None
    returned = simulation.run()
    directory = tmp_path / "run"
    assert simulation.directory == directory and returned == json.loads((directory / "summary.json").read_text())

    assert {"algorithm", "rounds", "adapter_sha256", "virtual_s", "energy_j", "download_bytes", "upload_bytes"} < set(
        returned
    )
    assert {"wall_s", "perplexity", "gap_closed", "num_completed", "num_dropped", "drop_reasons"} < set(returned)
    perplexity = returned["perplexity"]
    assert set(perplexity) == {"zero_shot", "tuned", "centralised"}
    assert max(perplexity["centralised"], perplexity["tuned"]) < perplexity["zero_shot"]
    assert returned["gap_closed"] == gap_closed(**perplexity)

    rounds: Any = pd.read_parquet(directory / "rounds")
    clients: Any = pd.read_parquet(directory / "clients")
    assert list(rounds.columns) == [column.name for column in ROUND_COLUMNS]
    assert list(clients.columns) == [column.name for column in CLIENT_COLUMNS]
    assert rounds["round"].tolist() == [1, 2, 3, 4] and rounds["virtual_s"].is_monotonic_increasing
    assert rounds["perplexity"].notna().tolist() == [False, False, True, True], "every third, and the last"
    assert rounds["perplexity"].iloc[-1] == perplexity["tuned"]
    assert clients.groupby("round").size().tolist() == [math.ceil(6 * 1.25)] * 4
    completed = clients[clients["outcome"] == "completed"]
    assert completed["drop_reason"].isna().all() and completed["train_loss"].notna().all()
    assert completed.groupby("round").size().tolist() == rounds["num_completed"].tolist()
    dropped = clients[clients["outcome"] == "dropped"]
    assert set(dropped["drop_reason"]) <= set(DROP_REASONS) and not dropped["upload_bytes"].any()
    for name in ("download_bytes", "emulator_bytes", "upload_bytes", "energy_j"):
        assert returned[name] == pytest.approx(clients[name].sum()) == pytest.approx(rounds[name].sum())
    assert returned["num_tokens"] == completed["num_tokens"].sum() == rounds["num_tokens"].sum()
    assert returned["virtual_s"] == rounds["virtual_s"].iloc[-1]
    assert returned["drop_reasons"] == {r: int((dropped["drop_reason"] == r).sum()) for r in DROP_REASONS}
    resolved = read_config(directory)["resolved"]
    payload = resolved["payload_bytes"]
    assert set(completed["upload_bytes"]) == set(completed["download_bytes"]) == {payload}
    assert (directory / "adapter" / "adapter_model.safetensors").stat().st_size == pytest.approx(payload, rel=0.2)


def test_the_saved_adapter_is_the_one_that_was_judged(run, gpt2_dir):
    directory = run()
    base = AutoModelForCausalLM.from_pretrained(gpt2_dir)
    model = PeftModel.from_pretrained(base, str(directory / "adapter"))
    assert model.peft_config["default"].base_model_name_or_path == str(gpt2_dir)
    stored = load_file(directory / "checkpoints" / "00004" / "state.safetensors")["model"]
    saved = load_file(directory / "adapter" / "adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in saved.values()) == stored.numel()
    assert stored.abs().sum().item() == pytest.approx(sum(t.abs().sum().item() for t in saved.values()), rel=1e-5)


def test_a_run_says_how_far_the_memory_of_its_devices_is_known(run, monkeypatch):
    tested = run("tested", rounds=1)
    monkeypatch.setattr("fedpeat_ray.trainable.shape.TESTED_FAMILIES", ())
    estimated = run("estimated", rounds=1)
    assert read_config(tested)["resolved"]["memory_model"] == "tested family"
    assert read_config(estimated)["resolved"]["memory_model"] == "estimate"
    assert not (tested / "events.jsonl").exists()
    assert [event["kind"] for event in events(estimated)] == ["memory_estimated"]


def test_the_same_configuration_gives_the_same_bits_and_another_seed_others(run, tiny, tmp_path):
    one, two, other = run("one"), run("two"), run("other", seed=4)
    assert_same_bits(one, two)
    assert summary(one)["adapter_sha256"] != summary(other)["adapter_sha256"]
    config = SimulationConfig.from_dict(read_config(one)["config"])
    assert dataclasses.replace(config, out=None) == dataclasses.replace(tiny, out=None)
    Simulation(dataclasses.replace(config, out=tmp_path / "again")).run()
    assert_same_bits(one, tmp_path / "again")


def test_the_batch_size_that_was_measured_is_written_down_and_repeats_the_run(run, tmp_path):
    one = run("one", client_batch_size="auto")
    config = SimulationConfig.from_dict(read_config(one)["config"])
    assert config.client_batch_size in range(1, 7)
    Simulation(dataclasses.replace(config, out=tmp_path / "again")).run()
    assert_same_bits(one, tmp_path / "again")


def test_the_batch_size_that_was_measured_is_remembered_for_runs_of_the_same_kind(run, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    found = []
    monkeypatch.setattr(
        "fedpeat_ray.world.find_client_batch_size", lambda *_: found.append(len(found) + 2) or found[-1]
    )
    for name, changes in (("one", {}), ("again", {"seed": 9}), ("longer", {"local": {"sequence_length": 16}})):
        run(name, client_batch_size="auto", rounds=1, **changes)
    found = [read_config(tmp_path / name)["config"]["client_batch_size"] for name in ("one", "again", "longer")]
    assert found == [2, 2, 3]


@pytest.mark.parametrize(("algorithm", "rate"), [("fed-peft", 2e-3), ("fed-avg", 5e-4)])
def test_the_learning_rate_that_suits_the_algorithm_is_written_down_and_resumed(run, tiny, tmp_path, algorithm, rate):
    local = LocalConfig(sequence_length=32, max_steps=3)
    settings: dict[str, Any] = {"algorithm": algorithm, "local": local, "rounds": 1}
    one = run("one", **settings)
    assert read_config(one)["config"]["local"]["learning_rate"] == rate
    two = run("two", **(settings | {"local": dataclasses.replace(local, learning_rate=rate)}))
    assert_same_bits(one, two)
    Simulation(dataclasses.replace(tiny, resume=one, **(settings | {"rounds": 2}))).run()
    assert read_config(one)["config"]["local"]["learning_rate"] == rate


def test_fed_avg_is_held_against_central_tuning_of_all_weights(run, tiny):
    evaluation = dataclasses.replace(tiny.evaluation, centralised=True)
    local = LocalConfig(sequence_length=32, max_steps=3, learning_rate=5e-3)
    settings: dict[str, Any] = {"algorithm": "fed-avg", "evaluation": evaluation, "local": local, "rounds": 1}
    bounds = [summary(run(f"rank{rank}", lora=LoraConfig(rank), **settings))["perplexity"] for rank in (1, 4)]
    assert bounds[0] == bounds[1] and bounds[0]["centralised"] < bounds[0]["zero_shot"]


def stop_in_round(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine goes away when this round is to be written."""
    write = RunLog.write_round

    def write_or_stop(log: RunLog, round: int, *arguments: Any) -> None:
        if round == number:
            raise KeyboardInterrupt
        write(log, round, *arguments)

    monkeypatch.setattr(RunLog, "write_round", write_or_stop)


STOPS = [(1, 2), (3, 2), (4, 2), (4, 1), (4, 10)]
WITH_MOMENTUM = ServerConfig("yogi", 0.01, momentum=0.9)


@pytest.fixture(scope="module")
def whole_of(gpt2_dir: Path, text_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The run directory of a run of an algorithm that nothing stopped."""

    @functools.cache
    def whole(algorithm: str) -> Path:
        directory = tmp_path_factory.mktemp(algorithm) / "run"
        config = dataclasses.replace(tiny_config(gpt2_dir, text_dir), algorithm=algorithm, server=WITH_MOMENTUM)
        Simulation(dataclasses.replace(config, out=directory)).run()
        return directory

    return whole


@pytest.mark.parametrize("algorithm", sweep(["fed-peft", "fed-avg"], quick=["fed-peft"]))
@pytest.mark.parametrize(("stopped_in", "checkpoint_every"), sweep(STOPS, quick=[(3, 2)], full=[(1, 2), (4, 10)]))
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(
    run, tiny, whole_of, tmp_path, monkeypatch, algorithm, stopped_in, checkpoint_every
):
    settings = {"algorithm": algorithm, "server": WITH_MOMENTUM, "checkpoint_every": checkpoint_every}
    whole = whole_of(algorithm)
    with monkeypatch.context() as patch:
        stop_in_round(stopped_in, patch)
        with pytest.raises(KeyboardInterrupt):
            run("stopped", **settings)
    stopped = tmp_path / "stopped"
    assert not (stopped / "summary.json").exists()
    assert table(whole, "rounds")["round"].tolist() == [1, 2, 3, 4]
    Simulation(dataclasses.replace(tiny, resume=stopped, **settings)).run()
    assert_same_bits(whole, stopped)
    assert [event["kind"] for event in events(stopped) if event["kind"] != "ignored_setting"] == ["resumed"]


def test_a_run_that_is_finished_can_be_given_more_rounds(run, tiny, tmp_path):
    longer, shorter = run("longer", rounds=6), run("shorter", rounds=4)
    Simulation(dataclasses.replace(tiny, resume=shorter, rounds=6)).run()
    assert_same_bits(longer, shorter)
    assert read_config(shorter)["config"]["rounds"] == 6


def test_finishing_a_finished_run_again_changes_nothing(run, tiny, tmp_path):
    one, two = run("one"), run("two")
    Simulation(dataclasses.replace(tiny, resume=two)).run()
    assert_same_bits(one, two)


def test_resuming_with_a_setting_that_changes_the_results_is_refused(run, tiny, tmp_path):
    directory = run()
    before = summary(directory)
    for change, path in (
        ({"seed": 4}, "seed = 4 is not allowed: 3, as in the run that is resumed"),
        ({"local": dataclasses.replace(tiny.local, learning_rate=0.5)}, "local.learning_rate = 0.5"),
        ({"fleet": dataclasses.replace(tiny.fleet, num_devices=50)}, "fleet.num_devices = 50"),
        ({"algorithm": "fed-avg"}, "algorithm = 'fed-avg'"),
        ({"rounds": 3}, "rounds = 3 is not allowed: at least 4"),
    ):
        with pytest.raises(ConfigError, match=re.escape(path)):
            Simulation(dataclasses.replace(tiny, resume=directory, **change))
    with pytest.raises(RunDirError, match="holds no run"):
        Simulation(dataclasses.replace(tiny, resume=tmp_path / "nothing"))
    assert summary(directory) == before, "a refusal touches nothing"


def test_a_directory_with_another_run_is_refused_before_anything_is_loaded(run, tiny):
    directory = run()
    before = summary(directory)
    missing = FoundationConfig("no-such-model")
    with pytest.raises(RunDirError, match="holds another run"):
        Simulation(dataclasses.replace(tiny, out=directory, foundation=missing)).run()
    assert summary(directory) == before


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"cohort_size": 41}, "cohort_size = 41 is not allowed: at most fleet.num_devices = 40"),
        ({"foundation": FoundationConfig("no-such-model")}, "foundation.name = 'no-such-model'"),
        ({"lora": LoraConfig(targets=("q_proj",))}, "lora.targets = 'q_proj'"),
        ({"local": LocalConfig(sequence_length=65)}, "local.sequence_length = 65 is not allowed: at most 64"),
        ({"evaluation": EvaluationConfig(sequence_length=65)}, "evaluation.sequence_length = 65"),
        ({"data": DataConfig("python_docs", partition=PartitionConfig(alpha=-1))}, "data.partition.alpha = -1"),
        ({"fleet": FleetConfig(num_devices=40, tier_shares={"phone": 1})}, "fleet.tier_shares = 'phone'"),
        (
            {"fleet": FleetConfig(num_devices=40, memory_scale=1e-9)},
            "fleet.memory_scale = 1e-09 is not allowed",
        ),
    ],
)
def test_what_cannot_be_run_is_refused_and_nothing_is_written(run, tmp_path, change, said):
    with pytest.raises(ConfigError, match=re.escape(said)):
        run(**change)
    assert not (tmp_path / "run").exists()


# Users as devices


@pytest.fixture
def users(tiny: SimulationConfig, tmp_path: Path) -> SimulationConfig:
    """Two rounds of all of twelve users, who wrote six lines each in one file."""
    rng = random.Random(1)
    lines = [f"{user:03},{' '.join(rng.choices(WORDS, k=12))}\n" for user in range(12) for _ in range(6)]
    (tmp_path / "letters.csv").write_text("user,text\n" + "".join(lines))
    data = DataConfig(str(tmp_path / "letters.csv"), source_column="user", partition=PartitionConfig("natural"))
    fleet = FleetConfig(availability=ALWAYS)
    return dataclasses.replace(tiny, rounds=2, cohort_size=12, over_sample=1.0, data=data, fleet=fleet)


WORDS = "ship rope tide anchor gull mast sail wind pan salt bread oven knife butter onion broth".split()


def test_every_user_is_one_device_and_the_log_names_them(users, tmp_path):
    def run(name: str, **changes: Any) -> Path:
        Simulation(dataclasses.replace(users, **({"out": tmp_path / name} | changes))).run()
        return changes.get("resume") or tmp_path / name

    directory = run("run")
    config = SimulationConfig.from_dict(read_config(directory)["config"])
    assert config.fleet.num_devices == 12 and read_config(directory)["resolved"]["fits"]["num_devices"]["all"] == 12
    clients = table(directory, "clients")
    names = [f"{user:03}" for user in range(12)]
    for _, round in clients.groupby("round"):
        assert round["device_id"].tolist() == list(range(12)) and sorted(round["group"]) == names
        assert round["group"].tolist() == clients["group"].tolist()[:12] != names

    Simulation(dataclasses.replace(config, out=tmp_path / "again")).run()
    assert_same_bits(directory, tmp_path / "again")
    whole = run("whole", rounds=3)
    assert_same_bits(whole, run("", resume=directory, out=None, rounds=3))

    some = table(run("some", fleet=FleetConfig(5, availability=ALWAYS), cohort_size=5), "clients")
    assert some["group"].tolist()[:5] == clients["group"].tolist()[:5], "so many of the same"


def test_users_whose_text_is_held_out_are_no_devices(users, tmp_path):
    data = dataclasses.replace(users.data, heldout_by="source", heldout_share=0.25)
    Simulation(dataclasses.replace(users, out=tmp_path / "run", data=data, cohort_size=9)).run()
    assert read_config(tmp_path / "run")["config"]["fleet"]["num_devices"] == 9
    corpus = load_corpus(data, load_tokenizer(Path(users.foundation.name)))
    heldout = {corpus.group_names[group] for group in corpus.group[corpus.heldout]}
    assert len(heldout) == 3 and heldout.isdisjoint(table(tmp_path / "run", "clients")["group"])


def test_more_devices_than_users_are_refused_and_nothing_is_written(users, tmp_path):
    of_a_file = dataclasses.replace(users.data, source_column=None)
    for changes, said in (
        ({"cohort_size": 13}, "cohort_size = 13 is not allowed: at most fleet.num_devices = 12"),
        ({"fleet": FleetConfig(13)}, "fleet.num_devices = 13 is not allowed: auto, or at most"),
        (
            {"data": of_a_file},
            "at most fleet.num_devices = 1, as data.partition.kind = 'natural' makes a device of each",
        ),
    ):
        with pytest.raises(ConfigError, match=re.escape(said)):
            Simulation(dataclasses.replace(users, out=tmp_path / "run", **changes)).run()
    assert not (tmp_path / "run").exists()


def test_fed_avg_trains_and_saves_the_whole_model(run, gpt2_dir):
    directory = run(algorithm="fed-avg", local=LocalConfig(sequence_length=32, max_steps=3, learning_rate=5e-3))
    result = summary(directory)
    assert result["algorithm"] == "fed-avg"
    assert result["perplexity"]["tuned"] < result["perplexity"]["zero_shot"]
    before, after = (AutoModelForCausalLM.from_pretrained(path) for path in (gpt2_dir, directory / "adapter"))
    moved = [not after.get_parameter(name).equal(weight) for name, weight in before.named_parameters()]
    assert all(moved)
    clients = table(directory, "clients")
    assert clients["lora_rank"].isna().all() and clients["upload_bytes"].max() > 4 * sum(
        p.numel() for p in before.parameters()
    )


@pytest.mark.parametrize("algorithm", ["fed-peft", "fed-avg"])
def test_a_round_for_which_nobody_is_available_leaves_the_model_as_it_was_and_the_run_goes_on(run, tmp_path, algorithm):
    trace = tmp_path / "trace.csv"
    lines = "".join(f"{device_id},700,1e9\n" for device_id in range(40))
    trace.write_text("device_id,start_s,stop_s\n" + lines)
    availability = AvailabilityConfig(kind="trace", trace=trace, slot_s=600.0)
    directory = run(fleet=FleetConfig(num_devices=40, availability=availability), algorithm=algorithm)
    rounds, clients = table(directory, "rounds"), table(directory, "clients")
    assert rounds["num_completed"].tolist() == [0, 0, 6, 6]
    assert rounds["virtual_s"].tolist()[:2] == [600.0, 1200.0], "a slot each"
    assert rounds["perplexity"].tolist()[:2] == [summary(directory)["perplexity"]["zero_shot"]] * 2
    assert rounds["perplexity"].iloc[3] < rounds["perplexity"].iloc[1]
    assert rounds["train_loss"].isna().tolist() == [True, True, False, False]
    nobody = clients[clients["round"] <= 2]
    assert set(nobody["drop_reason"]) == {"unavailable"} and nobody["train_loss"].isna().all()
    assert not nobody[["download_bytes", "upload_bytes", "energy_j", "compute_s"]].any(axis=None)


def test_a_run_in_which_nobody_ever_comes_ends_where_it_began(run, tiny, tmp_path):
    trace = tmp_path / "trace.csv"
    trace.write_text("device_id,start_s,stop_s\n0,1e8,1e9\n")
    with pytest.raises(RunFailedError, match="no update was used in any of 4 rounds: devices dropped 32 unavailable"):
        run(
            fleet=FleetConfig(num_devices=40, availability=AvailabilityConfig(kind="trace", trace=trace)),
            evaluation=dataclasses.replace(tiny.evaluation, centralised=True),
        )
    result = summary(tmp_path / "run")
    assert result["perplexity"]["tuned"] == result["perplexity"]["zero_shot"]
    assert result["perplexity"]["centralised"] is None and result["gap_closed"] is None
    assert result["num_completed"] == result["num_tokens"] == result["energy_j"] == 0


def test_a_deadline_drops_the_slow_and_ends_the_round(run):
    fleet = FleetConfig(num_devices=40, availability=ALWAYS, channel=ChannelConfig(kind="nominal"))
    patient = table(run("patient", fleet=fleet, over_sample=1.0), "clients")
    first = patient[patient["round"] == 1].set_index("device_id")
    total_s = (first["download_s"] + first["compute_s"] + first["upload_s"]).sort_values()
    assert (first["outcome"] == "completed").all()
    deadline_s = float(total_s.iloc[2:4].mean())
    directory = run("hurried", fleet=fleet, over_sample=1.0, deadline_s=deadline_s)
    clients = table(directory, "clients")
    hurried = clients[clients["round"] == 1].set_index("device_id")
    late = hurried[hurried["outcome"] == "dropped"]
    assert set(late.index) == set(total_s.index[3:]) and set(late["drop_reason"]) == {"deadline"}
    assert late["train_loss"].isna().all() and not late["upload_bytes"].any() and (late["energy_j"] > 0).all()
    assert table(directory, "rounds")["virtual_s"].iloc[0] == pytest.approx(deadline_s)
    spent_s = hurried["download_s"] + hurried["compute_s"] + hurried["upload_s"]
    assert (spent_s <= deadline_s * (1 + 1e-12)).all()


def test_devices_that_are_too_small_drop_out_for_memory_and_the_share_that_fits_is_known_before(run, capsys):
    directory = run(fleet=FleetConfig(num_devices=40, availability=ALWAYS, memory_scale=2e-4))
    clients = table(directory, "clients")
    too_small = clients["memory_bytes"] > clients["memory_cap_bytes"]
    assert 0 < too_small.sum() < len(clients) and (too_small == (clients["drop_reason"] == "memory")).all()
    fits = read_config(directory)["resolved"]["fits"]
    assert fits["memory_bytes"] == {"model": clients["memory_bytes"].iloc[0]}
    assert sum(fits["num_devices"].values()) == 2 * fits["num_devices"]["all"] == 80
    assert fits["shares"]["phone-low"]["model"] < fits["shares"]["all"]["model"] < 1
    said = capsys.readouterr().out
    assert "devices that have the memory to train" in said and "phone-low" in said.split("measuring zero-shot")[0]


def test_updates_that_are_not_finite_are_dropped_told_of_and_leave_the_model_alone(run, tiny, tmp_path):
    local = LocalConfig(sequence_length=32, max_steps=3, optimizer="sgd", learning_rate=1e30)
    partition = PartitionConfig(documents_per_device=12.0, quantity_sigma=0.0)  # three steps for everybody
    with pytest.raises(RunFailedError, match="no update was used"):
        run(local=local, data=dataclasses.replace(tiny.data, partition=partition))
    directory = tmp_path / "run"
    clients, result = table(directory, "clients"), summary(directory)
    trained = clients[clients["drop_reason"] == "non_finite"]
    assert len(trained) >= 4 and not (clients["outcome"] == "completed").any()
    assert not trained["upload_bytes"].any(), "nothing was sent that could be used"
    assert (trained[["download_bytes", "compute_s", "upload_s", "energy_j"]] > 0).all(axis=None), "it took its time"
    told = [(event["round"], event["device_id"]) for event in events(directory) if event["kind"] == "non_finite"]
    assert sorted(told) == sorted(zip(trained["round"], trained["device_id"], strict=True))
    assert result["perplexity"]["tuned"] == result["perplexity"]["zero_shot"]
    assert all(t.isfinite().all() for t in load_file(directory / "adapter" / "adapter_model.safetensors").values())


def test_the_number_of_threads_is_put_back(run):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        run(rounds=1)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_the_centralised_is_worked_out_once(run, tiny, monkeypatch):
    evaluation = dataclasses.replace(tiny.evaluation, centralised=True)
    settings: dict[str, Any] = {"evaluation": evaluation, "rounds": 1, "seed": 11}
    first = summary(run("one", **settings))["perplexity"]["centralised"]
    monkeypatch.setattr("fedpeat_ray.data.client_data.ClientData.pooled_task", None)
    assert summary(run("two", **settings))["perplexity"]["centralised"] == first


def test_the_share_of_the_gap_is_that_of_the_way_to_centralised_tuning():
    assert gap_closed(100.0, 80.0, 60.0) == 0.5
    assert gap_closed(100.0, 110.0, 60.0) == -0.25
    assert gap_closed(100.0, 50.0, 60.0) is None, "what federated tuning has passed is no bound"
    assert gap_closed(100.0, 80.0, None) is gap_closed(100.0, 80.0, 100.0) is gap_closed(100.0, 90.0, math.inf) is None
