"""What a run that is resumed may change, and what it must not."""

from __future__ import annotations

import dataclasses

from fedpeat_ray.config import SimulationConfig
from fedpeat_ray.errors import ConfigError, RunDirError
from fedpeat_ray.runtime.checkpoint import load_checkpoint
from fedpeat_ray.runtime.run_log import changed_versions, read_config, read_settings
from fedpeat_ray.settings import differences

_MAY_CHANGE = ("out", "resume", "accept_changes", "trace", "rounds", "checkpoint_every", "hosts", "watch")
_MUST_STAY = ("hosts.num_threads", "hosts.exclusive")  # the last bits depend on them
_MODEL_SAYS = tuple(f"{name}.sequence_length" for name in ("local", "evaluation", "emulator.distil"))
"""Where all examples are of one length."""


def with_resumed(config: SimulationConfig) -> SimulationConfig:
    """The configuration of the run to go on with; only what cannot change its results may differ.

    Raises ConfigError for the first setting that differs, RunDirError if the directory holds no run or if other
    versions compute now, which `accept_changes` allows.
    """
    assert config.resume is not None
    before, stored = read_config(config.resume), read_settings(config.resume)
    versions = {} if config.accept_changes else changed_versions(before)
    for package, (began, now) in versions.items():
        raise RunDirError(
            f"{config.resume} cannot be resumed: {package} was {began} when the run began, now it is {now}, and the "
            "bits may differ; accept_changes goes on nevertheless"
        )
    said = _MODEL_SAYS if (before.get("resolved") or {}).get("fixed_length") else ()
    for path, was, now in differences(stored, config):
        may_change = (path.split(".")[0] in _MAY_CHANGE and path not in _MUST_STAY) or path in said
        if not may_change and now != "auto":
            raise ConfigError.of(path, now, f"{was!r}, as in the run that is resumed, {config.resume}")
    kept = {name: getattr(config, name) for name in _MAY_CHANGE}
    merged = dataclasses.replace(stored, **kept)
    checkpoint = load_checkpoint(config.resume)
    least = max(stored.rounds, checkpoint[1].round if checkpoint else 0)
    if config.rounds < least:
        raise ConfigError.of("rounds", config.rounds, f"at least {least}, as many as {config.resume} has")
    return merged
