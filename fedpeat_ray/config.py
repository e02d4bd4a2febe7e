"""Every setting of a run: frozen dataclasses, one part a component, each field with its help text.

The same objects are the command line (`--fleet.num-devices 2000`), the Python interface and
`config.json`. `SimulationConfig.validate` is called before anything starts; it raises ConfigError
with the field, its value and what is allowed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from fedpeat_ray.errors import ConfigError, one_of
from fedpeat_ray.settings import (
    Bounds,
    Decay,
    NonNegative,
    NonNegativeInt,
    Number,
    Positive,
    PositiveInt,
    SequenceLength,
    Settings,
    Share,
    as_words,
    check,
    differences,
    from_plain,
    of_today,
    to_plain,
)

REMOVED = {
    "evaluation.num_sequences_per_tier": "quality by tier, while the text of devices does not depend on their tier",
}
"""Settings that there once were and what for: config.json of older runs still has them, and they are ignored."""

RENAMED = {"evaluation.upper_bound": "centralised"}
"""What settings in config.json of older runs are called now."""

TIER_NAMES = ("sbc", "phone-low", "phone-mid", "phone-high", "laptop", "edge-gpu", "edge-gpu-large")
"""Those of fleet/tiers.py, in their order, in which config.json of older runs has their shares."""

SHARES = (0.25, 0.5, 0.75)
"""Of the middle blocks, where emulator.shares is auto and the model is deep enough."""


@dataclass(frozen=True)
class FoundationConfig(Settings):
    """The pre-trained model that is tuned."""

    name: str = "pydoc-base"
    """Embedded model (pydoc-base, pydoc-small), Hugging Face name, or local directory."""
    pretrained: bool = True
    """False: start from random weights, for comparison."""
    num_shards: PositiveInt = 1
    """Processes that share the foundation on the driver's side (DeepSpeed ZeRO-3); above 1 no process has all of it."""
    num_gpus: Positive | None = None
    """GPU share of a shard; unset: 1 where the cluster has GPUs, else 0. With one shard, hosts hold the foundation."""
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"
    """Type of the frozen weights while adapters are trained; auto: bfloat16 where the hardware multiplies
    it natively. Adapters, full fine-tuning and evaluation are in float32 (float64 with float64)."""


@dataclass(frozen=True)
class LoraConfig(Settings):
    """Low-rank adaptation (Hu et al. 2022), with PEFT's initialisation and scaling alpha / rank."""

    rank: PositiveInt = 8
    """Rank of the factors."""
    alpha: Positive = 16.0
    """Scaling numerator: the update is alpha / rank * B A."""
    rank_stabilized: bool = False
    """Scale by alpha / sqrt(rank) instead, so that high ranks learn as fast (rsLoRA)."""
    targets: tuple[str, ...] = ()
    """Names of the modules to adapt, e.g. c_attn c_fc. Empty: every linear layer."""
    blocks: tuple[int, ...] = ()
    """Numbers of the blocks to adapt, from 0. Empty: all of them, or the adapter blocks of emulators."""


@dataclass(frozen=True)
class PeftConfig(Settings):
    """What FedPEFT trains; a head that the task puts on the model is always trained, too."""

    module: Literal["lora", "ia3", "bias", "head", "houlsby", "prompt", "prefix", "full"] = "lora"
    """lora (see lora); ia3: factors of keys, values and feed-forward layers; bias: every bias; head: that alone;
    houlsby: bottleneck adapters; prompt: learned tokens before a text, or in each block for images; prefix: learned
    keys and values; full: all weights."""
    adapter_width: PositiveInt = 8
    """Width of houlsby's bottleneck."""
    adapters: Literal["both", "feedforward"] = "both"
    """Where houlsby's adapters are: behind attention and feed-forward layer of a block, or behind the latter."""
    num_tokens: PositiveInt = 10
    """Learned tokens of prompt and prefix."""


@dataclass(frozen=True)
class DistilConfig(Settings):
    """How kept blocks learn, on public text, to stand in for those left out."""

    steps: PositiveInt = 1200
    """Optimizer steps; every step trains the emulator of one level."""
    batch_size: PositiveInt = 16
    """Sequences a step."""
    sequence_length: SequenceLength = 128
    """Tokens a sequence."""
    learning_rate: Positive = 3e-3
    """Peak learning rate of AdamW; it rises over a tenth of the steps and falls to zero."""
    output_weight: NonNegative = 30.0
    """Weight of the error of the middle's output, beside the language model's loss of weight 1."""
    seed: NonNegativeInt = 0
    """Draws text and levels; not the run's seed, so that runs of several seeds share their emulators."""


