"""What every algorithm is: how it is built, what a round gives back, and what the engine asks it for.

The engine knows no algorithm by name. It asks the class what its settings mean, has it built, runs its rounds and
logs what they give back. What has no default here `averaging.py` has, but for `build`.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase

from fedpeat_ray.aggregation.server_optimizer import ServerState, init_server
from fedpeat_ray.config import USES, LocalConfig, LoraConfig, ServerConfig, SimulationConfig
from fedpeat_ray.control.plan import Decision
from fedpeat_ray.data.client_data import ClientData, ServerData
from fedpeat_ray.errors import ConfigError
from fedpeat_ray.fleet.conditions import Conditions
from fedpeat_ray.fleet.costs import Admission, Costs, ServerCosts
from fedpeat_ray.fleet.memory import ModelShape
from fedpeat_ray.models import foundation as foundations
from fedpeat_ray.models.architecture import CAUSAL, Head
from fedpeat_ray.models.foundation import Foundation
from fedpeat_ray.models.layout import Layout
from fedpeat_ray.models.traits import check_tokenizer, reads_tokens
from fedpeat_ray.records import Assignment, ClientReport
from fedpeat_ray.settings import get
from fedpeat_ray.tasks.language_modelling import LANGUAGE_MODELLING
from fedpeat_ray.tasks.score import Score
from fedpeat_ray.tasks.task import Task
from fedpeat_ray.trainable.lora import Lora, find_lora
from fedpeat_ray.trainable.shape import model_shape
from fedpeat_ray.training.adapters import Adapter, StackedAdapter
from fedpeat_ray.training.map_clients import MapClients, Where
from fedpeat_ray.training.stacking import check_stacking

ALL = "all"
"""The group of held-out text that the foundation is judged by."""


def level_group(level: int) -> str:
    """The group of held-out text that the emulator of a level is judged by."""
    return f"level {level}"


@dataclass(frozen=True)
class Given:
    """What an algorithm is built from: settings that were checked, and a foundation that can be loaded."""

    config: SimulationConfig
    foundation: Foundation
    directory: Path
    """Of the run."""
    task: Task = LANGUAGE_MODELLING
    """What the model is tuned for."""
    has_head: bool = False
    """Whether that put a head on the model."""

    @classmethod
    def find(
        cls, name: str, training_dtype: str, field: str, head: Head = CAUSAL, pretrained: bool = True
    ) -> Foundation:
        """A model by name (`models.foundation.prepare`)."""
        return foundations.prepare(name, training_dtype, field=field, head=head, pretrained=pretrained)

    @classmethod
    def reader(cls, task: Task, name: str) -> Any:
        """What turns documents into numbers for a model by name."""
        return task.reader(foundations.model_dir(name, weights=False))

    def beside(self, name: str, field: str) -> Self:
        """The same settings, and another model."""
        return dataclasses.replace(self, foundation=self.find(name, self.config.foundation.dtype, field))

    @cached_property
    def model(self) -> PreTrainedModel:
        """The foundation, loaded: its structure is to be read, not changed."""
        return foundations.load(self.foundation)

    @cached_property
    def shape(self) -> ModelShape:
        """What the memory and cost models know of it."""
        return model_shape(self.model, self.config.fleet.weight_bytes)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """That of the foundation. Raises ModelError if there is none."""
        return foundations.load_tokenizer(self.foundation.config_dir)

    def check_tokenizer(self) -> None:
        """Raise ModelError for one with tokens that the model does not know."""
        if reads_tokens(self.model):
            check_tokenizer(self.tokenizer, self.model, f"foundation.name = {self.foundation.name!r}")

    @property
    def client_batch_size(self) -> int:
        """Clients trained together; until that is measured, 1."""
        return 1 if self.config.client_batch_size == "auto" else self.config.client_batch_size

    def with_config(self, config: SimulationConfig) -> Self:
        """With what is known by now in place of auto; what is loaded stays loaded."""
        given = dataclasses.replace(self, config=config)
        vars(given).update(vars(self) | vars(given))
        return given

    def lora(self, config: LoraConfig) -> Lora:
        """LoRA in the foundation. Raises ConfigError for layers that it cannot be in."""
        lora = find_lora(self.model, config)
        check_stacking(self.foundation, lora)
        return lora

    def public_text(self) -> ServerData:
        """The text (or images) of the server. Raises DataError if there is none."""
        reader = self.reader(self.task, self.config.foundation.name)
        return ServerData(self.task.load(self.config.data, reader, public=True), self.task)

    def check_positions(self, *fields: str, most: int | None = None, of: str = "the model") -> None:
        """Raise ConfigError for a setting, a number of tokens, beyond the positions of a model."""
        most = foundations.max_positions(self.model) if most is None else most
        for name in fields:
            if (length := get(self.config, name)) > most:
                raise ConfigError.of(name, length, f"at most {most}, the positions of {of}")


@dataclass(frozen=True)
class Reference:
    """What is tuned centrally to judge an algorithm by: the tensors it trains itself, on the model it has them in."""

    adapter: Adapter
    where: Where
    """Who has that model."""
    key: tuple[str, ...]
    """All that the perplexity depends on besides configuration and text: digests of models."""


Assigned = Callable[[np.ndarray, int], list[Assignment]]
"""What each of some devices, by their ids, is asked to train in a round."""


@dataclass(frozen=True)
class RoundResult:
    """The facts of one round, a device a position; `reports` of those that trained."""

    device_ids: np.ndarray
    tasks: Sequence[Assignment]
    costs: Costs
    admission: Admission
    reports: Sequence[ClientReport] = ()
    lora_rank: int | None = None
    levels: np.ndarray | None = None
    """Of the emulators, if there are any."""
    emulator_bytes: np.ndarray | None = None
    """The part of what was downloaded that is emulators."""
    server: ServerCosts = field(default_factory=ServerCosts)
    refused: str | None = None
    """UPDATES or DISTILLATION if the server's state would not have been finite with them."""
    skipped: Sequence[Assignment] = ()
    """What was left undone: of devices that were sampled and then left out by decision."""
    decision: Decision | None = None
    """The controller's, from which it is to learn."""
    figures: Mapping[str, float] = field(default_factory=dict)
    """Whatever else is worth a number a round: they are logged by name, and the report shows them."""

    @property
    def completing(self) -> list[Assignment]:
        """The tasks of devices that complete the round."""
        return [task for task, completes in zip(self.tasks, self.admission.completed, strict=True) if completes]


