"""Text from finished runs, on the command line: what is shown, and what is refused."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import whole_runs
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from analysis.load import load_run
from fedpeat_ray import Simulation, SimulationConfig
from fedpeat_ray.__main__ import main
from fedpeat_ray.config import (
    DataConfig,
    EmulatorConfig,
    EvaluationConfig,
    FleetConfig,
    FoundationConfig,
    HostsConfig,
    LocalConfig,
    LoraConfig,
    PartitionConfig,
    ProxyConfig,
)
from fedpeat_ray.errors import RunDirError
from fedpeat_ray.models.foundation import load_tokenizer
from fedpeat_ray.tuned import tuned_model

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT calls what transformers will rename

PROMPT = "harbour [/b]: ship"
NUM_TOKENS = 10
EMULATORS = EmulatorConfig(first=1, last=1, shares=(0.2,), weights="foundation")


@pytest.fixture
def finished(deep_gpt2_dir: Path, gpt2_dir: Path, text_dir: Path, tmp_path: Path) -> Callable[..., Path]:
    """A tiny run with some settings; returns its directory."""

    def run(**settings: Any) -> Path:
        config = SimulationConfig(
            rounds=2,
            cohort_size=4,
            client_batch_size=4,
            local=LocalConfig(sequence_length=32, max_steps=3, learning_rate=0.02),
            lora=LoraConfig(rank=2, blocks=(0, 1)),
            emulator=EMULATORS,
            proxy=ProxyConfig(small=str(gpt2_dir), steps=0, alpha=0.8),
            foundation=FoundationConfig(str(deep_gpt2_dir), dtype="float32"),
            data=DataConfig(str(text_dir), partition=PartitionConfig(documents_per_device=4)),
            fleet=FleetConfig(num_devices=10),
            evaluation=EvaluationConfig(num_sequences=2, sequence_length=32, centralised=False),
            hosts=HostsConfig(backend="serial"),
            out=tmp_path / "run",
        )
        Simulation(dataclasses.replace(config, **settings)).run()
        return tmp_path / "run"

    return run


@pytest.fixture
def shown(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """What `generate` prints on a line that is long enough."""
    monkeypatch.setenv("COLUMNS", "2000")
    monkeypatch.setenv("TERM", "dumb")

    def generate(directory: Path, *more: object) -> str:
        capsys.readouterr()
        words = ["generate", str(directory), "--prompt", PROMPT, "--max-new-tokens", str(NUM_TOKENS)]
        assert main([*words, *map(str, more)]) == 0
        return capsys.readouterr().out

    return generate


def assert_shows(out: str, texts: dict[str, str]) -> None:
    """A column a text in this order: its title, and the text's lines below one another."""
    _, titles, _, *lines = visible(out).rstrip("\n").split("\n")
    starts = [*map(titles.index, texts), None]
    cells = [slice(start, stop) for start, stop in pairwise(starts)]
    assert [titles[cell].rstrip() for cell in cells] == list(texts)
    for cell, text in zip(cells, texts.values(), strict=True):
        assert text.startswith(PROMPT)
        assert "\n".join(line[cell].rstrip() for line in lines).rstrip() == "\n".join(
            line.rstrip() for line in visible(text).split("\n")
        )


def visible(text: str) -> str:
    """Without what a terminal does not show."""
    return "".join(letter for letter in text if letter.isprintable() or letter == "\n")


def plain(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory).eval()


def with_adapter(directory: Path, run: Path) -> Any:
    return PeftModel.from_pretrained(plain(directory), str(run / "adapter"))


def text_of(directory: Path, *weighted: tuple[float, Any]) -> str:
    """The likeliest tokens by a weighted sum of models' logits, without caches."""
    tokenizer = load_tokenizer(directory)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    for _ in range(NUM_TOKENS):
        with torch.no_grad():
            logits: Any = sum(weight * model(input_ids=ids).logits[:, -1] for weight, model in weighted)
        ids = torch.cat([ids, logits.argmax(dim=1, keepdim=True)], dim=1)
        if ids[0, -1] == tokenizer.eos_token_id:
            break
    return tokenizer.batch_decode(ids, skip_special_tokens=True)[0]


def test_fed_pt_shows_the_large_model_the_tuned_small_one_and_both_together(finished, shown, deep_gpt2_dir, gpt2_dir):
    run = finished(algorithm="fed-pt")
    large, tuned, original = plain(deep_gpt2_dir), with_adapter(gpt2_dir, run), plain(gpt2_dir)
    base, small = text_of(gpt2_dir, (1, large)), text_of(gpt2_dir, (1, tuned))
    for alpha, more in ((0.8, ()), (3, ("--alpha", 3)), (0, ("--alpha", 0))):
        steered = text_of(gpt2_dir, (1, large), (alpha, tuned), (-alpha, original))
        assert len({base, small, steered}) == (2 if alpha == 0 else 3), "texts that tell columns apart"
        titles = f"{deep_gpt2_dir}, as it was", f"{gpt2_dir}, tuned", f"{deep_gpt2_dir}, steered (alpha = {alpha:g})"
        assert_shows(shown(run, *more), dict(zip(titles, (base, small, steered), strict=True)))


