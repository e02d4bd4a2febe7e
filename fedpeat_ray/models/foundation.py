"""Pre-trained causal language models: the embedded pair, or any from Hugging Face or a directory.

Only safetensors are read and no code of a model's repository is run. Processes of one machine share
the frozen weights through a private memory map of one file: pages are shared, a stray write is not.
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import init_empty_weights
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from fedpeat_ray.errors import ConfigError, ModelError
from fedpeat_ray.files import file_sha256, user_cache_dir, written_whole
from fedpeat_ray.fleet.memory import ModelShape
from fedpeat_ray.models import weight_files
from fedpeat_ray.models.layout import Layout

EMBEDDED = ("pydoc-base", "pydoc-small")
_SCALED_LOGITS = ("final_logit_softcapping", "logit_scale", "logits_scaling")  # in the configurations of some models
_EMBEDDED_DIR = Path(__file__).parent / "embedded"
_FLOATS = ("F64", "F32", "BF16", "F16")  # as safetensors names them


@dataclass(frozen=True)
class Foundation:
    """A model that is ready to be loaded by any process of this machine."""

    name: str
    """As the user gave it; for adapters, what PEFT calls the base model."""
    config_dir: Path
    """Directory with config.json and the tokenizer, on the driver's machine."""
    config_json: str
    """The model's configuration."""
    weights: Path
    """One safetensors file in the exact type, float32 (or float64)."""
    training_dtype: str
    """Type of the frozen weights while adapters are trained: a torch dtype's name."""
    digest: str
    """SHA-256 of that file."""
    blocks: tuple[int, ...] | None = None
    """Numbers of the blocks that the file holds; None: all of them."""

    @property
    def exact_dtype(self) -> torch.dtype:
        """Type of the weights in the file."""
        return torch.float64 if self.training_dtype == "float64" else torch.float32


Blocks = dict[int, nn.Module]
"""Transformer blocks by number."""


@dataclass(frozen=True)
class Backbone:
    """A frozen model as a process holds it: exact, and in the type adapters are trained against.

    The two are one object where the types agree.
    """

    exact: PreTrainedModel
    training: PreTrainedModel
    stand_ins: dict[Path, tuple[Blocks, Blocks]] = field(default_factory=dict)
    """Blocks of emulators that are not the model's own, once they were asked for: exact, and for training."""
    while_training: Callable[[], AbstractContextManager] = nullcontext
    """Around a device's optimizer steps: holds it to its memory, where that is done."""


def fast_training_dtype() -> str:
    """bfloat16 where this machine multiplies it natively, otherwise float32."""
    if torch.cuda.is_available():
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    return "bfloat16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() and _has_bf16_instructions() else "float32"


def prepare(
    name: str, training_dtype: str, cache_dir: Path | None = None, field: str = "foundation.name"
) -> Foundation:
    """Find the model and write its exact weights to one node-local file (once).

    Raises ConfigError, of the setting `field`, for a name that is neither embedded, a directory, nor known
    to Hugging Face, ModelError if what is found is no causal language model in safetensors files.
    """
    config_dir = model_dir(name, field)
    source = sorted(config_dir.glob("*.safetensors"))
    if not source:
        raise ModelError(f"{field} = {name!r}: {config_dir} holds no safetensors file")
    dtype = torch.float64 if training_dtype == "float64" else torch.float32
    key = hashlib.sha256(str(dtype).encode())
    for path in (config_dir / "config.json", *source):
        key.update(bytes.fromhex(file_sha256(path)))
    weights = (cache_dir or user_cache_dir()) / f"backbone-{key.hexdigest()[:16]}.safetensors"
    config_json = (config_dir / "config.json").read_text()
    if not weights.exists():
        files = _files_of_tensors(config_json, source)
        with written_whole(weights) as part:
            if files is None:
                model = _load_pretrained(f"{field} = {name!r}", config_dir, dtype)
                first_name = {id(parameter): name for name, parameter in model.named_parameters()}  # tied weights: once
                state = {
                    name: tensor.detach().contiguous()
                    for name, tensor in model.state_dict(keep_vars=True).items()
                    if first_name.get(id(tensor), name) == name
                }
                save_file(state, part)
            else:  # one tensor at a time, for models larger than memory
                shapes = {name: (dtype, shape) for name, (_, shape) in files.items()}
                weight_files.write(part, shapes, lambda name: weight_files.read(files[name][0], name).to(dtype))
    return Foundation(name, config_dir, config_json, weights, training_dtype, file_sha256(weights))


