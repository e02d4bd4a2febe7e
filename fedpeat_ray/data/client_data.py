"""The devices' data as the rounds see it: tasks to train on, and held-out text to be judged by."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from fedpeat_ray.config import EvaluationConfig, LocalConfig
from fedpeat_ray.data.batches import (
    batch_order,
    client_batches,
    client_sequences,
    heldout_sequences,
    num_steps,
    sequence_lengths,
)
from fedpeat_ray.data.corpus import Corpus
from fedpeat_ray.data.partition import Partition
from fedpeat_ray.records import SERVER, Assignment, ClientTask, TextBatch
from fedpeat_ray.seeding import generator


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

    def assignments(self, device_ids: np.ndarray, round: int) -> list[Assignment]:
        """What each device trains in this round, in numbers; no text is read."""
        num_documents = self.partition.num_documents(device_ids).tolist()
        return [self._assignment(*device, round) for device in zip(device_ids.tolist(), num_documents, strict=True)]

    def task(self, assignment: Assignment) -> ClientTask:
        """A device's text: its share, packed, in an order of the round's own."""
        device_id, length, batch_size = assignment.device_id, self.local.sequence_length, self.local.batch_size
        tokens_NT, lengths_N = client_sequences(self.corpus, assignment.documents, length)
        order = self._order(assignment.round, device_id)
        batches = client_batches(tokens_NT, lengths_N, assignment.num_steps, batch_size, order)
        return ClientTask(device_id, assignment.num_examples, *batches, assignment.level, assignment.age)

    def tasks(self, device_ids: Iterable[int], round: int) -> list[ClientTask]:
        """The same for several devices at once."""
        return [self.task(assignment) for assignment in self.assignments(np.asarray(device_ids), round)]

    def pooled_task(self, num_steps: int, batch_size: int) -> ClientTask:
        """All private training text as one client's task: the reference of centralised tuning."""
        everything = np.flatnonzero(~self.corpus.heldout)
        rng = generator(self.seed, "pooled order")
        tokens_NT, lengths_N = client_sequences(self.corpus, rng.permutation(everything), self.local.sequence_length)
        return ClientTask(SERVER, len(tokens_NT), *client_batches(tokens_NT, lengths_N, num_steps, batch_size, rng))

    def heldout(self, config: EvaluationConfig) -> tuple[np.ndarray, np.ndarray]:
        """Held-out text of all groups: tokens (N, T) and lengths (N,); the same for every run on this text."""
        return heldout_sequences(self.corpus, config.num_sequences, config.sequence_length, seed=0)

    def _assignment(self, device_id: int, num_documents: int, round: int) -> Assignment:
        documents, offsets = self.partition.documents(device_id, num_documents), self.corpus.offsets
        num_tokens = int((offsets[documents + 1] - offsets[documents]).sum())
        lengths_N = sequence_lengths(num_tokens, self.local.sequence_length)
        steps = num_steps(len(lengths_N), self.local)
        order_SB = batch_order(len(lengths_N), steps, self.local.batch_size, self._order(round, device_id))
        return Assignment(
            device_id, round, len(lengths_N), steps, int(lengths_N[order_SB].sum()), tuple(documents.tolist())
        )

    def _order(self, round: int, device_id: int) -> np.random.Generator:
        return generator(self.seed, "batch order", round, device_id)
