"""Whole runs of FedPT in this process: what they leave, what they are equal to, and what is refused."""

from __future__ import annotations

import hashlib
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import whole_runs
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM
from whole_runs import assert_same_bits, changed, summary, table

from fedpeat_ray import Simulation, SimulationConfig
from fedpeat_ray.config import (
    ControlConfig,
    EmulatorConfig,
    ProxyConfig,
    ServerConfig,
)
from fedpeat_ray.errors import ConfigError, FedPeatError
from fedpeat_ray.fleet.costs import forward_flops, training_flops
from fedpeat_ray.fleet.memory import training_memory
from fedpeat_ray.models.foundation import load, load_tokenizer
from fedpeat_ray.models.foundation import prepare as find_foundation
from fedpeat_ray.runtime.run_log import RunLog
from fedpeat_ray.trainable.shape import model_shape
from fedpeat_ray.world import prepare

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT calls what transformers will rename


@pytest.fixture
def tiny(deep_llama_dir: Path, gpt2_dir: Path, text_dir: Path) -> SimulationConfig:
    """GPT-2 of two blocks steers a LLaMA of seven."""
    proxy = ProxyConfig(str(gpt2_dir), steps=2, batch_size=2, sequence_length=24, learning_rate=0.002, alpha=0.8)
    return whole_runs.tiny(deep_llama_dir, text_dir, algorithm="fed-pt", proxy=proxy)


def perplexity(config: SimulationConfig, logits_of: Callable[[Tensor], Tensor]) -> float:
    """Of the run's held-out text."""
    loss, count = 0.0, 0
    for task in prepare(config, Path()).heldout:
        tokens = torch.from_numpy(task.arrays["tokens"]).long()
        labels = tokens.masked_fill(
            torch.arange(tokens.shape[1]) >= torch.from_numpy(task.arrays["lengths"])[:, None], -100
        )
        with torch.no_grad():
            logits = logits_of(tokens)[:, :-1].flatten(0, 1)
        loss += nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum").item()
        count += int((labels[:, 1:] != -100).sum())
    return math.exp(loss / count)


def files_of(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()}


# What a run leaves


def test_a_run_leaves_its_numbers_an_adapter_of_the_small_model_and_what_the_server_had_to_pay(
    run, tiny, deep_llama_dir, gpt2_dir
):
    files = files_of(gpt2_dir), files_of(deep_llama_dir)
    directory = run(rounds=4, evaluation={"every": 2, "centralised": True})
    result, rounds = summary(directory), table(directory, "rounds")
    numbers = result["perplexity"]
    assert numbers.keys() == {"zero_shot", "tuned", "centralised", "small_zero_shot", "small_tuned", "proxy_tuned"}
    assert numbers["small_tuned"] < numbers["small_zero_shot"] and numbers["centralised"] < numbers["zero_shot"]
    assert numbers["proxy_tuned"] == numbers["tuned"] == rounds["perplexity"].iloc[-1] < numbers["zero_shot"]
    assert rounds["device_perplexity"].iloc[-1] == numbers["small_tuned"]
    assert rounds["device_perplexity"].isna().tolist() == rounds["perplexity"].isna().tolist() == [True, False] * 2

    large, original, base = (
        AutoModelForCausalLM.from_pretrained(path).eval() for path in (deep_llama_dir, gpt2_dir, gpt2_dir)
    )
    tuned: Any = PeftModel.from_pretrained(base, str(directory / "adapter"))
    assert tuned.peft_config["default"].base_model_name_or_path == str(gpt2_dir)
    for number, logits_of in (
        ("zero_shot", lambda tokens: large(tokens).logits),
        ("small_zero_shot", lambda tokens: original(tokens).logits),
        ("small_tuned", lambda tokens: tuned(tokens).logits),
        (
            "proxy_tuned",
            lambda tokens: large(tokens).logits + 0.8 * (tuned(tokens).logits - original(tokens).logits),
        ),
    ):
        assert numbers[number] == pytest.approx(perplexity(tiny, logits_of), rel=1e-5)
    assert (files_of(gpt2_dir), files_of(deep_llama_dir)) == files, "the original is never the tuned one"

    shape, small = (
        model_shape(load(find_foundation(str(path), "float32")), weight_bytes=4) for path in (deep_llama_dir, gpt2_dir)
    )
    lora_parameters = sum(p.numel() for name, p in tuned.named_parameters() if "lora_" in name)
    flops = 4 * 24 * (forward_flops(shape, 24) + 2 * forward_flops(small, 24))  # two steps of two sequences
    flops += training_flops(small, 4 * 24, 24, "lora", lora_parameters)
    assert rounds["server_flops"].tolist() == pytest.approx([flops] * 4)
    step = training_memory(small, batch_size=2, sequence_length=24, trainable="lora", lora_rank=2)
    held = 4 * sum(p.numel() for model in (large, original, original) for p in model.parameters())
    assert rounds["server_memory_bytes"].tolist() == [held + step.peak_bytes] * 4


