"""The foundation in shards: the numbers of the plain model, a share of its memory, and no survivor of a lost rank."""

from __future__ import annotations

import os
import signal
import time
import traceback
from collections.abc import Iterator
from typing import Any

import driver_work
import psutil
import pytest
import ray
import torch
from driver_work import Values
from patience import OutOfPatience
from processes import Known, below, living
from safetensors.torch import load_file, save_file
from torch.distributed import TCPStore
from transformers import GPT2Config, GPT2LMHeadModel

from fedpeat_ray.errors import ConfigError, DriverLostError
from fedpeat_ray.models.foundation import Backbone, Foundation, load, prepare
from fedpeat_ray.runtime import driver_actor
from fedpeat_ray.runtime.driver_actor import FoundationDriver
from fedpeat_ray.runtime.foundation_driver import Shard, ShardedFoundation
from fedpeat_ray.runtime.serial import Serial

pytestmark = pytest.mark.usefixtures("local_ray")
TASKS = [torch.randint(0, 250, (2, 12), generator=torch.Generator().manual_seed(i)) for i in range(5)]


def ignore(kind: str, **facts: Any) -> None:
    """An on_event."""


def processes_of(sharded: ShardedFoundation) -> list[Known]:
    ids = sharded.process_ids()
    return [process for process in below() if process.process_id in ids]


def matrices(model: torch.nn.Module) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """A pair for every matrix of every block."""
    rng, pairs = torch.Generator().manual_seed(1), {}
    for name, parameter in model.named_parameters():
        layer = name.removesuffix(".weight")
        if parameter.ndim == 2 and ("layers." in name or ".h." in name):
            rows, columns = parameter.shape if "layers." in name else parameter.T.shape  # GPT-2's are transposed
            pairs[layer] = tuple(torch.randn(shape, generator=rng) / 10 for shape in ((3, columns), (rows, 3)))
    return pairs


def listening() -> set[tuple[str, int]]:
    """Where this process does."""
    connections = psutil.Process().net_connections("inet")
    return {(each.laddr.ip, each.laddr.port) for each in connections if each.status == psutil.CONN_LISTEN}


def test_where_the_ranks_meet_is_open_at_one_address_only():
    before, rank = listening(), Shard(0, num_shards=2, num_threads=torch.get_num_threads())
    address = rank.open_store("127.0.0.1")
    assert listening() - before == {address}
    other = TCPStore(*address, 2, is_master=False)
    other.set("key", "value")
    assert rank._store.get("key") == b"value"


@pytest.fixture(scope="module", params=["gpt2-1", "gpt2-2", pytest.param("llama-1", marks=pytest.mark.full), "llama-2"])
def case(request: pytest.FixtureRequest) -> Iterator[tuple[str, Foundation, ShardedFoundation]]:
    """A model in one shard and in two."""
    name, num_shards = request.param.split("-")
    foundation = prepare(str(request.getfixturevalue(f"{name}_dir")), "float32")
    with ShardedFoundation(foundation, int(num_shards), None, ignore) as sharded:
        processes = processes_of(sharded)
        assert len(processes) == int(num_shards)
        yield name, foundation, sharded
    assert not living(processes), "the ranks end with it"


@pytest.fixture
def plain(case) -> Serial:
    """The same model whole, in this process."""
    model = load(case[1])
    return Serial(Backbone(model, model))


@pytest.fixture(scope="module")
def earlier() -> dict[tuple[str, str], Any]:
    """What the first number of shards gave."""
    return {}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Foundation:
    """A GPT-2 of 150 MB: it outweighs what a process needs besides."""
    config = GPT2Config(vocab_size=257, n_embd=512, n_layer=12, n_head=8, bos_token_id=256, eos_token_id=256)
    model = GPT2LMHeadModel(config)
    directory = tmp_path_factory.mktemp("wide")
    model.save_pretrained(directory)
    return prepare(str(directory), "float32", directory)


def test_logits_are_those_of_the_plain_model_whatever_the_number_of_shards(case, plain, earlier):
    name, _, sharded = case
    expected, _ = plain(driver_work.logits, 3, TASKS, Values(), 2)
    got, reports = sharded(driver_work.logits, 3, TASKS, Values(), 2)
    assert [len(batch) for batch in got.result()] == [2, 2, 1] and reports == [2] * 5
    torch.testing.assert_close(got.result(), expected.result(), rtol=0, atol=1e-6)
    before = earlier.setdefault((name, "logits"), got.result())
    torch.testing.assert_close(got.result(), before, rtol=0, atol=0)


def test_gradients_flow_through_the_frozen_layers_to_what_stands_beside_them(case, plain, earlier):
    name, _, sharded = case
    pairs = matrices(plain.backbone.exact)
    assert len(pairs) == {"gpt2": 8, "llama": 14}[name]
    some = dict(list(pairs.items())[5:7])
    for shared in (pairs, some, pairs):  # the layers before the first that is adapted are not gone back through
        expected, _ = plain(driver_work.gradients, shared, TASKS, Values(), 5)
        got, _ = sharded(driver_work.gradients, shared, TASKS, Values(), 5)
        assert all(gradient.any() for gradient in got.result()[0][0])
        torch.testing.assert_close(got.result(), expected.result(), rtol=1e-4, atol=1e-6)
    before = earlier.setdefault((name, "gradients"), got.result())
    torch.testing.assert_close(got.result(), before, rtol=0, atol=0)
    assert sum(sharded.shares()) == pytest.approx(1, abs=0.01), "and no layer stays gathered"


