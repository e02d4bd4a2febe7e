"""What users bring in files of their own: run, on any number of hosts, resumed, and reported."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import own_examples
import pytest
from tiny_runs import arguments
from whole_runs import assert_same_bits, summary, table

from analysis import load_run
from analysis.report import write_report
from fedpeat_ray import Simulation, SimulationConfig, own
from fedpeat_ray.commands import run
from fedpeat_ray.runtime.host_pool import HostPool
from fedpeat_ray.runtime.run_log import read_config
from workloads import large_scale

pytestmark = pytest.mark.usefixtures("small_images", "no_reports")


@pytest.fixture(autouse=True)
def _hosts_of_the_session(pool: HostPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "hosts_that_start_meanwhile", lambda *arguments: pool)


@pytest.fixture
def command(gpt2_dir: Path, deep_gpt2_dir: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """The command line of a tiny run of one kind with the four of docs/own.md, in files outside of everything."""
    (tmp_path / "mine").mkdir()
    mine = own_examples.write(tmp_path / "mine")
    common = ["--data.name", mine["dataset"], "--server.aggregator", mine["aggregator"]]
    peat = ["--foundation.name", deep_gpt2_dir, "--emulator.weights", "foundation", "--algorithm", "fed-peat"]
    peat += ["--emulator.first", 1, "--emulator.last", 1, "--emulator.shares", 0.4, 0.8]
    peat += ["--control.kind", mine["controller"]]
    kinds = {"algorithm": ["--algorithm", mine["algorithm"]], "controller": peat}

    def of(kind: str, *more: object) -> list[str]:
        return arguments(gpt2_dir, Path(), *common, *kinds[kind], *more)

    return of


@pytest.mark.parametrize("kind", ["algorithm", "controller"])
def test_what_users_bring_gives_the_same_bits_on_any_side_and_after_a_resume(kind, command, tmp_path, capsys):
    def run(name: str, *more: object) -> Path:
        assert large_scale.main(command(kind, "--out", tmp_path / name, *more)) == 0, capsys.readouterr().err
        return tmp_path / name

    serial = run("serial")
    assert_same_bits(serial, run("ray", "--hosts.backend", "ray", "--hosts.num-hosts", 2))
    resumed = run("resumed", "--rounds", 2)
    assert large_scale.main(["--resume", str(resumed), "--rounds", "4"]) == 0
    assert_same_bits(serial, resumed)
    page = write_report([serial]).read_text()
    if kind == "algorithm":
        rates = load_run(serial).rounds["figures.learning rate"].tolist()
        assert rates == pytest.approx([2e-3 * 0.5 ** (round / 8) for round in (1, 2, 3, 4)])
        assert "learning rate" in page and "federated LoRA with a falling learning rate" in page
        assert read_config(serial)["resolved"]["algorithm"]["name"] == "Cooling"
    else:
        clients = table(serial, "clients")
        levels = clients[clients["outcome"] != "skipped"].groupby("round")["level"].unique()
        assert [list(each) for each in levels][:2] == [[1], [2]], "each level is tried"
        assert (clients["outcome"] == "skipped").any() and (clients["outcome"] == "completed").any()
        assert "Devices skipped" in page


def test_what_is_given_in_python_is_what_is_named_on_the_command_line(command, tmp_path):
    from_shell = tmp_path / "shell"
    assert large_scale.main(command("algorithm", "--out", from_shell)) == 0
    config = SimulationConfig.from_dict(read_config(from_shell)["config"])
    found = {
        "algorithm": own.find("algorithm", config.algorithm, {}),
        "aggregator": own.find("server.aggregator", config.server.aggregator, {}),
        "dataset": own.find("data.name", config.data.name, {}),
    }
    plain = json.loads(json.dumps(config.to_dict()))
    plain["algorithm"], plain["data"]["name"] = "fed-peft", "python_docs"
    plain["server"]["aggregator"] = "weighted-mean"
    plain["out"] = str(tmp_path / "python")
    Simulation(SimulationConfig.from_dict(plain), **found).run()
    one, other = (summary(directory) for directory in (from_shell, tmp_path / "python"))
    assert one.pop("algorithm").endswith("my_algorithm.py:Cooling") and other.pop("algorithm").endswith(":Cooling")
    assert one == other, "under another name"
