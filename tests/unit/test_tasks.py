"""Tasks: what they measure, what they refuse, and data and tasks of one's own."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from sklearn.metrics import precision_recall_fscore_support
from task_models import CASES, CLASSES, MODELS, documents, pictures, tiny_task, write_family_for_tasks

from fedpeat_ray import Simulation
from fedpeat_ray.config import DataConfig
from fedpeat_ray.errors import ConfigError, DataError, ModelError, RunDirError
from fedpeat_ray.models.foundation import load
from fedpeat_ray.runtime.run_log import read_config
from fedpeat_ray.tasks.classification import TextClassification
from fedpeat_ray.tasks.masked import SHARE, MaskedLanguageModelling
from fedpeat_ray.tasks.score import Score
from fedpeat_ray.training.client_batch import together
from fedpeat_ray.world import prepare
from workloads.peft_modules import vit_b16_elements

DOCS = Path(__file__).parents[2] / "docs" / "tasks.md"


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The directory of a model of each."""
    folder = tmp_path_factory.mktemp("families")
    return {family: write_family_for_tasks(folder / family, family) for family in MODELS}


def with_data(families: dict[str, Path], case: str, directory: Path, name: Path | str, **data: Any) -> Any:
    """The summary of a run on other data."""
    config = tiny_task(families, case, "float32", out=directory)
    data_config = dataclasses.replace(config.data, name=str(name), **data)
    return Simulation(dataclasses.replace(config, data=data_config)).run()


def test_the_task_of_the_docs_is_trained_on_a_table_of_ones_own(families, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ((name, code),) = re.findall(r"^```python\n# (\w+\.py)\n(.*?)^```$", DOCS.read_text(), re.M | re.S)
    assert len([line for line in code.splitlines() if line]) < 20
    Path(name).write_text(code)
    rows = [f'"{document.text}",{document.label}' for document in documents(DataConfig())]
    Path("letters.csv").write_text("\n".join(["text,class", *rows]))
    config = tiny_task(families, "bert", "float32", task="my_task.py:Careful", out=tmp_path / "run")
    config = dataclasses.replace(
        config, data=dataclasses.replace(config.data, name="letters.csv", label_column="class")
    )
    summary = Simulation(config).run()
    assert summary["metric"] == {"name": "macro_f1", "higher_is_better": True}
    assert summary["scores"]["tuned"] == summary["metrics"]["tuned"]["macro_f1"]
    world = prepare(config, tmp_path)
    batch = together([world.heldout[0].arrays], load(world.foundation))
    plain, _ = TextClassification.losses(world.task, load(world.foundation), batch)  # type: ignore[arg-type]  # it is one
    careful, _ = world.task.losses(load(world.foundation), batch)
    assert careful.tolist() == pytest.approx((plain * torch.where(batch["labels"] == 0, 5.0, 1.0)).tolist())


@pytest.mark.parametrize("kind", ["folder", "parquet"])
def test_images_are_read_from_folders_and_tables(kind, families, tmp_path):
    place = tmp_path / "images"
    data: dict[str, Any] = {}
    found = pictures(DataConfig())
    for i, picture in enumerate(found):
        file = place / picture.label / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.asarray(picture.image)).resize((16, 16)).save(file)
    if kind == "parquet":
        files = sorted(place.rglob("*.png"))
        contents = [{"bytes": file.read_bytes(), "path": file.name} for file in files]
        place = tmp_path / "images.parquet"
        data["label_column"] = "kind"
        pq.write_table(pa.table({"image": contents, "kind": [file.parent.name for file in files]}), place)
    summary = with_data(families, "vit", tmp_path / "run", place, **data)
    assert summary["metric"]["name"] == "accuracy" and summary["num_completed"] > 0
    config = tiny_task(families, "vit", "float32")
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, name=str(place), **data))
    corpus = prepare(config, tmp_path).data.corpus
    assert corpus.label_names == CLASSES and corpus.num_documents == len(found) and corpus.image_shape == (1, 8, 8)