@pytest.mark.parametrize("settings", [{"algorithm": "fed-peft"}, {}], ids=["fed-peft", "fed-peat"])
def test_others_show_the_foundation_before_and_after(finished, shown, deep_gpt2_dir, settings):
    run = finished(**settings)
    texts = [text_of(deep_gpt2_dir, (1, model)) for model in (plain(deep_gpt2_dir), with_adapter(deep_gpt2_dir, run))]
    titles = f"{deep_gpt2_dir}, as it was", f"{deep_gpt2_dir}, tuned"
    assert len(set(texts)) == 2
    assert_shows(shown(run), dict(zip(titles, texts, strict=True)))
    assert text_of(deep_gpt2_dir, (1, tuned_model(run))) == texts[1]


@pytest.mark.parametrize(
    "settings",
    [
        {"emulator": dataclasses.replace(EMULATORS, trained="bias")},
        {"emulator": dataclasses.replace(EMULATORS, trained="blocks")},
        {"algorithm": "fed-avg", "local": LocalConfig(sequence_length=32, max_steps=3, learning_rate=5e-3)},
    ],
    ids=["bias", "blocks", "fed-avg"],
)
def test_weights_of_the_model_itself_are_plugged_in(finished, shown, deep_gpt2_dir, settings):
    run = finished(**settings)
    before, after = plain(deep_gpt2_dir), plain(deep_gpt2_dir)
    (file,) = (run / "adapter").glob("*.safetensors")
    _, unexpected = after.load_state_dict(load_file(file), strict=False)
    texts = [text_of(deep_gpt2_dir, (1, model)) for model in (before, after)]
    assert not unexpected and len(set(texts)) == 2
    assert text_of(deep_gpt2_dir, (1, tuned_model(run))) == texts[1]
    titles = f"{deep_gpt2_dir}, as it was", f"{deep_gpt2_dir}, tuned"
    assert_shows(shown(run), dict(zip(titles, texts, strict=True)))


def test_a_simulation_in_a_notebook_has_its_model_and_goes_on_with_text(deep_gpt2_dir, text_dir, tmp_path):
    config = whole_runs.tiny(deep_gpt2_dir, text_dir, algorithm="fed-peft", rounds=1, out=tmp_path / "run")
    simulation = Simulation(config)
    about = f"fed-peft on {deep_gpt2_dir}, 1 rounds, seed 3; {tmp_path / 'run'}"
    assert repr(simulation) == f"<Simulation: {about}>"
    with pytest.raises(RunDirError, match="has not been run"):
        simulation.model()
    simulation.run()
    model = simulation.model()
    text = simulation.generate(PROMPT, NUM_TOKENS)
    assert (
        text
        == text_of(deep_gpt2_dir, (1, model))
        == text_of(deep_gpt2_dir, (1, with_adapter(deep_gpt2_dir, tmp_path / "run")))
    )
    assert not any("lora" in name for name, _ in model.named_modules())
    assert repr(load_run(tmp_path / "run")) == "<Run run: fed-peft, 1 of 1 rounds, finished>"


def test_text_that_is_drawn_is_that_of_its_seed(finished, shown):
    run = finished(algorithm="fed-pt")
    one, again, other = (shown(run, "--temperature", 1.5, "--seed", seed) for seed in (1, 1, 2))
    assert one == again != other


def test_a_text_ends_where_the_model_reads_no_further(finished, capsys):
    run = finished(algorithm="fed-pt")
    assert main(["generate", str(run), "--prompt", "x" * 60, "--max-new-tokens", "40"]) == 0
    assert main(["generate", str(run), "--max-new-tokens", "2"]) == 0, "nothing to go on with"


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--prompt", "x" * 64), "error: prompt = '64 tokens' is not allowed: fewer than 64 tokens"),
        (("--temperature", "-0.5"), "error: temperature = -0.5 is not allowed: at least 0"),
        (("--max-new-tokens", "0"), "error: max_new_tokens = 0 is not allowed: at least 1"),
    ],
    ids=["prompt", "temperature", "max_new_tokens"],
)
def test_what_cannot_be_done_is_said_in_one_line(finished, capsys, more, said):
    run = finished(algorithm="fed-peft")
    capsys.readouterr()
    assert main(["generate", str(run), *more]) == 2
    out, error = capsys.readouterr()
    assert (out, error) == ("", said + "\n")


def test_runs_that_are_not_there_or_not_finished_are_refused(finished, capsys, tmp_path):
    run = finished(algorithm="fed-peft")
    (run / "adapter").rename(run / "gone")
    for directory, said in ((tmp_path / "none", "holds no run"), (run, "has no adapter: the run is not finished")):
        capsys.readouterr()
        assert main(["generate", str(directory), "--max-new-tokens", "1"]) == 2
        out, error = capsys.readouterr()
        assert not out and error.startswith(f"error: {directory} {said}") and error.count("\n") == 1
