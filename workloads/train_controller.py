"""Train a controller for FedPEAT in a simulated fleet: who takes part in a round, on which emulator.

    python workloads/train_controller.py                  1,000 candidates, minutes on two cores
    ray job submit -- python workloads/train_controller.py
    python workloads/train_controller.py --resume DIR     go on with an interrupted training

Then, in any run of FedPEAT: --control.kind learned --control.policy DIR/policy --control.candidates 1000
"""

from __future__ import annotations

import sys

import tyro

from fedpeat_ray.control_training import TrainConfig, begun, settings_for, stored, train
from fedpeat_ray.errors import FedPeatError
from fedpeat_ray.runtime.host_pool import some_ray
from fedpeat_ray.settings import directory_to_resume


def main(arguments: list[str]) -> int:
    """Train what the command line describes; returns the exit status."""
    try:
        return run(tyro.cli(TrainConfig, args=arguments, description=__doc__, default=defaults(arguments)))
    except FedPeatError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def run(config: TrainConfig) -> int:
    """Train; returns the exit status."""
    directory = begun(config)
    try:
        print(f"{config.candidates:,} candidates, {config.iterations} iterations: {directory}", flush=True)
        settings = settings_for(config)
        with some_ray(1 + config.ppo.num_env_runners):
            train(config, settings, directory)
    except KeyboardInterrupt:
        print(f"\nstopped; go on from the last checkpoint with --resume {directory}", file=sys.stderr)
        return 130
    print(directory)
    return 0


def defaults(arguments: list[str]) -> TrainConfig:
    """The defaults of this workload; those of the training itself if one is resumed."""
    directory = directory_to_resume(arguments)
    return stored(directory) if directory else TrainConfig()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