@dataclass(frozen=True)
class EmulatorConfig(Settings):
    """What devices get of the foundation in FedPEAT, and what they train in it."""

    first: NonNegativeInt | Literal["auto"] = "auto"
    """Adapter blocks at the start of the foundation; auto: 2, or 1 in a model of fewer than 8 blocks."""
    last: NonNegativeInt | Literal["auto"] = "auto"
    """Adapter blocks at its end; auto: the same."""
    shares: tuple[float, ...] | Literal["auto"] = "auto"
    """Share of the blocks between that level 1, 2, … keeps; the level above them is the foundation itself. auto: 0.25
    0.5 0.75, or as many of these as keep different numbers of blocks."""
    give_foundation: bool = False
    """Whether devices may get that level too."""
    trained: Literal["lora", "bias", "blocks"] = "lora"
    """What is trained in the adapter blocks: LoRA, the biases, or everything."""
    choice: Literal["uniform", "influence"] = "uniform"
    """Which blocks are kept: evenly spread, or those that change their input most (on public text)."""
    weights: Literal["elastic", "per_level", "foundation"] = "elastic"
    """Weights of the kept blocks: distilled once for all levels, distilled for each, or the foundation's own."""
    eight_bit: bool = False
    """Keep the frozen blocks in 8 bit on devices."""
    realign_every: NonNegativeInt = 0
    """Rounds after which emulators are distilled again, with the current adapter plugged in; 0: never."""
    realign_steps: PositiveInt = 20
    """Optimizer steps of a re-alignment."""
    server_steps: NonNegativeInt = 0
    """Local steps of the server a round, as one more participant, on public text and the foundation; 0: none."""
    distil: DistilConfig = field(default_factory=DistilConfig)

    @property
    def needs_public_text(self) -> bool:
        """Whether anything that is asked for learns from the server's text."""
        distilled = self.weights != "foundation" or self.realign_every > 0
        return distilled or self.choice == "influence" or self.server_steps > 0


@dataclass(frozen=True)
class ControlConfig(Settings):
    """Which emulator a device gets in a round."""

    kind: str = "greedy"
    """fixed: one level for all; random: any that fits its memory; greedy: the largest that fits memory and deadline;
    greedy-by-time, greedy-by-holding: the same for the candidates that are soonest done, or hold an emulator; learned:
    what a trained policy says; or one of your own, module:Name or file.py:Name."""
    level: PositiveInt = 1
    """The level of fixed."""
    candidates: PositiveInt | None = None
    """Devices that the controller chooses from in a round, drawn at random; unset: those that a cohort needs. fixed,
    random and greedy pick a cohort of them at random."""
    policy: Path | None = None
    """Directory of learned's policy, as workloads/train_controller.py writes it; unset: the one that comes with the
    package."""


@dataclass(frozen=True)
class ProxyConfig(Settings):
    """The small model of FedPT, how it steers the foundation, and what it learns from it."""

    small: str = "pydoc-small"
    """Embedded model, Hugging Face name, or local directory, with the vocabulary of the foundation."""
    alpha: Number = 1.0
    """Weight of (tuned small - original small) in the foundation's logits."""
    steps: NonNegativeInt = 20
    """Optimizer steps of distillation a round; 0: none."""
    batch_size: PositiveInt = 8
    """Sequences of public text a step."""
    sequence_length: SequenceLength = 128
    """Tokens a sequence."""
    learning_rate: Positive = 2e-4
    """Of AdamW, on the small model's LoRA."""
    kl_weight: Share = 0.5
    """lambda: weight of the teacher, beside 1 - lambda for the text itself."""
    temperature: Positive = 1.0
    """T: both distributions are softened by it."""
    top_k: PositiveInt | None = None
    """Tokens a position for which the teacher's logits are kept; unset: all."""
    emulators: bool = False
    """Whether devices get emulators of the small model (see emulator, control) instead of all of it."""


