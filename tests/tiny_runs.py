"""The command line of a run small enough for a test: four rounds of six devices."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import tyro
from whole_runs import table

from fedpeat_ray import SimulationConfig
from workloads.large_scale import main

REPOSITORY = Path(__file__).parents[1]
CLIENT_BATCH_SIZE = 2


def arguments(model: Path, text: Path, *more: object) -> list[str]:
    """The command line of a tiny run on the serial side of the seam; `more` goes last and so wins."""
    values: dict[str, Any] = {
        "--algorithm": "fed-peft",
        "--foundation.name": model,
        "--data.name": text,
        "--data.partition.documents-per-device": 4,
        "--fleet.num-devices": 50,
        "--rounds": 4,
        "--cohort-size": 6,
        "--client-batch-size": CLIENT_BATCH_SIZE,
        "--checkpoint-every": 2,
        "--local.sequence-length": 32,
        "--local.max-steps": 3,
        "--lora.rank": 2,
        "--evaluation.num-sequences": 8,
        "--evaluation.sequence-length": 32,
        "--hosts.backend": "serial",
    }
    flat = [str(part) for item in values.items() for part in item]
    return [*flat, "--evaluation.no-centralised", *map(str, more)]


def parse(command_line: list[str]) -> SimulationConfig:
    """The configuration of a command line."""
    return tyro.cli(SimulationConfig, args=command_line)


def main_at(folder: Path, environment: dict[str, str], arguments: list[str]) -> int:
    """The status of large_scale.py in a process of its own."""
    os.chdir(folder)
    os.environ.update(environment)
    return main(arguments)


def batches(directory: Path, round: int) -> list[list[int]]:
    """The device ids of each client batch of a round, in the order in which they are handed out."""
    clients = table(directory, "clients")
    trained = clients.query(f"round == {round} and outcome == 'completed'")
    ids = trained.sort_values("num_steps", ascending=False, kind="stable")["device_id"].tolist()
    return [ids[start : start + CLIENT_BATCH_SIZE] for start in range(0, len(ids), CLIENT_BATCH_SIZE)]