def test_exported_tensors_are_the_bytes_of_the_plain_model(case, tmp_path):
    _, foundation, sharded = case
    state = load_file(foundation.weights)
    sharded.export(tmp_path / "all", list(state))
    assert (tmp_path / "all").read_bytes() == foundation.weights.read_bytes()
    some = {name: tensor for name, tensor in state.items() if ".1." in name}
    sharded.export(tmp_path / "some", list(some))
    save_file(some, tmp_path / "expected")
    assert (tmp_path / "some").read_bytes() == (tmp_path / "expected").read_bytes()


def test_each_rank_holds_its_share_and_no_more(case):
    shares = case[2].shares()
    assert sum(shares) == pytest.approx(1, abs=0.01) and max(shares) <= 1.1 / len(shares)


def test_an_error_in_training_code_is_raised_as_it_is_and_the_driver_goes_on(case, plain):
    name, _, sharded = case
    block = {"gpt2": "transformer.h.1", "llama": "model.layers.1"}[name]
    with pytest.raises(OutOfPatience, match=r"^this took too long$") as caught:
        sharded(driver_work.lose_patience, block, TASKS, Values(), 2)
    assert "in lose_patience" in "".join(traceback.format_exception(caught.value))
    assert sum(sharded.shares()) == pytest.approx(1, abs=0.01)
    test_logits_are_those_of_the_plain_model_whatever_the_number_of_shards(case, plain, {})


def test_blocks_can_be_called_without_the_model_around_them(case, plain):
    if case[0] != "gpt2":
        pytest.skip("a LLaMA's blocks want the positions that the model around them works out")
    expected, _ = plain(driver_work.by_hand, None, TASKS, Values(), 5)
    got, _ = case[2](driver_work.by_hand, None, TASKS, Values(), 5)
    torch.testing.assert_close(got.result(), expected.result(), rtol=1e-4, atol=1e-6)


def test_a_rank_lost_between_calls_is_noticed_at_the_next(case):  # the last test of a case: its driver is gone
    sharded = case[2]
    ids = sharded.process_ids()
    os.kill(ids[-1], signal.SIGKILL)
    with pytest.raises(DriverLostError, match=f"^rank {len(ids) - 1} of the {len(ids)} "):
        sharded(driver_work.logits, 0, TASKS, Values())


def test_no_rank_ever_holds_as_much_as_the_model_and_a_lost_one_ends_them_all(wide):
    events = []
    full_bytes = wide.weights.stat().st_size
    with ShardedFoundation(wide, 2, None, lambda kind, **facts: events.append((kind, facts))) as sharded:
        processes = processes_of(sharded)
        sharded(driver_work.logits, 0, TASKS[:2], Values())
        peaks = sharded.peak_memory_bytes()
        assert all(full_bytes / 2 < peak < full_bytes for peak in peaks), [peak / full_bytes for peak in peaks]
        with pytest.raises(DriverLostError) as caught:
            sharded(driver_work.kill, 1, TASKS, Values(), 5)
        assert str(caught.value).startswith("rank 1 of the 2 that hold the foundation is lost (")
        assert str(caught.value).endswith("the run can be resumed from its last checkpoint")
        assert "\n" not in str(caught.value)
        with pytest.raises(DriverLostError, match="^rank 1 of the 2 "):
            sharded.shares()
        assert not living(processes)
    assert [kind for kind, _ in events] == ["driver_lost"] * 2 and events[0][1]["error"] == str(caught.value)
    assert ray.is_initialized(), "a Ray that was there before is left running"


def test_ranks_that_wait_for_one_that_failed_are_ended(monkeypatch):
    class Rank:
        def __init__(self, fails: bool):
            self._fails = fails

        def do(self, method: str) -> tuple[None, None]:
            if self._fails:
                raise KeyError("no such thing")
            time.sleep(1000)
            return None, None

    monkeypatch.setattr(driver_actor, "_STUCK_S", 0.5)
    driver = FoundationDriver(2, 0, 1)
    driver._ranks = [ray.remote(num_cpus=0)(Rank).remote(fails) for fails in (False, True)]
    with pytest.raises(KeyError, match="no such thing"):
        driver.call("meet")
    with pytest.raises(DriverLostError, match="^rank 0 of the 2 .* did not come to the error of rank 1"):
        driver.call("meet")


def test_shards_that_the_cluster_has_no_gpus_for_are_refused(gpt2_dir):
    foundation = prepare(str(gpt2_dir), "float32")
    with pytest.raises(
        ConfigError, match=r"foundation.num_gpus = 1.0 is not allowed: the cluster has 0 GPUs for 2 shards"
    ):
        ShardedFoundation(foundation, 2, 1.0, ignore)