def load_backbone(foundation: Foundation, device: torch.device | str = "cpu") -> Backbone:
    """The frozen model twice, or once if the types agree."""
    exact = load(foundation, device)
    dtype = getattr(torch, foundation.training_dtype)
    same = dtype == next(exact.parameters()).dtype
    return Backbone(exact, exact if same else _with_weights_in(dtype, load(foundation, device)))


def load(foundation: Foundation, device: torch.device | str = "cpu") -> PreTrainedModel:
    """The frozen exact model in evaluation mode, its weights mapped from the node-local file."""
    model = empty(foundation.config_json)
    if foundation.blocks is not None:
        name = block_list_name(model)
        model.set_submodule(name, block_view(model.get_submodule(name), foundation.blocks))
    state = load_file(foundation.weights)
    _, unexpected = model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    left = [name for name, tensor in model.named_parameters() if tensor.is_meta]
    if unexpected or left:
        raise ModelError(f"{foundation.weights} does not fit {type(model).__name__}: {unexpected or left}")
    return model.to(device).requires_grad_(False).eval()  # type: ignore[arg-type]


def empty(config_json: str) -> PreTrainedModel:
    """The model with its buffers and without memory for its parameters."""
    values = json.loads(config_json)
    config = _tuning_config(AutoConfig.for_model(values.pop("model_type"), **values))
    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    model.tie_weights()
    return model


def weights_layout(model: PreTrainedModel) -> Layout:
    """Every weight of the model as a flat vector; tied ones once."""
    named = dict(model.named_parameters())
    return Layout(tuple(named), tuple(tuple(tensor.shape) for tensor in named.values()))


def save_weights(directory: Path, foundation: Foundation, layout: Layout, weights_P: Tensor) -> None:
    """Write the foundation with these weights as a directory that `from_pretrained` reads."""
    model = load(foundation)
    for name, tensor in layout.unflatten(weights_P).items():
        model.get_parameter(name).data = tensor
    model.save_pretrained(directory)
    load_tokenizer(foundation.config_dir).save_pretrained(directory)


def load_tokenizer(config_dir: Path) -> PreTrainedTokenizerBase:
    """The tokenizer beside the model. Raises ModelError if there is none or it has no end-of-text token."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(config_dir, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ModelError(f"{config_dir} holds no tokenizer: {error}") from error
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # what transformers makes up where there are no files
        raise ModelError(f"{config_dir} holds no tokenizer, or one without a vocabulary")
    if tokenizer.eos_token_id is None:
        raise ModelError(f"the tokenizer in {config_dir} has no end-of-text token")
    return tokenizer


def block_list_name(model: PreTrainedModel) -> str:
    """Name of the list of transformer blocks, e.g. `transformer.h` or `model.layers`."""
    depth = model.config.num_hidden_layers
    names = [n for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    if not names:
        raise ModelError(f"{type(model).__name__} has no list of {depth} blocks")
    return names[0]


def block_view(blocks: nn.Module, numbers: Iterable[int], stand_ins: Blocks | None = None) -> nn.ModuleList:
    """Some of the blocks under their own numbers, those in `stand_ins` in place of the model's."""
    view = nn.ModuleList()
    for number in numbers:
        view.add_module(str(number), (stand_ins or {}).get(number) or blocks.get_submodule(str(number)))
    return view


