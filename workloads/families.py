"""FedPEFT and FedPEAT on every family of models: one table.

    python workloads/families.py [--families GPT-2 ViT] [--seeds 0 1 2] [--out DIR]

The same devices tune LoRA (and a new head, where the task has labels) in the whole model, or in the end blocks of an
emulator with half of the middle, distilled on public data. Families without an embedded model are first pre-trained for
a few minutes on the public part of python_docs: small, and no more than a start. Writes families.csv, .md and .png;
models and run directories lie beside them. What is finished is not repeated.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import transformers
import tyro
from matplotlib.figure import Figure

from fedpeat_ray import SimulationConfig
from fedpeat_ray.config import (
    AvailabilityConfig,
    ControlConfig,
    DataConfig,
    DistilConfig,
    EmulatorConfig,
    EvaluationConfig,
    FleetConfig,
    FoundationConfig,
    HostsConfig,
    LocalConfig,
    LoraConfig,
    PartitionConfig,
)
from fedpeat_ray.data.client_data import ServerData
from fedpeat_ray.emulators.distillation import learning_rate_factor
from fedpeat_ray.models.foundation import load_tokenizer, model_dir
from fedpeat_ray.runtime.metric import metric_words, written_metric
from fedpeat_ray.runtime.run_log import read_config
from fedpeat_ray.seeding import generator
from fedpeat_ray.sweep import Sweep, report
from fedpeat_ray.tasks.find import find_task
from fedpeat_ray.tasks.task import tensors_of

SMALL = {"hidden_size": 128, "num_hidden_layers": 8, "num_attention_heads": 4, "intermediate_size": 512}
SMALL_T5 = {"d_model": 128, "num_layers": 6, "num_decoder_layers": 2, "num_heads": 4, "d_kv": 32, "d_ff": 512}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


@dataclass(frozen=True)
class Untrained:
    """A model that is pre-trained here."""

    kind: str
    """Its configuration in transformers."""
    values: dict[str, Any]
    task: str
    """What it learns on public text."""
    tokenizer: str
    """The embedded model whose tokenizer it has."""
    steps: int
    """Of 32 texts."""
    learning_rate: float
    """Peak learning rate of AdamW."""


@dataclass(frozen=True)
class Family:
    """What devices tune, and for what."""

    task: str
    model: str | Untrained
    data: str = "workloads/peft_modules.py:as_many_of_each"
    public: str = "python_docs"


FAMILIES = {
    "GPT-2": Family("language-modelling", "pydoc-small", "python_docs"),
    "LLaMA": Family(
        "language-modelling",
        Untrained("LlamaConfig", SMALL | {"tie_word_embeddings": True}, "language-modelling", "pydoc-base", 400, 2e-3),
        "python_docs",
    ),
    "BERT": Family(
        "classification",
        Untrained("BertConfig", SMALL | NO_DROPOUT, "classification", "pydoc-roberta", 600, 5e-4),
    ),
    "RoBERTa": Family("classification", "pydoc-roberta"),
    "T5": Family(
        "sequence-to-sequence",
        Untrained("T5Config", SMALL_T5 | {"dropout_rate": 0.0}, "sequence-to-sequence", "pydoc-roberta", 1200, 2e-3),
    ),
    "ViT": Family("images", "glyph-vit", "digits", "workloads/pretrain_vit.py:letters"),
}
ALGORITHMS = ("fed-peft", "fed-peat")


@dataclass(frozen=True)
class Settings:
    """What all families share."""

    families: tuple[str, ...] = tuple(FAMILIES)
    seeds: tuple[int, ...] = (0, 1, 2)
    rounds: int = 12
    num_devices: int = 16
    distil_steps: int = 100
    sequence_length: int = 32
    """Of texts."""
    hosts: HostsConfig = field(default_factory=HostsConfig)
    out: Path = Path("runs/families")


def main(settings: Settings) -> int:
    """Run everything and write the results; returns the exit status."""

    def study(sweep: Sweep) -> str:
        models = {name: foundation(name, settings) for name in settings.families}
        keys = [(name, kind, seed) for name in settings.families for kind in ALGORITHMS for seed in settings.seeds]
        configs = {name_of(*key): configuration(settings, models[key[0]], *key) for key in keys}
        found = sweep.run_all(configs)
        table = pd.DataFrame([measured(*found[name_of(*key)], *key) for key in keys])
        table.to_csv(sweep.out / "families.csv", index=False)
        draw(table, sweep.out / "families.png")
        return markdown(table)

    return report(Sweep(settings.out, settings.hosts), "families.md", study)


def foundation(name: str, settings: Settings) -> str:
    """The name of a family's model, or the directory of one that is pre-trained."""
    untrained = FAMILIES[name].model
    if isinstance(untrained, str):
        return untrained
    directory = settings.out / "models" / name.lower()
    if not (directory / "model.safetensors").exists():
        print(f"pre-training {directory}", flush=True)
        pretrain(untrained, directory, settings.sequence_length)
    return str(directory)


