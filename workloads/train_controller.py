"""Train a controller for FedPEAT in a simulated fleet: who takes part in a round, on which emulator.

    python workloads/train_controller.py                  1,000 candidates, minutes on two cores
    ray job submit -- python workloads/train_controller.py
    python workloads/train_controller.py --resume DIR     go on with an interrupted training

Then, in any run of FedPEAT: --control.kind learned --control.policy DIR/policy --control.candidates 1000
"""

from __future__ import annotations

import sys

import tyro

from fedpeat_ray.control_training import TrainConfig, begun, settings_for, train
from fedpeat_ray.errors import FedPeatError
from fedpeat_ray.runtime.host_pool import some_ray


def main(config: TrainConfig) -> int:
    """Train; returns the exit status."""
    try:
        directory, config = begun(config)
    except FedPeatError as error:
        return failed(error)
    try:
        print(f"{config.candidates:,} candidates, {config.iterations} iterations: {directory}", flush=True)
        settings = settings_for(config)
        with some_ray(1 + config.ppo.num_env_runners):
            train(config, settings, directory)
    except FedPeatError as error:
        return failed(error)
    except KeyboardInterrupt:
        print(f"\nstopped; go on from the last checkpoint with --resume {directory}", file=sys.stderr)
        return 130
    print(directory)
    return 0


def failed(error: FedPeatError) -> int:
    """One line; returns the exit status."""
    print(f"error: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(tyro.cli(TrainConfig, description=__doc__)))
