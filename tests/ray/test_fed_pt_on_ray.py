"""FedPT on Ray: hosts have the small model, and whoever has the large one gives the same bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_runs
from tiny_runs import parse
from whole_runs import assert_same_bits, events, summary, table

from fedpeat_ray import Simulation

pytestmark = pytest.mark.usefixtures("local_ray")


@pytest.fixture(scope="session")
def proxy_arguments(deep_llama_dir: Path, gpt2_dir: Path, text_dir: Path, public_dir: Path) -> Callable[..., list[str]]:
    """The command line of a tiny FedPT: two rounds, two steps of distillation each."""
    words = """--algorithm fed-pt --rounds 2 --proxy.steps 2 --proxy.batch-size 2 --proxy.sequence-length 24
        --proxy.top-k 50 --foundation.dtype float32"""
    own = [*words.split(), "--proxy.small", str(gpt2_dir), "--data.public-name", str(public_dir)]
    return lambda *more: tiny_runs.arguments(deep_llama_dir, text_dir, *own, *more)


@pytest.fixture(scope="session")
def serial(proxy_arguments: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of such a run in this process."""
    directory = tmp_path_factory.mktemp("serial") / "run"
    Simulation(parse(proxy_arguments("--out", directory))).run()
    return directory


@pytest.mark.parametrize("num_hosts", [pytest.param(1, marks=pytest.mark.full), 3])
def test_any_number_of_hosts_gives_the_bits_of_a_serial_run(num_hosts, pool, proxy_arguments, serial, tmp_path):
    hosts = ("--hosts.backend", "ray", "--hosts.num-hosts", num_hosts)
    Simulation(parse(proxy_arguments("--out", tmp_path / "run", *hosts))).run(pool)
    assert_same_bits(serial, tmp_path / "run")
    assert not events(tmp_path / "run", "host_lost")


def test_two_shards_of_the_large_model_give_the_adapter_of_one(proxy_arguments, serial, tmp_path):
    Simulation(parse(proxy_arguments("--out", tmp_path / "run", "--foundation.num-shards", 2))).run()
    one, two = summary(serial), summary(tmp_path / "run")
    assert one["adapter_sha256"] == two["adapter_sha256"]
    assert table(serial, "clients").equals(table(tmp_path / "run", "clients"))
    for number in ("small_zero_shot", "small_tuned"):
        assert one["perplexity"][number] == two["perplexity"][number]
    for number in ("zero_shot", "proxy_tuned"):
        assert one["perplexity"][number] == pytest.approx(two["perplexity"][number], rel=1e-5)


def test_devices_with_actors_of_their_own_get_the_small_model_and_the_server_steers_the_large(
    pool, proxy_arguments, tmp_path
):
    one_by_one, exclusive = ("--client-batch-size", 1), ("--hosts.backend", "ray", "--hosts.exclusive")
    few = ("--rounds", 1, "--cohort-size", 2, "--over-sample", 1.0)
    for name, more in (("serial", ()), ("exclusive", exclusive)):
        Simulation(parse(proxy_arguments("--out", tmp_path / name, *few, *one_by_one, *more))).run(pool)
    assert_same_bits(tmp_path / "serial", tmp_path / "exclusive")
