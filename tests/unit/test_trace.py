"""The timeline of a run."""

from __future__ import annotations

import json
import time

import pytest
from whole_runs import changed
from whole_runs import tiny as tiny_run

from fedpeat_ray import Simulation, SimulationConfig
from fedpeat_ray.errors import FedPeatError
from fedpeat_ray.runtime.trace import MAIN, Trace, process_started_s


@pytest.fixture
def tiny(gpt2_dir, text_dir) -> SimulationConfig:
    return tiny_run(gpt2_dir, text_dir, algorithm="fed-peft")


def spans(path) -> list[dict]:
    return [event for event in json.loads(path.read_text())["traceEvents"] if event["ph"] == "X"]


def test_spans_are_written_in_microseconds_from_the_first_with_a_name_a_lane(tmp_path):
    trace = Trace()
    trace.begin("one")
    trace.begin("two")
    trace.end()
    trace.add("host 0", "work", 0.5, 2.0, batches=3)
    trace.write(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert [event["args"]["name"] for event in events if event["ph"] == "M"] == [MAIN, "host 0"]
    one, two, work = spans(tmp_path / "trace.json")
    assert (work["ts"], work["dur"], work["tid"], work["args"]) == (0, 1_500_000, 1, {"batches": 3})
    assert one["tid"] == two["tid"] == 0 and one["ts"] + one["dur"] <= two["ts"] + 1


def test_a_process_began_before_now():
    assert 0 < time.time() - process_started_s() < 24 * 3600


def test_a_run_writes_where_its_time_went(tiny, tmp_path):
    Simulation(changed(tiny, out=tmp_path / "run", trace=tmp_path / "trace.json")).run()
    names = [span["name"] for span in spans(tmp_path / "trace.json")]
    for name in (
        "loading Python's modules",
        "round 1, training",
        "round 3, evaluation and log",
        "evaluating what came out",
    ):
        assert name in names


def test_a_run_that_is_refused_says_where_its_time_went_too(tiny, tmp_path):
    data, places = {"name": str(tmp_path / "nothing")}, {"trace": tmp_path / "trace.json", "out": tmp_path / "run"}
    broken = changed(tiny, data=data, **places)
    with pytest.raises(FedPeatError):
        Simulation(broken).run()
    assert any(span["name"].startswith("loading") for span in spans(tmp_path / "trace.json"))
