"""Emulators for every task: what is distilled, from what, and runs on them from the first round to the plug-in."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sweeps import sweep
from task_models import CASES, MODELS, public_data_for, tiny_task, write_family_for_tasks
from torch import Tensor, nn

from fedpeat_ray import Simulation, SimulationConfig
from fedpeat_ray.algorithms.fed_peat import FedPEAT
from fedpeat_ray.config import DistilConfig, EmulatorConfig
from fedpeat_ray.emulators.distillation import distillation_loss
from fedpeat_ray.emulators.ladder import emulated
from fedpeat_ray.emulators.on_emulators import BlockInfluence, MiddleOutput
from fedpeat_ray.errors import ConfigError, DataError
from fedpeat_ray.models.foundation import Backbone, load
from fedpeat_ray.world import prepare

NUM_BLOCKS, WEIGHT = 5, 30.0
OTHERS = [case for case, (_, task) in CASES.items() if task != "language-modelling"]


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The directory of a model of each family, of five blocks."""
    folder = tmp_path_factory.mktemp("deep")
    return {family: write_family_for_tasks(folder / family, family, NUM_BLOCKS) for family in MODELS}


@pytest.fixture
def configured(deep: dict[str, Path], tmp_path: Path):
    """A run on emulators of one and two of the three blocks in the middle, with data of the server's own."""

    def configured(case: str, dtype: str = "float64", **emulator: Any) -> SimulationConfig:
        config = tiny_task(deep, case, dtype, algorithm="fed-peat", out=tmp_path / "run")
        distil = DistilConfig(steps=6, batch_size=4, sequence_length=20)
        settings = EmulatorConfig(first=1, last=1, shares=(0.3, 0.7), distil=distil)
        data = dataclasses.replace(config.data, public_name=public_data_for(config.task))
        return dataclasses.replace(config, data=data, emulator=dataclasses.replace(settings, **emulator))

    return configured


def states_of(model: Any, inputs: dict[str, Tensor]) -> Any:
    """What plain transformers gives: the hidden states after each block (and before the first), and all else."""
    with torch.no_grad():
        out = model(**inputs, output_hidden_states=True)
    return (out.encoder_hidden_states if "encoder_hidden_states" in out else out.hidden_states), out


def plainly(case: str, arrays: Any, mean: float = 0.5, std: float = 0.5) -> tuple[dict[str, Tensor], Tensor]:
    """What transformers is called with for a batch, and which positions count."""
    if case == "vit":
        pixels = (torch.from_numpy(arrays["pixels"]).double() / 255 - mean) / std
        return {"pixel_values": pixels}, torch.ones(len(pixels), 5, dtype=torch.bool)
    longest = int(arrays["lengths"].max())
    tokens = torch.from_numpy(arrays["tokens"][:, :longest])
    valid = torch.arange(longest) < torch.from_numpy(arrays["lengths"])[:, None]
    inputs = {"input_ids": tokens, "attention_mask": valid.long()}
    return inputs | ({"decoder_input_ids": tokens[:, :1]} if case == "t5" else {}), valid


@pytest.mark.parametrize("case", OTHERS)
def test_what_is_distilled_is_the_output_of_the_middle_and_where_labels_are_in_the_text_its_own_loss(
    case, configured, tmp_path
):
    world = prepare(configured(case), tmp_path)
    assert isinstance(world.algorithm, FedPEAT)
    emulators, task = world.algorithm.emulators, world.task
    ladder, model = emulators.ladder, load(world.foundation)
    rung = ladder.rungs[0]
    assert rung.blocks == (0, 2, 4) and ladder.num_blocks == NUM_BLOCKS
    (arrays,) = emulators.workshop.public_text.batches(
        1, 4, world.config.local.sequence_length, np.random.default_rng(0)
    )
    inputs, valid = plainly(case, arrays)
    whole, _ = states_of(model, inputs)
    (found,) = MiddleOutput(ladder, emulators.adapter, "float32")(Backbone(model, model), None, [arrays])
    torch.testing.assert_close(found.value[valid], whole[NUM_BLOCKS - 1][valid].float(), rtol=0, atol=1e-6)
    (influence,) = BlockInfluence(ladder, task)(Backbone(model, model), None, [arrays])
    last = NUM_BLOCKS - 1 if case.startswith(("gpt2", "llama", "t5")) else NUM_BLOCKS  # others put a norm behind it
    likeness = [
        nn.functional.cosine_similarity(before[valid], after[valid], dim=-1).mean().item()
        for before, after in itertools.pairwise(whole[: last + 1])
    ]
    np.testing.assert_allclose(influence.value[:last], 1 - np.array(likeness), atol=1e-6)

    with emulated(model, ladder.block_list, rung):
        loss = distillation_loss(model, ladder, rung, task, arrays, found.value, WEIGHT)
    blocks: Any = model.get_submodule(ladder.block_list)
    model.set_submodule(ladder.block_list, nn.ModuleList([blocks[i] for i in rung.blocks]))
    shallow, out = states_of(model, inputs)
    target = whole[NUM_BLOCKS - 1][valid]
    expected = WEIGHT * nn.functional.mse_loss(shallow[2][valid], target) / target.square().mean().sqrt()
    if case == "roberta masked":
        labels = torch.from_numpy(arrays["labels"][:, : out.logits.shape[1]])
        expected += nn.functional.cross_entropy(out.logits.flatten(0, 1), labels.flatten())
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("case", sweep(OTHERS, quick=["vit"], full=["gpt2 classifier", "llama classifier", "bert"]))
def test_devices_of_every_task_tune_on_distilled_emulators_that_are_aligned_anew(case, configured, tmp_path):
    choices = {"weights": "elastic", "choice": "influence", "realign_every": 1, "realign_steps": 2}
    config = dataclasses.replace(configured(case, "float32", **choices), rounds=2)
    summary = Simulation(config).run()
    scores = summary["scores"]
    assert summary["rounds"] == 2 and scores["plug_in"] == scores["tuned"] and np.isfinite(scores["tuned"])
    assert scores["emulator_tuned"].keys() == {"1", "2"}
    perplexity = summary["perplexity"]
    assert perplexity["emulator_tuned"]["1"] != perplexity["emulator_zero_shot"]["1"]
    assert perplexity["tuned"] != perplexity["zero_shot"]
    assert len(list((tmp_path / "run" / "emulators").iterdir())) == 2


def test_a_server_without_the_devices_labels_or_without_data_is_refused_in_a_line(configured, tmp_path):
    with pytest.raises(ConfigError, match="^emulator.server_steps = 2 is not allowed: 0 with --task images"):
        prepare(configured("vit", server_steps=2), tmp_path)
    config = configured("vit")
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, public_name=None))
    with pytest.raises(ConfigError, match="^data.public_name = None is not allowed: the name of the server's images"):
        prepare(config, tmp_path)
    same = dataclasses.replace(config, data=dataclasses.replace(config.data, public_name=config.data.name))
    with pytest.raises(DataError, match="^data.public_name = .* has nothing left: its images are all among those of"):
        prepare(same, tmp_path)


def test_images_of_devices_are_none_of_the_server(configured, tmp_path):
    world = prepare(configured("vit"), tmp_path)
    assert world.corpora["public"].removed.private == 1
    assert world.corpora["public"].num_documents == world.corpora["private"].num_documents
