"""FedPEAT on Ray: the bits of the serial side on any hosts and on a sharded foundation, whatever is lost on the way."""

from __future__ import annotations

import functools
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import failing_hosts
import pytest
import tiny_runs
from safetensors.torch import load_file
from tiny_runs import CLIENT_BATCH_SIZE, parse
from whole_runs import assert_same_bits, events, summary, table

from fedpeat_ray import Simulation
from fedpeat_ray.errors import DriverLostError
from fedpeat_ray.files import user_cache_dir
from fedpeat_ray.runtime import foundation_driver
from fedpeat_ray.runtime.run_log import RunLog
from fedpeat_ray.training import adapters

pytestmark = pytest.mark.usefixtures("local_ray")


@pytest.fixture(scope="session")
def peat_arguments(deep_gpt2_dir: Path, text_dir: Path, public_dir: Path) -> Callable[..., list[str]]:
    """The command line of a tiny FedPEAT: a level at random, elastic weights, re-aligned after every other round."""
    words = """--algorithm fed-peat --control.kind random --emulator.first 1 --emulator.last 1 --emulator.shares 0.2 0.6
        --emulator.weights elastic --emulator.realign-every 2 --emulator.realign-steps 2
        --emulator.distil.steps 4 --emulator.distil.batch-size 2 --emulator.distil.sequence-length 16"""
    own = [*words.split(), "--data.public-name", str(public_dir)]
    return lambda *more: tiny_runs.arguments(deep_gpt2_dir, text_dir, *own, *more)


SERVER_AND_MIDDLE = ("--emulator.server-steps", 1, "--lora.blocks", 0, 1, 6)


@pytest.fixture(scope="session")
def serial(peat_arguments: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of such a run in this process, adapters in a middle block and the server taking part."""
    directory = tmp_path_factory.mktemp("serial") / "run"
    Simulation(parse(peat_arguments("--out", directory, *SERVER_AND_MIDDLE))).run()
    levels = table(directory, "clients").query("outcome == 'completed'")["level"]
    assert set(levels) == {1, 2}
    return directory


def emulator_files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (directory / "emulators").iterdir()}


@pytest.mark.parametrize("num_hosts", [pytest.param(1, marks=pytest.mark.full), 3])
def test_any_number_of_hosts_gives_the_bits_of_a_serial_run(num_hosts, pool, peat_arguments, serial, tmp_path):
    hosts = ("--hosts.backend", "ray", "--hosts.num-hosts", num_hosts)
    Simulation(parse(peat_arguments("--out", tmp_path / "run", *SERVER_AND_MIDDLE, *hosts))).run(pool)
    assert_same_bits(serial, tmp_path / "run")
    assert emulator_files(serial) == emulator_files(tmp_path / "run") and len(emulator_files(serial)) == 2
    assert not events(tmp_path / "run", "host_lost")


def test_a_host_that_is_killed_on_an_emulator_leaves_no_trace_in_the_result(
    pool, peat_arguments, serial, tmp_path, monkeypatch
):
    batch = level_batches(serial, round=3)[1]
    earlier = {device_id for round in (1, 2) for ids in level_batches(serial, round) for device_id in ids}
    victim = next(device_id for device_id in batch if device_id not in earlier)  # so that the kill is in round 3
    kills = functools.partial(failing_hosts.KillsItsHost, device_id=victim, once=tmp_path / "killed")
    monkeypatch.setattr(adapters, "TrainClientBatch", kills)
    hosts = ("--hosts.backend", "ray", "--hosts.num-hosts", 2)
    Simulation(parse(peat_arguments("--out", tmp_path / "run", *SERVER_AND_MIDDLE, *hosts))).run(pool)
    assert (tmp_path / "killed").exists()
    assert_same_bits(serial, tmp_path / "run")
    (event,) = events(tmp_path / "run", "host_lost")
    assert event["device_ids"] == batch and event["batch"] == 1


def level_batches(directory: Path, round: int) -> list[list[int]]:
    """The device ids of each client batch of a round: by level, then the longest first."""
    clients = table(directory, "clients").query(f"round == {round} and outcome == 'completed'")
    clients = clients.assign(fewer=-clients["num_steps"]).sort_values(["level", "fewer"], kind="stable")
    ids = clients["device_id"].tolist()
    return [ids[start : start + CLIENT_BATCH_SIZE] for start in range(0, len(ids), CLIENT_BATCH_SIZE)]


# A foundation that no process holds whole


ALSO_IN_A_DROPPED_BLOCK = ("--lora.blocks", 0, 1, 2, 6)  # no emulator has block 2
TWO_SHARDS = (*ALSO_IN_A_DROPPED_BLOCK, "--foundation.num-shards", 2)


@pytest.fixture(scope="module")
def sharded(peat_arguments: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of a run with two shards, with nothing in its way."""
    directory = tmp_path_factory.mktemp("sharded") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(directory.with_name("cache")))  # others made a file of these blocks too
        Simulation(parse(peat_arguments("--out", directory, *TWO_SHARDS))).run()
        (held,) = user_cache_dir().glob("held-*")
    blocks = {int(name.split(".")[2]) for name in load_file(held) if name.startswith("transformer.h.")}
    assert blocks == {0, 1, 3, 5, 6}, "hosts hold no block that emulators do not have"
    return directory


