"""What tests share: tiny models and a page of text, written to disk, and caches of their own."""

from __future__ import annotations

import gc
import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sweeps import sweep

# Read when the libraries are imported. Tests run beside one another: threads that wait for one another are no help.
os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
gc.disable()  # until all is loaded: nothing of it is garbage

ON_ONE_RAY = "tests/ray/test_"
LONGEST_FIRST = (ON_ONE_RAY, "tests/ray/own_processes/", "tests/parity/")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes longest comes first: where there are several workers, others have time for the rest meanwhile."""
    items.sort(key=lambda item: [not item.nodeid.startswith(folder) for folder in LONGEST_FIRST])


def pytest_collection_finish() -> None:
    """From here on there is garbage."""
    gc.enable()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `--dist loadfile`, which gives workers whole files: all that share a Ray are one, so there is one."""
    from xdist.scheduler import LoadScopeScheduling

    if config.getvalue("dist") != "loadfile":
        return None

    class WholeFiles(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return ON_ONE_RAY if nodeid.startswith(ON_ONE_RAY) else nodeid.split("::")[0]

    config.option.loadscopereorder = False
    return WholeFiles(config, log)


@pytest.fixture(scope="session", autouse=True)
def _caches_of_their_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing that an earlier session cached is read, and nothing is left behind."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def _nothing_survives_a_loss_of_power() -> Iterator[None]:
    """A run of a second would wait for the disk for a tenth of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture
def small_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports have small figures, not laid out either: half of the work."""
    from matplotlib.figure import Figure

    from analysis import figures

    monkeypatch.setitem(figures.STYLE, "savefig.dpi", 20)
    monkeypatch.setattr(Figure, "get_layout_engine", lambda figure: None)


def _model(tmp_path_factory: pytest.TempPathFactory, name: str, family: str, **changes: Any) -> Path:
    from tiny_models import write_family  # not at the top: who only hands out tests needs no torch

    return write_family(tmp_path_factory.mktemp(name), family, **changes)


@pytest.fixture(scope="session")
def gpt2_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GPT-2: Conv1D layers with biases, learned positions, a tied head, dropout in its configuration."""
    return _model(tmp_path_factory, "gpt2", "GPT2")


@pytest.fixture(scope="session")
def llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LLaMA: linear layers without biases, grouped queries, rotary positions, a head of its own."""
    return _model(tmp_path_factory, "llama", "Llama")


@pytest.fixture(params=sweep(["gpt2", "llama"], quick=["gpt2"]))
def model_dir(request: pytest.FixtureRequest) -> Path:
    """Each of the two."""
    return request.getfixturevalue(f"{request.param}_dir")


@pytest.fixture(scope="session")
def deep_gpt2_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven blocks: one at each end to tune, and five between to leave out."""
    return _model(tmp_path_factory, "deep_gpt2", "GPT2", n_layer=7)


@pytest.fixture(scope="session")
def deep_llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same of LLaMA, its head tied."""
    return _model(tmp_path_factory, "deep_llama", "Llama", num_hidden_layers=7, tie_word_embeddings=True)


@pytest.fixture(params=sweep(["gpt2", "llama"], quick=["gpt2"]))
def deep_dir(request: pytest.FixtureRequest) -> Path:
    """Each of these two."""
    return request.getfixturevalue(f"deep_{request.param}_dir")


@pytest.fixture(scope="session")
def text_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three files of JSON lines, 20 short documents each, every file with words of its own; `public_dir` is beside."""
    directory = tmp_path_factory.mktemp("texts")
    _write_text(
        directory / "private",
        harbour="ship rope tide anchor gull mast sail wind",
        kitchen="pan salt bread oven knife butter onion broth",
        workshop="saw plane nail bench glue clamp chisel oak",
    )
    _write_text(
        directory / "public",
        garden="seed soil rake leaf hedge spade rain moss",
        library="page shelf ink index spine map atlas folio",
        station="rail clock bell track signal porter ticket engine",
    )
    return directory / "private"


@pytest.fixture(scope="session")
def public_dir(text_dir: Path) -> Path:
    """The same for a server: other words."""
    return text_dir.with_name("public")


@pytest.fixture(scope="session")
def tiny_arguments(gpt2_dir: Path, text_dir: Path) -> Callable[..., list[str]]:
    """The command line of a tiny run, with more arguments at its end."""
    import tiny_runs

    return lambda *more: tiny_runs.arguments(gpt2_dir, text_dir, *more)


@pytest.fixture(scope="session")
def uninterrupted(tiny_arguments: Callable[..., list[str]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of a tiny run on the serial side, with nothing in its way."""
    import tiny_runs

    from fedpeat_ray import Simulation

    directory = tmp_path_factory.mktemp("uninterrupted") / "run"
    Simulation(tiny_runs.parse(tiny_arguments("--out", directory))).run()
    return directory


def _write_text(directory: Path, **vocabularies: str) -> None:
    directory.mkdir()
    rng = random.Random(0)
    for source, words in vocabularies.items():
        texts = [f"{source} {i}: " + " ".join(rng.choices(words.split(), k=rng.randint(4, 16))) for i in range(20)]
        (directory / f"{source}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
