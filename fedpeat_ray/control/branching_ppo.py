"""Action-branching PPO in RLlib: all of RLlib that there is in this project.

Proximal policy optimisation (Schulman et al. 2017) where a round's action is a choice for each of 2 N branches (a level
and an exchange for each candidate), one network for all devices, one critic:

    r_b = pi(a_b | s) / pi_old(a_b | s)                         for each branch b
    L   = mean over branches of min(r_b A, clip(r_b, 1 - eps, 1 + eps) A)

"joint" has the one ratio of the product of all branches in its place, which is what plain PPO does with such an action;
at thousands of branches it leaves the clip range after the smallest step. Branching after Tavakoli et al. 2018; the
paper's SABPPO (Chua et al. 2023) is not published in detail: the ratio a branch is ours.

"independent" has a trunk that reads all candidates at once and a head a branch, as a common trunk is usually built: its
parameters grow with the fleet, and it serves one number of candidates only.

Legend: B rounds, N candidates, D columns, K = 1 + L + 2 choices of both branches of a candidate.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import gymnasium
import torch
from ray.rllib.algorithms.ppo import PPOConfig
from ray.rllib.algorithms.ppo.torch.ppo_torch_learner import PPOTorchLearner
from ray.rllib.callbacks.callbacks import RLlibCallback
from ray.rllib.core import DEFAULT_MODULE_ID
from ray.rllib.core.columns import Columns as Names
from ray.rllib.core.distribution.torch.torch_distribution import TorchDistribution
from ray.rllib.core.rl_module.apis.value_function_api import ValueFunctionAPI
from ray.rllib.core.rl_module.rl_module import RLModuleSpec
from ray.rllib.core.rl_module.torch.torch_rl_module import TorchRLModule
from ray.rllib.evaluation.postprocessing import Postprocessing
from ray.rllib.utils.metrics import (
    ENV_RUNNER_RESULTS,
    ENV_RUNNER_SAMPLING_TIMER,
    LEARNER_RESULTS,
    LEARNER_UPDATE_TIMER,
    TIMERS,
)
from torch import Tensor, nn

from fedpeat_ray.control.environment import TERMS, Episode, Setting
from fedpeat_ray.control.fleet_env import FleetVectorEnv
from fedpeat_ray.control.observation import Columns, observe, plan_of
from fedpeat_ray.control.plan import SKIP, Plan
from fedpeat_ray.control.policy import About, Policy
from fedpeat_ray.control.ppo import PPOSettings
from fedpeat_ray.control.trial import Player

FORBIDDEN = -1e9
"""The logit of a choice that may not be made."""


def rllib_config(settings: Sequence[Setting], ppo: PPOSettings, iterations: int, seed: int) -> PPOConfig:
    """RLlib's configuration; the learning rate falls to a tenth over so many iterations."""
    falling = [[0, ppo.learning_rate], [iterations * ppo.rounds_per_iteration, ppo.learning_rate / 10]]
    model = {"num_levels": len(settings[0].levels), "width": ppo.width, "network": ppo.network}
    return (
        PPOConfig()
        .environment(
            FleetVectorEnv, env_config={"settings": tuple(settings), "penalty": ppo.penalty, "draws": ppo.draws}
        )
        .env_runners(
            num_env_runners=ppo.num_env_runners,
            num_envs_per_env_runner=ppo.num_envs,
            gym_env_vectorize_mode=gymnasium.VectorizeMode.VECTOR_ENTRY_POINT,
            rollout_fragment_length="auto",
        )
        .fault_tolerance(restart_failed_env_runners=False)
        .learners(
            num_learners=1 if ppo.num_gpus else 0,
            num_gpus_per_learner=ppo.num_gpus,
            learner_class=BranchingLearner,
            learner_config_dict={"ratio": ppo.ratio, "advantage_clip": ppo.advantage_clip},
        )
        .rl_module(rl_module_spec=RLModuleSpec(module_class=BranchingModule, model_config=model))
        .callbacks(LogTerms)
        .training(
            train_batch_size_per_learner=ppo.rounds_per_iteration,
            minibatch_size=ppo.minibatch_rounds,
            num_epochs=ppo.epochs,
            lr=falling,
            gamma=ppo.discount,
            lambda_=ppo.gae_lambda,
            clip_param=ppo.clip,
            entropy_coeff=ppo.entropy,
            use_kl_loss=False,
            grad_clip=1.0,
            grad_clip_by="norm",  # of each tensor: the critic's errors do not shrink the policy's steps
        )
        .debugging(seed=seed, log_level="ERROR")
    )


