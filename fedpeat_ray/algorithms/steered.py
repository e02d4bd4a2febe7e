"""What an algorithm whose small model steers a large one is made of, and what it answers the engine; its round is its
own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel

from fedpeat_ray.aggregation.server_optimizer import ServerState
from fedpeat_ray.algorithms.algorithm import ALL, Algorithm, Given, Reference, RoundResult, level_group
from fedpeat_ray.algorithms.find import find_algorithm
from fedpeat_ray.config import EMULATORS, LORA, PROXY, PUBLIC_TEXT, EmulatorConfig, ProxyConfig, SimulationConfig
from fedpeat_ray.data.client_data import ServerData
from fedpeat_ray.errors import ConfigError
from fedpeat_ray.fleet.costs import ServerCosts
from fedpeat_ray.models import foundation as foundations
from fedpeat_ray.models.architecture import CAUSAL
from fedpeat_ray.models.foundation import Foundation
from fedpeat_ray.models.proxy import ProxyLogits, check_vocabularies
from fedpeat_ray.models.traits import num_tokens
from fedpeat_ray.tasks.find import find_task
from fedpeat_ray.tasks.score import Score
from fedpeat_ray.trainable.lora import Lora
from fedpeat_ray.training.adapters import StackedAdapter
from fedpeat_ray.training.evaluation import EvaluationTask, GroupScore
from fedpeat_ray.training.proxy_tuning import EvaluateProxy, SmallModel, step_costs

_PLAIN = ("trained", "weights", "eight_bit", "choice", "server_steps", "realign_every")  # of emulators of the small one
_PLAIN_EMULATORS = EmulatorConfig(weights="foundation")


@dataclass(frozen=True)
class Steered(Algorithm):
    """Devices tune a small model, which steers a large one."""

    on_small: Algorithm
    """The algorithm by which devices tune the small model."""
    large_digest: str
    small: SmallModel
    small_level: int
    """Of evaluation tasks that ask for the small model alone."""
    config: ProxyConfig
    teaching_text: ServerData | None
    """None: nothing is distilled."""
    costs_of_a_step: ServerCosts
    seed: int

    @classmethod
    def check(cls, config: SimulationConfig) -> None:
        """Emulators of the small model are plain ones, and both models language models."""
        if find_task(config.task).auto != CAUSAL.auto:
            raise ConfigError.of("task", config.task, "language-modelling, as one model's logits steer another's")
        if config.proxy.emulators:
            for name in _PLAIN:
                value, only = getattr(config.emulator, name), getattr(_PLAIN_EMULATORS, name)
                if value != only:
                    raise ConfigError.of(f"emulator.{name}", value, f"{only!r} if proxy.emulators")
            _kind_on_small(config).check(_on_one_shard(config))

    @classmethod
    def uses(cls, config: SimulationConfig) -> set[str]:
        """A small model, LoRA in it, perhaps emulators of it, and public text to teach it."""
        emulators = {EMULATORS} if config.proxy.emulators else set()
        return {PROXY, LORA} | emulators | ({PUBLIC_TEXT} if config.proxy.steps else set())

    @classmethod
    def with_numbers(cls, given: Given) -> SimulationConfig:
        """Emulators, if there are any, by the depth of the small model."""
        if not given.config.proxy.emulators:
            return given.config
        return _kind_on_small(given.config).with_numbers(given.beside(given.config.proxy.small, "proxy.small"))

    @classmethod
    def build(cls, given: Given) -> Self:
        """FedPEFT, or FedPEAT, on the small model, and what it takes to steer the large one."""
        config, proxy = given.config, given.config.proxy
        small = given.beside(proxy.small, "proxy.small")
        check_vocabularies(given.tokenizer, num_tokens(given.model), small.tokenizer, num_tokens(small.model))
        lengths = ("local.sequence_length", "evaluation.sequence_length", "proxy.sequence_length")
        most = min(foundations.max_positions(model) for model in (small.model, given.model))
        given.check_positions(*(lengths if proxy.steps else lengths[:2]), most=most, of="both models")
        on_small = _kind_on_small(config).build(small)
        assert isinstance(on_small.adapter, StackedAdapter) and isinstance(on_small.adapter.part, Lora)
        lora = on_small.adapter.part
        return cls(
            on_small,
            given.foundation.digest,
            SmallModel(small.foundation, lora),
            on_small.whole_level,
            proxy,
            given.public_text() if proxy.steps else None,
            step_costs(proxy, given.shape, small.shape, lora),
            config.seed,
        )

    def init(self, seed: int) -> ServerState:
        """The small model as it is, which leaves the large one as it is."""
        return self.on_small.init(seed)

    def memory(self) -> dict[str, Tensor]:
        """That of the algorithm on the small model."""
        return self.on_small.memory()

    def learn(self, state: ServerState, result: RoundResult, perplexity: float | None) -> ServerState:
        """What the algorithm on the small model learns."""
        return self.on_small.learn(state, result, perplexity)

    def trainer(self, state: ServerState) -> Callable:
        """Local training of the small model."""
        return self.on_small.trainer(state)

    def evaluator(self, state: ServerState, exact: bool = True) -> EvaluateBoth:
        """The proxy-tuned large model, always exactly, or for tasks with a level the small one."""
        return EvaluateBoth(EvaluateProxy(self.small, self.config.alpha), self.on_small.evaluator(state, exact))

    def save(self, directory: Path, model_P: Tensor) -> None:
        """The small model's adapter."""
        self.on_small.save(directory, model_P)

    @property
    def distils(self) -> bool:
        """Whether the small model learns from the large one that it steers."""
        return self.teaching_text is not None and self.config.steps > 0

    @property
    def server_costs(self) -> ServerCosts:
        """Of distillation in a round."""
        return self.costs_of_a_step.times(self.config.steps)

    @property
    def adapter(self) -> StackedAdapter:
        """That of the small model."""
        return StackedAdapter(self.small.lora)

    @property
    def foundation(self) -> Foundation:
        """The small model."""
        return self.small.foundation

    @property
    def public(self) -> ServerData | None:  # type: ignore[override]  # an attribute elsewhere
        """What teaches the small model."""
        return self.teaching_text

    @property
    def levels(self) -> tuple[int]:  # type: ignore[override]  # an attribute elsewhere
        """The small model."""
        return (self.small_level,)

    @property
    def reference(self) -> Reference:
        """The small model's LoRA on hosts, judged by the large model that it then steers."""
        key = (self.large_digest, self.foundation.digest, str(self.config.alpha))
        return Reference(self.adapter, "hosts", key)

    def with_client_batch_size(self, size: int) -> Self:
        """The same with clients trained so many at a time."""
        return dataclasses.replace(self, on_small=self.on_small.with_client_batch_size(size))

    def memory_needs(self) -> dict[str, int]:
        """Of the small model, or of its emulators."""
        return self.on_small.memory_needs()

    def weights_bytes(self, level: int | None) -> int:
        """The same of weights."""
        return self.on_small.weights_bytes(level)

    def digests(self) -> dict[str, str | None]:
        """Of the text that teaches, and of the small model."""
        return {**super().digests(), "small_sha256": self.foundation.digest}

    def scores(
        self, zero_shot: Mapping[str, Score], tuned: Mapping[str, Score]
    ) -> dict[str, Score | Mapping[str, Score]]:
        """The small model alone, and the foundation as it steers it."""
        group = level_group(self.small_level)
        return {"small_zero_shot": zero_shot[group], "small_tuned": tuned[group], "proxy_tuned": tuned[ALL]}

    @classmethod
    def tuned_model(cls, config: SimulationConfig) -> str:
        """The small one."""
        return config.proxy.small

    @classmethod
    def steering(cls, config: SimulationConfig, tuned: PreTrainedModel, alpha: float) -> LogitsProcessor:
        """By what tuning changed in its logits."""
        original = foundations.load(foundations.prepare(config.proxy.small, "float32"))
        return ProxyLogits(tuned, original, alpha)


def _kind_on_small(config: SimulationConfig) -> type[Algorithm]:
    return find_algorithm("fed-peat" if config.proxy.emulators else "fed-peft")


def _on_one_shard(config: SimulationConfig) -> SimulationConfig:
    """The shards are those of the large model."""
    return dataclasses.replace(config, foundation=dataclasses.replace(config.foundation, num_shards=1))


@dataclass(frozen=True)
class EvaluateBoth:
    """`train(backbone, adapter_P, tasks)`: on the large model steered, on hosts the small model."""

    steered: EvaluateProxy
    small: Any

    @property
    def files(self) -> list[Path]:
        """The small model's weights."""
        return self.steered.files

    def __call__(self, backbone: Any, adapter_P: Tensor, tasks: Sequence[EvaluationTask]) -> list[GroupScore]:
        work = self.steered if tasks[0].level is None else self.small
        return work(backbone, adapter_P, tasks)
