"""FedPT against what it replaces, and where it stops being worth it.

python workloads/fed_pt.py [--seeds 0 1 2] [--out DIR]

Writes results.md and two figures: the table of the paper on our text (large model as it is, small model
tuned by FedPEFT, the same steering the large one, FedPT, and the large model tuned by FedPEFT); a sweep of
alpha; heterogeneity from IID to one source a device; how much local data and how small a gap between the
two models it takes until the tuned small model is better alone; a small model spoilt by shuffled words; and
what devices save, for our pair and by the cost model for two published pairs. Runs that are finished
are not repeated, one that was interrupted goes on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import numpy as np
import torch
import tyro
from matplotlib.figure import Figure
from torch import Tensor
from transformers import GPT2Config, LlamaConfig, PreTrainedModel

from fedpeat_ray import SimulationConfig
from fedpeat_ray.algorithms.fed_peat import FedPEAT
from fedpeat_ray.config import (
    DataConfig,
    EvaluationConfig,
    FoundationConfig,
    HostsConfig,
    LoraConfig,
    PartitionConfig,
    ProxyConfig,
)
from fedpeat_ray.data import python_docs
from fedpeat_ray.data.batches import heldout_sequences
from fedpeat_ray.data.corpus import load_corpus
from fedpeat_ray.emulators.ladder import Rung, emulated, load_blocks
from fedpeat_ray.errors import ConfigError
from fedpeat_ray.files import written_whole_dir
from fedpeat_ray.fleet.costs import training_flops
from fedpeat_ray.fleet.memory import ModelShape, lora_parameters, training_memory
from fedpeat_ray.models import foundation as foundations
from fedpeat_ray.models.proxy import proxy_logits
from fedpeat_ray.runtime.progress import Progress
from fedpeat_ray.seeding import generator
from fedpeat_ray.sweep import Sweep, report
from fedpeat_ray.tasks.language_modelling import IGNORED, next_token_labels
from fedpeat_ray.trainable.lora import find_lora
from fedpeat_ray.trainable.peft_files import load
from fedpeat_ray.trainable.shape import model_shape
from fedpeat_ray.training.proxy_tuning import SmallModel
from fedpeat_ray.world import furnished, prepare

PARTITIONS = {
    "iid": PartitionConfig("iid"),
    "Dirichlet 1": PartitionConfig("dirichlet", 1.0),
    "Dirichlet 0.1": PartitionConfig("dirichlet", 0.1),
    "one source a device": PartitionConfig("by_source"),
}


@dataclass(frozen=True)
class Settings:
    """What all runs share."""

    seeds: tuple[int, ...] = (0, 1, 2)
    rounds: int = 8
    cohort_size: int = 32
    client_batch_size: int = 8
    """Fixed, so that the last digits do not depend on what a machine measures."""
    alphas: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
    """Among them 1, at which the large model is judged in the main table."""
    distillation_steps: int = 10
    """A round."""
    more_rounds: tuple[int, ...] = (1, 3, 8, 20, 50)
    """Rounds after which the small model is judged alone and as a proxy."""
    large: str = "pydoc-base"
    small: str = "pydoc-small"
    num_sequences: int = 64
    """Held-out private sequences of 128 tokens."""
    hosts: HostsConfig = field(default_factory=HostsConfig)
    out: Path = Path("runs/fed_pt")


def main(settings: Settings) -> int:
    """Run everything and write the results; returns the exit status."""

    def study(sweep: Sweep) -> str:
        if 1.0 not in settings.alphas:
            raise ConfigError.of("alphas", settings.alphas, "numbers with 1 among them")
        judge = Judge(settings)
        parts = [
            main_table(settings, sweep, judge),
            heterogeneity(settings, sweep),
            edge(settings, sweep, judge),
            spoilt(settings, sweep, judge),
            savings(settings),
        ]
        return "\n".join(parts)

    return report(Sweep(settings.out, settings.hosts), "results.md", study)


def configuration(settings: Settings, algorithm: str, seed: int, data: DataConfig | None = None) -> SimulationConfig:
    """FedPEFT on either model, or FedPT."""
    kind, _, model = algorithm.partition(" ")
    return SimulationConfig(
        algorithm="fed-pt" if kind == "fed-pt" else "fed-peft",
        rounds=settings.rounds,
        cohort_size=settings.cohort_size,
        client_batch_size=settings.client_batch_size,
        seed=seed,
        foundation=FoundationConfig(settings.small if model == "small" else settings.large),
        proxy=ProxyConfig(settings.small, steps=settings.distillation_steps) if kind == "fed-pt" else ProxyConfig(),
        data=data or DataConfig(),
        evaluation=EvaluationConfig(  # the last round is always evaluated
            every=1000, num_sequences=settings.num_sequences, centralised=False
        ),
    )


class Judge:
    """Held-out perplexities of small models alone and as proxies, for many alphas at once."""

    def __init__(self, settings: Settings):
        foundation = foundations.prepare(settings.large, "float32")
        self.large = foundations.load(foundation)
        small = foundations.prepare(settings.small, "float32")
        self.small = SmallModel(small, find_lora(foundations.load(small), LoraConfig()))
        self.alphas = settings.alphas
        corpus = load_corpus(DataConfig(), foundations.load_tokenizer(foundation.config_dir))
        tokens, lengths = heldout_sequences(corpus, settings.num_sequences, 128, seed=0)
        self.tokens_NT, self.lengths_N = torch.from_numpy(tokens).long(), torch.from_numpy(lengths)

    def adapter(self, run: Path) -> Tensor:
        """What a run of FedPEFT on the small model tuned."""
        return load(run / "adapter", self.small.lora)

    def __call__(self, adapter_P: Tensor) -> tuple[float, dict[float, float]]:
        """(tuned small model alone, {alpha: large model steered by it})."""
        alone, steered, count = 0.0, np.zeros(len(self.alphas)), 0
        with torch.no_grad(), self.small.pair(adapter_P) as pair:
            for tokens, lengths in zip(self.tokens_NT.split(4), self.lengths_N.split(4), strict=True):
                labels = next_token_labels(tokens, lengths).flatten()
                rows = labels != IGNORED
                tuned, original = (logits.flatten(0, 1)[rows] for logits in pair(tokens))
                large = self.large(input_ids=tokens, use_cache=False).logits.flatten(0, 1)[rows]
                alone += _loss(tuned, labels[rows])
                for i, alpha in enumerate(self.alphas):
                    steered[i] += _loss(proxy_logits(large, tuned, original, alpha), labels[rows])
                count += int(rows.sum())
        return math.exp(alone / count), dict(zip(self.alphas, np.exp(steered / count).tolist(), strict=True))


def _loss(logits: Tensor, labels: Tensor) -> float:
    return torch.nn.functional.cross_entropy(logits.float(), labels, reduction="sum").item()


def main_table(settings: Settings, sweep: Sweep, judge: Judge) -> str:
    """The table of the paper, mean and range over seeds, and the sweep of alpha."""
    rows: dict[str, list[float]] = {}
    sweeps, costs = [], {}
    names = ("fed-peft small", "fed-pt", "fed-peft large")
    files = {(name, seed): f"{name.replace(' ', '-')}-seed{seed}" for seed in settings.seeds for name in names}
    found = sweep.run_all({file: configuration(settings, name, seed) for (name, seed), file in files.items()})
    for seed in settings.seeds:
        runs = {name: found[files[name, seed]] for name in names}
        perplexity = {name: summary["perplexity"] for name, (summary, _) in runs.items()}
        alone, by_alpha = judge(judge.adapter(runs["fed-peft small"][1]))
        sweeps.append(by_alpha)
        best = min(by_alpha, key=lambda alpha: by_alpha[alpha])
        values = {
            "large, as it is": perplexity["fed-peft large"]["zero_shot"],
            "small, as it is": perplexity["fed-peft small"]["zero_shot"],
            "small, FedPEFT": alone,
            "large steered by it (alpha = 1), not distilled": by_alpha[1.0],
            "the same at the best alpha": by_alpha[best],
            "FedPT: large steered, distilled every round": perplexity["fed-pt"]["proxy_tuned"],
            "FedPT: its small model alone": perplexity["fed-pt"]["small_tuned"],
            "large, FedPEFT": perplexity["fed-peft large"]["tuned"],
        }
        for name, value in values.items():
            rows.setdefault(name, []).append(value)
        costs |= {name: summary for name, (summary, _) in runs.items()}
    draw_alphas(settings, sweeps, rows)
    lines = ["### Our pair", "", "| | perplexity | range |", "|---|---|---|"]
    lines += [f"| {name} | {np.mean(v):.2f} | {min(v):.2f} to {max(v):.2f} |" for name, v in rows.items()]
    lines += ["", "| run | MB to devices | MB from devices | J on devices | virtual s |", "|---|---|---|---|---|"]
    for name, summary in costs.items():
        down, up = summary["download_bytes"] / 1e6, summary["upload_bytes"] / 1e6
        lines.append(f"| {name} | {down:.1f} | {up:.1f} | {summary['energy_j']:.0f} | {summary['virtual_s']:.1f} |")
    lines += ["", f"alpha, mean over {len(settings.seeds)} seeds, small model of FedPEFT:", ""]
    lines += ["| alpha | " + " | ".join(f"{alpha:g}" for alpha in settings.alphas) + " |"]
    lines += ["|---|" + "---|" * len(settings.alphas)]
    means = [float(np.mean([sweep[alpha] for sweep in sweeps])) for alpha in settings.alphas]
    lines += ["| perplexity | " + " | ".join(f"{mean:.2f}" for mean in means) + " |", ""]
    return "\n".join(lines)


def heterogeneity(settings: Settings, sweep: Sweep) -> str:
    """FedPT with and without distillation from IID to disjoint sources; the first seed, half of the rounds."""
    seed, rounds = settings.seeds[0], max(1, settings.rounds // 2)
    lines = [
        f"### Heterogeneity, {rounds} rounds",
        "",
        "| partition | small, FedPEFT | steered, not distilled | FedPT |",
        "|---|---|---|---|",
    ]
    configs = {}
    for name, partition in PARTITIONS.items():
        for steps in (0, settings.distillation_steps):
            config = configuration(settings, "fed-pt", seed, DataConfig(partition=partition))
            proxy = dataclasses.replace(config.proxy, steps=steps)
            configs[f"fed-pt-{name.replace(' ', '-')}-{steps}-seed{seed}"] = dataclasses.replace(
                config, rounds=rounds, proxy=proxy
            )
    found = [summary["perplexity"] for summary, _ in sweep.run_all(configs).values()]
    for name, plain, distilled in zip(PARTITIONS, found[::2], found[1::2], strict=True):
        lines.append(
            f"| {name} | {plain['small_tuned']:.2f} | {plain['proxy_tuned']:.2f} | {distilled['proxy_tuned']:.2f} |"
        )
    return "\n".join([*lines, ""])


def edge(settings: Settings, sweep: Sweep, judge: Judge) -> str:
    """How much the small model must have learnt, and how near the large one must be, for the small one to win alone."""
    seed = settings.seeds[0]
    config = configuration(settings, "fed-peft small", seed)
    lines = ["### Where the tuned small model wins alone", ""]
    header, columns = "| rounds | private tokens | small, tuned |", dict(_gaps(settings))
    lines += [header + "".join(f" steered: {name} |" for name in columns), "|---|---|---|" + "---|" * len(columns)]
    points: list[tuple[int, float, list[float]]] = []
    for rounds in sorted(settings.more_rounds):  # of one run, which goes on
        adapter_P, num_tokens = _tuned_for(sweep, f"more-rounds-seed{seed}", dataclasses.replace(config, rounds=rounds))
        steered, alone = [], 0.0
        for large in columns.values():
            with large(judge.large):
                alone, by_alpha = judge(adapter_P)
            steered.append(min(by_alpha.values()))
        points.append((num_tokens, alone, steered))
        cells = " | ".join(f"{value:.2f}" if value < alone else f"**{value:.2f}**" for value in steered)
        lines.append(f"| {rounds} | {num_tokens:,} | {alone:.2f} | {cells} |")
    draw_edge(settings, list(columns), points)
    lines += ["", "Steered at the best alpha of the sweep; bold where the small model alone is at least as good.", ""]
    return "\n".join(lines)


def _tuned_for(sweep: Sweep, name: str, config: SimulationConfig) -> tuple[Tensor, int]:
    """The small model's adapter after so many rounds of one run, and the tokens that it was trained on."""
    model = foundations.load(foundations.prepare(config.foundation.name, "float32"))
    kept = sweep.out / f"{name}-{config.rounds}"
    if not kept.exists():
        _, directory = sweep.run(name, config)
        with written_whole_dir(kept) as part:
            shutil.copytree(directory, part, dirs_exist_ok=True)
    num_tokens = json.loads((kept / "summary.json").read_text())["num_tokens"]
    return load(kept / "adapter", find_lora(model, config.lora)), num_tokens