def model_shape(model: PreTrainedModel, weight_bytes: int) -> ModelShape:
    """What the memory and cost models need to know about a decoder-only model, held in `weight_bytes` an element."""
    config = model.config
    blocks = model.get_submodule(block_list_name(model))
    mlp_width = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * config.hidden_size
    rotary = not any(isinstance(module, nn.Embedding) for module in _position_embeddings(model))
    return ModelShape(
        num_blocks=config.num_hidden_layers,
        width=config.hidden_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or config.num_attention_heads,
        mlp_width=mlp_width,
        gated_mlp=any(name.endswith("gate_proj") for name, _ in blocks.named_modules()),
        vocabulary=config.vocab_size,
        num_positions=0 if rotary else config.max_position_embeddings,
        bias=any(name.endswith("bias") and "ln" not in name for name, _ in blocks.named_parameters()),
        weight_bytes=weight_bytes,
        num_parameters=sum(p.numel() for p in model.parameters()),
        block_parameters=sum(p.numel() for p in blocks.get_submodule("0").parameters()),
    )


def plain_head(model: PreTrainedModel) -> Tensor | None:
    """The output layer (V, D) where logits are hidden states times its transpose and nothing else.

    None for a head that is more (a bias, a soft cap) or that this process does not hold whole.
    """
    head = model.get_output_embeddings()
    more = any(getattr(model.config, name, None) for name in _SCALED_LOGITS)
    if not isinstance(head, nn.Linear) or head.bias is not None or more or is_sharded(model):
        return None
    return head.weight


def is_sharded(model: nn.Module) -> bool:
    """Whether the parameters are divided over processes (ZeRO-3): only calling a layer brings them together."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def max_positions(model: PreTrainedModel) -> int:
    """Longest sequence the model can read."""
    return model.config.max_position_embeddings


def _position_embeddings(model: PreTrainedModel) -> list[nn.Module]:
    tokens = model.get_input_embeddings()
    return [m for m in model.modules() if isinstance(m, nn.Embedding) and m is not tokens]


def model_dir(name: str, field: str = "foundation.name") -> Path:
    """Where a model lies: embedded, a local directory, or downloaded from Hugging Face. Raises ConfigError."""
    if name in EMBEDDED:
        return _EMBEDDED_DIR / name
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").exists():
            raise ConfigError.of(field, name, "a directory with config.json and safetensors")
        return path.resolve()
    try:
        return Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        allowed = f"{', '.join(EMBEDDED)}, a local directory, or a Hugging Face model that can be reached"
        raise ConfigError.of(field, name, allowed) from error


def _files_of_tensors(config_json: str, source: list[Path]) -> dict[str, tuple[Path, tuple[int, ...]]] | None:
    """Where each tensor of the model lies, and its shape, if the files hold just these; otherwise None."""
    found: dict[str, tuple[Path, tuple[int, ...]]] = {}
    try:
        for path in source:
            with safe_open(path, framework="pt") as file:
                for name in list(file.keys()):
                    part = file.get_slice(name)
                    if name in found or part.get_dtype() not in _FLOATS:
                        return None
                    found[name] = (path, tuple(part.get_shape()))
        model = empty(config_json)
    except (OSError, ValueError, KeyError, SafetensorError):  # to be read, or refused, by from_pretrained
        return None
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    has_buffers = len(model.state_dict()) > len(list(model.named_parameters(remove_duplicate=False)))
    return found if not has_buffers and shapes == {name: shape for name, (_, shape) in found.items()} else None


def _load_pretrained(setting: str, config_dir: Path, dtype: torch.dtype) -> PreTrainedModel:
    try:
        return AutoModelForCausalLM.from_pretrained(
            config_dir, dtype=dtype, use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(f"{setting} is no causal language model that can be read: {reason}") from error


def _with_weights_in(dtype: torch.dtype, model: PreTrainedModel) -> PreTrainedModel:
    """Rounded weights; buffers stay, as in `from_pretrained`: rotary positions need their float32 frequencies."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def _has_bf16_instructions() -> bool:
    """On x86: AVX512-BF16 or AMX; elsewhere trust oneDNN."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return True
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def _tuning_config(config: PretrainedConfig) -> PretrainedConfig:
    """The same function in faster kernels, and without what a training step has no use for."""
    config.use_cache = False  # a training forward would build a key-value cache
    if getattr(config, "activation_function", None) == "gelu_new":
        config.activation_function = "gelu_pytorch_tanh"  # the same formula in one kernel instead of eight
    if not torch.cuda.is_available():
        config._attn_implementation = "eager"  # faster than the fused kernel at a device's short sequences
    return config