def pretrain(untrained: Untrained, directory: Path, length: int) -> None:
    """Train a model on the server's text and write it, with its tokenizer."""
    task, tokenizer = find_task(untrained.task), load_tokenizer(model_dir(untrained.tokenizer))
    ids = {f"{token}_token_id": getattr(tokenizer, f"{token}_token_id") for token in ("bos", "eos", "pad")}
    corpus = task.load(DataConfig(), tokenizer, public=True)
    values = {**untrained.values, **ids, "vocab_size": len(tokenizer)}
    if labels := task.head(corpus).labels:
        values["num_labels"] = len(labels)
    config = getattr(transformers, untrained.kind)(**values)
    if config.is_encoder_decoder:
        config.decoder_start_token_id = config.pad_token_id
    torch.manual_seed(0)
    model = getattr(transformers, task.auto).from_config(config).train()
    num_steps, peak = untrained.steps, untrained.learning_rate
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, weight_decay=0.01, fused=True)
    batches = ServerData(corpus, task).batches(num_steps, 32, length, generator(0, "pre-training"))
    for step, arrays in enumerate(batches):
        optimizer.param_groups[0]["lr"] = peak * learning_rate_factor(step, num_steps)
        losses_B, counts_B = task.losses(model, tensors_of(arrays, "cpu", torch.float32))
        loss = losses_B.sum() / counts_B.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == num_steps - 1:
            print(f"  step {step + 1}/{num_steps}: loss {loss.item():.2f}", flush=True)
    tokenizer.save_pretrained(directory)
    model.save_pretrained(directory)  # last: what is there is whole


def name_of(family: str, algorithm: str, seed: int) -> str:
    """The directory of a run."""
    return f"{family}-{algorithm}-seed{seed}"


def configuration(settings: Settings, model: str, name: str, algorithm: str, seed: int) -> SimulationConfig:
    """One run."""
    family, length = FAMILIES[name], settings.sequence_length
    return SimulationConfig(
        task=family.task,
        algorithm=algorithm,
        rounds=settings.rounds,
        cohort_size=settings.num_devices // 2,
        over_sample=1.0,
        client_batch_size=4,
        seed=seed,
        lora=LoraConfig(rank=8, alpha=16.0),
        foundation=FoundationConfig(model, dtype="float32"),
        data=DataConfig(family.data, family.public, partition=PartitionConfig(kind="iid", documents_per_device=64)),
        local=LocalConfig(batch_size=8, max_steps=8, epochs=2, sequence_length=length),
        emulator=EmulatorConfig(shares=(0.5,), distil=DistilConfig(settings.distil_steps, sequence_length=length)),
        control=ControlConfig("fixed"),
        fleet=FleetConfig(num_devices=settings.num_devices, availability=AvailabilityConfig(kind="always")),
        evaluation=EvaluationConfig(settings.rounds, num_sequences=400, sequence_length=length, centralised=False),
        hosts=settings.hosts,
    )