def _gaps(settings: Settings) -> Iterator[tuple[str, Callable[[PreTrainedModel], AbstractContextManager]]]:
    """Large models of several qualities: the foundation, and its distilled emulators with fewer and fewer blocks."""
    yield settings.large, lambda model: contextlib.nullcontext()
    config = SimulationConfig(
        algorithm="fed-peat", foundation=FoundationConfig(settings.large), hosts=HostsConfig("serial")
    )
    with Progress(num_rounds=1) as progress:
        world = furnished(prepare(config, settings.out), None, progress)
    ladder = cast(FedPEAT, world.algorithm).emulators.ladder
    for rung in reversed(ladder.rungs[:-1]):

        def large(model: PreTrainedModel, rung: Rung = rung) -> AbstractContextManager:
            assert rung.weights is not None
            blocks = load_blocks(model, ladder.block_list, rung.weights)
            return emulated(model, ladder.block_list, rung, blocks)

        yield f"{len(rung.blocks)} of its blocks", large


def spoilt(settings: Settings, sweep: Sweep, judge: Judge) -> str:
    """A small model tuned on text whose words are shuffled: what it steers to."""
    seed = settings.seeds[0]
    directory = settings.out / "shuffled-text"
    if not directory.exists():
        rng, table = generator(0, "shuffled words"), python_docs.load()
        table = table.filter(~table["public"].to_numpy())
        with written_whole_dir(directory) as part, (part / "text.jsonl").open("w") as file:
            for text, source in zip(table["text"].to_pylist(), table["source"].to_pylist(), strict=True):
                shuffled = " ".join(rng.permutation(text.split()).tolist())
                file.write(json.dumps({"text": shuffled, "source": source}) + "\n")
    data = DataConfig(str(directory), source_column="source")
    config = configuration(settings, "fed-peft small", seed, data)
    _, run = sweep.run(f"fed-peft-small-shuffled-seed{seed}", config)
    alone, by_alpha = judge(judge.adapter(run))
    lines = [
        "### A small model made bad on purpose",
        "",
        "FedPEFT on text whose words are shuffled, judged on the text itself:",
        "",
    ]
    lines += [
        "| small alone | " + " | ".join(f"alpha {alpha:g}" for alpha in by_alpha) + " |",
        "|---|" + "---|" * len(by_alpha),
    ]
    lines += [f"| {alone:.2f} | " + " | ".join(f"{value:.2f}" for value in by_alpha.values()) + " |", ""]
    return "\n".join(lines)