class SharedNetwork(nn.Module):
    """policy.py in PyTorch: the same parameters by the same names."""

    def __init__(self, columns: Columns, width: int):
        super().__init__()
        self.columns, num_choices = columns, sum(columns.num_choices)
        self.device_1 = nn.Linear(columns.num_features, width)
        self.device_2 = nn.Linear(width, width)
        self.context = nn.Linear(2 * width, width)
        self.joint = nn.Linear(2 * width, width)
        self.choice = nn.Linear(width, num_choices)
        nn.init.zeros_(self.choice.bias)
        self.choice.weight.data *= 0.01  # all levels alike likely at first

    def forward(self, rows: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, K), not yet masked."""
        features = rows[..., : self.columns.num_features]
        h = self.device_2(self.device_1(features).relu()).relu()
        context = self.context(torch.cat([h.mean(dim=1), h.amax(dim=1)], dim=-1)).relu()
        weight, width = self.joint.weight, h.shape[-1]
        z = (h @ weight[:, :width].T + (context @ weight[:, width:].T + self.joint.bias)[:, None]).relu()
        return self.choice(z)


class IndependentHeads(nn.Module):
    """One trunk over all candidates, a plain head a branch."""

    def __init__(self, columns: Columns, width: int, num_candidates: int):
        super().__init__()
        self.columns, self.num_choices = columns, sum(columns.num_choices)
        self.trunk = nn.Sequential(
            nn.Linear(num_candidates * columns.num_features, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh()
        )
        self.heads = nn.Linear(width, num_candidates * self.num_choices)
        self.heads.weight.data *= 0.01

    def forward(self, rows: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, K), not yet masked."""
        trunk = self.trunk(rows[..., : self.columns.num_features].flatten(1))
        return self.heads(trunk).unflatten(1, (-1, self.num_choices))


class Critic(nn.Module):
    """What is to be expected of a round and those after it: on the mean of encoded candidates."""

    def __init__(self, columns: Columns, width: int):
        super().__init__()
        self.num_features = columns.num_features
        self.device = nn.Sequential(nn.Linear(columns.num_features, width), nn.ReLU())
        self.value = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1))

    def forward(self, rows: Tensor) -> Tensor:
        """(B, N, D) -> (B,)."""
        return self.value(self.device(rows[..., : self.num_features]).mean(dim=1)).squeeze(-1)


