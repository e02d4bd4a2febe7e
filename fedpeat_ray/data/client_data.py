"""The devices' data as the rounds see it: tasks to train on, and held-out examples to be judged by."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from fedpeat_ray.config import EvaluationConfig, LocalConfig
from fedpeat_ray.data.batches import batch_order, client_batches, heldout_order, num_steps
from fedpeat_ray.data.corpus import Corpus
from fedpeat_ray.data.partition import Partition
from fedpeat_ray.records import SERVER, Arrays, Assignment, ClientTask
from fedpeat_ray.seeding import generator


class Examples(Protocol):
    """How documents become examples, rows of arrays (see `fedpeat_ray.tasks`)."""

    def lengths(self, corpus: Corpus, documents: Sequence[int] | np.ndarray, length: int) -> np.ndarray:
        """Tokens (N,) of each row, without making it."""
        ...

    def rows(self, corpus: Corpus, documents: Sequence[int] | np.ndarray, length: int) -> Arrays:
        """The examples, at most so many tokens each: arrays (N, ...)."""
        ...

    def enough(self, corpus: Corpus, documents: np.ndarray, num_rows: int, length: int) -> np.ndarray:
        """The first of these documents, at least as many as become so many rows."""
        ...

    def first_rows(self, corpus: Corpus, documents: np.ndarray, num_rows: int, length: int) -> Arrays:
        """The first so many rows."""
        ...

    def prepared(self, corpus: Corpus, batches: Arrays, rng: np.random.Generator) -> Arrays:
        """What is drawn anew whenever they are used."""
        ...


@dataclass(frozen=True)
class ServerData:
    """The server's public text, or images."""

    corpus: Corpus
    examples: Examples

    def batches(
        self, num_batches: int, batch_size: int, sequence_length: int, rng: np.random.Generator
    ) -> list[Arrays]:
        """Batches of examples, documents and examples in random order; arrays (B, ...)."""
        arrays = self._arrays(num_batches, batch_size, sequence_length, rng)
        return [{name: array[i] for name, array in arrays.items()} for i in range(num_batches)]

    def task(self, num_steps: int, local: LocalConfig, rng: np.random.Generator) -> ClientTask:
        """The server's own part in a round; its weight is the number of sequences it trains on."""
        arrays = self._arrays(num_steps, local.batch_size, local.sequence_length, rng)
        return ClientTask(SERVER, num_steps * local.batch_size, arrays)

    def _arrays(self, num_batches: int, batch_size: int, sequence_length: int, rng: np.random.Generator) -> Arrays:
        documents = rng.permutation(np.flatnonzero(~self.corpus.heldout))
        documents = self.examples.enough(self.corpus, documents, num_batches * batch_size, sequence_length)
        rows = self.examples.rows(self.corpus, documents, sequence_length)
        return self.examples.prepared(self.corpus, client_batches(rows, num_batches, batch_size, rng), rng)


@dataclass(frozen=True)
class ClientData:
    """A corpus divided over devices; nothing is stored a device."""

    corpus: Corpus
    partition: Partition
    local: LocalConfig
    seed: int
    examples: Examples

    def assignments(self, device_ids: np.ndarray, round: int) -> list[Assignment]:
        """What each device trains in this round, in numbers; no text is read."""
        num_documents = self.partition.num_documents(device_ids).tolist()
        return [self._assignment(*device, round) for device in zip(device_ids.tolist(), num_documents, strict=True)]

    def task(self, assignment: Assignment) -> ClientTask:
        """A device's examples: its share, in an order of the round's own."""
        device_id = assignment.device_id
        rows = self.examples.rows(self.corpus, assignment.documents, self.local.sequence_length)
        rng = self._order(assignment.round, device_id)
        batches = client_batches(rows, assignment.num_steps, self.local.batch_size, rng)
        batches = self.examples.prepared(self.corpus, batches, rng)
        return ClientTask(device_id, assignment.num_examples, batches, assignment.level, assignment.age)

    def tasks(self, device_ids: Iterable[int], round: int) -> list[ClientTask]:
        """The same for several devices at once."""
        return [self.task(assignment) for assignment in self.assignments(np.asarray(device_ids), round)]

    def pooled_task(self, num_steps: int, batch_size: int) -> ClientTask:
        """All private training examples as one client's task: the reference of centralised tuning."""
        rng = generator(self.seed, "pooled order")
        everything = rng.permutation(np.flatnonzero(~self.corpus.heldout))
        rows = self.examples.rows(self.corpus, everything, self.local.sequence_length)
        batches = client_batches(rows, num_steps, batch_size, rng)
        batches = self.examples.prepared(self.corpus, batches, rng)
        return ClientTask(SERVER, len(rows["lengths"]), batches)

    def heldout(self, config: EvaluationConfig) -> Arrays:
        """Held-out examples of all groups, arrays (N, ...); the same for every run on these documents."""
        documents = heldout_order(self.corpus, seed=0)
        rows = self.examples.first_rows(self.corpus, documents, config.num_sequences, config.sequence_length)
        return self.examples.prepared(self.corpus, rows, generator(0, "held-out examples"))

    def _assignment(self, device_id: int, num_documents: int, round: int) -> Assignment:
        documents = self.partition.documents(device_id, num_documents)
        lengths_N = self.examples.lengths(self.corpus, documents, self.local.sequence_length)
        steps = num_steps(len(lengths_N), self.local)
        order_SB = batch_order(len(lengths_N), steps, self.local.batch_size, self._order(round, device_id))
        return Assignment(
            device_id, round, len(lengths_N), steps, int(lengths_N[order_SB].sum()), tuple(documents.tolist())
        )

    def _order(self, round: int, device_id: int) -> np.random.Generator:
        return generator(self.seed, "batch order", round, device_id)