class Algorithm(ABC):
    """A federated algorithm: a state, and a round that takes it to the next.

    Immutable, and made of what hosts can receive. What it remembers from round to round is in the state alone.
    """

    about: ClassVar[str] = ""
    """A line for the report."""
    levels: Sequence[int] = ()
    """Of the models on devices that are judged too: all before the first round and at the end, the last of them
    whenever the foundation is."""
    public: ServerData | None = None
    """Text of the server, if it is read."""
    if TYPE_CHECKING:  # what is read only: a field of one algorithm, a property of another

        @property
        def adapter(self) -> Adapter:
            """What is trained and sent."""

        @property
        def foundation(self) -> Foundation:
            """The model it is trained in, as hosts are to have it."""

        @property
        def local(self) -> LocalConfig:
            """What a client does in a round."""

        @property
        def server(self) -> ServerConfig:
            """What the server does with the mean update."""

    # Asked of the class, before anything is loaded.

    @classmethod
    def check(cls, config: SimulationConfig) -> None:
        """Raise ConfigError for settings that do not go together; each alone is within its bounds."""
        if (shards := config.foundation.num_shards) > 1:
            raise ConfigError.of("foundation.num_shards", shards, f"1, as devices of {config.algorithm} hold all of it")

    @classmethod
    def uses(cls, config: SimulationConfig) -> Collection[str]:
        """Of USES, what it makes use of: other settings are told to have no effect."""
        return USES

    @classmethod
    def learning_rate(cls, config: SimulationConfig) -> float:
        """What local.learning_rate = auto stands for."""
        return 2e-3

    @classmethod
    def with_numbers(cls, given: Given) -> SimulationConfig:
        """The settings with what auto stands for, where that depends on the model. Raises ConfigError."""
        return given.config

    @classmethod
    @abstractmethod
    def build(cls, given: Given) -> Self:
        """The algorithm with these settings. Raises ConfigError, DataError or ModelError."""

    # The rounds.

    def init(self, seed: int) -> ServerState:
        """The state before the first round: it changes nothing in the foundation."""
        return dataclasses.replace(init_server(self.server, self.adapter.init(seed)), memory=self.memory())

    def memory(self) -> dict[str, Tensor]:
        """What is remembered before the first round, besides the tensors that are trained."""
        return {}

    def settle(
        self, state: ServerState, round: int, now_s: float, conditions: Conditions, assigned: Assigned
    ) -> tuple[ServerState, RoundResult]:
        """What of a round is known before anybody trains: who is asked for what, what that costs, who completes it, and
        the state that remembers this. A round starts with it, and a plan does nothing else (fedpeat_ray/planning.py):
        of the state it reads the memory only."""
        raise ConfigError.of("algorithm", type(self).__name__, "one that settles its rounds before it runs them")

    @abstractmethod
    def run_round(
        self,
        state: ServerState,
        round: int,
        now_s: float,
        conditions: Conditions,
        data: ClientData,
        map_clients: MapClients,
    ) -> tuple[ServerState, RoundResult]:
        """One round, from the sampling of devices to the server's step; `round` counts from 1."""

    def learn(self, state: ServerState, result: RoundResult, perplexity: float | None) -> ServerState:
        """The state after it is known what came of a round; perplexity is None where it was not evaluated."""
        return state

    def trainer(self, state: ServerState) -> Callable:
        """`train(backbone, model_P, tasks)` of clients in the next round."""
        return self.adapter.trainer(self.local)

    def evaluator(self, state: ServerState, exact: bool = True) -> Callable:
        """`train(backbone, model_P, tasks)` that scores held-out text with the current model: exactly, or as fast as
        is within 0.1 % of perplexity over 32,000 tokens (what rounding does to a token averages out)."""
        return self.adapter.evaluator(exact)

    def save(self, directory: Path, model_P: Tensor) -> None:
        """Write the current model so that others can load it."""
        self.adapter.save(directory, model_P, self.foundation.name)

    # What the engine must know.

    @property
    def layout(self) -> Layout:
        """The tensors that are trained and sent."""
        return self.adapter.layout

    @property
    def reference(self) -> Reference:
        """What is tuned centrally, for comparison."""
        return Reference(self.adapter, "driver", (self.foundation.digest,))

    @property
    def whole_level(self) -> int:
        """A level at which work on tasks has the whole model."""
        return 1

    @property
    def batches_clients(self) -> bool:
        """Whether clients can be trained together, so that it is worth finding out how many at a time."""
        return isinstance(self.adapter, StackedAdapter)

    def with_client_batch_size(self, size: int) -> Self:
        """The same with clients trained so many at a time."""
        return dataclasses.replace(self, client_batch_size=size)  # type: ignore[type-var]  # dataclasses inherit

    @abstractmethod
    def memory_needs(self) -> dict[str, int]:
        """Bytes that a device must have to take part, by what it may be asked to train."""

    @abstractmethod
    def weights_bytes(self, level: int | None) -> int:
        """Of these, for the weights of what tasks of a level train on."""

    def furnished(self, map_clients: MapClients, export: Callable | None, say: Callable[[str], None]) -> Self:
        """What must be made before the first round, with the foundation at work.

        Args:
            map_clients: does work on the foundation.
            export: `export(path, names)` writes tensors of a sharded foundation; None if it is not.
            say: hears what is going on.
        """
        return self

    def digests(self) -> dict[str, str | None]:
        """Of what rounds read besides foundation and private text, by name: a run is resumed with the same only."""
        return {"public_digest": self.public.corpus.digest if self.public else None}

    def made(self) -> dict[str, str | None]:
        """The same of what `furnished` made."""
        return {}

    def facts(self) -> dict[str, Any]:
        """For config.json: what was worked out and is no setting."""
        return {}

    def scores(
        self, zero_shot: Mapping[str, Score], tuned: Mapping[str, Score]
    ) -> dict[str, Score | Mapping[str, Score]]:
        """For summary.json: what came of it besides the foundation's own scores, of those by group.

        A pair `X_zero_shot`, `X_tuned`, scores or scores by level, is a model X on devices.
        """
        return {}

    def summary(self, zero_shot: Mapping[str, Score], tuned: Mapping[str, Score]) -> dict[str, Any]:
        """For summary.json: whatever else is worth a number."""
        return {}

    # After the run.

    @classmethod
    def tuned_model(cls, config: SimulationConfig) -> str:
        """The model that the saved adapter fits."""
        return config.foundation.name

    @classmethod
    def steering(cls, config: SimulationConfig, tuned: PreTrainedModel, alpha: float) -> LogitsProcessor | None:
        """How that model steers the foundation, if it is another."""
        return None
