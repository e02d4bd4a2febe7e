"""A policy that was trained in the environment decides: no Ray, no RLlib, milliseconds for thousands of candidates."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from fedpeat_ray.config import SHARES, ControlConfig, SimulationConfig
from fedpeat_ray.control.observation import observe, plan_of
from fedpeat_ray.control.plan import Controller, Memory, Plan, Prospects
from fedpeat_ray.control.policy import Policy
from fedpeat_ray.errors import ConfigError, DataError

SHIPPED = Path(__file__).parent / "shipped"
"""For the ladder of pydoc-base, of fleets of the default tiers with 0.045 of their memory and 200 candidates."""


@dataclass(frozen=True)
class Learned(Controller):
    """The likeliest choice of a policy for every candidate: who takes part, on which level, who downloads afresh."""

    policy: Policy
    wants_history = True

    @classmethod
    def build(cls, config: ControlConfig, seed: int) -> Self:
        """See Controller. Raises ConfigError if there is no policy to read."""
        try:
            return cls(Policy.load(config.policy or SHIPPED))
        except DataError as error:
            allowed = f"a directory that train_controller.py wrote; {error}"
            raise ConfigError.of("control.policy", str(config.policy or SHIPPED), allowed) from error

    @classmethod
    def check(cls, config: SimulationConfig) -> None:
        """See Controller: the ladder must be the one that the policy was trained for."""
        about, emulator = cls.build(config.control, config.seed).policy.about, config.emulator
        shares = SHARES if emulator.shares == "auto" else tuple(emulator.shares)
        if emulator.shares == "auto" and {*about.shares} < {*SHARES}:  # those of a shallow model, perhaps of this one
            return
        if (about.shares, about.give_foundation) != (shares, emulator.give_foundation):
            foundation = " and the foundation" if about.give_foundation else ""
            allowed = (
                f"a policy for the levels of this run; this one was trained for shares {about.shares}{foundation}, "
            )
            allowed += f"emulator.shares is {shares}"
            raise ConfigError.of("control.policy", str(config.control.policy or SHIPPED), allowed)

    def digests(self) -> dict[str, str | None]:
        """See Controller: what comes with the package may be another policy tomorrow."""
        return {"policy_sha256": self.policy.sha256}

    def act(self, round: int, device_ids: np.ndarray, prospects: Prospects, memory: Memory) -> Plan:
        """See Controller."""
        return plan_of(self.policy.choose(observe(round, prospects)), prospects)
