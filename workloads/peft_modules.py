"""Which small part to tune: every module of FedPEFT over how uneven labels are and how many devices take part.

    python workloads/peft_modules.py [--task images] [--seeds 0 1 2] [--out DIR]
    python workloads/peft_modules.py --task classification --foundation pydoc-small \\
        --data workloads/peft_modules.py:as_many_of_each

Each module has the best of three learning rates, chosen on a seed that is not counted. Beside the grid: random weights,
shards in place of a Dirichlet split, devices that drop out, and full fine-tuning at equal bytes, by as many devices and
by one a round. Writes peft_modules.csv, .md and .png; a run directory for every setting lies beside them. Runs that are
finished are not repeated, one that was interrupted goes on.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import wrap
from typing import Any

import numpy as np
import pandas as pd
import tyro
from matplotlib.figure import Figure

from analysis.load import load_run
from fedpeat_ray import SimulationConfig
from fedpeat_ray.config import (
    AvailabilityConfig,
    DataConfig,
    EvaluationConfig,
    FleetConfig,
    FoundationConfig,
    HostsConfig,
    LocalConfig,
    LoraConfig,
    PartitionConfig,
    PeftConfig,
)
from fedpeat_ray.data.documents import load_documents
from fedpeat_ray.data.hub import Document
from fedpeat_ray.sweep import Sweep, report

COLOURS = {
    "full": "#c44e52",
    "head": "#999999",
    "bias": "#e0a63b",
    "houlsby": "#7d5ba6",
    "prompt": "#2f9e62",
    "lora": "#2f6db3",
}
RATES = {"full": 5e-4, "head": 1e-2, "bias": 5e-3, "houlsby": 5e-3, "prompt": 1e-2, "lora": 5e-3}
"""The middle one of those that are tried."""
TUNING_SEED = 100
IID = math.inf
CONDITIONS = {
    "": "pre-trained, Dirichlet",
    "scratch": "from random weights",
    "shards": "two shards a device",
    "dropouts": "half of the devices drop out",
}
"""What else is tried at alpha 1 with most devices: shards instead of a Dirichlet split, devices that come and go."""


@dataclass(frozen=True)
class Settings:
    """What all runs share."""

    task: str = "images"
    foundation: str = "glyph-vit"
    data: str = "digits"
    modules: tuple[str, ...] = tuple(COLOURS)
    alphas: tuple[float, ...] = (0.1, 1.0, IID)
    """Dirichlet concentrations of labels; inf: every device draws from all documents alike."""
    participation: tuple[float, ...] = (0.125, 0.5)
    """Shares of the devices that take part in a round."""
    seeds: tuple[int, ...] = (0, 1, 2)
    rounds: int = 8
    num_devices: int = 16
    documents_per_device: float = 32
    sequence_length: int = 32
    """Of texts."""
    num_heldout: int = 400
    hosts: HostsConfig = field(default_factory=HostsConfig)
    out: Path = Path("runs/peft_modules")


def main(settings: Settings) -> int:
    """Run everything and write the results; returns the exit status."""

    def study(sweep: Sweep) -> str:
        rates = best_rates(sweep, settings)
        keys = [
            (module, alpha, share, "", seed)
            for module in settings.modules
            for alpha in settings.alphas
            for share in settings.participation
            for seed in settings.seeds
        ]
        keys += [
            (module, 1.0, settings.participation[-1], condition, seed)
            for condition in CONDITIONS
            if condition
            for module in settings.modules
            for seed in settings.seeds
        ]
        keys += [("full", 1.0, alone(settings), "", seed) for seed in settings.seeds if "full" in settings.modules]
        configs = {name_of(*key): configuration(settings, rates[key[0]], *key) for key in keys}
        found = sweep.run_all(configs)
        rows = [measured(*found[name_of(*key)], key) for key in keys]
        table = pd.concat(rows)
        table.to_csv(sweep.out / "peft_modules.csv", index=False)
        draw(table, settings, sweep.out / "peft_modules.png")
        return markdown(table, rates, settings)

    return report(Sweep(settings.out, settings.hosts), "peft_modules.md", study)


def as_many_of_each(config: DataConfig) -> list[Document]:
    """The private docstrings of python_docs, as many of every package, so that the largest one is no good guess."""
    table, _ = load_documents(DataConfig())
    frame = table.select(["text", "source", "label"]).to_pandas()
    frame = frame.groupby("label").head(frame["label"].value_counts().min())
    return [Document(*row) for row in frame.itertuples(index=False)]


def alone(settings: Settings) -> float:
    """The share of one device."""
    return 1 / settings.num_devices


def best_rates(sweep: Sweep, settings: Settings) -> dict[str, float]:
    """The learning rate of each module with the best score at alpha 1 on the tuning seed."""
    share = settings.participation[-1]
    tried = {
        (module, factor): configuration(settings, factor * RATES[module], module, 1.0, share, "", TUNING_SEED)
        for module in settings.modules
        for factor in (0.3, 1.0, 3.0)
    }
    found = sweep.run_all({f"rate-{module}-{factor:g}": config for (module, factor), config in tried.items()})
    scores = {key: found[f"rate-{key[0]}-{key[1]:g}"][0]["scores"]["tuned"] for key in tried}
    best = {module: max((0.3, 1.0, 3.0), key=lambda f, m=module: scores[m, f]) for module in settings.modules}
    return {module: factor * RATES[module] for module, factor in best.items()}


def name_of(module: str, alpha: float, share: float, condition: str, seed: int) -> str:
    """The directory of a run."""
    split = "iid" if alpha == IID else f"alpha{alpha:g}"
    return f"{module}-{split}-{share:g}{condition and '-'}{condition}-seed{seed}"


def configuration(
    settings: Settings, rate: float, module: str, alpha: float, share: float, condition: str, seed: int
) -> SimulationConfig:
    """One run."""
    partition = PartitionConfig(
        kind="iid" if alpha == IID else "dirichlet",
        alpha=PartitionConfig.alpha if alpha == IID else alpha,
        group_by="label",
        documents_per_device=settings.documents_per_device,
    )
    if condition == "shards":
        few = {"shards_per_device": 2, "num_shards": 2 * settings.num_devices}
        partition = dataclasses.replace(partition, kind="shards", **few)
    availability = AvailabilityConfig(kind="always")
    if condition == "dropouts":  # a run takes seconds of the devices' clock
        availability = AvailabilityConfig(kind="markov", slot_s=0.1, mean_on_s=1.0, mean_off_s=1.0)
    texts = settings.task != "images"
    cohort_size = max(1, round(share * settings.num_devices))
    length: dict[str, Any] = {"sequence_length": settings.sequence_length} if texts else {}
    return SimulationConfig(
        task=settings.task,
        algorithm="fed-peft",
        rounds=settings.rounds,
        cohort_size=cohort_size,
        over_sample=1.0,
        client_batch_size=4 if module != "full" else 1,
        seed=seed,
        peft=PeftConfig(module=module),  # type: ignore[arg-type]  # one of its names
        lora=LoraConfig(rank=4, alpha=8.0),
        foundation=FoundationConfig(settings.foundation, pretrained=condition != "scratch", dtype="float32"),
        data=DataConfig(settings.data, heldout_share=0.25, partition=partition),
        local=LocalConfig(batch_size=8, max_steps=8, epochs=2, learning_rate=rate, **length),
        fleet=FleetConfig(num_devices=settings.num_devices, availability=availability),
        evaluation=EvaluationConfig(
            every=min(2, cohort_size), num_sequences=settings.num_heldout, centralised=False, **length
        ),
        hosts=settings.hosts,
    )


def measured(summary: dict[str, Any], directory: Path, key: tuple[str, float, float, str, int]) -> pd.DataFrame:
    """The score after so many rounds and bytes of one run, from before the first round."""
    rounds = load_run(directory).rounds
    sent = (rounds["download_bytes"] + rounds["upload_bytes"]).astype(float).cumsum()
    frame = pd.DataFrame({"round": rounds["round"].astype(int), "bytes": sent, "score": rounds["score"].astype(float)})
    start = pd.DataFrame([{"round": 0, "bytes": 0.0, "score": summary["scores"]["zero_shot"]}])
    module, alpha, share, condition, seed = key
    frame = pd.concat([start, frame.dropna(subset="score")])
    payload = float(rounds["upload_bytes"].sum() / rounds["num_completed"].sum())
    return frame.assign(
        module=module, alpha=alpha, participation=share, condition=condition, seed=seed, payload=payload
    )


def finals(table: pd.DataFrame) -> pd.DataFrame:
    """The last row of each run."""
    keys = ["module", "alpha", "participation", "condition", "seed"]
    return table.sort_values("round", kind="stable").groupby(keys, sort=False).last().reset_index()


def at_bytes(run: pd.DataFrame, num_bytes: float) -> float:
    """The best score of a run by the time so many bytes were sent."""
    return float(run.loc[run["bytes"] <= num_bytes, "score"].max())


def markdown(table: pd.DataFrame, rates: dict[str, float], settings: Settings) -> str:
    """Mean and deviation over seeds by setting; at equal bytes; from random weights; the bytes of a large ViT."""
    last = finals(table)
    tuned = last[last["condition"] == ""]
    columns = [(alpha, share) for alpha in settings.alphas for share in settings.participation]
    heads = [f"{'IID' if alpha == IID else f'alpha {alpha:g}'}, {share:g}" for alpha, share in columns]
    lines = [f"| module | rate | kB a device sends | {' | '.join(heads)} |", "|" + "---|" * (3 + len(columns))]
    for module in settings.modules:
        own = tuned[tuned["module"] == module]
        cells = [
            spread(own[(own["alpha"] == alpha) & (own["participation"] == share)]["score"]) for alpha, share in columns
        ]
        size = own["payload"].iloc[0] / 1e3
        lines.append(f"| {module} | {rates[module]:g} | {size:,.1f} | {' | '.join(cells)} |")
    lines += ["", *equal_bytes(table, settings), "", *by_condition(last, settings), "", *large_vit()]
    return "\n".join(lines) + "\n"


def spread(scores: pd.Series) -> str:
    """Mean ± standard deviation over seeds."""
    values = scores.to_numpy(float)
    return f"{values.mean():.3f} ± {values.std(ddof=min(1, len(values) - 1)):.3f}"


def equal_bytes(table: pd.DataFrame, settings: Settings) -> list[str]:
    """Full fine-tuning against the others when each other one has sent all its bytes."""
    shares = (settings.participation[-1], alone(settings))
    lines = [
        "| module | its MB | its score | full fine-tuning after as many | rounds of it | by one device | rounds of it |"
    ]
    lines.append("|---|---|---|---|---|---|---|")
    chosen = table[(table["alpha"] == 1.0) & (table["condition"] == "")]
    runs: dict[Any, pd.DataFrame] = dict(iter(chosen.groupby(["module", "participation", "seed"])))
    for module in settings.modules:
        if module == "full" or "full" not in settings.modules:
            continue
        of_seeds = [runs[module, shares[0], seed] for seed in settings.seeds]
        sent = [run["bytes"].max() for run in of_seeds]
        cells = [f"{np.mean(sent) / 1e6:.2f}", spread(pd.Series([run["score"].iloc[-1] for run in of_seeds]))]
        for share in shares:
            full = [runs["full", share, seed] for seed in settings.seeds]
            cells.append(spread(pd.Series([at_bytes(run, most) for run, most in zip(full, sent, strict=True)])))
            a_round = np.mean([run["bytes"].max() / run["round"].max() for run in full])
            cells.append(f"{np.mean(sent) / a_round:.2f}")
        lines.append(f"| {module} | {' | '.join(cells)} |")
    return lines


def by_condition(last: pd.DataFrame, settings: Settings) -> list[str]:
    """Random weights, another split and devices that drop out."""
    lines = [f"| module | {' | '.join(CONDITIONS.values())} |", "|" + "---|" * (1 + len(CONDITIONS))]
    chosen = last[(last["alpha"] == 1.0) & (last["participation"] == settings.participation[-1])]
    for module in settings.modules:
        own = chosen[chosen["module"] == module]
        cells = [spread(own[own["condition"] == condition]["score"]) for condition in CONDITIONS]
        lines.append(f"| {module} | {' | '.join(cells)} |")
    return lines


def large_vit() -> list[str]:
    """What a device sends of ViT-B/16 with 100 classes, by module: exact, from the model's shapes."""
    lines = ["| ViT-B/16, 100 classes | elements | MiB in float32 |", "|---|---|---|"]
    return lines + [f"| {name} | {count:,} | {4 * count / 2**20:.2f} |" for name, count in vit_b16_elements().items()]


