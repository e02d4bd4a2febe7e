"""Many simulations: what is finished is not repeated, what was interrupted goes on, and a study says why it failed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from whole_runs import assert_same_bits, changed, tiny

from fedpeat_ray.config import HostsConfig
from fedpeat_ray.errors import ConfigError, FedPeatError
from fedpeat_ray.runtime import run_log
from fedpeat_ray.runtime.run_log import RunLog, read_settings
from fedpeat_ray.sweep import Sweep, report

SERIAL = HostsConfig(backend="serial")


@pytest.fixture
def config(gpt2_dir, text_dir):
    return tiny(gpt2_dir, text_dir, algorithm="fed-peft", rounds=2)


def test_a_finished_run_is_not_repeated_and_one_with_fewer_rounds_goes_on(config, tmp_path, capsys):
    with Sweep(tmp_path / "out", SERIAL) as sweep:
        first = sweep.run("one", config)
        assert sweep.run("one", config) == first
        assert capsys.readouterr().out.count("run one\n") == 1
        summary, directory = sweep.run("one", changed(config, rounds=3))
        assert summary["rounds"] == 3 and directory == tmp_path / "out" / "one"


def test_a_run_is_never_taken_for_one_of_other_settings(config, tmp_path):
    with Sweep(tmp_path, SERIAL) as sweep:
        sweep.run("one", config)
        with pytest.raises(ConfigError, match=r"cohort_size = 5 is not allowed: 6, as in the run that is resumed"):
            sweep.run("one", changed(config, cohort_size=5))
        with pytest.raises(ConfigError, match=r"rounds = 1 is not allowed: at least 2"):
            sweep.run("one", changed(config, rounds=1))


def test_a_finished_run_of_other_versions_is_taken_and_its_hosts_are_the_sweeps(config, tmp_path, monkeypatch):
    with Sweep(tmp_path, SERIAL) as sweep:
        on_ray = changed(config, hosts=HostsConfig("ray"))
        summary, directory = sweep.run("one", on_ray)
        assert read_settings(directory).hosts == SERIAL
        monkeypatch.setattr(run_log, "_versions", lambda: {"torch": "another"})
        older = {name: value for name, value in summary.items() if name != "failure"}
        (directory / "summary.json").write_text(json.dumps(older))
        assert sweep.run("one", on_ray) == (older, directory)


def test_a_run_that_was_interrupted_goes_on(config, tmp_path, monkeypatch):
    write = RunLog.write_round

    def stop(log: RunLog, round: int, *arguments: object) -> None:
        if round == 2:
            raise KeyboardInterrupt
        write(log, round, *arguments)  # type: ignore[arg-type]

    with Sweep(tmp_path, SERIAL) as sweep:
        sweep.run("whole", config)
        with monkeypatch.context() as patch:
            patch.setattr(RunLog, "write_round", stop)
            with pytest.raises(KeyboardInterrupt):
                sweep.run("stopped", config)
        sweep.run("stopped", config)
    assert_same_bits(tmp_path / "whole", tmp_path / "stopped")


def test_a_study_leaves_its_text_or_says_why_not(tmp_path, capsys):
    def refused(sweep: Sweep) -> str:
        raise ConfigError.of("seeds", (), "at least one")

    assert report(Sweep(tmp_path, SERIAL), "study.md", lambda sweep: "found\n") == 0
    assert Path(tmp_path / "study.md").read_text() == "found\n"
    assert capsys.readouterr().out.splitlines() == ["found", "", str(tmp_path)]
    assert report(Sweep(tmp_path, SERIAL), "other.md", refused) == 2
    assert capsys.readouterr().err.startswith("error: seeds = ()") and not (tmp_path / "other.md").exists()


def test_a_study_that_is_interrupted_says_where_it_left_things(tmp_path, capsys):
    def stopped(sweep: Sweep) -> str:
        raise KeyboardInterrupt

    assert report(Sweep(tmp_path, SERIAL), "study.md", stopped) == 130
    assert capsys.readouterr().err == f"\ninterrupted: what was finished is in {tmp_path}\n"


def test_many_runs_end_as_they_would_alone_and_those_that_fail_are_named_when_the_others_are_done(config, tmp_path):
    never = changed(config, seed=3, deadline_s=1e-9)
    with Sweep(tmp_path, SERIAL) as sweep:
        found = sweep.run_all({"one": config, "other": changed(config, seed=1)})
        assert found["one"] == sweep.run("one", config) and [*found] == ["one", "other"]
        with pytest.raises(FedPeatError, match=r"1 of 3 runs failed: late: no update was used in any of 2 rounds"):
            sweep.run_all({"one": config, "late": never, "third": changed(config, seed=2)})
        assert (tmp_path / "third" / "summary.json").exists()
        with pytest.raises(ConfigError, match="cohort_size = 5000 is not allowed"):
            sweep.run_all({"fourth": changed(config, seed=4), "fifth": changed(config, cohort_size=5000)})
        assert not (tmp_path / "fourth").exists(), "what is refused is refused first"
