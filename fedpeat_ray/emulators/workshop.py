"""Where emulators are made: which blocks are kept, what weights they have, and the files these are in.

Happens once before the first round, and again with every re-alignment. Distilled weights are cached by
all they depend on, with their hash; those of the default settings come with the embedded base.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.torch import save_file
from torch import Tensor

from fedpeat_ray.config import EmulatorConfig
from fedpeat_ray.data.client_data import ServerData
from fedpeat_ray.emulators.distillation import distil
from fedpeat_ray.emulators.ladder import Ladder, Rung, build_ladder, eight_bit, load_blocks
from fedpeat_ray.emulators.on_emulators import BlockInfluence, MiddleOutput
from fedpeat_ray.files import file_sha256, kept_sha256, user_cache_dir, written_whole, written_with_hash
from fedpeat_ray.models import foundation as foundations
from fedpeat_ray.models.arithmetic import arithmetic_key
from fedpeat_ray.models.foundation import Blocks, Foundation
from fedpeat_ray.seeding import generator
from fedpeat_ray.training.adapters import Adapter
from fedpeat_ray.training.collect import collect
from fedpeat_ray.training.map_clients import MapClients

_VERSION = 1  # of what is cached: raise it when the same settings give something else
_INFLUENCE_BATCHES = 8

OnStep = Callable[[int, int], None]
"""Is told the number of a step, from 1, and how many there are."""


@dataclass(frozen=True)
class Workshop:
    """Makes the emulators of one foundation."""

    foundation: Foundation
    """What this process may hold of it: with several shards, the blocks that emulators have."""
    digest: str
    """Of the whole foundation."""
    config: EmulatorConfig
    adapter: Adapter
    public: ServerData | None
    """None: nothing that needs public text is asked for."""
    embedded_text: bool
    """Whether that text is the one that shipped emulators were distilled on."""
    directory: Path
    """Of re-aligned emulators, a file a version: where a resumed run finds them."""

    def choose(self, ladder: Ladder, map_clients: MapClients) -> Ladder:
        """The ladder with the blocks that the configuration asks for; `ladder` has them evenly spread."""
        if self.config.choice == "uniform":
            return ladder
        distilled = self.config.distil
        rng = generator(distilled.seed, "influence text")
        batches = self.public_text.batches(_INFLUENCE_BATCHES, distilled.batch_size, distilled.sequence_length, rng)
        scores_NL = list(collect(map_clients, BlockInfluence(ladder, self.adapter.task), None, batches))
        return build_ladder(
            foundations.empty(self.foundation.config_json), self.config, np.mean(scores_NL, axis=0).tolist()
        )

    def furnish(self, ladder: Ladder, map_clients: MapClients, on_step: OnStep) -> Ladder:
        """The ladder with weights of its own, if it is to have any: distilled, in 8 bit, or both."""
        if self.config.weights == "foundation" and not self.config.eight_bit:
            return ladder
        own = [rung for rung in ladder.rungs[:-1] if ladder.kept_middle(rung.level)]
        groups = [[rung] for rung in own] if self.config.weights == "per_level" else [own]
        made: dict[int, Rung] = {}
        for group in groups if own else []:
            path = None
            if self.config.weights != "foundation":
                path = self._distilled_file(ladder, group, map_clients, on_step)
            if self.config.eight_bit:
                path = self._eight_bit_file(ladder, [dataclasses.replace(rung, weights=path) for rung in group])
            made |= {rung.level: dataclasses.replace(rung, weights=path) for rung in group}
        return dataclasses.replace(ladder, rungs=tuple(made.get(rung.level, rung) for rung in ladder.rungs))

    def _distilled_file(self, ladder: Ladder, group: Sequence[Rung], map_clients: MapClients, on_step: OnStep) -> Path:
        if self.embedded_text and kept_sha256(path := self.shipped(ladder, group)):
            return path
        task = type(self.adapter.task)
        made_on = [
            task.__module__,
            task.__qualname__,
            self.foundation.training_dtype,
            self.public_text.corpus.digest,
            arithmetic_key(),
        ]
        path = user_cache_dir() / f"emulators-{self._key(ladder, group, *made_on)}.safetensors"
        if kept_sha256(path) is None:
            steps = self.config.distil.steps
            blocks = self._distilled(ladder, group, self._start(ladder, group), None, steps, map_clients, on_step)
            with written_with_hash(path) as part:
                _write(part, ladder, blocks)
        return path

    def _eight_bit_file(self, ladder: Ladder, group: Sequence[Rung]) -> Path:
        weights = group[0].weights
        source = weights and file_sha256(weights)
        path = user_cache_dir() / f"emulators-{self._key(ladder, group, source)}-8bit.safetensors"
        if kept_sha256(path) is None:
            with written_with_hash(path) as part:
                _write(part, ladder, self._start(ladder, group), quantise=True)
        return path

    def realign(self, ladder: Ladder, version: int, adapter_P: Tensor, map_clients: MapClients) -> None:
        """Distil once more, with the adapter plugged into both sides, and write this version's files."""
        after = self.version(ladder, version)
        before = self.version(ladder, version - 1)
        for path in after.files:
            group = [rung for rung, new in zip(before.rungs, after.rungs, strict=True) if new.weights == path]
            steps = self.config.realign_steps
            blocks = self._distilled(
                ladder, group, self._start(ladder, group), adapter_P, steps, map_clients, lambda *_: None, version
            )
            with written_whole(path) as part:
                _write(part, ladder, blocks)

    def version(self, ladder: Ladder, version: int) -> Ladder:
        """The ladder after so many re-alignments."""
        if version == 0:
            return ladder
        each, rungs = self.config.weights == "per_level", []
        for rung in ladder.rungs[:-1]:
            path = self.directory / f"{version:05d}{f'-level{rung.level}' if each else ''}.safetensors"
            rungs.append(dataclasses.replace(rung, weights=path if ladder.kept_middle(rung.level) else None))
        return dataclasses.replace(ladder, rungs=(*rungs, ladder.rungs[-1]))

    def shipped(self, ladder: Ladder, group: Sequence[Rung]) -> Path:
        """Where the package has the result, if it has it; machine and version of the public text do not count here."""
        return self.foundation.config_dir / "emulators" / f"{self._key(ladder, group)}.safetensors"

    @property
    def public_text(self) -> ServerData:
        """Of a workshop that needs it."""
        assert self.public is not None, "the configuration asks for public text, which was not loaded"
        return self.public

    def _start(self, ladder: Ladder, group: Sequence[Rung]) -> Blocks:
        """The middle blocks that these levels keep, as they are now."""
        model = foundations.load(self.foundation)
        blocks = model.get_submodule(ladder.block_list)
        own = {i: blocks.get_submodule(str(i)) for rung in group for i in ladder.kept_middle(rung.level)}
        weights = group[0].weights
        return own if weights is None else own | load_blocks(model, ladder.block_list, weights)

    def _distilled(
        self,
        ladder: Ladder,
        group: Sequence[Rung],
        start: Blocks,
        adapter_P: Tensor | None,
        steps: int,
        map_clients: MapClients,
        on_step: OnStep,
        version: int = 0,
    ) -> Blocks:
        student, config = foundations.load(self.foundation), self.config.distil
        dtype = self.foundation.training_dtype
        rng = generator(config.seed, "distillation text", version)
        batches = self.public_text.batches(steps, config.batch_size, config.sequence_length, rng)
        targets = collect(map_clients, MiddleOutput(ladder, self.adapter, dtype), adapter_P, batches)

        def plugged(rung: Rung) -> contextlib.AbstractContextManager:
            if adapter_P is None:
                return contextlib.nullcontext()
            part = ladder.part(self.adapter, rung.level)
            return part.plugged(student, adapter_P[self.adapter.layout.part(part.layout.names)[1]])

        return distil(
            student,
            ladder,
            group,
            self.adapter.task,
            start,
            batches,
            targets,
            config,
            dtype,
            lambda step: on_step(step, steps),
            plugged,
        )

    def _key(self, ladder: Ladder, group: Sequence[Rung], *more: Any) -> str:
        """Of all that the weights depend on."""
        parts = [_VERSION, self.digest, ladder.first, ladder.last, [rung.blocks for rung in group], *more]
        if self.config.weights != "foundation":
            parts += [self.config.weights, dataclasses.asdict(self.config.distil)]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _write(path: Path, ladder: Ladder, blocks: Blocks, quantise: bool = False) -> None:
    tensors: dict[str, Tensor] = {}
    for number, block in blocks.items():
        for name, tensor in block.state_dict().items():
            full = f"{ladder.block_list}.{number}.{name}"
            tensors |= eight_bit(full, tensor) if quantise else {full: tensor}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