def test_without_distillation_devices_do_what_they_do_in_fed_peft_on_the_small_model(run, gpt2_dir):
    no_text = {"public_name": None}
    proxy_tuned = run("proxy", proxy={"steps": 0, "sequence_length": 4096}, data=no_text, evaluation={"every": 1})
    small = run(
        "small", algorithm="fed-peft", foundation={"name": str(gpt2_dir)}, data=no_text, evaluation={"every": 1}
    )
    one, other = summary(proxy_tuned), summary(small)
    pd.testing.assert_frame_equal(table(proxy_tuned, "clients"), table(small, "clients"), check_exact=True)
    judged = ["perplexity", "device_perplexity", "token_accuracy", "metrics", "device_metrics"]
    rounds, rounds_of_small = table(proxy_tuned, "rounds"), table(small, "rounds")
    pd.testing.assert_frame_equal(rounds.drop(columns=judged), rounds_of_small.drop(columns=judged), check_exact=True)
    assert one["adapter_sha256"] == other["adapter_sha256"]
    assert rounds["device_perplexity"].tolist() == pytest.approx(rounds_of_small["perplexity"].tolist(), rel=1e-6)
    assert not rounds[["server_flops", "server_memory_bytes"]].any(axis=None)
    assert one["perplexity"]["small_zero_shot"] == pytest.approx(other["perplexity"]["zero_shot"], rel=1e-6)
    names = [path.name for path in (small / "adapter").iterdir() if path.suffix == ".safetensors"]
    assert [(proxy_tuned / "adapter" / name).read_bytes() for name in names] == [
        (small / "adapter" / name).read_bytes() for name in names
    ]


def test_distillation_changes_the_adapter_and_depends_on_the_large_model(run, gpt2_dir, deep_gpt2_dir):
    names = {
        summary(run("one"))["adapter_sha256"],
        summary(run("none", proxy={"steps": 0}))["adapter_sha256"],
        summary(run("other", foundation={"name": str(deep_gpt2_dir)}))["adapter_sha256"],
        summary(run("few", proxy={"top_k": 3}))["adapter_sha256"],
    }
    assert len(names) == 4
    text_alone = [
        summary(run(f"text {path.name}", proxy={"kl_weight": 0.0}, foundation={"name": str(path)}))["adapter_sha256"]
        for path in (gpt2_dir, deep_gpt2_dir)
    ]
    assert text_alone[0] == text_alone[1] not in names, "with lambda = 0 the teacher has no say"


def test_with_alpha_0_the_large_model_stays_what_it_was(run):
    directory = run(proxy={"alpha": 0.0}, evaluation={"every": 1})
    numbers = summary(directory)["perplexity"]
    assert set(table(directory, "rounds")["perplexity"]) == {numbers["zero_shot"]} == {numbers["proxy_tuned"]}
    assert numbers["small_tuned"] < numbers["small_zero_shot"]


def test_a_large_model_steered_by_a_copy_of_itself_is_that_copy_tuned(run, gpt2_dir):
    numbers = summary(run(foundation={"name": str(gpt2_dir)}, proxy={"alpha": 1.0}))["perplexity"]
    assert numbers["small_zero_shot"] == pytest.approx(numbers["zero_shot"], rel=1e-6)
    assert numbers["proxy_tuned"] == pytest.approx(numbers["small_tuned"], rel=1e-5)
    assert numbers["small_tuned"] < numbers["small_zero_shot"]


