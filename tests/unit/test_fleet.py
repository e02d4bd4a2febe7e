"""The simulated fleet: who is in it, when it can be reached, over which link, at what cost."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import GPT2Config, LlamaConfig

from fedpeat_ray.config import AvailabilityConfig, ChannelConfig, FleetConfig
from fedpeat_ray.errors import ConfigError, DataError
from fedpeat_ray.fleet.availability import Availability, build_availability
from fedpeat_ray.fleet.channel import both_fadings, fading_power, link_ok, link_rates
from fedpeat_ray.fleet.costs import Admission, Costs, Task, admit, spent, task_costs, training_flops
from fedpeat_ray.fleet.fits import WHOLE_FLEET, check_fits, fits
from fedpeat_ray.fleet.memory import Figure, Memory, ModelShape, bias_parameters, training_memory
from fedpeat_ray.fleet.own_tiers import read_tiers
from fedpeat_ray.fleet.population import Fleet, build_fleet
from fedpeat_ray.fleet.tiers import TIERS, Tier
from fedpeat_ray.models.foundation import empty
from fedpeat_ray.trainable.shape import model_shape

ARRAYS = (
    "tier",
    "flops_per_s",
    "memory_cap_bytes",
    "downlink_bytes_per_s",
    "uplink_bytes_per_s",
    "compute_power_w",
    "radio_power_w",
    "distance_m",
)
IDS = np.arange(20_000)


def fleet_of(num_devices: int, **settings) -> Fleet:
    return build_fleet(FleetConfig(num_devices=num_devices, **settings), seed=7)


def availability_of(num_devices: int = len(IDS), **settings) -> Availability:
    return build_availability(AvailabilityConfig(**settings), num_devices, seed=7)


# Tiers and population


def test_tiers_are_complete():
    assert len({tier.name for tier in TIERS}) == len(TIERS) >= 6
    assert sum(tier.share for tier in TIERS) == pytest.approx(1.0)
    for tier in TIERS:
        assert tier.sources and tier.description
        assert 0 < tier.gpu_fraction <= 1
        assert tier.float16_flops_per_s >= tier.float32_flops_per_s > 0


@pytest.mark.parametrize("name", ARRAYS)
def test_a_device_does_not_depend_on_the_size_of_the_fleet(name: str):
    np.testing.assert_array_equal(getattr(fleet_of(100), name), getattr(fleet_of(5000), name)[:100])


def test_shares_and_medians_are_those_of_the_tiers():
    fleet = fleet_of(len(IDS))
    for index, tier in enumerate(TIERS):
        members = fleet.tier == index
        assert members.mean() == pytest.approx(tier.share, abs=0.01)
        assert np.median(fleet.flops_per_s[members]) == pytest.approx(tier.float32_flops_per_s, rel=0.08)
        assert np.median(fleet.memory_cap_bytes[members]) == pytest.approx(tier.memory_cap_bytes, rel=0.08)
        assert np.median(fleet.downlink_bytes_per_s[members]) == pytest.approx(tier.downlink_bytes_per_s, rel=0.08)
        assert np.median(fleet.uplink_bytes_per_s[members]) == pytest.approx(tier.uplink_bytes_per_s, rel=0.08)
    assert np.log(fleet.flops_per_s[fleet.tier == 1]).std() == pytest.approx(0.25, rel=0.05)


def test_settings_of_the_fleet_have_their_effect():
    fleet = fleet_of(50, tier_shares={"laptop": 3}, spread=0.0, memory_scale=0.5, precision="float16")
    laptop = next(tier for tier in TIERS if tier.name == "laptop")
    assert {fleet.tier_names[index] for index in fleet.tier} == {"laptop"}
    assert set(fleet.memory_cap_bytes) == {laptop.memory_cap_bytes // 2}
    np.testing.assert_allclose(fleet.flops_per_s, laptop.float16_flops_per_s, rtol=1e-6)


def test_devices_are_spread_evenly_over_the_cell():
    distance_m = fleet_of(len(IDS)).distance_m
    assert distance_m.min() >= 10 and distance_m.max() <= 500
    assert np.median(distance_m) == pytest.approx(500 / math.sqrt(2), rel=0.02)


@pytest.mark.parametrize("shares", [{"kiosk": 1.0}, {"sbc": -1.0}, {"sbc": 0.0, "laptop": 0.0}, {"sbc": math.nan}])
def test_shares_that_do_not_fit_are_refused(shares: dict[str, float]):
    with pytest.raises(ConfigError, match="fleet.tier_shares"):
        fleet_of(10, tier_shares=shares)


def test_shares_by_name_draw_the_fleet_that_shares_by_place_drew():
    by_place = fleet_of(1000, tier_shares=(0, 0.2, 0, 0, 0.6, 0, 0.1))
    by_name = fleet_of(1000, tier_shares={"edge-gpu-large": 0.1, "laptop": 0.6, "phone-low": 0.2})
    own = fleet_of(1000, tier_shares={tier.name: tier.share for tier in TIERS})
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(by_name, name), getattr(by_place, name))
        np.testing.assert_array_equal(getattr(own, name), getattr(fleet_of(1000), name))


# Tiers of one's own

KIOSK = """
share = 1
float32_flops_per_s = 2e9
memory_cap_bytes = 1e9
downlink_bytes_per_s = 10e6
uplink_bytes_per_s = 1_000_000
compute_power_w = 5
radio_power_w = 1.5
"""


def tiers_of(tmp_path: Path, text: str, suffix: str = ".toml") -> tuple[Tier, ...]:
    """Read from a file with this text."""
    path = tmp_path / f"tiers{suffix}"
    path.write_text(text)
    return read_tiers(path)


def test_the_tiers_of_the_documentation_can_be_read(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "fleet.md").read_text()
    kiosk, gateway = tiers_of(tmp_path, page.split("## Tiers of your own")[1].split("```")[1])
    laptop = next(tier for tier in TIERS if tier.name == "laptop")
    sources = str(tmp_path / "tiers.toml")
    assert kiosk == replace(laptop, name="kiosk", share=0.3, memory_cap_bytes=3 * 10**9, sources=sources)
    assert gateway == Tier(
        "gateway", "LTE gateway", 0.7, 200e9, 200e9, 2 * 10**9, 0.1, 10e6, 2e6, 10.0, 2.0, sources=sources
    )
    assert isinstance(gateway.memory_cap_bytes, int)


def test_what_need_not_be_given_of_a_tier(tmp_path):
    plain, halves, like = tiers_of(
        tmp_path,
        f"[plain]{KIOSK}[halves]{KIOSK}float16_flops_per_s = 5e9\ngpu_fraction = 1\ndescription = 'of two kinds'\n"
        "[like]\nlike = 'sbc'\nfloat32_flops_per_s = 1e9\n",
    )
    assert (plain.description, plain.float16_flops_per_s, plain.gpu_fraction) == ("", 2e9, 0.1)
    assert (halves.description, halves.float16_flops_per_s, halves.gpu_fraction) == ("of two kinds", 5e9, 1.0)
    assert like.float16_flops_per_s == like.float32_flops_per_s == 1e9 and like.share == TIERS[0].share


def test_tiers_in_rows_are_those_in_tables(tmp_path):
    tables = "[a]\nlike = 'sbc'\nshare = 2\n['b, c']\nlike = 'laptop'\nradio_power_w = 3\n"
    rows = '\ufeffname, like ,share,radio_power_w\na,sbc,2,\n\n,,,\n"b, c",laptop, ,3\n'
    assert [replace(tier, sources="") for tier in tiers_of(tmp_path, tables)] == [
        replace(tier, sources="") for tier in tiers_of(tmp_path, rows, ".csv")
    ]


def test_a_fleet_of_own_tiers(tmp_path):
    tiers_of(tmp_path, f"[small]\nlike = 'phone-low'\nshare = 3\n[large]{KIOSK}float16_flops_per_s = 5e9\n")
    path = tmp_path / "tiers.toml"
    fleet = fleet_of(len(IDS), tiers=path)
    assert fleet.tier_names == ("small", "large") and fleet.tier.dtype == np.int8
    assert (fleet.tier == 1).mean() == pytest.approx(0.25, abs=0.01)
    assert np.median(fleet.flops_per_s[fleet.tier == 1]) == pytest.approx(2e9, rel=0.02)
    large = fleet_of(50, tiers=path, tier_shares={"large": 1}, spread=0.0, memory_scale=0.5, precision="float16")
    assert set(large.tier) == {1} and set(large.memory_cap_bytes) == {500_000_000} and set(large.flops_per_s) == {5e9}
    with pytest.raises(
        ConfigError, match="fleet.tier_shares = 'larg' is not allowed: one of small, large; did you mean"
    ):
        fleet_of(10, tiers=path, tier_shares={"larg": 1})
    assert list(fits(large, {"model": 1}).shares) == ["large", WHOLE_FLEET]


def test_127_tiers_can_be_told_apart(tmp_path):
    path = tmp_path / "tiers.csv"
    path.write_text("name,like,share\n" + "".join(f"t{i},sbc,1\n" for i in range(127)))
    fleet = fleet_of(len(IDS), tiers=path)
    assert set(fleet.tier) == set(range(127)) and fits(fleet, {"model": 1}).num_devices[WHOLE_FLEET] == len(IDS)
    path.write_text(path.read_text() + "one more,sbc,1\n")
    with pytest.raises(DataError, match="tiers.csv: 128 tiers, must be 1 to 127"):
        fleet_of(10, tiers=path)


@pytest.mark.parametrize(
    ("suffix", "text", "message"),
    [
        (".toml", "", "0 tiers, must be 1 to 127"),
        (".toml", "share = 1", "tier 'share': must be a table"),
        (".toml", "[a]\nshar = 1", "tier 'a', shar: must be one of .*; did you mean share?"),
        (".toml", f"[a]{KIOSK}[b]\nshare = 1", "tier 'b', float32_flops_per_s: is missing, and so is `like`"),
        (".toml", f"[a]{KIOSK}gpu_fraction = 1.5", "tier 'a', gpu_fraction = 1.5: must be .* to 1$"),
        (".toml", "[a]\nlike = 'phone-lo'", "tier 'a', like = 'phone-lo': must be one of .*; did you mean phone-low?"),
        (".toml", "[all]\nlike = 'sbc'", "tier 'all': must be a name"),
        (".toml", "['']\nlike = 'sbc'", "tier '': must be a name"),
        *(
            (".toml", f"[a]\nlike = 'sbc'\nshare = {value}", "tier 'a', share = .*: must be a number above 0")
            for value in ("0", "-1", "nan", "inf", "1e39", "1e-39", "true", "'many'", "[1]")
        ),
        (".csv", "", "line 1: the header is ''"),
        (".csv", "name,like,like\na,sbc,sbc\n", "line 1: the header is 'name,like,like'"),
        (".csv", "name,like\n", "0 tiers"),
        (".csv", "name,like\na,sbc,1\n", "line 2: 3 values, must be at most 2"),
        (".csv", "name,like\na,sbc\na,laptop\n", "tier 'a': is there twice"),
        (".csv", "name,lik\na,sbc\n", "tier 'a', lik: must be one of .*; did you mean like?"),
        (".csv", "name,like,share\na,sbc,x\n", "tier 'a', share = 'x': must be a number"),
        (".csv", "name,like,share\na,sbc,0\n", "tier 'a', share = '0': must be a number above 0"),
    ],
)
def test_tiers_that_cannot_be_used_say_which_and_why(tmp_path, suffix: str, text: str, message: str):
    with pytest.raises(DataError, match=message) as caught:
        tiers_of(tmp_path, text, suffix)
    assert str(tmp_path / f"tiers{suffix}") in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("none.toml", None, "No such file"),
        ("tiers.txt", "x", "its name ends in '.txt', not in .toml or .csv"),
        ("tiers.toml", "[a", "readable TOML or CSV file"),
        ("tiers.toml", "[a]\nlike = 'sbc'\n[a]\nlike = 'sbc'", "twice"),
        ("tiers.csv", b"\xff\xfe", "can't decode"),
    ],
)
def test_a_file_of_tiers_that_cannot_be_read_is_a_wrong_setting(tmp_path, name: str, text, message: str):
    if text is not None:
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=f"fleet.tiers = .*{name}.*{message}"):
        fleet_of(10, tiers=tmp_path / name)


def test_a_sample_is_sorted_without_repeats_and_reproducible():
    fleet = fleet_of(100)
    sample = fleet.sample(round=3, size=40)
    assert len(set(sample)) == 40 and (np.diff(sample) > 0).all()
    np.testing.assert_array_equal(sample, fleet_of(100).sample(3, 40))
    assert not np.array_equal(sample, fleet.sample(4, 40))
    assert len(fleet.sample(1, 1000)) == 100
    drawn = np.concatenate([fleet.sample(round, 40) for round in range(500)])
    assert np.bincount(drawn).min() > 150 and np.bincount(drawn).max() < 250


def test_a_round_of_a_million_devices():
    fleet = fleet_of(1_000_000)
    assert sum(getattr(fleet, name).nbytes for name in ARRAYS) < 50e6
    ids = fleet.sample(round=1, size=64)
    availability = availability_of(fleet.num_devices, kind="markov")
    downlink, uplink = links(fleet, ChannelConfig(), ids, 1)
    costs = task_costs(fleet, ids, Task(1e6, 1e6, 1e12, 1e9), downlink, uplink)
    available = availability.available(ids, now_s=1e6)
    admission = admit(costs, available, link_ok(ChannelConfig(), downlink, uplink), cohort_size=32, deadline_s=None)
    assert admission.completed.sum() == 32


# Availability


def test_availability_of_a_device_does_not_depend_on_who_else_is_asked():
    assert availability_of(kind="always").available(IDS, 5.0).all()
    for kind in ("markov", "diurnal"):
        available = availability_of(kind=kind).available(IDS, 12_345.0)
        np.testing.assert_array_equal(available[100:200], availability_of(kind=kind).available(IDS[100:200], 12_345.0))


@pytest.mark.parametrize("now_s", [0.0, 600.0, 1e6])
def test_markov_is_stationary_from_the_start(now_s: float):
    available = availability_of(kind="markov").available(IDS, now_s)
    assert available.mean() == pytest.approx(7200 / (7200 + 1200), abs=0.01)


def test_markov_persists_as_the_process_it_samples():
    markov = availability_of(kind="markov")
    before, after = (markov.available(IDS, slot * 600.0) for slot in (10, 11))
    keep = math.exp(-600 / 7200 - 600 / 1200)
    share_on = 7200 / 8400
    assert after[before].mean() == pytest.approx(keep + (1 - keep) * share_on, abs=0.01)
    assert after[~before].mean() == pytest.approx((1 - keep) * share_on, abs=0.02)
    np.testing.assert_array_equal(after, markov.available(IDS, 11 * 600.0 + 599.0))
    np.testing.assert_array_equal(before, markov.available(IDS, 6000.0))  # an earlier time, asked later


def test_diurnal_swings_between_its_shares():
    diurnal = availability_of(kind="diurnal", min_share=0.2, max_share=0.8)
    best, worst = (diurnal.available(IDS, hour * 3600.0).mean() for hour in (6, 18))
    assert best == pytest.approx(0.8, abs=0.03)
    assert worst == pytest.approx(0.2, abs=0.03)
    steady = availability_of(kind="diurnal", min_share=0.5, max_share=0.5).available(IDS, 3600.0)
    assert steady.mean() == pytest.approx(0.5, abs=0.02)


def test_a_trace_is_followed(tmp_path):
    path = tmp_path / "trace.csv"
    path.write_text("device_id,start_s,stop_s\n3,0,10\n3,5,20\n1,10,inf\n")
    trace = availability_of(num_devices=5, kind="trace", trace=path)
    on = [np.flatnonzero(trace.available(np.arange(5), now_s)).tolist() for now_s in (0.0, 10.0, 20.0, 1e9)]
    assert on == [[3], [1, 3], [1], [1]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1: the header"),
        ("device,start_s,stop_s\n", "line 1: the header"),
        ("device_id,start_s,stop_s\n", "no intervals"),
        ("device_id,start_s,stop_s\n1,2\n", "line 2: 2 values, must be 3"),
        ("device_id,start_s,stop_s\n1,0,1\n9,0,1\n", "line 3, device_id = '9': must be an integer from 0 to 4"),
        ("device_id,start_s,stop_s\n-1,0,1\n", "line 2, device_id = '-1'"),
        ("device_id,start_s,stop_s\n1,noon,1\n", "line 2, start_s = 'noon'"),
        ("device_id,start_s,stop_s\n1,-1,1\n", "line 2, start_s = '-1'"),
        ("device_id,start_s,stop_s\n1,2,2\n", "line 2, stop_s = '2': must be a number above start_s = 2"),
    ],
)
def test_a_trace_that_cannot_be_used_says_where_and_why(tmp_path, text: str, message: str):
    path = tmp_path / "trace.csv"
    path.write_text(text)
    with pytest.raises(DataError, match=message) as caught:
        availability_of(num_devices=5, kind="trace", trace=path)
    assert str(path) in str(caught.value)


def test_a_trace_that_is_not_there_is_a_wrong_setting(tmp_path):
    with pytest.raises(ConfigError, match="fleet.availability.trace"):
        availability_of(kind="trace", trace=tmp_path / "missing.csv")


# Channel


def test_the_nominal_link_is_the_device_s_own():
    fleet = fleet_of(100)
    downlink, uplink = links(fleet, ChannelConfig(kind="nominal"), np.array([5, 50]), 1)
    np.testing.assert_array_equal(downlink, fleet.downlink_bytes_per_s[[5, 50]])
    np.testing.assert_array_equal(uplink, fleet.uplink_bytes_per_s[[5, 50]])


def test_shannon_rate_by_hand():
    """At 1 km with L = 120 dB and no fading (K large): SNR = 1e-12 * 4 W / (4e-21 W/Hz * 1 MHz) = 1000."""
    noise_dbm_per_hz = 10 * math.log10(4e-21) + 30
    config = ChannelConfig(
        kind="rician",
        rician_k=1e12,
        bandwidth_hz=2e6,
        server_power_w=8.0,
        device_power_w=4.0,
        noise_dbm_per_hz=noise_dbm_per_hz,
        path_loss_db_at_1km=120.0,
    )
    fleet = unlimited_links(fleet_of(2), distance_m=1000.0)
    downlink, uplink = links(fleet, config, np.arange(2), 1)
    by_hand = 1e6 * math.log2(1001) / 8
    np.testing.assert_allclose(downlink, by_hand, rtol=1e-4)
    np.testing.assert_allclose(uplink, by_hand, rtol=1e-4)
    _, alone = links(fleet, config, np.arange(1), 1)
    np.testing.assert_allclose(alone, 2e6 * math.log2(501) / 8, rtol=1e-4)  # twice the band, twice the noise


def test_links_are_capped_and_fade_anew_each_round():
    fleet, ids = fleet_of(1000), np.arange(40)
    downlink, uplink = links(fleet, ChannelConfig(), ids, 1)
    assert (downlink <= fleet.downlink_bytes_per_s[ids]).all() and (uplink <= fleet.uplink_bytes_per_s[ids]).all()
    free = unlimited_links(fleet, distance_m=300.0)
    rates = [links(free, ChannelConfig(), ids, round) for round in (1, 1, 2)]
    np.testing.assert_array_equal(rates[0], rates[1])
    assert (rates[0][0] != rates[2][0]).all()
    assert abs(np.corrcoef(rates[0])[0, 1]) < 0.5


@pytest.mark.parametrize(("kind", "variance"), [("rayleigh", 1.0), ("rician", (1 + 2 * 3.0) / (1 + 3.0) ** 2)])
def test_fading_has_unit_mean_power(kind, variance: float):
    power = fading_power(ChannelConfig(kind=kind, rician_k=3.0), 7, IDS)
    assert power.mean() == pytest.approx(1.0, abs=0.03)
    assert power.var() == pytest.approx(variance, rel=0.1)


def test_an_outage_is_a_link_below_the_least_rate():
    config = ChannelConfig(min_bytes_per_s=10.0)
    assert link_ok(config, np.array([10.0, 9.0, 99.0]), np.array([10.0, 99.0, 9.0])).tolist() == [True, False, False]


def links(fleet: Fleet, config: ChannelConfig, ids: np.ndarray, round: int) -> tuple[np.ndarray, np.ndarray]:
    return link_rates(fleet, config, ids, fleet.nominal_rates(ids), both_fadings(config, 7, round, ids))


def unlimited_links(fleet: Fleet, distance_m: float) -> Fleet:
    endless = np.full(fleet.num_devices, np.inf, np.float32)
    distances = np.full(fleet.num_devices, distance_m, np.float32)
    return replace(fleet, downlink_bytes_per_s=endless, uplink_bytes_per_s=endless, distance_m=distances)


# Costs and admission


def costs_of(*total_s: float) -> Costs:
    """Devices that spend 10 % of `total_s` on 100 bytes down, 60 % computing at 2 W, 30 % on 50 bytes up at 1 W."""
    total = np.array(total_s)
    count = len(total)
    return Costs(
        download_bytes=np.full(count, 100),
        upload_bytes=np.full(count, 50),
        download_s=0.1 * total,
        compute_s=0.6 * total,
        upload_s=0.3 * total,
        compute_power_w=np.full(count, 2.0),
        radio_power_w=np.full(count, 1.0),
        memory_bytes=np.full(count, 8),
        memory_cap_bytes=np.full(count, 8),
    )


def admit_all(costs: Costs, cohort_size: int, deadline_s: float | None = None) -> Admission:
    everyone = np.ones(len(costs.total_s), bool)
    return admit(costs, everyone, everyone, cohort_size, deadline_s)


def test_costs_by_hand():
    fleet = replace(
        fleet_of(3),
        flops_per_s=np.array([1.0, 2.0, 4.0], np.float32),
        compute_power_w=np.array([5.0, 5.0, 3.0], np.float32),
        radio_power_w=np.array([1.0, 1.0, 2.0], np.float32),
    )
    task = Task(download_bytes=100, upload_bytes=np.array([30, 60]), flops=8.0, memory_bytes=7)
    costs = task_costs(fleet, np.array([0, 2]), task, downlink=np.array([10.0, 20.0]), uplink=np.array([3.0, 4.0]))
    assert costs.total_s.tolist() == [10 + 8 + 10, 5 + 2 + 15]
    assert costs.energy_j.tolist() == [5 * 8 + 1 * 20, 3 * 2 + 2 * 20]
    assert costs.upload_bytes.tolist() == [30, 60] and costs.memory_bytes.tolist() == [7, 7]


def test_every_reason_to_drop_in_its_order():
    costs = replace(costs_of(1, 1, 1, 9, 2, 3), memory_bytes=np.array([9, 9, 8, 8, 8, 8]))
    available = np.array([False, True, True, True, True, True])
    link = np.array([False, False, False, True, True, True])
    admission = admit(costs, available, link, cohort_size=1, deadline_s=5.0)
    assert list(admission.drop_reason) == ["unavailable", "memory", "link", "deadline", None, "not needed"]
    assert admission.completed.tolist() == [False, False, False, False, True, False]
    assert admission.round_s == 2.0  # enough completed: nobody waits for the late one


def test_the_fastest_complete_and_ties_go_to_the_lower_device_id():
    admission = admit_all(costs_of(3, 1, 2, 2, 2), cohort_size=3)
    assert list(admission.drop_reason) == ["not needed", None, None, None, "not needed"]
    assert admission.round_s == 2.0


@pytest.mark.parametrize(
    ("total_s", "deadline_s", "round_s"),
    [
        ((1.0, 2.0), 5.0, 2.0),  # too few were asked: nobody else can come
        ((1.0, 9.0), 5.0, 5.0),  # the server waits for the late one
        ((8.0, 9.0), 5.0, 5.0),  # nobody came
        ((), 5.0, 5.0),
        ((), None, 0.0),
        ((1.0, 9.0), None, 9.0),
    ],
)
def test_how_long_a_round_lasts(total_s, deadline_s, round_s: float):
    assert admit_all(costs_of(*total_s), cohort_size=3, deadline_s=deadline_s).round_s == round_s


def test_what_dropped_devices_spent():
    """The round ends at 10 s, when the first completes; the others were to take 20 s and 200 s."""
    costs = costs_of(10.0, 20.0, 200.0, 10.0)
    available = np.array([True, True, True, False])
    admission = admit(costs, available, available, cohort_size=1, deadline_s=100.0)
    assert list(admission.drop_reason) == [None, "not needed", "deadline", "unavailable"]
    logged = spent(costs, admission)
    assert logged.download_bytes.tolist() == [100, 100, 50, 0]
    assert logged.upload_bytes.tolist() == [50, 0, 0, 0]
    np.testing.assert_allclose(logged.download_s, [1, 2, 10, 0])
    np.testing.assert_allclose(logged.compute_s, [6, 8, 0, 0])
    np.testing.assert_allclose(logged.upload_s, [3, 0, 0, 0])
    np.testing.assert_allclose(logged.energy_j, [2 * 6 + 4, 2 * 8 + 2, 10, 0])


def test_training_flops_by_hand():
    shape = ModelShape(
        num_blocks=2,
        weight_bytes=4,
        num_parameters=500,
        block_parameters=180,
        block_biases=20,
        used_parameters=100,
        head_parameters=40,
        attention_width=6,
        lora_features=50,
        largest_matrix=64,
        steps={},
    )
    weights, attention = 2 * 100 + 40, 12 * 2 * 8 * 6
    assert training_flops(shape, 5, 8, "all") == 5 * (6 * weights + attention)
    assert training_flops(shape, 5, 8, "lora", 7) == 5 * (4 * weights + 6 * 7 + attention)
    ranks = training_flops(shape, np.array([1, 2]), 8, "lora", np.array([7, 14]))
    np.testing.assert_array_equal(ranks, [4 * weights + 42 + attention, 2 * (4 * weights + 84 + attention)])


# Emulators

SIZES: dict[str, Any] = {
    "num_hidden_layers": 12,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "vocab_size": 128,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
GPT2 = model_shape(empty(GPT2Config(**SIZES, n_positions=64).to_json_string()), weight_bytes=4)
LLAMA = model_shape(
    empty(LlamaConfig(**SIZES, intermediate_size=256, num_key_value_heads=2).to_json_string()), weight_bytes=4
)
ADAPTED = ("lora", "bias", "blocks")


def emulator_memory(trainable, num_blocks: Figure = 12, adapter_blocks=(2, 2), shape=GPT2, **settings) -> Memory:
    rank = 4 if trainable == "lora" else 0
    sizes: dict[str, Any] = {"batch_size": 2, "sequence_length": 32} | settings
    return training_memory(
        shape, trainable=trainable, lora_rank=rank, num_blocks=num_blocks, adapter_blocks=adapter_blocks, **sizes
    )


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("adapter_blocks", [(2, 2), (0, 1), (3, 0)])
@pytest.mark.parametrize("trainable", ADAPTED)
def test_memory_and_flops_grow_with_depth(trainable, adapter_blocks, optimizer):
    depth = np.arange(4, 13)
    memory = emulator_memory(trainable, depth, adapter_blocks, optimizer=optimizer)
    through = adapter_blocks[0] > 0
    assert (np.diff(memory.weights_bytes) == GPT2.block_parameters * 4).all()
    assert (np.diff(memory.peak_bytes) >= GPT2.block_parameters * 4).all()
    assert (np.diff(np.broadcast_to(memory.activations_bytes, depth.shape)) > 0).all() == through
    flops = training_flops(GPT2, 10, 32, trainable, 100, num_blocks=depth, adapter_blocks=adapter_blocks)
    assert (
        np.diff(flops) == 10 * (4 if through else 2) * (GPT2.block_parameters + (3 if through else 2) * 32 * 64)
    ).all()


@pytest.mark.parametrize(
    ("trainable", "shape"),
    [
        *((trainable, GPT2) for trainable in ADAPTED),
        *((trainable, LLAMA) for trainable in ("lora", "blocks")),  # it has no biases
    ],
)
def test_adapter_blocks_at_the_end_only_are_cheaper(trainable, shape):
    both, end = (emulator_memory(trainable, 10, blocks, shape=shape) for blocks in ((2, 2), (0, 4)))
    assert end.activations_bytes < both.activations_bytes and end.peak_bytes < both.peak_bytes
    assert (end.weights_bytes, end.optimizer_bytes) == (both.weights_bytes, both.optimizer_bytes)
    both, end = (training_flops(shape, 1, 32, trainable, 100, adapter_blocks=blocks) for blocks in ((2, 2), (0, 4)))
    assert end < both


@pytest.mark.parametrize("adapter_blocks", [(2, 2), (0, 2)])
@pytest.mark.parametrize("trainable", ADAPTED)
def test_emulators_as_an_array_are_what_each_is(trainable, adapter_blocks):
    depth, frozen_bytes = np.array([4, 7, 12]), np.array([199_936, 60_000, 199_936])
    together = emulator_memory(trainable, depth, adapter_blocks, frozen_block_bytes=frozen_bytes)
    flops = training_flops(GPT2, 3, 32, trainable, 7, num_blocks=depth, adapter_blocks=adapter_blocks)
    for i in range(3):
        alone = emulator_memory(trainable, int(depth[i]), adapter_blocks, frozen_block_bytes=int(frozen_bytes[i]))
        assert isinstance(alone.peak_bytes, int | np.integer)
        assert np.asarray(together.peak_bytes)[i] == alone.peak_bytes
        assert np.asarray(flops)[i] == training_flops(
            GPT2, 3, 32, trainable, 7, num_blocks=int(depth[i]), adapter_blocks=adapter_blocks
        )


@pytest.mark.parametrize("adapter_blocks", [(6, 6), (1, 11), (0, 12), (12, 0)])
def test_adapter_blocks_that_are_all_blocks_are_no_emulator(adapter_blocks):
    for optimizer in ("adamw", "sgd"):
        for shape in (GPT2, LLAMA):
            covered, whole = (
                emulator_memory("lora", adapter_blocks=blocks, optimizer=optimizer, shape=shape)
                for blocks in (adapter_blocks, None)
            )
            assert covered == whole
    for trainable in ADAPTED:
        covered, whole = (
            training_flops(GPT2, 5, 32, trainable, 7, adapter_blocks=blocks) for blocks in (adapter_blocks, None)
        )
        assert covered == whole


def test_what_is_trained_of_an_emulator():
    assert bias_parameters(GPT2, num_blocks=1) == (3 + 1 + 4 + 1 + 2) * 64  # of the four layers and two norms
    assert bias_parameters(LLAMA) == 0
    lora, bias, blocks = (emulator_memory(trainable, 8) for trainable in ADAPTED)
    assert blocks.optimizer_bytes == 2 * blocks.gradients_bytes == 2 * 4 * 4 * GPT2.block_parameters
    assert bias.gradients_bytes == 4 * 4 * 11 * 64
    assert lora.weights_bytes == bias.weights_bytes == blocks.weights_bytes
    assert lora.adapter_bytes == lora.gradients_bytes > 0 == bias.adapter_bytes == blocks.adapter_bytes


@pytest.mark.parametrize("adapter_blocks", [(1, 1), (0, 2)])
def test_frozen_blocks_in_8_bits_save_their_weights_and_unpack_one_matrix(adapter_blocks):
    full, small = (emulator_memory("lora", 8, adapter_blocks, frozen_block_bytes=frozen) for frozen in (None, 51_000))
    saved = 6 * (4 * GPT2.block_parameters - 51_000)
    assert full.weights_bytes - small.weights_bytes == saved
    assert saved - 4 * 64 * 256 <= full.peak_bytes - small.peak_bytes <= saved


def test_flops_of_an_emulator_by_hand():
    """Of the 5 blocks kept, 2 behind 3 frozen ones; or one on either side."""
    head, block, attention = 128 * 64, GPT2.block_parameters, 32 * 64
    forward = 2 * (5 * block + head) + 4 * 5 * attention
    end = forward + 2 * (2 * block + head) + 8 * 2 * attention
    both = forward + 2 * (5 * block + head) + 8 * 5 * attention
    for blocks, base in (((0, 2), end), ((1, 1), both)):
        kept = {"num_blocks": 5, "adapter_blocks": blocks}
        assert training_flops(GPT2, 3, 32, "bias", **kept) == 3 * base
        assert training_flops(GPT2, 3, 32, "blocks", **kept) == 3 * (base + 2 * 2 * block)
        assert training_flops(GPT2, 3, 32, "lora", 70, **kept) == 3 * (base + 6 * 70)


def test_who_has_the_memory_is_counted_by_tier_over_the_whole_fleet():
    fleet = fleet_of(5000, memory_scale=0.001)
    needs = {"level 1": 10**6, "level 2": 3 * 10**6, "level 3": 2**62}
    found = fits(fleet, needs)
    assert found.memory_bytes == needs and found.num_devices[WHOLE_FLEET] == 5000
    for tier, name in enumerate(fleet.tier_names):
        caps = fleet.memory_cap_bytes[fleet.tier == tier]
        assert found.num_devices[name] == len(caps)
        assert found.shares[name] == {task: (caps >= need).mean() for task, need in needs.items()}
    assert found.shares[WHOLE_FLEET] == {task: (fleet.memory_cap_bytes >= need).mean() for task, need in needs.items()}
    check_fits(found, fleet, 0.001)


def test_a_tier_without_devices_is_left_out_and_a_fleet_in_which_nothing_fits_is_refused():
    fleet = fleet_of(50, tier_shares=(0, 0, 0, 0, 1, 0, 0), spread=0.0)
    need = int(fleet.memory_cap_bytes.max()) + 1
    found = fits(fleet, {"model": need})
    assert found.shares == {"laptop": {"model": 0.0}, WHOLE_FLEET: {"model": 0.0}}
    with pytest.raises(ConfigError, match=rf"fleet.memory_scale = 0.5 .* {need:,} bytes .* {need - 1:,} bytes"):
        check_fits(found, fleet, 0.5)
    check_fits(fits(fleet, {"level 1": need - 1, "level 2": need}), fleet, 0.5)


@pytest.mark.parametrize("memory_scale", [1e11, 1e300])
def test_a_huge_memory_stays_a_huge_memory(memory_scale):
    caps = fleet_of(1000, memory_scale=memory_scale).memory_cap_bytes
    assert caps.dtype == np.int64 and (caps > 10**18).all()