def savings(settings: Settings) -> str:
    """What a device saves when it tunes the small model instead of the large one, by the memory and cost model."""
    ours = [
        model_shape(foundations.load(foundations.prepare(name, "float32")), weight_bytes=4)
        for name in (settings.large, settings.small)
    ]
    pairs = {
        f"{settings.large} / {settings.small}": (*ours, 64),
        "GPT-2 XL / GPT-2": (gpt2(48, 1600, 25), gpt2(12, 768, 12), 512),
        "LLaMA-13B / LLaMA-7B": (llama(40, 5120, 40, 13824), llama(32, 4096, 32, 11008), 512),
    }
    lines = [
        "### What a device saves",
        "",
        "| pair | memory, GB | less | LoRA sent, MB | less | GFLOP a token | less |",
    ]
    lines += ["|---|" + "---|" * 6]
    for name, (large, small, length) in pairs.items():
        figures = []
        for shape in (large, small):
            memory = training_memory(shape, batch_size=2, sequence_length=length, trainable="lora", lora_rank=8)
            sent = 4 * lora_parameters(shape, 8)
            flops = training_flops(shape, 1, length, "lora", lora_parameters(shape, 8))
            figures.append((float(memory.peak_bytes) / 1e9, float(sent) / 1e6, float(flops) / 1e9))
        cells = [f"{a:.3g} -> {b:.3g} | {1 - b / a:.0%}" for a, b in zip(*figures, strict=True)]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "LoRA of rank 8 on every linear layer, batches of 2, sequences of 64 (ours) or 512 tokens; float32, ",
        "",
    ]
    lines[-2] += "the published pairs in float16. The paper claims 36-44 % less memory and 36-40 % less communication."
    return "\n".join(lines)