@dataclass(frozen=True)
class LocalConfig(Settings):
    """What a client does in a round."""

    batch_size: PositiveInt = 2
    """Sequences a step."""
    sequence_length: SequenceLength = 64
    """Tokens a sequence."""
    max_steps: PositiveInt = 8
    """Most optimizer steps a round."""
    epochs: Positive = 1.0
    """Passes over the device's share; steps = min(max_steps, ceil(epochs * sequences / batch_size))."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """Optimizer on the device; its state starts anew every round."""
    learning_rate: Positive | Literal["auto"] = "auto"
    """Constant learning rate on the device; auto: 2e-3 for LoRA and biases, 5e-4 where whole weights are trained."""
    weight_decay: NonNegative = 0.0
    """Decoupled (AdamW) or L2 (SGD) weight decay of the trained tensors."""
    prox_mu: NonNegative = 0.0
    """FedProx: adds mu / 2 * ||w - w_round_start||^2 to the loss (Li et al. 2020, eq. 2)."""


@dataclass(frozen=True)
class ServerConfig(Settings):
    """What the server does with the mean update (Reddi et al. 2021, algorithm 2)."""

    optimizer: Literal["sgd", "adam", "yogi"] = "sgd"
    """sgd with learning rate 1 and no momentum is FedAvg's plain mean."""
    learning_rate: Positive = 1.0
    """Server learning rate."""
    momentum: Decay = 0.0
    """Momentum (sgd), or beta 1 (adam, yogi)."""
    beta2: Decay = 0.99
    """Second-moment decay (adam, yogi)."""
    tau: Positive = 1e-3
    """Degree of adaptivity, added to the root of the second moment (adam, yogi)."""
    aggregator: str = "weighted-mean"
    """How updates become one: weighted-mean (by a device's number of sequences); or one of your own, module:name or
    file.py:name."""


@dataclass(frozen=True)
class PartitionConfig(Settings):
    """Which documents a device holds: a function of its seed, worked out when needed."""

    kind: Literal["iid", "dirichlet", "by_source", "shards", "natural"] = "dirichlet"
    """iid; Dirichlet(alpha) over sources (or labels); one source (or label) a device, drawn by size; k shards a device;
    natural: every source (or label) is one device, with all of its text."""
    alpha: Positive = 0.3
    """Dirichlet concentration: small is heterogeneous, large is nearly IID."""
    group_by: Literal["source", "label"] = "source"
    """What dirichlet, by_source, shards and natural group documents by."""
    shards_per_device: PositiveInt = 2
    """k of the pathological k-shard split (McMahan et al. 2017)."""
    num_shards: PositiveInt = 400
    """Shards into which the documents, sorted by group, are cut."""
    documents_per_device: Annotated[float, Bounds(1, math.inf, "at least 1")] = 24.0
    """Median number of documents a device holds; inf: all there are in its groups."""
    quantity_sigma: NonNegative = 0.6
    """Standard deviation of the log of the number of documents; 0: all devices alike."""


@dataclass(frozen=True)
class DataConfig(Settings):
    """The text."""

    name: str = "python_docs"
    """python_docs (embedded), Hugging Face dataset name, local file or directory (parquet, csv, jsonl, txt; in a txt
    file a blank line ends a document); or a function of your own, module:name or file.py:name."""
    public_name: str | None = None
    """Text of the server, named like `name`; unset: python_docs has a public part, other text has none."""
    subset: str | None = None
    """Configuration of a hub dataset, e.g. wikitext-2-raw-v1."""
    text_column: str = "text"
    """Column with the text (hub and local data)."""
    source_column: str | None = None
    """Column that says where a document comes from, if any; in local data, otherwise the file's name."""
    label_column: str | None = None
    """Column with a class, if any; for python_docs it is the package."""
    target_column: str | None = None
    """Column with what is to be written for a text (sequence-to-sequence); unset: the name of its class."""
    image_column: str = "image"
    """Column with the images (hub data and Parquet)."""
    split: str = "train"
    """Split of a hub dataset."""
    heldout_share: Annotated[float, Bounds(math.ulp(0.0), 1 - 2**-53, "above 0 and below 1")] = 0.1
    """Share of the documents of every source kept for evaluation (hub and local data)."""
    heldout_by: Literal["document", "source"] = "document"
    """What is held out: documents of every source, or whole sources, so users whose text is never trained on
    (hub and local data of devices)."""
    partition: PartitionConfig = field(default_factory=PartitionConfig)


