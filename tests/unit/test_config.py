"""Settings: what is refused and how it is said, and configurations as plain values and back."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import re
import typing
from pathlib import Path
from typing import Any

import pytest
import tyro

from fedpeat_ray.algorithms.find import find_algorithm
from fedpeat_ray.command_line import USUAL, check_flags, flags
from fedpeat_ray.config import (
    COUNTS_ONLY,
    REMOVED,
    RENAMED,
    TIER_NAMES,
    AvailabilityConfig,
    DataConfig,
    FleetConfig,
    HostsConfig,
    LocalConfig,
    LoraConfig,
    PartitionConfig,
    SimulationConfig,
)
from fedpeat_ray.errors import ConfigError, FedPeatError
from fedpeat_ray.fleet.tiers import TIERS
from fedpeat_ray.settings import Bounds, bounds_of, differences, get
from workloads.large_scale import main


def with_value(config: Any, path: str, value: Any) -> Any:
    """A copy of the configuration with one field changed."""
    name, _, rest = path.partition(".")
    return dataclasses.replace(config, **{name: with_value(getattr(config, name), rest, value) if rest else value})


def leaves(config: Any, prefix: str = "") -> dict[str, Any]:
    """Every field by its path."""
    found = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            found |= leaves(value, f"{prefix}{field.name}.")
        else:
            found[prefix + field.name] = value
    return found


def bounds(config: Any, prefix: str = "") -> dict[str, Bounds]:
    """Those of every field that has some, by its path."""
    found = {}
    for name, hint in typing.get_type_hints(type(config), include_extras=True).items():
        if dataclasses.is_dataclass(value := getattr(config, name)):
            found |= bounds(value, f"{prefix}{name}.")
        elif of_field := bounds_of(hint):
            found[prefix + name] = of_field
    return found


BOUNDS = bounds(SimulationConfig())
FULL = SimulationConfig(
    algorithm="fed-avg",
    deadline_s=12.5,
    client_batch_size=7,
    out=Path("runs") / "a",
    local=LocalConfig(optimizer="sgd", learning_rate=0.1, prox_mu=0.1),
    lora=LoraConfig(targets=("c_attn", "c_fc")),
    data=DataConfig(subset="x", partition=PartitionConfig(kind="iid", documents_per_device=math.inf)),
    fleet=FleetConfig(
        tiers=Path("tiers.toml"),
        tier_shares={"sbc": 1, "kiosk": 0.5},
        availability=AvailabilityConfig(kind="trace", trace=Path("trace.csv"), slot_s=60),
    ),
    hosts=HostsConfig(num_gpus=0.5, memory_gib=2.0),
)


def test_the_defaults_and_a_full_configuration_are_valid():
    SimulationConfig().validate()
    FULL.validate()


@pytest.mark.parametrize("config", [SimulationConfig(), FULL], ids=["defaults", "full"])
def test_a_configuration_survives_json(config):
    text = json.dumps(config.to_dict(), allow_nan=False)
    again = SimulationConfig.from_dict(json.loads(text))
    assert again == config
    assert [type(value) for value in leaves(again).values()] == [type(value) for value in leaves(config).values()]
    assert again.to_dict() == config.to_dict()
    assert not list(differences(config, again))


def test_what_a_file_leaves_out_is_the_default():
    assert SimulationConfig.from_dict({}) == SimulationConfig()
    config = SimulationConfig.from_dict({"rounds": 3, "data": {"partition": {"alpha": 2.0}}})
    assert config.rounds == 3 and config.data.partition == PartitionConfig(alpha=2.0)


@pytest.mark.parametrize("path", REMOVED)
def test_a_setting_that_there_once_was_is_read_and_ignored(path):
    values = SimulationConfig(rounds=3).to_dict()
    part, name = path.split(".")
    values[part][name] = 7
    assert SimulationConfig.from_dict(values) == SimulationConfig(rounds=3)
    assert values[part][name] == 7, "what was read stays as it was"


@pytest.mark.parametrize(("path", "now"), RENAMED.items())
def test_a_setting_of_another_name_is_read_under_that_of_today(path, now):
    values = SimulationConfig().to_dict()
    part, name = path.split(".")
    values[part][name] = not values[part].pop(now)
    assert SimulationConfig.from_dict(values).to_dict()[part][now] == values[part][name]


@pytest.mark.parametrize("path", ["ruonds", "local.learningrate", "data.partition.aplha"])
def test_a_field_that_does_not_exist_is_refused_by_its_whole_name(path):
    *parents, name = path.split(".")
    values: dict[str, Any] = {name: 3}
    for parent in reversed(parents):
        values = {parent: values}
    with pytest.raises(ConfigError, match=re.escape(f"{path} = 3 is not allowed: one of ")):
        SimulationConfig.from_dict(values)


@pytest.mark.parametrize("path", BOUNDS)
def test_a_value_beyond_its_bounds_is_refused_with_field_value_and_what_is_allowed(path):
    low, high, allowed = dataclasses.astuple(BOUNDS[path])
    wrong: list[float] = [-1.0 if low == 0 else math.nextafter(low, -math.inf), math.nan]
    if high < math.inf:
        wrong.append(math.nextafter(high, math.inf) if high < 2 else 2 * high)
    for value in wrong:
        config = with_value(SimulationConfig(), path, value)
        with pytest.raises(ConfigError) as caught:
            config.validate()
        assert str(caught.value) == f"{path} = {value!r} is not allowed: {allowed}"
        assert isinstance(caught.value, FedPeatError) and isinstance(caught.value, ValueError)


@pytest.mark.parametrize("path", BOUNDS)
def test_the_smallest_value_allowed_is_allowed(path):
    low = BOUNDS[path].low
    value = type(low)(low)
    config = with_value(with_value(SimulationConfig(), "cohort_size", 1), path, value)
    if path == "fleet.availability.max_share":
        config = with_value(config, "fleet.availability.min_share", 0)
    config.validate()


def test_every_number_has_its_bounds():
    numbers = {path for path, value in leaves(SimulationConfig()).items() if type(value) in (int, float)}
    assert numbers <= set(BOUNDS)


@pytest.mark.parametrize(
    ("path", "value", "allowed"),
    [
        ("local.optimizer", "adam", "adamw, sgd"),
        ("foundation.dtype", "float16", "auto, float32, bfloat16, float64"),
        ("data.partition.kind", "non-iid", "iid, dirichlet, by_source, shards, natural"),
        ("hosts.backend", None, "ray, serial"),
        ("lora.targets", "c_attn", "tuple[str, ...]"),
        ("lora.targets", ("c_attn", 3), "tuple[str, ...]"),
        ("hosts.exclusive", 1, "bool"),
        ("fleet.tier_shares", (1.0,), "Mapping[str, float]"),
        ("fleet.tier_shares", {"sbc": "1"}, "Mapping[str, float]"),
        ("local", "adamw", "LocalConfig"),
        ("client_batch_size", "automatic", "an integer of at least 1"),
        ("client_batch_size", 2.0, "an integer of at least 1"),
        ("rounds", 2.5, "an integer of at least 1"),
        ("rounds", "3", "an integer of at least 1"),
        ("rounds", True, "an integer of at least 1"),
        ("local.learning_rate", "0.1", "a finite number above 0"),
    ],
)
def test_a_value_of_another_kind_is_refused_before_it_means_something_else(path, value, allowed):
    with pytest.raises(ConfigError) as caught:
        with_value(SimulationConfig(), path, value).validate()
    assert str(caught.value).startswith(f"{path} = {value!r} is not allowed: ")
    assert allowed in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"cohort_size": 2001}, "cohort_size = 2001 is not allowed: at most fleet.num_devices = 2000"),
        ({"cohort_size": 9, "fleet.num_devices": 8}, "cohort_size = 9 is not allowed: at most fleet.num_devices = 8"),
        ({"fleet.num_devices": "all"}, "fleet.num_devices = 'all' is not allowed: an integer of at least 1"),
        ({"fleet.availability.kind": "trace"}, "fleet.availability.trace = None is not allowed: a CSV file"),
        ({"fleet.availability.min_share": 0.96}, "min_share = 0.96 is not allowed: at most fleet.availability.max"),
        ({"out": Path("a"), "resume": Path("b")}, "out = 'a' is not allowed: unset together with resume"),
        ({"hosts.exclusive": True, "hosts.backend": "serial"}, "hosts.exclusive = True is not allowed"),
        (
            {"fleet.tier_shares": {"phone-lo": 1}},
            "fleet.tier_shares = 'phone-lo' is not allowed: one of sbc, phone-low, ",
        ),
        ({"fleet.tier_shares": {"phone-lo": 1}}, "edge-gpu-large; did you mean phone-low?"),
        ({"fleet.tier_shares": {"sbc": -1.0}}, "fleet.tier_shares = 'sbc=-1.0' is not allowed: a finite number of at"),
        ({"fleet.tier_shares": {"sbc": math.nan}}, "fleet.tier_shares = 'sbc=nan' is not allowed: a finite number"),
        ({"fleet.tier_shares": {"sbc": 0, "laptop": 0}}, "fleet.tier_shares = 'sbc=0 laptop=0' is not allowed: shares"),
        ({"fleet.tier_shares": {"sbc": 1e308, "laptop": 1e308}}, "shares of which one is above 0, with a finite sum"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(changes, said):
    config = SimulationConfig()
    for path, value in changes.items():
        config = with_value(config, path, value)
    with pytest.raises(ConfigError, match=re.escape(said)):
        config.validate()


def test_how_many_users_there_are_is_not_known_before_the_text_is_read():
    users = with_value(with_value(SimulationConfig(), "data.partition.kind", "natural"), "cohort_size", 3000)
    users.validate()
    for num_devices, said in (
        (2999, "at most fleet.num_devices = 2999, as data.partition.kind = 'natural'"),
        (3000, None),
    ):
        config = with_value(users, "fleet.num_devices", num_devices)
        with pytest.raises(ConfigError, match=said) if said else contextlib.nullcontext():
            config.validate()
    by_label = with_value(with_value(users, "data.partition.group_by", "label"), "fleet.num_devices", 1)
    with pytest.raises(ConfigError, match=r"makes a device of each label \(data.label_column\)$"):
        by_label.validate()


@pytest.mark.parametrize(
    ("changes", "rate"),
    [
        ({"algorithm": "fed-peat"}, 2e-3),
        ({"algorithm": "fed-peft"}, 2e-3),
        ({"algorithm": "fed-pt"}, 2e-3),
        ({"algorithm": "fed-avg"}, 5e-4),
        ({"emulator.trained": "bias"}, 2e-3),
        ({"emulator.trained": "blocks"}, 5e-4),
        ({"algorithm": "fed-avg", "emulator.trained": "bias"}, 5e-4),
        ({"algorithm": "fed-peft", "emulator.trained": "blocks"}, 2e-3),
    ],
)
def test_the_learning_rate_suits_what_is_trained(changes, rate):
    config = SimulationConfig()
    for path, value in changes.items():
        config = with_value(config, path, value)
    assert config.local.learning_rate == "auto"
    assert find_algorithm(config.algorithm).learning_rate(config) == rate


def test_shares_of_tiers_are_said_by_name_and_those_of_older_runs_by_place():
    said = ["--fleet.tier-shares", "phone-low=0.5", "phone-mid=2"]
    config = tyro.cli(SimulationConfig, args=said)
    assert config.fleet.tier_shares == {"phone-low": 0.5, "phone-mid": 2.0}
    assert config.to_dict()["fleet"]["tier_shares"] == {"phone-low": 0.5, "phone-mid": 2.0}
    assert tyro.cli(SimulationConfig, args=[], default=config) == config
    assert hash(config) == hash(tyro.cli(SimulationConfig, args=said))
    old = SimulationConfig.from_dict({"fleet": {"tier_shares": [0, 0.5, 2, 0, 0, 0, 0]}})
    old.validate()
    assert {name: share for name, share in old.fleet.tier_shares.items() if share} == config.fleet.tier_shares
    assert SimulationConfig.from_dict({"fleet": {"tier_shares": []}}) == SimulationConfig()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("phone-low", "fleet.tier_shares = 'phone-low' is not allowed: NAME=SHARE of one or more tiers"),
        ("0.5 0.5", "fleet.tier_shares = '0.5' is not allowed: NAME=SHARE of one or more tiers"),
        ("phone-low=half", "fleet.tier_shares = 'phone-low=half' is not allowed: NAME=SHARE"),
        ("=0.5", "fleet.tier_shares = '=0.5' is not allowed: NAME=SHARE"),
        ("sbc=1 sbc=2", "fleet.tier_shares = 'sbc=2' is not allowed: sbc once; it has 1.0 already"),
        ("laptp=1", "edge-gpu-large; did you mean laptop?"),
    ],
)
def test_shares_that_cannot_be_read_are_refused_in_one_line(words, said, capsys):
    assert main(["--fleet.tier-shares", *words.split()]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and said in line


def test_tiers_are_known_by_the_names_of_the_fleet(capsys):
    assert tuple(tier.name for tier in TIERS) == TIER_NAMES
    with pytest.raises(SystemExit):
        main(["--help"])
    shown = capsys.readouterr().out.split("--fleet.tier-shares")[1].split("--fleet.spread")[0]
    assert set(TIER_NAMES) <= set(re.findall(r"[a-z-]+", shown)) and "NAME=SHARE" in shown


def test_a_file_of_tiers_is_where_the_person_was_who_named_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert FleetConfig(tiers=Path("my.toml")).tiers == tmp_path / "my.toml"


def test_differences_name_the_path_and_both_values():
    one, other = SimulationConfig(), with_value(with_value(SimulationConfig(), "seed", 3), "data.partition.alpha", 1.0)
    assert list(differences(one, other)) == [("seed", 0, 3), ("data.partition.alpha", 0.3, 1.0)]
    assert not list(differences(one, SimulationConfig()))


def test_every_field_has_its_help_text():
    source = Path(__file__).parents[2].joinpath("fedpeat_ray", "config.py").read_text()
    parts = {"local", "lora", "server", "foundation", "data", "fleet", "evaluation", "hosts"}
    nested = parts | {"partition", "availability", "channel"}
    for name in {path.rsplit(".", 1)[-1] for path in leaves(SimulationConfig())} - nested:
        assert re.search(rf'\n    {name}: [^\n]+\n    """', source), f"{name} has none"


