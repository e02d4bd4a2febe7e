"""Who is shown what a run writes down, a round at a time: beside the run log, which no run goes on without."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from fedpeat_ray import own
from fedpeat_ray.config import SimulationConfig, WatchConfig
from fedpeat_ray.errors import ConfigError
from fedpeat_ray.runtime.run_log import read_config


class Watcher(Protocol):
    """Shows a run somewhere."""

    def round(self, row: Mapping[str, Any], clients: Mapping[str, Any]) -> None:
        """A round is over: its row of the rounds table, and columns of its clients."""
        ...

    def summary(self, summary: Mapping[str, Any]) -> None:
        """The run is: its summary.json."""
        ...

    def close(self) -> None:
        """Nothing more comes, whether the run is finished or not."""
        ...


class Watchers:
    """Watchers by name, as one of them; use as a context manager.

    One that raises is told of once and left out from then on: no run ends because it cannot be watched.
    """

    def __init__(self, begin: Mapping[str, Callable[[], Watcher]], failed: Callable[[str, Exception], None]):
        """`begin` makes each watcher; `failed` is told the name of one that raised, and what."""
        self._failed = failed
        self._watchers: dict[str, Watcher] = {}
        for name, make in begin.items():
            with self._trying(name):
                self._watchers[name] = make()

    def __enter__(self) -> Watchers:
        return self

    def __exit__(self, *_: object) -> None:
        self._each(lambda watcher: watcher.close())

    def round(self, row: Mapping[str, Any], clients: Mapping[str, Any]) -> None:
        """Show a round."""
        self._each(lambda watcher: watcher.round(row, clients))

    def summary(self, summary: Mapping[str, Any]) -> None:
        """Show what came out."""
        self._each(lambda watcher: watcher.summary(summary))

    def _each(self, show: Callable[[Watcher], None]) -> None:
        for name, watcher in [*self._watchers.items()]:
            with self._trying(name):
                show(watcher)

    @contextlib.contextmanager
    def _trying(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._watchers.pop(name, None)
            self._failed(name, error)


def check_watchers(config: WatchConfig) -> None:
    """Raise ConfigError for a watcher that is asked for and not installed."""
    if config.wandb is None:
        return
    found = importlib.util.find_spec("wandb")
    if found is None or found.origin is None:  # no file: a folder of that name, as W&B leaves them behind
        raise ConfigError.of("watch.wandb", config.wandb, "unset where wandb is not installed (pip install wandb)")


def watchers_of(
    config: SimulationConfig, directory: Path, first_round: int, failed: Callable[[str, Exception], None]
) -> Watchers:
    """Those that the settings ask for, for a run that goes on with this round in its directory."""
    stored = read_config(directory)

    def ray_metrics() -> Watcher:
        from fedpeat_ray.runtime.watchers.ray_metrics import RayMetrics  # Ray is loaded only where it is used

        return RayMetrics(directory.name, own.short(config.algorithm))

    def tensorboard() -> Watcher:
        from fedpeat_ray.runtime.watchers.tensorboard import TensorBoard

        return TensorBoard(directory, stored["config"], first_round)

    def wandb() -> Watcher:
        from fedpeat_ray.runtime.watchers.weights_and_biases import WeightsAndBiases

        assert config.watch.wandb is not None
        return WeightsAndBiases(config.watch.wandb, directory, stored["config"], stored["created"])

    asked_for = {
        "Ray metrics": ray_metrics if config.hosts.backend == "ray" else None,
        "TensorBoard": tensorboard if config.watch.tensorboard else None,
        "W&B": wandb if config.watch.wandb is not None else None,
    }
    return Watchers({name: make for name, make in asked_for.items() if make}, failed)
