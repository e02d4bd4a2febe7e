"""The devices' data as the rounds see it: tasks to train on, and held-out text to be judged by."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from fedpeat_ray.config import EvaluationConfig, LocalConfig
from fedpeat_ray.data.batches import (
    client_batches,
    client_sequences,
    device_heldout_sequences,
    heldout_sequences,
    num_steps,
)
from fedpeat_ray.data.corpus import Corpus
from fedpeat_ray.data.partition import Partition
from fedpeat_ray.records import ClientTask
from fedpeat_ray.seeding import generator


@dataclass(frozen=True)
class ClientData:
    """A corpus divided over devices; nothing is stored a device."""

    corpus: Corpus
    partition: Partition
    local: LocalConfig
    seed: int

    def tasks(self, device_ids: Iterable[int], round: int) -> list[ClientTask]:
        """What each device trains on in this round: its share, packed, in an order of the round's own."""
        return [self._task(int(device_id), round) for device_id in device_ids]

    def pooled_task(self, num_steps: int, batch_size: int) -> ClientTask:
        """All private training text as one client's task: the reference of centralised tuning."""
        everything = np.flatnonzero(~self.corpus.heldout)
        rng = generator(self.seed, "pooled order")
        tokens_NT, lengths_N = client_sequences(self.corpus, rng.permutation(everything), self.local.sequence_length)
        return ClientTask(-1, len(tokens_NT), *client_batches(tokens_NT, lengths_N, num_steps, batch_size, rng))

    def heldout(self, config: EvaluationConfig) -> tuple[np.ndarray, np.ndarray]:
        """Held-out text of all groups: tokens (N, T) and lengths (N,); the same for every run on this text."""
        return heldout_sequences(self.corpus, config.num_sequences, config.sequence_length, seed=0)

    def heldout_of(self, device_ids: np.ndarray, config: EvaluationConfig) -> tuple[np.ndarray, np.ndarray]:
        """Held-out text in the mixtures of these devices, evenly divided among them: tokens (N, T), lengths (N,)."""
        each = max(1, config.num_sequences_per_tier // len(device_ids))
        parts = [
            device_heldout_sequences(self.corpus, self.partition, int(device_id), each, config.sequence_length)
            for device_id in device_ids
        ]
        tokens, lengths = zip(*parts, strict=True)
        return np.concatenate(tokens), np.concatenate(lengths)

    def _task(self, device_id: int, round: int) -> ClientTask:
        tokens_NT, lengths_N = client_sequences(
            self.corpus, self.partition.documents(device_id), self.local.sequence_length
        )
        steps = num_steps(len(tokens_NT), self.local)
        order = generator(self.seed, "batch order", round, device_id)
        return ClientTask(
            device_id, len(tokens_NT), *client_batches(tokens_NT, lengths_N, steps, self.local.batch_size, order)
        )
