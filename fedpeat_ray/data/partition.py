"""Which documents a device holds: a function of (seed, device), worked out when needed, never stored.

So a fleet of a million devices costs nothing until a device takes part. The price is that devices
draw independently: within a device no document comes twice, but two devices may hold the same one,
as two people may. An assignment of each document to one owner would need the whole fleet at once;
only where the text names its owners, each document can have one (natural).

Shapes: D documents, G groups (sources or labels).
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

from fedpeat_ray.config import PartitionConfig
from fedpeat_ray.errors import ConfigError, DataError
from fedpeat_ray.seeding import derive_seed, generator, normals


class Partition:
    """Shares of documents by device.

    iid        documents drawn evenly from all.
    dirichlet  the device's mixture over groups is q ~ Dirichlet(alpha p), p the share of each group
               among the documents (Hsu et al. 2019, "Measuring the Effects of Non-Identical Data
               Distribution for Federated Visual Classification", section 3): with alpha -> 0 a device
               has one group, with alpha -> infinity it has the mixture of the whole. As there, a group
               with no document left takes no further part and the others share its place.
    by_source  one group a device, chosen with probability p.
    natural    a device is a group: each that has documents to train on is one device, which has all of
               them. Which of these users is device i is a function of the seed.
    shards     documents sorted by group are cut into num_shards equal pieces, and the device has
               shards_per_device different ones (McMahan et al. 2017, section 3); if those hold more
               than the device's number of documents, it has a sample of them.

    Otherwise the number of documents is log-normal with median documents_per_device, rounded, at least 1 and at
    most what the device's groups or shards hold. With documents_per_device = inf it is all of them:
    for iid and dirichlet every document there is.
    """

    def __init__(self, config: PartitionConfig, group_D: np.ndarray, heldout_D: np.ndarray, seed: int):
        """Sort the documents by group; nothing is drawn yet.

        Args:
            config: kind, heterogeneity and quantity.
            group_D: group of every document, integers from 0 (`Corpus.group`).
            heldout_D: bool, the documents kept for evaluation (`Corpus.heldout`).
            seed: the run's seed.

        Raises DataError if all or none of the documents are held out; ConfigError if num_shards or
        shards_per_device ask for more than there is.
        """
        self._config, self._seed = config, seed
        num_groups = int(group_D.max(initial=0)) + 1
        self._train_D, self._starts_G, self._sizes_G = _sorted_by_group(group_D, ~heldout_D, num_groups)
        self._prior_G = self._sizes_G / max(1, self._sizes_G.sum())
        self._present = np.flatnonzero(self._prior_G)
        self._users = generator(seed, "users").permutation(self._present) if config.kind == "natural" else self._present
        self._concentration = config.alpha * self._prior_G[self._present]
        if not len(self._train_D) or not heldout_D.any():
            counts = f"{len(self._train_D)} to train on and {heldout_D.sum()} held out"
            raise DataError(f"a partition needs at least one document of each kind; there are {counts}")
        self._check()

    def num_devices(self, wanted: int | Literal["auto"]) -> int:
        """Of a natural fleet: all users that have text to train on, or so many of them. Raises ConfigError if there are
        not so many."""
        num_users = len(self._users)
        if wanted == "auto":
            return num_users
        if wanted > num_users:
            allowed = f"auto, or at most the number of users with text to train on, {num_users}"
            raise ConfigError.of("fleet.num_devices", wanted, allowed)
        return wanted

    def num_documents(self, device_ids: np.ndarray) -> np.ndarray:
        """How many documents each device is to have: (N,) -> (N,) int64, at least 1."""
        if self._config.kind == "natural":
            return self._sizes_G[self._users[device_ids]]
        spread_N = normals(derive_seed(self._seed, "number of documents"), device_ids)
        log_number_N = np.log(self._config.documents_per_device) + self._config.quantity_sigma * spread_N
        number_N = np.exp(np.minimum(log_number_N, math.log(len(self._train_D))))
        return np.maximum(1, np.round(number_N)).astype(np.int64)

    def documents(self, device_id: int, num_documents: int | None = None) -> np.ndarray:
        """Indices of the device's training documents, ascending and without repeats; int64, at least one.

        `num_documents`: its own, if it is known already.
        """
        rng = generator(self._seed, "documents", device_id)
        if num_documents is None:
            num_documents = int(self.num_documents(np.array([device_id]))[0])
        if self._config.kind == "iid" or (self._config.kind == "dirichlet" and num_documents == len(self._train_D)):
            chosen = rng.choice(len(self._train_D), num_documents, replace=False)
        elif self._config.kind == "shards":
            pool = self._shard_positions(device_id)
            chosen = rng.choice(pool, min(num_documents, len(pool)), replace=False)
        elif self._config.kind == "natural":
            chosen = self._starts_G[self._users[device_id]] + np.arange(num_documents)
        else:
            counts_G = _counts(rng, self.mixture(device_id), self._sizes_G, num_documents)
            chosen = np.concatenate(
                [
                    self._starts_G[group] + rng.choice(self._sizes_G[group], counts_G[group], replace=False)
                    for group in np.flatnonzero(counts_G)
                ]
            )
        return np.sort(self._train_D[chosen])

    def mixture(self, device_id: int) -> np.ndarray:
        """The device's share of every group before the number of documents is drawn. Shape (G,), sums to 1."""
        prior_G = self._prior_G
        rng = generator(self._seed, "mixture", device_id)
        mixture_G = np.zeros(len(prior_G))
        match self._config.kind:
            case "iid":
                mixture_G = prior_G
            case "dirichlet":
                mixture_G[self._present] = rng.dirichlet(self._concentration)
            case "by_source":
                mixture_G[rng.choice(len(prior_G), p=prior_G)] = 1.0
            case "natural":
                mixture_G[self._users[device_id]] = 1.0
            case "shards":
                group = np.searchsorted(self._starts_G, self._shard_positions(device_id), side="right") - 1
                mixture_G = np.bincount(group, minlength=len(prior_G)) / len(group)
        return mixture_G

    @property
    def caution(self) -> str | None:
        """What may not be as it was meant."""
        kind, group = self._config.kind, self._config.group_by
        if kind in ("dirichlet", "by_source") and np.count_nonzero(self._sizes_G) == 1:
            return f"data.partition.kind = {kind!r} has no effect: all text is of one {group} (see data.{group}_column)"
        return None

    def _shard_positions(self, device_id: int) -> np.ndarray:
        """Positions, in the order by group, of the documents of the device's shards."""
        num_shards, num_documents = self._config.num_shards, len(self._train_D)
        rng = generator(self._seed, "shards", device_id)
        shards = rng.choice(num_shards, self._config.shards_per_device, replace=False)
        return np.concatenate(
            [np.arange(i * num_documents // num_shards, (i + 1) * num_documents // num_shards) for i in shards]
        )

    def _check(self) -> None:
        config, num_documents = self._config, len(self._train_D)
        if config.kind == "shards" and config.num_shards > num_documents:
            allowed = f"at most the number of documents to train on, {num_documents}"
            raise ConfigError.of("data.partition.num_shards", config.num_shards, allowed)
        if config.kind == "shards" and config.shards_per_device > config.num_shards:
            allowed = f"at most data.partition.num_shards = {config.num_shards}"
            raise ConfigError.of("data.partition.shards_per_device", config.shards_per_device, allowed)


def _sorted_by_group(group_D: np.ndarray, wanted_D: np.ndarray, num_groups: int) -> tuple[np.ndarray, ...]:
    """Indices of the wanted documents by group, and where each group starts and how many it has."""
    wanted = np.flatnonzero(wanted_D)
    ordered = wanted[np.argsort(group_D[wanted], kind="stable")]
    sizes_G = np.bincount(group_D[wanted], minlength=num_groups)
    return ordered, np.cumsum(sizes_G) - sizes_G, sizes_G


def _counts(rng: np.random.Generator, mixture_G: np.ndarray, sizes_G: np.ndarray, num_documents: int) -> np.ndarray:
    """How many of `num_documents` come from each group: multinomial, again for those a full group cannot give."""
    counts_G = np.zeros_like(sizes_G)
    while (missing := num_documents - counts_G.sum()) > 0:
        open_G = np.where(counts_G < sizes_G, mixture_G, 0.0)
        if open_G.sum() == 0:  # the device's groups have no more
            break
        counts_G = np.minimum(counts_G + rng.multinomial(missing, open_G / open_G.sum()), sizes_G)
    return counts_G