def vit_b16_elements() -> dict[str, int]:
    """Trained elements of ViT-B/16 with 100 classes, by module."""
    from transformers import ViTConfig

    from fedpeat_ray.models.architecture import Head, with_head
    from fedpeat_ray.models.foundation import Foundation, empty, weights_layout
    from fedpeat_ray.trainable.find import find_part
    from fedpeat_ray.trainable.lora import find_lora

    labels = tuple(f"class {i:02d}" for i in range(100))
    config_json = with_head(ViTConfig().to_json_string(), Head("AutoModelForImageClassification", labels))
    model = empty(config_json)
    foundation = Foundation("ViT-B/16", Path(), config_json, Path(), "float32", "")
    found = {"full": weights_layout(model).num_elements}
    kinds = {
        "head": PeftConfig("head"),
        "bias + head": PeftConfig("bias"),
        "adapter of 8 a block + head": PeftConfig("houlsby", adapter_width=8, adapters="feedforward"),
        "VPT-deep of 10 + head": PeftConfig("prompt", num_tokens=10),
        "LoRA r=4 on q, v + head": PeftConfig("lora"),
    }
    for name, peft in kinds.items():
        config = SimulationConfig(peft=peft, lora=LoraConfig(4, targets=("q_proj", "v_proj")))
        part = find_part(config, model, foundation, True, lambda c=config: find_lora(model, c.lora))
        found[name] = part.layout.num_elements
    return found


