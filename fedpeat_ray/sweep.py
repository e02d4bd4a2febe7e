"""Many simulations, one after another: hosts go from one to the next, and what is finished is not repeated."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from fedpeat_ray.config import HostsConfig, SimulationConfig
from fedpeat_ray.errors import FedPeatError


class Sweep:
    """Runs simulations, each in a directory of its own below `out`; use as a context manager.

    with Sweep(Path("runs/ranks"), HostsConfig()) as sweep:
        for rank in (2, 8, 32):
            summary, directory = sweep.run(f"rank {rank}", dataclasses.replace(config, lora=LoraConfig(rank)))
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

            self.pool = self._stack.enter_context(HostPool(self._hosts))
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
        directory = self.out / name
        config = dataclasses.replace(config, hosts=self._hosts, out=None, resume=None)
        if (directory / "config.json").exists():
            config = dataclasses.replace(config, resume=directory)
            if summary := _finished(config):
                return summary, directory
        else:
            config = dataclasses.replace(config, out=directory)
        print(f"run {name}")
        from fedpeat_ray import Simulation  # with PyTorch: not before settings are read

        return Simulation(config).run(self.pool), directory


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
