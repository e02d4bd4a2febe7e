"""Names of what users bring, and what is said of one that names nothing."""

from __future__ import annotations

from pathlib import Path

import own_examples
import pytest
from whole_runs import changed, tiny

from fedpeat_ray import Simulation, SimulationConfig, own
from fedpeat_ray.config import ControlConfig, DataConfig, ServerConfig
from fedpeat_ray.errors import ConfigError, DataError, FedPeatError

RAISES = "raise RuntimeError('no \\n such luck')"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"algorithm": "fed_avg"},
            "algorithm = 'fed_avg' is not allowed: one of fed-peat, fed-peft, fed-pt, fed-avg, or an",
        ),
        ({"algorithm": "nowhere.py:It"}, "algorithm = 'nowhere.py:It' is not allowed: .* FileNotFoundError"),
        ({"algorithm": "no_module:It"}, "algorithm = 'no_module:It' is not allowed: .* No module named 'no_module'"),
        ({"algorithm": "mine.py:Other"}, "algorithm = 'mine.py:Other' is not allowed: .* no attribute 'Other'"),
        ({"algorithm": "mine.py:number"}, "algorithm = 'mine.py:number' is not allowed: a class that inherits from"),
        ({"algorithm": "raises.py:It"}, "algorithm = 'raises.py:It' is not allowed: .* RuntimeError: no"),
        ({"control": ControlConfig("mine.py:number")}, "control.kind = 'mine.py:number' is not allowed: a class that"),
        (
            {"control": ControlConfig("greedier")},
            "control.kind = 'greedier' is not allowed: one of fixed, random, greedy, .* or",
        ),
        (
            {"server": ServerConfig(aggregator="mean")},
            "server.aggregator = 'mean' is not allowed: one of weighted-mean, or",
        ),
    ],
    ids=lambda value: "" if isinstance(value, str) else str(value),
)
def test_a_name_of_nothing_is_refused_before_anything_starts(changes, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text("number = 3")
    Path("raises.py").write_text(RAISES)
    with pytest.raises(ConfigError, match=said) as caught:
        Simulation(changed(SimulationConfig(), **changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("def texts(config): return []", "data.name = .* gives nothing, not documents"),
        ("def texts(config): return ['a b c']", "data.name = .* gives str, not documents"),
        (
            "from fedpeat_ray.data.hub import Document\ndef texts(config): return [Document(b'a b', 3)]",
            "data.name = .* parts are no strings",
        ),
    ],
)
def test_a_dataset_that_gives_something_else_is_refused(code, said, gpt2_dir, tmp_path):
    (tmp_path / "texts.py").write_text(code)
    data = DataConfig(str(tmp_path / "texts.py:texts"))
    with pytest.raises(DataError, match=said):
        Simulation(changed(tiny(gpt2_dir, tmp_path), algorithm="fed-peft", data=data, out=tmp_path / "run")).run()


def test_the_same_file_name_in_two_folders_is_two_modules(tmp_path):
    found = []
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.py").write_text(f"class It: place = {name!r}")
        found.append(own.find("algorithm", str(tmp_path / name / "mine.py:It"), {}))
    assert [kind.place for kind in found] == ["one", "other"]
    assert own.find("algorithm", str(tmp_path / "one" / "mine.py:It"), {}) is found[0], "it is loaded once"


def test_what_is_given_goes_by_its_import_path_and_a_run_directory_by_its_short_name(monkeypatch, tmp_path):
    mine = own_examples.write(tmp_path)
    cooling = own.find("algorithm", mine["algorithm"], {})
    name = own.given(cooling)
    assert name.endswith(":Cooling") and own.find("algorithm", name, {}) is cooling
    assert own.short(name) == "Cooling" and own.short("fed-avg") == "fed-avg"
    assert not own.is_import_path("organisation/dataset") and not own.is_import_path("folder:with a colon")


def test_a_directory_whose_name_looks_like_an_import_path_is_a_directory(tmp_path):
    (tmp_path / "a:b").mkdir()
    assert not own.is_import_path(str(tmp_path / "a:b"))


def test_a_resume_without_the_code_says_what_is_missing(gpt2_dir, text_dir, tmp_path):
    mine = own_examples.write(tmp_path)
    config = changed(tiny(gpt2_dir, text_dir), algorithm=mine["algorithm"], out=tmp_path / "run", rounds=1)
    Simulation(config).run()
    (tmp_path / "my_algorithm.py").rename(tmp_path / "gone.py")
    del own.sys.modules[own.find("algorithm", mine["algorithm"], {}).__module__]
    with pytest.raises(FedPeatError, match="algorithm = .*my_algorithm.py:Cooling' is not allowed"):
        Simulation(changed(config, out=None, resume=tmp_path / "run", rounds=2))