class BranchingModule(TorchRLModule, ValueFunctionAPI):
    """Policy and critic as RLlib wants them."""

    def setup(self) -> None:
        """Networks for any number of candidates, or for this one."""
        assert isinstance(self.model_config, dict) and isinstance(self.observation_space, gymnasium.spaces.Box)
        columns, width = Columns(self.model_config["num_levels"]), self.model_config["width"]
        num_candidates = self.observation_space.shape[0]
        shared = self.model_config["network"] == "shared"
        self.columns = columns
        self.network = SharedNetwork(columns, width) if shared else IndependentHeads(columns, width, num_candidates)
        self.critic = Critic(columns, width // 2)
        self.action_dist_cls = branches_of(columns)

    def _forward(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        return {Names.ACTION_DIST_INPUTS: self.masked_logits(batch[Names.OBS])}

    def masked_logits(self, rows: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, K)."""
        masks = rows[..., self.columns.num_features :]
        per_place = rows[..., self.columns.names.index("candidates_per_place")]
        logits = self.network(rows)
        skip = logits[..., :1] + torch.expm1(per_place).clamp(min=0.05).log()[..., None]
        return torch.cat([skip, logits[..., 1:]], dim=-1).masked_fill(masks <= 0, FORBIDDEN)

    def compute_values(self, batch: dict[str, Any], embeddings: Any = None) -> Tensor:
        """(B,)."""
        return self.critic(batch[Names.OBS])


class Branches(TorchDistribution):
    """A categorical a branch, all at once: actions (B, N, 2), log-probabilities and entropies a branch (B, N, 2)."""

    num_levels: int
    """Choices of a level branch, skipping included; the rest of the logits are of the exchange branch."""

    def __init__(self, logits: Tensor):
        super().__init__()
        split = (logits[..., : self.num_levels], logits[..., self.num_levels :])
        self.log_p = [part.log_softmax(dim=-1) for part in split]

    @classmethod
    def from_logits(cls, logits: Tensor, **kwargs: Any) -> Self:  # type: ignore[override]  # tensors of PyTorch only
        """(B, N, K)."""
        return cls(logits)

    def _get_torch_distribution(self, *args: Any, **kwargs: Any) -> None:
        return None  # there are several, and they are ours

    def sample(self, *, sample_shape: Any = None, return_logp: bool = False, **kwargs: Any) -> Tensor:
        """(B, N, 2), by the Gumbel trick."""
        noisy = [log_p - torch.empty_like(log_p).exponential_().log() for log_p in self.log_p]
        return torch.stack([each.argmax(dim=-1) for each in noisy], dim=-1)

    def logp(self, value: Tensor, **kwargs: Any) -> Tensor:  # type: ignore[override]  # tensors of PyTorch only
        """(B, N, 2) -> (B, N, 2)."""
        chosen = value.long().unbind(dim=-1)
        found = [p.gather(-1, a[..., None])[..., 0] for p, a in zip(self.log_p, chosen, strict=True)]
        return torch.stack(found, dim=-1)

    def entropy(self, **kwargs: Any) -> Tensor:
        """(B, N, 2)."""
        return torch.stack([-(log_p.exp() * log_p).sum(dim=-1) for log_p in self.log_p], dim=-1)

    @staticmethod
    def required_input_dim(space: gymnasium.Space, **kwargs: Any) -> int:
        """Numbers a candidate."""
        raise NotImplementedError("networks are built for their columns, not for a space")

    def to_deterministic(self) -> Likeliest:  # type: ignore[override]  # what is asked of such a distribution
        """As Policy.choose does."""
        of_levels, of_exchange = self.log_p
        takes_part = 1 - of_levels[..., 0].exp()
        expected = takes_part.sum(dim=-1, keepdim=True).round().clamp(min=1)
        place = takes_part.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        levels = 1 + of_levels[..., 1:].argmax(dim=-1)
        levels = torch.where((place < expected) & (takes_part > 0), levels, SKIP)
        return Likeliest(torch.stack([levels, of_exchange.argmax(dim=-1)], dim=-1))


@dataclass(frozen=True)
class Likeliest:
    """Always the same choices."""

    choices: Tensor

    def sample(self, **kwargs: Any) -> Tensor:
        """(B, N, 2)."""
        return self.choices

    def logp(self, value: Tensor, **kwargs: Any) -> Tensor:
        """Certain."""
        return torch.zeros_like(value, dtype=torch.float32)


def branches_of(columns: Columns) -> type[Branches]:
    """The distribution for a ladder."""
    return type("Branches", (Branches,), {"num_levels": columns.num_choices[0]})


class BranchingLearner(PPOTorchLearner):
    """PPO's loss with a ratio a branch."""

    def compute_loss_for_module(self, *, module_id: Any, config: Any, batch: Any, fwd_out: Any) -> Tensor:
        """See the formula above; a loss a round, so that rounds that RLlib pads with do not count."""
        module: Any = self.module[module_id].unwrapped()
        real_B = batch.get(Names.LOSS_MASK, ...)
        branches = module.action_dist_cls.from_logits(fwd_out[Names.ACTION_DIST_INPUTS][real_B])
        log_ratio = branches.logp(batch[Names.ACTIONS][real_B]) - batch[Names.ACTION_LOGP][real_B]
        if config.learner_config_dict["ratio"] == "joint":
            log_ratio = log_ratio.sum(dim=(1, 2), keepdim=True)
        most, ratio = config.learner_config_dict["advantage_clip"], log_ratio.exp()
        advantage = batch[Postprocessing.ADVANTAGES][real_B].clamp(-most, most)[:, None, None]
        clipped = ratio.clamp(1 - config.clip_param, 1 + config.clip_param)
        gain = torch.minimum(ratio * advantage, clipped * advantage).mean()
        entropy = branches.entropy().mean()
        targets = batch[Postprocessing.VALUE_TARGETS][real_B]
        values = module.compute_values(batch)[real_B]
        error = nn.functional.smooth_l1_loss(values, targets)  # a round that one deep fade held up says little
        explained = 1 - (values - targets).var() / targets.var().clamp(min=1e-9)
        clipped_share = ((ratio - 1).abs() > config.clip_param).float().mean()
        figures = dict(zip(FIGURES, (-gain, error, explained, entropy, clipped_share), strict=True))
        self.metrics.log_dict(figures, key=module_id, window=1)
        return -gain + config.vf_loss_coeff * error - config.entropy_coeff * entropy


LOGGED = ("reward", *TERMS, "infeasible")
FIGURES = ("policy_loss", "value_error", "explained", "entropy", "clipped_share")
_TIMERS = {"sampling_s": ENV_RUNNER_SAMPLING_TIMER, "learning_s": LEARNER_UPDATE_TIMER}


class LogTerms(RLlibCallback):
    """The reward and each of its terms, means of the rounds of an iteration."""

    def on_episode_step(self, *, episode: Any, env_runner: Any, metrics_logger: Any, **kwargs: Any) -> None:  # type: ignore[override]  # gets both
        """Called by RLlib after each round of each episode."""
        info, window = episode.get_infos(-1), env_runner.config.train_batch_size_per_learner
        for name in LOGGED:
            metrics_logger.log_value(f"term_{name}", info[name], window=window)


class Training:
    """Iterations of PPO, one by one."""

    def __init__(
        self, settings: Sequence[Setting], ppo: PPOSettings, iterations: int, seed: int, checkpoint: Path | None = None
    ):
        """`settings`: see FleetVectorEnv; `checkpoint`: where an earlier one was saved, to go on with. Needs a running
        Ray."""
        for name in ("ray.rllib", "ray.tune"):
            logging.getLogger(name).setLevel(logging.ERROR)
        gymnasium.logger.min_level = gymnasium.logger.ERROR
        self.ppo = ppo
        torch.set_num_threads(ppo.num_threads)
        self.algorithm = rllib_config(settings, ppo, iterations, seed).build_algo()
        if checkpoint:
            self.algorithm.restore_from_path(checkpoint.resolve())

    def iterate(self) -> dict[str, float]:
        """Play and learn once: the mean reward of a round and its terms, what PPO says of itself, seconds."""
        result = self.algorithm.train()
        if ENV_RUNNER_RESULTS not in result:
            raise RuntimeError("no environment is left that plays; its error is above")
        played, learned = result[ENV_RUNNER_RESULTS], result[LEARNER_RESULTS][DEFAULT_MODULE_ID]
        terms = {name: float(played[f"term_{name}"]) for name in LOGGED}
        seconds = {name: float(result[TIMERS][key]) for name, key in _TIMERS.items()}
        return terms | {name: float(learned[name]) for name in FIGURES} | seconds

    @property
    def iteration(self) -> int:
        """How many there were."""
        return int(self.algorithm.iteration)

    def policy(self, about: About) -> Policy:
        """As it is used without RLlib."""
        module = self.algorithm.get_module()
        assert isinstance(module, BranchingModule)
        if not isinstance(module.network, SharedNetwork):
            raise ValueError("independent heads serve one fleet only and are not exported")
        weights = {name: value.detach().cpu().numpy() for name, value in module.network.state_dict().items()}
        return Policy(about, weights)

    def player(self) -> Player:
        """The likeliest choices of what was learned so far, for an episode of as many candidates."""
        module = self.algorithm.get_module()
        assert isinstance(module, BranchingModule)

        def decide(episode: Episode) -> Plan:
            rows = torch.from_numpy(observe(episode.round, episode.seen, masked=self.ppo.penalty is None))[None]
            with torch.no_grad():
                branches = branches_of(module.columns).from_logits(module.masked_logits(rows))
            return plan_of(branches.to_deterministic().sample()[0].numpy(), episode.seen)

        return decide

    def save(self, directory: Path) -> None:
        """A checkpoint; what lies there is replaced once it is whole."""
        new = directory.with_name(directory.name + ".new")
        shutil.rmtree(new, ignore_errors=True)
        self.algorithm.save_to_path(new.resolve())
        shutil.rmtree(directory, ignore_errors=True)
        new.rename(directory)

    def close(self) -> None:
        """Free its actors."""
        self.algorithm.stop()
