"""What a run needs to go on: the server's tensors, the clock, and the totals so far.

A checkpoint is a directory that appears whole (`written_whole_dir`). Everything else a round depends on
is a function of the configuration, the round and the virtual clock.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from safetensors.torch import load_file, save_file

from fedpeat_ray.aggregation.server_optimizer import ServerState
from fedpeat_ray.errors import RunDirError
from fedpeat_ray.files import written_whole_dir

_STATE, _FACTS = "state.safetensors", "facts.json"


@dataclass(frozen=True)
class Facts:
    """The small part of a checkpoint."""

    round: int
    """The last round that is in the state."""
    virtual_s: float
    num_tokens: int
    """Trained by completed devices so far."""
    wall_s: float = 0.0
    """Measured: the run so far, loading included, in all its parts; 0 in checkpoints that do not say."""

    def at(self, wall_s: float) -> Facts:
        """The same, with what was measured."""
        return replace(self, wall_s=wall_s)


def save_checkpoint(run_dir: Path, state: ServerState, facts: Facts) -> Path:
    """Write `checkpoints/<round>`; older ones stay until it is there, then go."""
    final = run_dir / "checkpoints" / f"{facts.round:05d}"
    tensors = {"model": state.model_P}
    tensors |= {f"moment.{name}": tensor for name, tensor in state.moments.items()}
    tensors |= {f"memory.{name}": tensor for name, tensor in state.memory.items()}
    with written_whole_dir(final) as part:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, part / _STATE)
        (part / _FACTS).write_text(json.dumps(asdict(facts)))
    for older in _checkpoints(run_dir)[:-1]:
        shutil.rmtree(older)
    return final


def load_checkpoint(run_dir: Path) -> tuple[ServerState, Facts] | None:
    """The last checkpoint of a run, or None if it has none yet. Raises RunDirError if it cannot be read."""
    found = _checkpoints(run_dir)
    if not found:
        return None
    try:
        tensors = load_file(found[-1] / _STATE)
        values = json.loads((found[-1] / _FACTS).read_text())
        values.pop("zero_shot", None)  # once known from the start
        facts = Facts(**values)
    except (OSError, ValueError, TypeError) as error:
        raise RunDirError(f"{found[-1]} is no checkpoint of this version: {error}") from error
    moments, memory = (
        {name.removeprefix(kind): tensor for name, tensor in tensors.items() if name.startswith(kind)}
        for kind in ("moment.", "memory.")
    )
    return ServerState(tensors["model"], moments, memory), facts


def _checkpoints(run_dir: Path) -> list[Path]:
    """By round: after 99999, names no longer sort."""
    found = (path for path in (run_dir / "checkpoints").glob("[0-9]*") if path.name.isdecimal() and path.is_dir())
    return sorted(found, key=lambda path: int(path.name))
