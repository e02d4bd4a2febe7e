"""What every task promises the engine, asked of ours and of the example in docs/tasks.md."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from ray import cloudpickle
from task_models import CASES, tiny_task, write_family_for_tasks

from fedpeat_ray.data.batches import IGNORED
from fedpeat_ray.models.foundation import load
from fedpeat_ray.records import Arrays
from fedpeat_ray.tasks.find import OURS, find_task
from fedpeat_ray.tasks.score import Score
from fedpeat_ray.tasks.task import tensors_of
from fedpeat_ray.world import World, prepare

DOCS = Path(__file__).parents[2] / "docs" / "tasks.md"
EXAMPLE, LENGTH = "example", 20
CASE = {"language-modelling": "gpt2", "masked-language-modelling": "roberta masked", "classification": "bert"}
CASE |= {"sequence-to-sequence": "t5", "images": "vit", EXAMPLE: "bert"}


@pytest.fixture(scope="module", params=[*OURS, EXAMPLE])
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    """A tiny run of each task, in float64."""
    folder, case = tmp_path_factory.mktemp("task"), CASE[request.param]
    family, _ = CASES[case]
    config = tiny_task({family: write_family_for_tasks(folder / family, family)}, case)
    if request.param == EXAMPLE:
        ((_, code),) = re.findall(r"^```python\n# (\w+\.py)\n(.*?)^```$", DOCS.read_text(), re.M | re.S)
        (folder / "of_the_docs.py").write_text(code)
        config = dataclasses.replace(config, task=f"{folder / 'of_the_docs.py'}:Careful")
    return prepare(config, folder / "run")


@pytest.fixture(scope="module")
def arrays(world: World) -> Arrays:
    """Four held-out examples."""
    return {name: array[:4] for name, array in world.data.heldout(world.config.evaluation).items()}


def test_the_class_answers_before_anything_is_loaded(world):
    task = find_task(world.config.task)
    assert task.auto.startswith("AutoModel") and task.metric and task.about and isinstance(task.higher_is_better, bool)


def test_examples_are_as_many_and_as_long_as_they_are_foreseen(world):
    task, corpus = world.task, world.data.corpus
    length = world.config.local.sequence_length
    documents = np.flatnonzero(~corpus.heldout)[:9]
    rows = task.rows(corpus, documents, length)
    assert {len(array) for array in rows.values()} == {len(rows["lengths"])}
    assert rows["lengths"].tolist() == task.lengths(corpus, documents, length).tolist()
    assert rows["lengths"].min() > 0 and rows["lengths"].max() <= length
    first = task.first_rows(corpus, documents, 3, length)
    assert all(np.array_equal(first[name], array[:3]) for name, array in rows.items())
    enough = task.enough(corpus, documents, 3, length)
    assert np.array_equal(enough, documents[: len(enough)]) and len(task.rows(corpus, enough, length)["lengths"]) >= 3


def test_what_is_drawn_anew_is_drawn_from_the_generator_alone(world):
    task, corpus = world.task, world.data.corpus
    rows = task.rows(corpus, np.flatnonzero(~corpus.heldout)[:4], world.config.local.sequence_length)
    kept = {name: array.copy() for name, array in rows.items()}
    one, other = (task.prepared(corpus, rows, np.random.default_rng(3)) for _ in range(2))
    assert one.keys() == other.keys() >= rows.keys()
    assert all(np.array_equal(one[name], other[name]) for name in one)
    assert all(np.array_equal(rows[name], array) for name, array in kept.items()), "what is handed in stays"


def test_rows_that_fill_up_a_batch_count_for_nothing(world, arrays):
    task, model = world.task, load(world.foundation)
    filled = {}
    for name, array in arrays.items():
        rest = np.full((2, *array.shape[1:]), IGNORED if name == "labels" else 0, array.dtype)
        filled[name] = np.concatenate([array, rest])
    (losses, counts), (of_all, count_all) = (
        task.losses(model, tensors_of(batch, "cpu", torch.float64)) for batch in (arrays, filled)
    )
    torch.testing.assert_close(of_all[:4], losses, rtol=1e-9, atol=1e-12)
    assert count_all.tolist() == [*counts.tolist(), 0, 0] and of_all[4:].tolist() == [0, 0]
    one, other = (task.score(model, tensors_of(batch, "cpu", torch.float64)) for batch in (arrays, filled))
    assert (one.num_correct, one.num_tokens) == (other.num_correct, other.num_tokens) and one.num_tokens > 0
    assert task.metrics(one) == pytest.approx(task.metrics(other))


def test_scores_of_parts_add_up_to_that_of_the_whole(world, arrays):
    task, model, parts = world.task, load(world.foundation), Score()
    for rows in (slice(0, 1), slice(1, 4)):
        part = {name: array[rows] for name, array in arrays.items()}
        parts += task.score(model, tensors_of(part, "cpu", torch.float64))
    whole = task.score(model, tensors_of(arrays, "cpu", torch.float64))
    assert parts.loss == pytest.approx(whole.loss) and parts.num_tokens == whole.num_tokens
    metrics = task.metrics(parts)
    assert metrics == pytest.approx(task.metrics(whole)) and task.metric in metrics
    assert all(np.isfinite(value) for value in metrics.values())
    losses, counts = task.losses(model, tensors_of(arrays, "cpu", torch.float64))
    assert counts.sum().item() == whole.num_tokens
    if type(task).__module__.startswith("fedpeat_ray"):  # the example weighs its losses, and is judged as they are
        assert losses.sum().item() == pytest.approx(whole.loss)


def test_the_model_can_be_called_with_its_inputs_and_has_the_head_it_asks_for(world, arrays):
    task, model = world.task, load(world.foundation)
    logits = model(**task.inputs(model, tensors_of(arrays, "cpu", torch.float64))).logits
    head = task.head(world.data.corpus)
    assert head.auto == task.auto and len(logits) == len(arrays["lengths"])
    assert not head.labels or logits.shape[-1] == len(head.labels) == len(world.data.corpus.label_names)


def test_hosts_can_receive_it(world):
    sent: bytes = cloudpickle.dumps(world.task)
    received = cloudpickle.loads(sent)
    assert dataclasses.asdict(received) == dataclasses.asdict(world.task) and received.metric == world.task.metric