def draw(table: pd.DataFrame, settings: Settings, path: Path) -> None:
    """Scores by alpha, over bytes, and under other conditions."""
    figure = Figure((14, 4), layout="constrained")
    by_alpha, over_bytes, conditions = figure.subplots(1, 3)
    last, shares = finals(table), sorted(settings.participation)
    alphas, modules = sorted(settings.alphas), list(settings.modules)
    for module in modules:
        own = last[(last["module"] == module) & (last["condition"] == "")]
        for share, style in zip(shares, ("--", "-"), strict=False):
            rows = own[own["participation"] == share].groupby("alpha")["score"].agg(["mean", "std"]).loc[alphas]
            label = module if share == shares[-1] else None
            by_alpha.errorbar(
                range(len(alphas)), rows["mean"], rows["std"], color=COLOURS[module], linestyle=style, label=label
            )
        chosen = table[(table["module"] == module) & (table["condition"] == "") & (table["alpha"] == 1.0)]
        for share, style in ((shares[-1], "-"), (alone(settings), ":")):
            mean = chosen[chosen["participation"] == share].groupby("round")[["bytes", "score"]].mean().iloc[1:]
            label = module if share == shares[-1] else None
            over_bytes.plot(mean["bytes"] / 1e6, mean["score"], style, color=COLOURS[module], marker=".", label=label)
    by_alpha.set_xticks(range(len(alphas)), ["IID" if alpha == IID else f"{alpha:g}" for alpha in alphas])
    by_alpha.set(xlabel="Dirichlet alpha of labels", ylabel="held-out score")
    by_alpha.set_title(f"solid: {shares[-1]:g} of devices a round; dashed: {shares[0]:g}", fontsize=9)
    over_bytes.set(xscale="log", xlabel="MB sent, both ways (alpha 1)")
    over_bytes.legend(frameon=False, fontsize=8)
    over_bytes.set_title(f"{shares[-1]:g} of devices a round; dotted: one device a round, full", fontsize=9)
    chosen = last[(last["alpha"] == 1.0) & (last["participation"] == shares[-1])]
    bar = 0.8 / len(modules)
    for place, module in enumerate(modules):
        own = chosen[chosen["module"] == module]
        own = own.groupby("condition")["score"].agg(["mean", "std"]).loc[list(CONDITIONS)]
        places = np.arange(len(own)) + bar * (place - (len(modules) - 1) / 2)
        conditions.bar(places, own["mean"], 0.9 * bar, yerr=own["std"], color=COLOURS[module])
    conditions.set_xticks(range(len(CONDITIONS)), ["\n".join(wrap(name, 16)) for name in CONDITIONS.values()])
    conditions.set_ylabel("held-out score")
    conditions.set_title(f"alpha 1, {shares[-1]:g} of devices a round", fontsize=9)
    for axes in (by_alpha, over_bytes, conditions):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Settings, description=__doc__)))