def measured(summary: dict[str, Any], directory: Path, family: str, algorithm: str, seed: int) -> dict[str, Any]:
    """What a run came to, and what it asked of a device."""
    scores, resolved = summary["scores"], read_config(directory)["resolved"]
    row = {"family": family, "task": FAMILIES[family].task, "metric": summary["metric"]["name"]}
    row |= {"algorithm": algorithm, "seed": seed, "zero_shot": scores["zero_shot"], "tuned": scores["tuned"]}
    perplexity = summary["perplexity"]
    row |= {f"{name}_perplexity": perplexity[name] for name in ("zero_shot", "tuned")}
    row |= {"payload_bytes": resolved["payload_bytes"], "memory_bytes": max(resolved["fits"]["memory_bytes"].values())}
    if algorithm == "fed-peat":
        row |= {"emulator": scores["emulator_tuned"]["1"], "emulator_perplexity": perplexity["emulator_tuned"]["1"]}
    return row


def cell(metric: str, rows: pd.DataFrame, name: str) -> str:
    """Mean ± standard deviation over seeds; behind it the perplexity of labels, where that is not the metric."""
    values = rows[name]
    deviation = values.std(ddof=min(1, len(values) - 1))
    text = f"{written_metric(metric, values.mean())} ± {written_metric(metric, deviation)}"
    return text if metric == "perplexity" else f"{text} ({rows[f'{name}_perplexity'].mean():.2f})"


def markdown(table: pd.DataFrame) -> str:
    """A line a family."""
    heads = ["family", "task, metric", "zero-shot", "FedPEFT", "FedPEAT, emulator", "FedPEAT, plug-in"]
    heads += ["kB sent: FedPEFT", "FedPEAT", "memory of a device, MB: FedPEFT", "FedPEAT"]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for family, rows in table.groupby("family", sort=False):
        peft, peat = (rows[rows["algorithm"] == algorithm] for algorithm in ALGORITHMS)
        metric = str(rows["metric"].iloc[0])
        cells = [str(family), f"{rows['task'].iloc[0]}, {metric_words(metric)}"]
        asked = ((rows, "zero_shot"), (peft, "tuned"), (peat, "emulator"), (peat, "tuned"))
        cells += [cell(metric, part, name) for part, name in asked]
        cells += [f"{part['payload_bytes'].iloc[0] / 1e3:,.1f}" for part in (peft, peat)]
        cells += [f"{part['memory_bytes'].iloc[0] / 1e6:,.1f}" for part in (peft, peat)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(table: pd.DataFrame, path: Path) -> None:
    """A panel a family: zero-shot, FedPEFT, and FedPEAT on the emulator and plugged in."""
    names = list(dict.fromkeys(table["family"]))
    figure = Figure((2.6 * len(names), 3.4), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        rows = table[table["family"] == name]
        peft, peat = (rows[rows["algorithm"] == algorithm] for algorithm in ALGORITHMS)
        bars: Sequence[tuple[str, pd.Series, str]] = (
            ("zero-shot", rows["zero_shot"], "#999999"),
            ("FedPEFT", peft["tuned"], "#2f6db3"),
            ("FedPEAT,\nemulator", peat["emulator"], "#e0a63b"),
            ("FedPEAT,\nplug-in", peat["tuned"], "#2f9e62"),
        )
        for place, (_, values, colour) in enumerate(bars):
            axes.bar(place, values.mean(), yerr=values.std() if len(values) > 1 else None, color=colour)
        axes.set_xticks(range(len(bars)), [label for label, _, _ in bars], rotation=45, fontsize=8)
        axes.set_title(f"{name}: {metric_words(str(rows['metric'].iloc[0]))}", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Settings, description=__doc__)))
