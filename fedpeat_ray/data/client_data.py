"""The devices' data as the rounds see it: tasks to train on, and held-out text to be judged by."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from fedpeat_ray.config import EvaluationConfig, LocalConfig
from fedpeat_ray.data.batches import (
    client_batches,
    client_sequences,
    heldout_sequences,
    num_steps,
)
from fedpeat_ray.data.corpus import Corpus
from fedpeat_ray.data.partition import Partition
from fedpeat_ray.records import ClientTask, TextBatch
from fedpeat_ray.seeding import generator

SERVER = -1
"""Stands for the server where a device id is asked for."""


@dataclass(frozen=True)
class ServerData:
    """The server's public text."""

    corpus: Corpus

    def batches(
        self, num_batches: int, batch_size: int, sequence_length: int, rng: np.random.Generator
    ) -> list[TextBatch]:
        """Batches of packed text, documents and sequences in random order."""
        documents = rng.permutation(np.flatnonzero(~self.corpus.heldout))
        num_tokens = num_batches * batch_size * sequence_length
        enough = np.searchsorted(np.cumsum(self.corpus.num_tokens[documents]), num_tokens)
        tokens_NT, lengths_N = client_sequences(self.corpus, documents[: enough + 1], sequence_length)
        tokens_SBT, lengths_SB = client_batches(tokens_NT, lengths_N, num_batches, batch_size, rng)
        return [TextBatch(*batch) for batch in zip(tokens_SBT, lengths_SB, strict=True)]

    def task(self, num_steps: int, local: LocalConfig, rng: np.random.Generator) -> ClientTask:
        """The server's own part in a round; its weight is the number of sequences it trains on."""
        batches = self.batches(num_steps, local.batch_size, local.sequence_length, rng)
        tokens_SBT = np.stack([batch.tokens_BT for batch in batches])
        lengths_SB = np.stack([batch.lengths_B for batch in batches])
        return ClientTask(SERVER, num_steps * local.batch_size, tokens_SBT, lengths_SB)


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
        return ClientTask(SERVER, len(tokens_NT), *client_batches(tokens_NT, lengths_N, num_steps, batch_size, rng))

    def heldout(self, config: EvaluationConfig) -> tuple[np.ndarray, np.ndarray]:
        """Held-out text of all groups: tokens (N, T) and lengths (N,); the same for every run on this text."""
        return heldout_sequences(self.corpus, config.num_sequences, config.sequence_length, seed=0)

    def _task(self, device_id: int, round: int) -> ClientTask:
        tokens_NT, lengths_N = client_sequences(
            self.corpus, self.partition.documents(device_id), self.local.sequence_length
        )
        steps = num_steps(len(tokens_NT), self.local)
        order = generator(self.seed, "batch order", round, device_id)
        return ClientTask(
            device_id, len(tokens_NT), *client_batches(tokens_NT, lengths_N, steps, self.local.batch_size, order)
        )