@dataclass(frozen=True)
class AvailabilityConfig(Settings):
    """When a device can be asked."""

    kind: Literal["always", "markov", "diurnal", "trace"] = "markov"
    """always; Markov on/off; diurnal (a sine over the day, phase by device); a CSV trace."""
    slot_s: Positive = 600.0
    """Length of a slot in virtual seconds: availability changes between slots (markov, diurnal)."""
    mean_on_s: Positive = 7200.0
    """Mean time a device stays available (markov)."""
    mean_off_s: Positive = 1200.0
    """Mean time a device stays unavailable (markov)."""
    day_s: Positive = 86400.0
    """Period (diurnal)."""
    min_share: Share = 0.3
    """Share of devices available at the worst hour (diurnal)."""
    max_share: Share = 0.95
    """Share of devices available at the best hour (diurnal)."""
    trace: Path | None = None
    """CSV with columns device_id,start_s,stop_s: when a device is available (trace)."""


@dataclass(frozen=True)
class ChannelConfig(Settings):
    """The radio link between devices and server."""

    kind: Literal["nominal", "rayleigh", "rician"] = "rayleigh"
    """nominal: the tier's link speeds; otherwise Shannon rate under block fading, capped by them."""
    bandwidth_hz: Positive = 100e6
    """Downlink, and again uplink, bandwidth shared equally by the devices of a round."""
    server_power_w: Positive = 20.0
    """Transmit power of the server, over the whole band."""
    device_power_w: Positive = 0.2
    """Transmit power of a device."""
    noise_dbm_per_hz: Number = -174.0
    """Noise power density (thermal noise at 290 K)."""
    path_loss_db_at_1km: Number = 128.1
    """Path loss at 1 km (3GPP TR 36.814, macro cell)."""
    path_loss_exponent: Positive = 3.76
    """Path loss exponent (the same model: 37.6 dB a decade)."""
    cell_radius_m: Positive = 500.0
    """Devices are spread evenly over a disc of this radius around the server."""
    min_distance_m: Positive = 10.0
    """No device is nearer than this."""
    rician_k: NonNegative = 3.0
    """Power of the line of sight over that of the scattered paths (rician)."""
    min_bytes_per_s: NonNegative = 1e3
    """A link slower than this, either way, is an outage: the device drops out with reason link."""


def shares_by_name(words: list[str]) -> dict[str, float]:
    """From NAME=SHARE each. Raises ConfigError."""
    shares: dict[str, float] = {}
    for word in words:
        name, _, share = word.rpartition("=")
        if name in shares:
            raise ConfigError.of("fleet.tier_shares", word, f"{name} once; it has {shares[name]} already")
        try:
            shares[name] = float(share)
        except ValueError:
            name = ""
        if not name:
            allowed = "NAME=SHARE of one or more tiers, e.g. phone-low=0.5 phone-mid=0.5"
            raise ConfigError.of("fleet.tier_shares", word, allowed)
    return shares


def _words_of(shares: Mapping[str, float]) -> list[str]:
    return [f"{name}={share}" for name, share in shares.items()]


_SHARES = ("NAME=SHARE", shares_by_name, _words_of)