@pytest.mark.parametrize(
    ("changes", "ignored"),
    [
        ({}, []),
        ({"algorithm": "fed-avg", "lora.rank": 4, "control.kind": "random"}, ["lora.rank", "control.kind"]),
        ({"algorithm": "fed-avg", "client_batch_size": 4}, ["client_batch_size"]),
        ({"algorithm": "fed-avg", "client_batch_size": 1}, []),
        ({"algorithm": "fed-peft", "emulator.distil.steps": 7, "lora.rank": 4}, ["emulator.distil.steps"]),
        ({"algorithm": "fed-pt", "control.kind": "random", "proxy.alpha": 0.5}, ["control.kind"]),
        ({"algorithm": "fed-pt", "control.kind": "random", "proxy.emulators": True}, []),
        ({"algorithm": "fed-pt", "proxy.steps": 0, "proxy.kl_weight": 0.9}, ["proxy.kl_weight"]),
        ({"proxy.alpha": 0.5, "lora.rank": 4}, ["proxy.alpha"]),
        ({"emulator.trained": "blocks", "lora.rank": 4}, ["lora.rank"]),
        ({"control.level": 2}, ["control.level"]),
        ({"control.level": 2, "control.kind": "fixed"}, []),
        ({"data.partition.kind": "iid", "data.partition.alpha": 1.0}, ["data.partition.alpha"]),
        ({"data.partition.kind": "natural", "data.partition.alpha": 1.0}, ["data.partition.alpha"]),
        (
            {"data.partition.kind": "natural", "data.partition.documents_per_device": 9.0},
            ["data.partition.documents_per_device"],
        ),
        ({"data.partition.kind": "natural", "data.partition.group_by": "label", "fleet.num_devices": 9}, []),
        ({"data.text_column": "body"}, ["data.text_column"]),
        ({"data.text_column": "body", "data.name": "somewhere"}, []),
        ({"data.text_column": "body", "data.public_name": "somewhere"}, []),
        ({"fleet.availability.kind": "always", "fleet.availability.mean_on_s": 9.0}, ["fleet.availability.mean_on_s"]),
        ({"fleet.availability.kind": "always", "fleet.availability.slot_s": 9.0}, []),
        ({"fleet.channel.kind": "nominal", "fleet.channel.noise_dbm_per_hz": 1.0}, ["fleet.channel.noise_dbm_per_hz"]),
        ({"fleet.channel.rician_k": 1.0}, ["fleet.channel.rician_k"]),
        ({"server.beta2": 0.5}, ["server.beta2"]),
        ({"server.beta2": 0.5, "server.optimizer": "yogi"}, []),
        ({"hosts.backend": "serial", "hosts.num_hosts": 3}, ["hosts.num_hosts"]),
    ],
    ids=str,
)
def test_a_setting_that_changes_nothing_is_known(changes, ignored):
    config = SimulationConfig()
    for path, value in changes.items():
        config = with_value(config, path, value)
    found = config.without_effect(find_algorithm(config.algorithm).uses(config))
    assert [path for path, _, _ in found] == ignored
    assert all(value == changes[path] and when for path, value, when in found)