@pytest.mark.parametrize("case", ["vit", "bert"])
def test_a_dataset_of_the_hub_with_classes_is_read_by_name(case, families, tmp_path, monkeypatch):
    names = datasets.ClassLabel(names=list(CLASSES))
    if case == "vit":
        rows = [{"image": Image.fromarray(np.asarray(p.image)), "kind": p.label} for p in pictures(DataConfig())]
        features = datasets.Features({"image": datasets.Image(), "kind": names})
    else:
        rows = [{"text": document.text, "kind": document.label} for document in documents(DataConfig())]
        features = datasets.Features({"text": datasets.Value("string"), "kind": names})
    dataset, asked = datasets.Dataset.from_list(rows, features), []
    monkeypatch.setattr(datasets, "load_dataset", lambda *names, **options: asked.append((names, options)) or dataset)
    summary = with_data(families, case, tmp_path / "run", "somebody/letters", label_column="kind")
    assert asked[0] == (("somebody/letters", None), {"split": "train"})
    assert summary["metric"]["name"] == "accuracy" and summary["num_completed"] > 0
    assert read_config(tmp_path / "run")["resolved"]["labels"] == list(CLASSES)


def test_digits_are_told_apart_by_the_embedded_model(families, tmp_path):
    config = tiny_task(families, "vit", "float32", out=tmp_path / "run", rounds=3)
    changes = {
        "foundation": dataclasses.replace(config.foundation, name="glyph-vit"),
        "data": DataConfig("digits", partition=dataclasses.replace(config.data.partition, documents_per_device=40)),
        "local": dataclasses.replace(config.local, max_steps=8, batch_size=8),
        "evaluation": dataclasses.replace(config.evaluation, num_sequences=120),
    }
    config = dataclasses.replace(config, **changes)
    summary = Simulation(config).run()
    assert summary["scores"]["tuned"] > summary["scores"]["zero_shot"] + 0.3
    more = Simulation(dataclasses.replace(config, out=None, resume=tmp_path / "run", rounds=4)).run()
    assert more["rounds"] == 4, "the model says how long an image is, and not the settings"


def test_what_classification_measures_is_what_scikit_learn_measures(families, tmp_path):
    world = prepare(tiny_task(families, "roberta"), tmp_path)
    model, score, actual, guessed = load(world.foundation), Score(), [], []
    for task in world.heldout:
        batch = together([task.arrays], model)
        score += world.task.score(model, batch)
        mask = torch.arange(batch["tokens"].shape[1]) < batch["lengths"][:, None]
        guessed += model(input_ids=batch["tokens"], attention_mask=mask.long()).logits.argmax(dim=1).tolist()
        actual += batch["labels"].tolist()
    found = world.task.metrics(score)
    expected = precision_recall_fscore_support(actual, guessed, average="macro", zero_division=0)
    assert [found[f"macro_{name}"] for name in ("precision", "recall", "f1")] == pytest.approx(expected[:3])
    assert found["accuracy"] == pytest.approx(np.mean(np.array(actual) == guessed))


def test_exact_match_is_that_of_greedy_decoding(families, tmp_path):
    world = prepare(tiny_task(families, "t5"), tmp_path)
    model: Any = load(world.foundation)
    tokenizer_end = world.data.corpus.eos_id
    for task in world.heldout:
        batch = together([task.arrays], model)
        lengths = batch["lengths"]
        for i in range(len(lengths)):
            written = model.generate(
                input_ids=batch["tokens"][i : i + 1, : lengths[i]], max_new_tokens=4, do_sample=False, num_beams=1
            )[0, 1:]
            row = {name: tensor[i : i + 1].clone() for name, tensor in batch.items()}
            row["labels"] = torch.full((1, 16), -100)
            row["labels"][0, : len(written)] = written
            assert world.task.metrics(world.task.score(model, row))["exact_match"] == 1
            row["labels"][0, 0] = (written[0] + 1) % tokenizer_end
            assert world.task.metrics(world.task.score(model, row))["exact_match"] == 0