@dataclass(frozen=True)
class FleetConfig(Settings):
    """The simulated population."""

    num_devices: PositiveInt | Literal["auto"] = "auto"
    """Devices in the fleet; auto: 2000, or with data.partition.kind natural one a user."""
    tiers: Path | None = None
    """TOML or CSV file with tiers of your own, as docs/fleet.md says; unset: the seven that are described there."""
    tier_shares: Annotated[Mapping[str, float], as_words(*_SHARES)] = field(default_factory=dict, hash=False)
    """Shares by name, any sum, e.g. phone-low=0.5 phone-mid=0.5; tiers that are not named have none. Empty: each
    tier's own share. Names: sbc, phone-low, phone-mid, phone-high, laptop, edge-gpu, edge-gpu-large; or those in the
    file of tiers."""
    spread: NonNegative = 0.25
    """Standard deviation of the log of speed, of memory and of link (one draw each) inside a tier."""
    memory_scale: Positive = 1.0
    """Multiplies every memory cap: shrink it to make small models feel large."""
    precision: Literal["float32", "float16"] = "float32"
    """Arithmetic in which devices train: which of the tier's speeds counts."""
    availability: AvailabilityConfig = field(default_factory=AvailabilityConfig)
    channel: ChannelConfig = field(default_factory=ChannelConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.tiers, Path):  # it lies where the person was who named it
            object.__setattr__(self, "tiers", self.tiers.absolute())
        if isinstance(self.tier_shares, tuple) and len(self.tier_shares) in (0, len(TIER_NAMES)):
            object.__setattr__(self, "tier_shares", dict(zip(TIER_NAMES, self.tier_shares, strict=False)))

    def check_shares(self, names: Collection[str]) -> None:
        """Raise ConfigError if `tier_shares` are none of tiers with these names."""
        for name, share in self.tier_shares.items():
            if name not in names:
                raise ConfigError.of("fleet.tier_shares", name, one_of(name, names))
            if not 0 <= share < math.inf:
                raise ConfigError.of("fleet.tier_shares", f"{name}={share}", "a finite number of at least 0")
        if self.tier_shares and not 0 < sum(self.tier_shares.values()) < math.inf:
            allowed = "shares of which one is above 0, with a finite sum"
            raise ConfigError.of("fleet.tier_shares", " ".join(_words_of(self.tier_shares)), allowed)

    @property
    def size(self) -> int:
        """Devices in the fleet; of auto what it is where no users are counted."""
        return 2000 if self.num_devices == "auto" else self.num_devices

    @property
    def weight_bytes(self) -> int:
        """Of an element of a model on devices."""
        return 4 if self.precision == "float32" else 2

    def check_has(self, field: str, number: int, partition: PartitionConfig) -> None:
        """Raise ConfigError for a setting, a number of devices, beyond the fleet's; if only the text knows how many
        there are, it is to be asked again."""
        if number <= self.size or (self.num_devices == "auto" and partition.kind == "natural"):
            return
        allowed, group = f"at most fleet.num_devices = {self.size}", partition.group_by
        if partition.kind == "natural":
            allowed += f", as data.partition.kind = 'natural' makes a device of each {group} (data.{group}_column)"
        raise ConfigError.of(field, number, allowed)


@dataclass(frozen=True)
class EvaluationConfig(Settings):
    """Held-out private text, and the reference points."""

    every: PositiveInt = 1
    """Rounds between evaluations; the last round is always evaluated."""
    num_sequences: PositiveInt = 128
    """Held-out sequences for the overall figure."""
    sequence_length: SequenceLength = 128
    """Tokens a held-out sequence."""
    centralised: bool = True
    """Also tune what the algorithm trains centrally, on the pooled data with as many tokens (cached)."""


@dataclass(frozen=True)
class HostsConfig(Settings):
    """The processes that embody devices."""

    backend: Literal["ray", "serial"] = "ray"
    """ray: host actors; serial: in this process, one batch after another (same bits)."""
    address: str | None = None
    """Ray to use: auto joins the cluster that runs on this machine, HOST:PORT that one, local starts one; unset:
    $RAY_ADDRESS if it is set, as in a job, otherwise local."""
    num_hosts: PositiveInt | None = None
    """Host actors; unset: one a GPU of the cluster, or one a core, also of nodes that come later."""
    max_hosts: PositiveInt | None = None
    """In place of a number: as many as a round has work for, at most so many. What the cluster lacks for them its
    autoscaler is asked for, and gets back what is not needed."""
    num_threads: PositiveInt = 1
    """CPU threads of a host. Changing it may change the last bits."""
    num_gpus: NonNegative | None = None
    """GPU share of a host; unset: 1 where the cluster has free GPUs, else 0."""
    memory_gib: Positive | None = None
    """Memory a host reserves in Ray's scheduler (which does not enforce it)."""
    exclusive: bool = False
    """One actor a device, with its tier's GPU fraction and a real allocator cap; tens of devices."""


@dataclass(frozen=True)
class WatchConfig(Settings):
    """Where a run is shown besides its run directory. None of it changes a result."""

    tensorboard: bool = True
    """Write event files for TensorBoard into the run directory."""
    wandb: str | None = None
    """Project of Weights & Biases to show the run in, where wandb is installed; unset: nothing leaves the machine."""