def gpt2(num_blocks: int, width: int, num_heads: int) -> ModelShape:
    """A GPT-2 in half precision."""
    config = GPT2Config(
        n_layer=num_blocks, n_embd=width, n_head=num_heads, activation_function="gelu_pytorch_tanh", vocab_size=50257
    )
    return model_shape(foundations.empty(config.to_json_string()), weight_bytes=2)


def llama(num_blocks: int, width: int, num_heads: int, mlp_width: int) -> ModelShape:
    """A LLaMA in half precision."""
    config = LlamaConfig(
        num_hidden_layers=num_blocks,
        hidden_size=width,
        num_attention_heads=num_heads,
        intermediate_size=mlp_width,
        vocab_size=32000,
        tie_word_embeddings=False,
    )
    return model_shape(foundations.empty(config.to_json_string()), weight_bytes=2)


def draw_alphas(settings: Settings, sweeps: list[dict[float, float]], rows: dict[str, list[float]]) -> None:
    """Perplexity over alpha, a line a seed, and the models it lies between."""
    figure = Figure((5.5, 3.8), layout="constrained")
    axes = figure.subplots()
    for sweep in sweeps:
        axes.plot(list(sweep), list(sweep.values()), color="#2f6db3", marker=".")
    for name, style in (("large, as it is", "--"), ("small, FedPEFT", ":"), ("large, FedPEFT", "-")):
        height = float(np.mean(rows[name]))
        axes.axhline(height, color="black", linewidth=0.8, linestyle=style)
        axes.annotate(name, (settings.alphas[-1], height), fontsize=8, va="bottom", ha="right")
    axes.set_xlabel("alpha")
    axes.set_ylabel("held-out perplexity")
    axes.set_title("the large model steered by the small one of FedPEFT", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(settings.out / "alpha.png", dpi=150)


def draw_edge(settings: Settings, names: list[str], points: list[tuple[int, float, list[float]]]) -> None:
    """Perplexity over the private tokens that the small model has seen, for large models of several qualities."""
    figure = Figure((5.5, 3.8), layout="constrained")
    axes = figure.subplots()
    tokens = [point[0] for point in points]
    axes.plot(tokens, [point[1] for point in points], color="black", marker="o", label="small alone")
    for i, name in enumerate(names):
        axes.plot(tokens, [point[2][i] for point in points], marker=".", label="steered: " + name.replace("$", r"\$"))
    axes.set_xscale("log")
    axes.set_xlabel("private tokens that the small model was tuned on")
    axes.set_ylabel("held-out perplexity")
    figure.legend(frameon=False, fontsize=8, loc="outside upper center", ncols=3)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(settings.out / "edge.png", dpi=150)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Settings, description=__doc__)))