def test_every_setting_that_may_change_nothing_exists():
    for _, _, settings in COUNTS_ONLY:
        for path in settings:
            get(SimulationConfig(), path)


def test_parts_are_written_as_a_person_would_in_a_notebook():
    config = SimulationConfig(
        out="runs/mine",  # type: ignore[arg-type]  # what the annotation does not say, and a notebook does not check
        lora={"rank": 4, "targets": ["c_attn"]},  # type: ignore[arg-type]  # as above
        data={"name": "users.csv", "partition": {"kind": "natural"}},  # type: ignore[arg-type]  # as above
    )
    assert config.out == Path("runs/mine")
    assert config.lora == LoraConfig(rank=4, targets=("c_attn",))
    assert config.data.partition == PartitionConfig(kind="natural")
    assert SimulationConfig.from_dict(config.to_dict()) == config
    with pytest.raises(ConfigError, match=r"data\.partition\.knd = 1 is not allowed: one of .*; did you mean kind\?"):
        SimulationConfig(data={"partition": {"knd": 1}})  # type: ignore[arg-type]  # as above


def test_flags_that_there_are_not_are_told_from_those_that_may_be_meant():
    known = set(flags(SimulationConfig))
    assert {"rounds", "hosts.exclusive", "hosts.no-exclusive", "emulator.distil.steps"} <= known
    assert set(USUAL.values()) <= known
    check_flags(["--rounds=3", "--fleet.num_devices", "9", "-h", "--help"], known)
    for wrong, first in {
        "lr": "local.learning-rate",
        "learning-rate": "local.learning-rate",
        "local.learningrate": "local.learning-rate",
        "num-clients": "fleet.num-devices",
        "rank": "lora.rank",
        "cohort": "cohort-size",
        "round": "rounds",
    }.items():
        with pytest.raises(ConfigError, match=rf"there is no --{wrong}: did you mean --{first}( or|\?)"):
            check_flags([f"--{wrong}", "1"], known)
    with pytest.raises(ConfigError, match="there is no --xyzzy: --help has all settings"):
        check_flags(["--xyzzy"], known)
