"""What every controller promises, asked of ours and of the example in docs/own.md."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import own_examples
import pytest

from fedpeat_ray.config import ControlConfig
from fedpeat_ray.control.find import OURS, find_controller
from fedpeat_ray.control.plan import SKIP, Controller, Decision, Memory, Outcome, Plan, Prospects

N, L = 12, 3
IDS = np.arange(10, 10 + N)


@pytest.fixture(params=[*OURS, "example"])
def controller(request: pytest.FixtureRequest, tmp_path: Path) -> Controller:
    name = own_examples.write(tmp_path)["controller"] if request.param == "example" else request.param
    return find_controller(name).build(ControlConfig(name, level=2), seed=5)


def prospects(deadline_s: float | None = None) -> Prospects:
    rng = np.random.default_rng(0)
    total_s_NL = np.sort(rng.uniform(1, 9, (N, L)), axis=1)
    return Prospects(np.array([5, 9, 12]), rng.integers(3, 20, N), total_s_NL, np.zeros(N, int), deadline_s)


def outcome(levels_N: np.ndarray, perplexity: float | None) -> Outcome:
    took_part = levels_N != SKIP
    costs = np.where(took_part, 3.0, 0.0)
    return Outcome(took_part, costs, costs.astype(int), costs.astype(int), costs, 4.0, perplexity)


def levels_of(answer: Plan | np.ndarray) -> np.ndarray:
    return answer.levels_N if isinstance(answer, Plan) else answer


def lived_through(controller: Controller, num_rounds: int) -> tuple[list[np.ndarray], Memory]:
    """Its answers and what it remembers in the end."""
    memory, answers = controller.init(), []
    for round in range(1, num_rounds + 1):
        seen = prospects(deadline_s=6.0 if round % 2 else None)
        answers.append(levels_of(controller.act(round, IDS, seen, memory)))
        came = outcome(answers[-1], 30.0 - round if round % 3 == 0 else None)
        memory = controller.learn(Decision(round, IDS, seen, answers[-1]), came, memory)
    return answers, memory


def test_every_device_gets_a_level_that_there_is_or_is_left_out(controller):
    given = {*controller.may_give(range(1, L + 1))}
    assert given <= {1, 2, 3}
    for levels_N in lived_through(controller, 7)[0]:
        assert levels_N.shape == (N,) and np.issubdtype(levels_N.dtype, np.integer)
        assert set(levels_N.tolist()) <= given | {SKIP}


def test_it_decides_and_learns_alike_every_time(controller):
    (one, kept), (other, again) = (lived_through(controller, 7) for _ in range(2))
    assert all((a == b).all() for a, b in zip(one, other, strict=True))
    assert kept.keys() == again.keys() and all(np.array_equal(kept[name], again[name]) for name in kept)


def test_it_remembers_arrays_and_changes_none_that_it_was_handed(controller):
    _, memory = lived_through(controller, 3)
    before = {name: np.array(value) for name, value in memory.items()}
    seen = prospects()
    levels_N = levels_of(controller.act(4, IDS, seen, memory))
    controller.learn(Decision(4, IDS, seen, levels_N), outcome(levels_N, 20.0), memory)
    for name, value in memory.items():
        assert isinstance(value, np.ndarray) and value.dtype.kind in "iuf?", name
        assert np.array_equal(value, before[name]), name


def test_all_that_it_knows_is_in_what_it_remembers(controller):
    answers, _ = lived_through(controller, 7)
    _, memory = lived_through(controller, 6)
    fresh = type(controller).build(ControlConfig(level=2), seed=5)
    assert (levels_of(fresh.act(7, IDS, prospects(deadline_s=6.0), memory)) == answers[6]).all()