@dataclass(frozen=True)
class SimulationConfig(Settings):
    """A whole run."""

    task: str = "language-modelling"
    """language-modelling; masked-language-modelling; classification (of texts); sequence-to-sequence; images
    (classification); or one of your own, module:Name or file.py:Name."""
    algorithm: str = "fed-peat"
    """fed-peat: adapters on emulators; fed-peft: LoRA on the foundation; fed-pt: LoRA on a small model that steers
    the foundation; fed-avg: averaging of all weights; or one of your own, module:Name or file.py:Name."""
    rounds: PositiveInt = 10
    """Rounds."""
    cohort_size: PositiveInt = 32
    """Devices whose updates a round waits for."""
    seed: NonNegativeInt = 0
    """Everything random follows from it."""
    out: Path | None = None
    """Run directory; unset: a new one under $FEDPEAT_RUNS."""
    resume: Path | None = None
    """Run directory to go on with, from its last checkpoint."""
    accept_changes: bool = False
    """Resume although other versions of what computes are installed: the bits may differ. The log says so."""
    over_sample: Annotated[float, Bounds(1, 1e6, "at least 1")] = 1.25
    """Devices sampled a round, as a multiple of cohort_size; those not needed drop out."""
    deadline_s: Positive | None = None
    """Virtual seconds after which a round ends without the devices that would be late; unset: none."""
    client_batch_size: PositiveInt | Literal["auto"] = "auto"
    """Clients trained together on one backbone; auto measures a few sizes first and logs its choice."""
    checkpoint_every: PositiveInt = 5
    """Rounds between checkpoints; the last round always has one."""
    trace: Path | None = None
    """File to write a timeline to: what the main process and each host did when (Chrome's trace format)."""
    foundation: FoundationConfig = field(default_factory=FoundationConfig)
    data: DataConfig = field(default_factory=DataConfig)
    fleet: FleetConfig = field(default_factory=FleetConfig)
    local: LocalConfig = field(default_factory=LocalConfig)
    peft: PeftConfig = field(default_factory=PeftConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    emulator: EmulatorConfig = field(default_factory=EmulatorConfig)
    control: ControlConfig = field(default_factory=ControlConfig)
    proxy: ProxyConfig = field(default_factory=ProxyConfig)
    server: ServerConfig = field(default_factory=ServerConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    hosts: HostsConfig = field(default_factory=HostsConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)

    def validate(self) -> None:
        """Raise ConfigError for the first setting that cannot be used; reads no file, loads nothing."""
        check(self)
        self.fleet.check_has("cohort_size", self.cohort_size, self.data.partition)
        if self.fleet.tiers is None:
            self.fleet.check_shares(TIER_NAMES)
        availability = self.fleet.availability
        if availability.kind == "trace" and availability.trace is None:
            raise ConfigError.of("fleet.availability.trace", None, "a CSV file when fleet.availability.kind is trace")
        if availability.min_share > availability.max_share:
            allowed = f"at most fleet.availability.max_share = {availability.max_share}"
            raise ConfigError.of("fleet.availability.min_share", availability.min_share, allowed)
        if self.out is not None and self.resume is not None:
            raise ConfigError.of("out", str(self.out), "unset together with resume, which goes on in its own directory")
        if self.accept_changes and self.resume is None:
            raise ConfigError.of("accept_changes", True, "only together with resume")
        if self.hosts.max_hosts is not None and self.hosts.num_hosts is not None:
            raise ConfigError.of("hosts.max_hosts", self.hosts.max_hosts, "unset together with hosts.num_hosts")
        if self.hosts.exclusive and self.hosts.backend != "ray":
            raise ConfigError.of("hosts.exclusive", True, "hosts.backend = 'ray'")

    def without_effect(self, uses: Collection[str]) -> list[tuple[str, Any, str]]:
        """(setting, value, when it would count) of all that differ from their default and change nothing for an
        algorithm that uses these (USES)."""
        found = []
        for path, _, value in differences(SimulationConfig(), self):
            for when, counts, settings in COUNTS_ONLY:
                if any(path == name or path.startswith(f"{name}.") for name in settings) and not counts(self, uses):
                    found.append((path, value, when))
                    break
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: paths as strings, tuples as lists, infinity as "inf"."""
        return to_plain(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> SimulationConfig:
        """The inverse of `to_dict`, also of older versions' (REMOVED, RENAMED); raises ConfigError for a field that
        never was."""
        return from_plain(cls, of_today(values, REMOVED, RENAMED))


LORA, PEFT, STACKED, EMULATORS, PROXY, PUBLIC_TEXT = "lora", "peft", "stacked", "emulators", "proxy", "public text"
USES = frozenset((LORA, PEFT, STACKED, EMULATORS, PROXY, PUBLIC_TEXT))
"""What an algorithm may make use of, so that the settings of it count."""

_PROXY_STEPS = ("batch_size", "sequence_length", "learning_rate", "kl_weight", "temperature", "top_k")
_READING = ("subset", "split", "text_column", "source_column", "label_column", "heldout_share")
_FADING = ("bandwidth_hz", "server_power_w", "device_power_w", "noise_dbm_per_hz", "path_loss_db_at_1km")
_FADING += ("path_loss_exponent", "cell_radius_m", "min_distance_m", "rician_k")

COUNTS_ONLY: tuple[tuple[str, Callable[[SimulationConfig, Collection[str]], bool], tuple[str, ...]], ...] = (
    ("devices train LoRA", lambda _, uses: LORA in uses, ("lora",)),
    ("algorithm is fed-peft", lambda _, uses: PEFT in uses, ("peft",)),
    (
        "devices train small parts such as LoRA",
        lambda c, uses: bool({LORA, STACKED} & set(uses)) or c.client_batch_size == 1,
        ("client_batch_size",),
    ),
    ("peft.module is houlsby", lambda c, _: c.peft.module == "houlsby", ("peft.adapter_width", "peft.adapters")),
    (
        "peft.module is prompt or prefix",
        lambda c, _: c.peft.module in ("prompt", "prefix"),
        ("peft.num_tokens",),
    ),
    ("devices get emulators", lambda _, uses: EMULATORS in uses, ("emulator", "control")),
    ("a small model steers the foundation", lambda _, uses: PROXY in uses, ("proxy",)),
    ("proxy.steps is above 0", lambda c, _: c.proxy.steps > 0, tuple(f"proxy.{name}" for name in _PROXY_STEPS)),
    (
        "emulators are distilled",
        lambda c, _: c.emulator.weights != "foundation" or c.emulator.realign_every > 0,
        ("emulator.distil",),
    ),
    ("emulator.realign_every is above 0", lambda c, _: c.emulator.realign_every > 0, ("emulator.realign_steps",)),
    ("control.kind is learned", lambda c, _: c.control.kind == "learned", ("control.policy",)),
    ("control.kind is fixed", lambda c, _: c.control.kind == "fixed", ("control.level",)),
    ("server.optimizer is adam or yogi", lambda c, _: c.server.optimizer != "sgd", ("server.beta2", "server.tau")),
    ("foundation.num_shards is above 1", lambda c, _: c.foundation.num_shards > 1, ("foundation.num_gpus",)),
    ("something learns from public text", lambda _, uses: PUBLIC_TEXT in uses, ("data.public_name",)),
    (
        "data are not embedded",
        lambda c, uses: c.data.name != "python_docs" or (c.data.public_name is not None and PUBLIC_TEXT in uses),
        tuple(f"data.{name}" for name in _READING),
    ),
    ("data.partition.kind is dirichlet", lambda c, _: c.data.partition.kind == "dirichlet", ("data.partition.alpha",)),
    (
        "data.partition.kind is shards",
        lambda c, _: c.data.partition.kind == "shards",
        ("data.partition.shards_per_device", "data.partition.num_shards"),
    ),
    (
        "data.partition.kind is not natural",
        lambda c, _: c.data.partition.kind != "natural",
        ("data.partition.documents_per_device", "data.partition.quantity_sigma"),
    ),
    ("data.partition.kind is not iid", lambda c, _: c.data.partition.kind != "iid", ("data.partition.group_by",)),
    (
        "fleet.availability.kind is markov",
        lambda c, _: c.fleet.availability.kind == "markov",
        ("fleet.availability.mean_on_s", "fleet.availability.mean_off_s"),
    ),
    (
        "fleet.availability.kind is diurnal",
        lambda c, _: c.fleet.availability.kind == "diurnal",
        ("fleet.availability.day_s", "fleet.availability.min_share", "fleet.availability.max_share"),
    ),
    (
        "fleet.availability.kind is trace",
        lambda c, _: c.fleet.availability.kind == "trace",
        ("fleet.availability.trace",),
    ),
    (
        "fleet.channel.kind is not nominal",
        lambda c, _: c.fleet.channel.kind != "nominal",
        tuple(f"fleet.channel.{name}" for name in _FADING),
    ),
    ("fleet.channel.kind is rician", lambda c, _: c.fleet.channel.kind == "rician", ("fleet.channel.rician_k",)),
    (
        "hosts.backend is ray",
        lambda c, _: c.hosts.backend == "ray",
        ("hosts.address", "hosts.num_hosts", "hosts.max_hosts", "hosts.num_gpus", "hosts.memory_gib"),
    ),
)
"""When settings count that do not always count: a reason, the same as a function, and the settings or whole parts."""