def test_two_shards_give_the_adapter_and_the_emulators_of_one(peat_arguments, sharded, tmp_path):
    Simulation(parse(peat_arguments("--out", tmp_path / "run", *ALSO_IN_A_DROPPED_BLOCK))).run()
    one, two = summary(tmp_path / "run"), summary(sharded)
    assert one["adapter_sha256"] == two["adapter_sha256"]
    assert emulator_files(tmp_path / "run") == emulator_files(sharded)
    assert one["perplexity"]["emulator_tuned"] == two["perplexity"]["emulator_tuned"]
    assert one["perplexity"]["plug_in"] == pytest.approx(two["perplexity"]["plug_in"], rel=1e-5)
    assert one["perplexity"]["zero_shot"] == pytest.approx(two["perplexity"]["zero_shot"], rel=1e-5)


@pytest.mark.full
def test_a_run_that_lost_a_rank_ends_with_one_line_and_goes_on_to_the_same_bits(
    peat_arguments, sharded, tmp_path, monkeypatch
):
    drivers: list[foundation_driver.ShardedFoundation] = []
    start, write = foundation_driver.ShardedFoundation.__init__, RunLog.write_round

    def remember(driver: Any, *arguments: Any) -> None:
        start(driver, *arguments)
        drivers.append(driver)

    def kill_in_round_3(log: RunLog, round: int, *arguments: Any) -> None:
        write(log, round, *arguments)
        if round == 3:
            os.kill(drivers[0].process_ids()[1], signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr(foundation_driver.ShardedFoundation, "__init__", remember)
        patch.setattr(RunLog, "write_round", kill_in_round_3)
        with pytest.raises(DriverLostError) as caught:
            Simulation(parse(peat_arguments("--out", tmp_path / "run", *TWO_SHARDS))).run()
    assert str(caught.value).startswith("rank 1 of the 2 that hold the foundation is lost (")
    assert "can be resumed" in str(caught.value) and "\n" not in str(caught.value)
    assert events(tmp_path / "run", "driver_lost") and not (tmp_path / "run" / "summary.json").exists()
    Simulation(parse(peat_arguments("--resume", tmp_path / "run", *TWO_SHARDS))).run()
    assert_same_bits(sharded, tmp_path / "run")
    assert emulator_files(sharded) == emulator_files(tmp_path / "run")


@pytest.mark.full
def test_a_server_that_takes_part_does_so_on_its_shards_while_devices_are_on_hosts(pool, peat_arguments, tmp_path):
    words = "--emulator.server-steps 2 --emulator.choice influence --foundation.dtype float32 --rounds 2".split()
    Simulation(parse(peat_arguments("--out", tmp_path / "one", *words))).run()
    on_ray = "--foundation.num-shards 2 --hosts.backend ray --hosts.num-hosts 2".split()
    Simulation(parse(peat_arguments("--out", tmp_path / "two", *words, *on_ray))).run(pool)
    one, two = (summary(tmp_path / name)["perplexity"] for name in ("one", "two"))
    for number in ("zero_shot", "plug_in", "emulator_zero_shot", "emulator_tuned"):
        assert two[number] == pytest.approx(one[number], rel=1e-5)
    assert one["plug_in"] < one["zero_shot"]
