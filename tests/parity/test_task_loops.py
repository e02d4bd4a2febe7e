"""Every family for its task: client batches against the loops of PEFT's own tutorials, and what is saved against what
PEFT loads.

In float64, with transformers' own loss where it keeps that type (a causal language model's rounds logits first).
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from task_models import CASES, CLASSES, MODELS, RATE, tiny_task, write_family_for_tasks
from torch import Tensor, nn

from fedpeat_ray import Simulation
from fedpeat_ray.errors import ConfigError
from fedpeat_ray.models.foundation import load_backbone
from fedpeat_ray.training.client_batch import ClientUpdate
from fedpeat_ray.world import World, prepare

MODULES = ("full", "head", "bias", "lora", "ia3", "houlsby", "prompt", "prefix")


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The directory of a model of each."""
    folder = tmp_path_factory.mktemp("families")
    return {family: write_family_for_tasks(folder / family, family) for family in MODELS}


def plain(world: World, directory: Path) -> nn.Module:
    """The model as transformers builds it, with the foundation's weights, where a task's head is new."""
    task, auto = world.task, getattr(transformers, world.task.auto)
    labels = {"num_labels": len(CLASSES)} if task.metric == "accuracy" and "Mask" not in task.auto else {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = auto.from_pretrained(
            directory, dtype=torch.float64, attn_implementation="eager", ignore_mismatched_sizes=True, **labels
        )
    model.load_state_dict({n: t.double() for n, t in load_file(world.foundation.weights).items()}, strict=False)
    if labels and getattr(model.config, "pad_token_id", 0) is None:
        model.config.pad_token_id = model.config.eos_token_id
    return model.eval()


def loss_of(model: Any, batch: Mapping[str, Tensor], case: str) -> Tensor:
    """transformers' loss of one client's batch, its rows that fill up left out."""
    real = batch["lengths"] > 0
    rows = {name: tensor[real] for name, tensor in batch.items()}
    _, task = CASES[case]
    if task == "images":
        return model(pixel_values=(rows["pixels"].double() / 255 - 0.5) / 0.5, labels=rows["labels"]).loss
    mask = torch.arange(rows["tokens"].shape[1]) < rows["lengths"][:, None]
    if task == "language-modelling":
        logits = model(input_ids=rows["tokens"], attention_mask=mask.long()).logits
        logits = logits[:, -mask.shape[1] : -1]  # PEFT leaves those of learned tokens in
        labels = rows["tokens"].masked_fill(~mask, -100)[:, 1:]
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
    return model(input_ids=rows["tokens"], attention_mask=mask.long(), labels=rows["labels"]).loss


def by_hand(model: Any, world: World, device_id: int, case: str) -> dict[str, Tensor]:
    """What one client's training changes in each trained tensor, by its name in the file of an adapter."""
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    before = {name: parameter.detach().clone() for name, parameter in trained.items()}
    optimizer = torch.optim.AdamW(list(trained.values()), lr=RATE, weight_decay=0.1)
    (task,) = world.data.tasks([device_id], round=1)
    for step in range(task.num_steps):
        batch = {n: torch.from_numpy(np.asarray(a, dtype=np.int64)) for n, a in task.step(step).items()}
        loss_of(model, batch, case).backward()
        optimizer.step()
        optimizer.zero_grad()
    short = {n: n.replace(".default", "").replace(".modules_to_save", "") for n in trained}
    return {short[n].removeprefix("base_model.model."): (p.detach() - before[n]).double() for n, p in trained.items()}


def trained(world: World, device_ids: list[int]) -> list[ClientUpdate]:
    """By a client batch of ours."""
    state = world.algorithm.init(0)
    tasks = world.data.tasks(device_ids, round=1)
    return world.algorithm.trainer(state)(load_backbone(world.foundation), state.model_P, tasks)


def with_start(model: Any, world: World) -> Any:
    """PEFT's model with our start."""
    start = world.algorithm.layout.unflatten(world.algorithm.init(0).model_P.double())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                short = name.replace(".default", "").replace(".modules_to_save", "")
                parameter.copy_(start[short.removeprefix("base_model.model.")])
    return model


@pytest.mark.parametrize("case", CASES)
def test_lora_of_a_client_batch_is_that_of_a_plain_peft_loop(families, case):
    world = prepare(tiny_task(families, case), Path())
    family, _ = CASES[case]
    updates = trained(world, [0, 1])
    ours = [dict(world.algorithm.layout.unflatten(update.delta_P)) for update in updates]
    linear = sorted({n.rsplit(".", 2)[0] for n in world.algorithm.layout.names if ".lora_A" in n})
    head = sorted({n.split(".")[0] for n in world.algorithm.layout.names if ".lora_" not in n})
    for device_id in (0, 1):
        settings = peft.LoraConfig(
            r=2,
            lora_alpha=3,
            target_modules=linear,
            modules_to_save=head or None,
            fan_in_fan_out=family == "gpt2",
        )
        model = with_start(peft.get_peft_model(cast(Any, plain(world, families[family])), settings), world)
        theirs = by_hand(model.eval(), world, device_id, case)
        assert theirs.keys() == ours[device_id].keys()
        for name, delta in theirs.items():
            torch.testing.assert_close(ours[device_id][name], delta, rtol=1e-9, atol=1e-9)


def other_modules() -> Iterator[tuple[str, str]]:
    """What PEFT trains too: IA3 in all families, prompts and prefixes in causal language models."""
    for case, (_, task) in CASES.items():
        yield case, "ia3"
        if task == "language-modelling":
            yield from ((case, module) for module in ("prompt", "prefix"))


@pytest.mark.sweep
@pytest.mark.parametrize(("case", "module"), list(other_modules()))
def test_other_modules_of_a_client_batch_are_those_of_plain_peft_loops(families, case, module, tmp_path):
    settings = tiny_task(families, case)
    settings = dataclasses.replace(settings, peft=dataclasses.replace(settings.peft, module=module))
    world = prepare(settings, Path())
    if module == "ia3" and CASES[case][0] == "vit":
        assert world.algorithm.layout.names[0].endswith("ia3_l")  # PEFT has no list of layers for it
    state = world.algorithm.init(0)
    world.algorithm.save(tmp_path, state.model_P)
    ours = [dict(world.algorithm.layout.unflatten(update.delta_P)) for update in trained(world, [0, 1])]
    for device_id in (0, 1):
        base = cast(Any, plain(world, families[CASES[case][0]]))
        settings = peft.PeftConfig.from_pretrained(str(tmp_path))
        settings.inference_mode = False
        model = peft.get_peft_model(base, settings)
        peft.set_peft_model_state_dict(model, load_file(tmp_path / "adapter_model.safetensors"))
        theirs = by_hand(model.double().eval(), world, device_id, case)
        theirs = {n.replace("prompt_encoder.embedding.weight", "prompt_embeddings"): t for n, t in theirs.items()}
        assert theirs.keys() == ours[device_id].keys()
        for name, delta in theirs.items():
            torch.testing.assert_close(ours[device_id][name], delta, rtol=1e-6, atol=1e-8)


@pytest.mark.sweep
@pytest.mark.parametrize("case", CASES)
def test_an_adapter_loads_in_peft_with_the_logged_score(families, case, tmp_path):
    settings = tiny_task(families, case, dtype="float32", out=tmp_path / "run")
    summary = Simulation(settings).run()
    world = prepare(settings, tmp_path)
    family, _ = CASES[case]
    model = peft.PeftModel.from_pretrained(
        cast(Any, plain(world, families[family])), str(tmp_path / "run" / "adapter")
    ).double()
    losses, counts = [], []
    for task in world.heldout:
        batch = {n: torch.from_numpy(np.asarray(a, dtype=np.int64)) for n, a in task.arrays.items()}
        with torch.no_grad():
            losses.append(loss_of(model.eval(), batch, case).item())
        counts.append(world.task.losses(load_backbone(world.foundation).exact, _tensors(task.arrays))[1].sum().item())
    found = np.exp(np.average(losses, weights=counts))
    assert summary["perplexity"]["tuned"] == pytest.approx(found, rel=1e-5)
    assert summary["perplexity"]["tuned"] != pytest.approx(summary["perplexity"]["zero_shot"], rel=1e-5)
    assert summary["scores"]["tuned"] == summary["metrics"]["tuned"][summary["metric"]["name"]]


def _tensors(arrays: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    return {
        name: torch.from_numpy(array).float() if name == "pixels" else torch.from_numpy(array.astype(np.int64))
        for name, array in arrays.items()
    }


@pytest.mark.sweep
@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("case", CASES)
def test_each_module_is_trained_in_batches_as_alone_or_is_refused_in_a_line(families, case, module, grid):
    settings = tiny_task(families, case)
    settings = dataclasses.replace(settings, peft=dataclasses.replace(settings.peft, module=module))
    try:
        world = prepare(settings, Path())
    except ConfigError as error:
        assert str(error).startswith(f"peft.module = {module!r} is not allowed: ") and "\n" not in str(error)
        grid[case, module] = "—"
        return
    grid[case, module] = "✓"
    _, last = trained(world, [0, 1])
    (alone,) = trained(world, [1])
    torch.testing.assert_close(last.delta_P, alone.delta_P, rtol=1e-9, atol=1e-9)
    assert alone.report.train_loss == pytest.approx(last.report.train_loss, rel=1e-9)
    assert alone.delta_P.count_nonzero() > 0.5 * len(alone.delta_P)


@pytest.fixture(scope="module")
def grid() -> dict[tuple[str, str], str]:
    """What works, filled by the tests above."""
    return {}


def test_the_table_of_what_works_is_the_one_in_the_docs(grid):
    if len(grid) < len(CASES) * len(MODULES):
        pytest.skip("not all of them were tried")
    lines = ["| family | task | " + " | ".join(MODULES) + " |", "|" + "---|" * (len(MODULES) + 2)]
    for case, (family, task) in CASES.items():
        lines.append(f"| {family} | {task} | " + " | ".join(grid[case, module] for module in MODULES) + " |")
    table = "\n".join(lines)
    docs = Path(__file__).parents[2] / "docs" / "fed_peft.md"
    assert table in docs.read_text(), table
