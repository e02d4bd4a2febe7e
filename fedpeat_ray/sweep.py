"""Many simulations, one after another on the same hosts or side by side; what is finished is not repeated."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from fedpeat_ray.config import HostsConfig, SimulationConfig
from fedpeat_ray.errors import FedPeatError
from fedpeat_ray.runtime.metric import metric_of, scores_of


class Sweep:
    """Runs simulations, each in a directory of its own below `out`; use as a context manager.

    with Sweep(Path("runs/ranks"), HostsConfig()) as sweep:
        found = sweep.run_all({f"rank {rank}": replace(config, lora=LoraConfig(rank)) for rank in (2, 8, 32)})
        for name, (summary, directory) in found.items(): ...
    """

    def __init__(self, out: Path, hosts: HostsConfig):
        self.out, self._hosts = out, hosts
        self.pool: Any = None
        """The HostPool that hosts come from; None on the serial side."""

    def __enter__(self) -> Self:
        self.out.mkdir(parents=True, exist_ok=True)
        self._stack = contextlib.ExitStack()
        if self._hosts.backend == "ray":
            from fedpeat_ray.runtime.host_pool import HostPool  # Ray is loaded only where it is used

            self.pool = self._stack.enter_context(HostPool(self._hosts, lambda: f"what was finished is in {self.out}"))
            print(self.pool.about, flush=True)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def run(self, name: str, config: SimulationConfig) -> tuple[dict[str, Any], Path]:
        """The summary and the directory of a run. One that is finished is not repeated, one that was interrupted or
        has fewer rounds goes on. Raises what Simulation raises, and ConfigError for a setting that differs from that
        of the run which is there.

        The hosts are the sweep's: `config.hosts` is not looked at, nor `config.out` and `config.resume`.
        """
        config, summary = self._begun(name, config)
        if summary is None:
            print(f"run {name}")
            from fedpeat_ray import Simulation  # with PyTorch: not before settings are read

            summary = Simulation(config).run(self.pool)
        return summary, self.out / name

    def run_all(self, configs: Mapping[str, SimulationConfig]) -> dict[str, tuple[dict[str, Any], Path]]:
        """The same for many by name, as many side by side as there is room for, which changes nothing but the time it
        takes. When some fail, the others are run nevertheless; then raises FedPeatError with a line of each.

        Each has its share of the hosts, and a process of its own on this node, which writes its run directory.
        """
        from fedpeat_ray import Simulation

        begun = {name: self._begun(name, config) for name, config in configs.items()}
        left = {name: config for name, (config, summary) in begun.items() if summary is None}
        for config in left.values():
            Simulation(config)  # what cannot be used is refused before anything is run
        summaries = {name: summary for name, (_, summary) in begun.items() if summary is not None}
        failed, started_s = [], time.monotonic()
        for name, result in self._results(left):
            if isinstance(result, str):
                failed.append(f"{name}: {result}")
            else:
                summaries[name] = result
            done = f"{len(summaries) + len(failed)}/{len(configs)}"
            came_to = result if isinstance(result, str) else _came_to(result)
            print(f"{done} {name}: {came_to}; {time.monotonic() - started_s:.0f} s", flush=True)
        if failed:
            raise FedPeatError(f"{len(failed)} of {len(configs)} runs failed: {'; '.join(failed)}")
        return {name: (summaries[name], self.out / name) for name in configs}

    def _begun(self, name: str, config: SimulationConfig) -> tuple[SimulationConfig, dict[str, Any] | None]:
        """What a run begins or goes on with, and its summary if it is finished."""
        directory = self.out / name
        config = dataclasses.replace(config, hosts=self._hosts, out=None, resume=None)
        if not (directory / "config.json").exists():
            return dataclasses.replace(config, out=directory), None
        config = dataclasses.replace(config, resume=directory)
        return config, _finished(config)

    def _results(self, left: Mapping[str, SimulationConfig]) -> Iterator[tuple[str, dict[str, Any] | str]]:
        """What comes of runs, as they end: a summary, or why there is none."""
        if self.pool is None or len(left) < 2:
            yield from ((name, _result(config, self.pool)) for name, config in left.items())
            return
        from fedpeat_ray.runtime.side_by_side import side_by_side

        yield from side_by_side(self.pool, self._hosts, _beside_others, left)


def _result(config: SimulationConfig, pool: Any = None) -> dict[str, Any] | str:
    """The summary of a run, or why there is none."""
    from fedpeat_ray import Simulation

    try:
        return Simulation(config).run(pool)
    except FedPeatError as error:
        return str(error)


def _came_to(summary: Mapping[str, Any]) -> str:
    """In the task's metric: accuracy 72.7%."""
    metric = metric_of(summary)
    return f"{metric.words} {metric.written(scores_of(summary)['tuned'])}"


def _beside_others(config: SimulationConfig, hosts: HostsConfig, folder: Path) -> dict[str, Any] | str:
    """The same in a process of its own, with these hosts."""
    os.environ["OMP_NUM_THREADS"] = str(hosts.num_threads)  # read when PyTorch is loaded
    os.chdir(folder)
    return _result(dataclasses.replace(config, hosts=hosts))


def _finished(config: SimulationConfig) -> dict[str, Any] | None:
    """The summary of a run to go on with, if nothing is left to do, whatever versions it was done with."""
    assert config.resume is not None
    path = config.resume / "summary.json"
    summary = json.loads(path.read_text()) if path.exists() else None
    if summary is None or summary["rounds"] < config.rounds or summary.get("failure"):
        return None
    from fedpeat_ray.runtime.resume import with_resumed  # with PyTorch

    with_resumed(dataclasses.replace(config, accept_changes=True))
    return summary


def report(sweep: Sweep, file: str, study: Callable[[Sweep], str]) -> int:
    """Write and show what a study finds; returns the exit status of a script that does nothing else."""
    try:
        with sweep:
            text = study(sweep)
    except FedPeatError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\ninterrupted: what was finished is in {sweep.out}", file=sys.stderr)
        return 130
    (sweep.out / file).write_text(text)
    print(text)
    print(sweep.out)
    return 0