def test_masks_hide_some_tokens_of_each_row_and_no_padding(families, tmp_path):
    world = prepare(tiny_task(families, "roberta masked"), tmp_path)
    corpus, task = world.data.corpus, MaskedLanguageModelling()
    tokens = np.arange(400).reshape(20, 20) % 200 + 10
    lengths = np.array([20] * 18 + [1, 0])
    made = task.prepared(corpus, {"tokens": tokens, "lengths": lengths}, np.random.default_rng(0))
    hidden = made["labels"] != -100
    assert (made["tokens"][hidden] == corpus.mask_id).all() and (made["tokens"][~hidden] == tokens[~hidden]).all()
    assert hidden[:19].any(axis=1).all() and not hidden[18, 1:].any() and not hidden[19].any()
    assert abs(hidden[:18].mean() - SHARE) < 0.05


@pytest.mark.parametrize("module", ["lora", "ia3", "bias", "head", "full", "houlsby", "prompt"])
@pytest.mark.parametrize("case", ["roberta", "vit"])
def test_the_tuned_model_scores_as_logged_or_is_refused_in_a_line(case, module, families, tmp_path):
    config = tiny_task(families, case, "float32", out=tmp_path / "run")
    simulation = Simulation(dataclasses.replace(config, peft=dataclasses.replace(config.peft, module=module)))
    summary = simulation.run()
    if module in ("houlsby", "prompt"):
        with pytest.raises(RunDirError, match="holds what is beside the model's weights"):
            simulation.model()
        return
    world, model = prepare(config, tmp_path), simulation.model()
    score = Score()
    for task in world.heldout:
        with torch.no_grad():
            score += world.task.score(model, together([task.arrays], model))
    assert score.perplexity == pytest.approx(summary["perplexity"]["tuned"], rel=1e-5)
    with pytest.raises(RunDirError, match="only language models go on with a text"):
        simulation.generate("Once")


@pytest.mark.parametrize(
    ("case", "changes", "error", "said"),
    [
        ("bert", {"task": "images"}, ModelError, "no model for square images"),
        ("vit", {"task": "classification"}, DataError, "gives Picture, not documents"),
        ("gpt2", {"task": "sequence-to-sequence"}, ModelError, "'gpt2' is no encoder with a decoder"),
        ("bert", {"task": "poetry"}, ConfigError, "task = 'poetry' is not allowed: one of language-modelling"),
        ("bert", {"data": DataConfig("texts.csv")}, ConfigError, "data.label_column = None is not allowed"),
        (
            "vit",
            {"data": DataConfig("nowhere.parquet", label_column="kind")},
            DataError,
            "neither a file nor a directory",
        ),
        ("gpt2", {"task": "masked-language-modelling"}, ModelError, "has no mask token"),
        ("bert", {"algorithm": "fed-pt"}, ConfigError, "task = 'classification' is not allowed: language-modelling"),
        (
            "bert",
            {"algorithm": "fed-peat"},
            DataError,
            "has no public part: name the server's text by data.public_name",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_go_together_is_refused_in_a_line(case, changes, error, said, families, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("texts.csv").write_text("text\n" + "\n".join(f"some words {i}" for i in range(9)))
    with pytest.raises(error, match=said) as caught:
        Simulation(tiny_task(families, case, "float32", out=tmp_path / "run", **changes)).run()
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_the_bytes_of_a_large_vit_are_those_of_the_paper_s_arithmetic():
    assert vit_b16_elements() == {
        "full": 85_875_556,
        "head": 76_900,
        "bias + head": 179_812,
        "adapter of 8 a block + head": 233_668,
        "VPT-deep of 10 + head": 169_060,
        "LoRA r=4 on q, v + head": 224_356,
    }


def test_every_case_has_a_model():
    assert {family for family, _ in CASES.values()} == set(MODELS)