def test_a_run_that_was_stopped_goes_on_to_the_same_bits(run, tiny, tmp_path, monkeypatch):
    settings = {"checkpoint_every": 1, "server": ServerConfig("yogi", 0.01, momentum=0.9)}
    whole = run("whole", **settings)
    write = RunLog.write_round

    def write_or_stop(log: RunLog, round: int, *arguments: Any) -> None:
        if round == 3:
            raise KeyboardInterrupt
        write(log, round, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(RunLog, "write_round", write_or_stop)
        with pytest.raises(KeyboardInterrupt):
            run("stopped", **settings)
    assert not (tmp_path / "stopped" / "summary.json").exists()
    Simulation(changed(tiny, resume=tmp_path / "stopped", **settings)).run()
    assert_same_bits(whole, tmp_path / "stopped")


def test_a_batch_size_that_was_measured_gives_a_run_too(run):
    assert summary(run(client_batch_size="auto", rounds=1))["num_completed"] == 6


ON_EMULATORS = {
    "proxy": {"emulators": True},
    "emulator": EmulatorConfig(first=1, last=1, shares=(0.2, 0.6), weights="foundation"),
    "control": ControlConfig("random"),
}


def test_devices_may_get_emulators_of_the_small_model(run, deep_gpt2_dir):
    directory = run(**(ON_EMULATORS | {"proxy": {"emulators": True, "small": str(deep_gpt2_dir)}}))
    result, clients = summary(directory), table(directory, "clients")
    completed = clients[clients["outcome"] == "completed"]
    assert set(completed["level"]) == {1, 2} and (completed["emulator_bytes"] > 0).any()
    sizes = completed.groupby("level")["emulator_bytes"].max()
    assert sizes[1] < sizes[2]
    numbers = result["perplexity"]
    assert numbers.keys() == {"zero_shot", "tuned", "centralised", "small_zero_shot", "small_tuned", "proxy_tuned"}
    assert numbers["small_tuned"] < numbers["small_zero_shot"] and numbers["proxy_tuned"] < numbers["zero_shot"]
    base = AutoModelForCausalLM.from_pretrained(deep_gpt2_dir)
    tuned: Any = PeftModel.from_pretrained(base, str(directory / "adapter"))
    adapted = {name.split(".h.")[1].split(".")[0] for name, _ in tuned.named_parameters() if "lora_" in name}
    assert adapted == {"0", "6"}


# What is refused


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"proxy": {"kl_weight": 1.5}}, "proxy.kl_weight = 1.5 is not allowed: between 0 and 1"),
        ({"proxy": {"kl_weight": -0.1}}, "proxy.kl_weight = -0.1 is not allowed: between 0 and 1"),
        ({"proxy": {"alpha": math.inf}}, "proxy.alpha = inf is not allowed: a finite number"),
        ({"proxy": {"temperature": 0.0}}, "proxy.temperature = 0.0 is not allowed"),
        ({"proxy": {"steps": -1}}, "proxy.steps = -1 is not allowed: an integer of at least 0"),
        ({"proxy": {"top_k": 0}}, "proxy.top_k = 0 is not allowed"),
        ({"proxy": {"sequence_length": 65}}, "proxy.sequence_length = 65 is not allowed: at most 64, the positions of"),
        ({"local": {"sequence_length": 65}}, "local.sequence_length = 65 is not allowed: at most 64"),
        ({"proxy": {"small": "no-such-model"}}, "proxy.small = 'no-such-model' is not allowed: "),
        ({"data": {"public_name": None}}, "has no public part: name the server's text by data.public_name"),
        ({"lora": {"targets": ("q_proj",)}}, "lora.targets = 'q_proj' is not allowed: linear layers of this model: c_"),
        (
            ON_EMULATORS | {"emulator": {"weights": "elastic"}},
            "emulator.weights = 'elastic' is not allowed: 'foundation'",
        ),
        (
            ON_EMULATORS | {"emulator": {"weights": "foundation", "trained": "bias"}},
            "emulator.trained = 'bias' is not allowed: 'lora' if proxy.emulators",
        ),
        (
            ON_EMULATORS | {"emulator": {"weights": "foundation", "eight_bit": True}},
            "emulator.eight_bit = True is not allowed: False if proxy.emulators",
        ),
        (
            {"algorithm": "fed-peft", "foundation": {"num_shards": 2}},
            "foundation.num_shards = 2 is not allowed: 1, as devices of fed-peft hold all of it",
        ),
    ],
    ids=lambda value: value.split(" is ")[0] if isinstance(value, str) else "",
)
def test_settings_that_do_not_go_together_are_refused_and_nothing_is_written(run, tmp_path, changes, said):
    with pytest.raises(FedPeatError, match=re.escape(said)) as caught:
        run(**changes)
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_a_small_model_of_another_vocabulary_is_refused(run, gpt2_dir, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(gpt2_dir, other)
    tokenizer = load_tokenizer(gpt2_dir)
    tokenizer.add_tokens(["harbour"])
    tokenizer.save_pretrained(other)
    said = rf"^proxy.small = {re.escape(repr(str(other)))} is not allowed: .*token 'harbour' differs, for one$"
    with pytest.raises(ConfigError, match=said):
        run(proxy={"small": str(other)})
    assert not (tmp_path / "run").exists()


def test_a_text_longer_than_the_small_model_reads_is_refused(run, llama_dir, tmp_path):
    short: Any = LlamaForCausalLM.from_pretrained(llama_dir)
    short.config.max_position_embeddings = 30
    short.save_pretrained(tmp_path / "short")
    load_tokenizer(llama_dir).save_pretrained(tmp_path / "short")
    for part in ("local", "evaluation"):
        lengths = {"local": {"sequence_length": 30}, "evaluation": {"sequence_length": 30}}
        said = rf"^{part}.sequence_length = 31 is not allowed: at most 30, the positions of both models$"
        with pytest.raises(ConfigError, match=said):
            run(proxy={"small": str(tmp_path / "short")}, **(lengths | {part: {"sequence_length": 31}}))
