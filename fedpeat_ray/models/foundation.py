"""Pre-trained transformers: the embedded ones, or any from Hugging Face or a directory.

Only safetensors are read and no code of a model's repository is run. Processes of one machine share
the frozen weights through a private memory map of one file: pages are shared, a stray write is not.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import peft
import torch
import transformers
from accelerate import init_empty_weights
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D

from fedpeat_ray.errors import ConfigError, FedPeatError, ModelError
from fedpeat_ray.files import file_sha256, kept_sha256, user_cache_dir, written_with_hash
from fedpeat_ray.models import weight_files
from fedpeat_ray.models.architecture import CAUSAL, Head, configuration, model_class, with_head
from fedpeat_ray.models.layout import Layout
from fedpeat_ray.models.traits import Traits, check_configuration, configured_positions, examine, linear_head
from fedpeat_ray.seeding import derive_seed

PAIR = ("pydoc-base", "pydoc-small")
"""Language models of one vocabulary."""

EMBEDDED = (*PAIR, "pydoc-roberta", "glyph-vit")
_VERSION = 1  # of the files of weights: raise it when the same model gives others
_NOT_THE_MODEL = ("transformers_version", "_name_or_path", "dtype", "torch_dtype")  # in a configuration
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
    """SHA-256 of that file and of the configuration: equal for equal models."""
    blocks: tuple[int, ...] | None = None
    """Numbers of the blocks that the file holds; None: all of them."""
    traits: Traits | None = None
    """What the model does; None: not known yet."""

    @property
    def shapes(self) -> weight_files.Shapes:
        """Types and shapes of the tensors in that file, by name."""
        return weight_files.shapes_of(self.weights)

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


def fast_training_dtype() -> Literal["bfloat16", "float32"]:
    """bfloat16 where this machine multiplies it natively, otherwise float32."""
    if torch.cuda.is_available():
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    return "bfloat16" if torch.ops.mkldnn._is_mkldnn_bf16_supported() and _has_bf16_instructions() else "float32"


def prepare(
    name: str,
    training_dtype: str,
    cache_dir: Path | None = None,
    field: str = "foundation.name",
    head: Head = CAUSAL,
    pretrained: bool = True,
) -> Foundation:
    """Find the model and write its exact weights to one node-local file (once).

    What the model lacks for the task's head, or all of it if it is not to be pre-trained, starts with random numbers,
    always the same ones.

    Raises ConfigError, of the setting `field`, for a name that is neither embedded, a directory, nor known
    to Hugging Face, ModelError if what is found is no model for this head in safetensors files.
    """
    config_dir = model_dir(name, field, weights=pretrained)
    source = sorted(config_dir.glob("*.safetensors")) if pretrained else []
    if pretrained and not source:
        raise ModelError(f"{field} = {name!r}: {config_dir} holds no safetensors file")
    setting = f"{field} = {name!r}"
    try:
        config_json = with_head((config_dir / "config.json").read_text(), head, _end_token(config_dir, head))
    except ModelError as error:
        raise ModelError(f"{setting}: {error}") from error
    dtype = torch.float64 if training_dtype == "float64" else torch.float32
    key = hashlib.sha256(f"{_VERSION} {transformers.__version__} {dtype}".encode())  # it names the tensors
    for path in (config_dir / "config.json", *source):
        key.update(bytes.fromhex(file_sha256(path)))
    if head != CAUSAL or not pretrained:
        key.update(f"{config_json} {pretrained}".encode())
    weights = (cache_dir or user_cache_dir()) / f"backbone-{key.hexdigest()[:16]}.safetensors"
    if (sha256 := kept_sha256(weights)) is None:
        files = _files_of_tensors(config_json, source)
        with written_with_hash(weights) as part:
            if files is None:
                model = _started(setting, config_dir if pretrained else None, config_json, head, dtype)
                save_file({name: tensor.contiguous() for name, tensor in tensors_of(model).items()}, part)
            else:  # one tensor at a time, for models larger than memory
                shapes = {name: (dtype, shape) for name, (_, shape) in files.items()}
                weight_files.write(part, shapes, lambda name: weight_files.read(files[name][0], name).to(dtype))
        sha256 = file_sha256(weights)
    digest = model_digest(sha256, config_json)
    foundation = Foundation(name, config_dir, config_json, weights, training_dtype, digest)
    try:
        traits = Traits(**asked(foundation, "traits", lambda model: dataclasses.asdict(examine(model))))
    except ModelError as error:
        raise ModelError(f"{setting}: {error}") from error
    return dataclasses.replace(foundation, traits=traits)


def tensors_of(model: PreTrainedModel) -> dict[str, Tensor]:
    """All that a file of the model's weights has, by name: parameters, tied ones once, and what else it saves."""
    first_name = {id(parameter): name for name, parameter in model.named_parameters()}
    state = model.state_dict(keep_vars=True).items()
    return {name: tensor.detach() for name, tensor in state if first_name.get(id(tensor), name) == name}


def model_digest(weights_sha256: str, config_json: str) -> str:
    """SHA-256 of weights and configuration, without what the latter says about how it was saved."""
    values = {name: value for name, value in json.loads(config_json).items() if name not in _NOT_THE_MODEL}
    return hashlib.sha256(f"{weights_sha256} {json.dumps(values, sort_keys=True)}".encode()).hexdigest()


def load_backbone(foundation: Foundation, device: torch.device | str = "cpu") -> Backbone:
    """The frozen model twice, or once if the types agree."""
    exact = load(foundation, device)
    dtype = getattr(torch, foundation.training_dtype)
    same = dtype == next(exact.parameters()).dtype
    return Backbone(exact, exact if same else _with_weights_in(dtype, load(foundation, device)))


def load(foundation: Foundation, device: torch.device | str = "cpu") -> PreTrainedModel:
    """The frozen exact model in evaluation mode, its weights mapped from the node-local file."""
    model = empty(foundation.config_json, foundation.exact_dtype)
    if foundation.blocks is not None:
        name = block_list_name(model)
        model.set_submodule(name, block_view(model.get_submodule(name), foundation.blocks))
    state = load_file(foundation.weights)
    _, unexpected = model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    left = [name for name, tensor in model.named_parameters() if tensor.is_meta]
    if unexpected or left:
        raise ModelError(f"{foundation.weights} does not fit {type(model).__name__}: {unexpected or left}")
    model.traits = foundation.traits  # type: ignore[assignment]  # torch annotates what modules usually hold
    return model.to(device).requires_grad_(False).eval()  # type: ignore[arg-type]  # a name is a device, too


def asked(foundation: Foundation, about: str, question: Callable[[PreTrainedModel], dict]) -> dict:
    """The plain values that `question` returns for the first blocks of a model, remembered beside its weights.

    `about` names the question. The model is in float64, or in float32 if it fixes a narrower type inside
    itself; of its blocks there are as few as have all kinds, two at least. Raises ModelError in place of
    what the model raises.
    """
    versions = f"{_VERSION} {transformers.__version__} {torch.__version__} {peft.__version__}"
    key = hashlib.sha256(f"{versions} {foundation.digest} {about}".encode()).hexdigest()[:16]
    path = foundation.weights.with_name(f"asked-{key}.json")
    if kept_sha256(path) is None:
        answer = _ask_first_blocks(foundation, question)
        with written_with_hash(path) as part:
            part.write_text(json.dumps(answer))
    return json.loads(path.read_text())


def _ask_first_blocks(foundation: Foundation, question: Callable[[PreTrainedModel], dict]) -> dict:
    model, error = load(foundation), None
    check_configuration(model)
    name = block_list_name(model)
    blocks = list(model.get_submodule(name).children())
    each = [(kind, _structure(block)) for kind, block in zip(_layer_types(model, len(blocks)), blocks, strict=True)]
    num_blocks = max(2, *(each.index(kind) + 1 for kind in each))
    model.set_submodule(name, block_view(model.get_submodule(name), range(min(num_blocks, len(blocks)))))
    for dtype in (torch.float64,) if foundation.exact_dtype == torch.float64 else (torch.float64, torch.float32):
        try:
            return question(_with_weights_in(dtype, model))
        except FedPeatError:
            raise
        except Exception as raised:  # the code of any model may raise anything
            error = raised
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    raise ModelError(f"{type(model).__name__} cannot be run on its inputs alone: {reason}") from error


def _layer_types(model: PreTrainedModel, num_blocks: int) -> Sequence[str]:
    """What the configuration calls each block, such as one with sliding attention."""
    named = getattr(model.config, "layer_types", None) or []
    return named if len(named) == num_blocks else [""] * num_blocks


def _structure(block: nn.Module) -> list[tuple[str, type, list[torch.Size]]]:
    """The modules inside: names, kinds and shapes; equal for blocks that do the same."""
    return [(name, type(m), [p.shape for p in m.parameters(recurse=False)]) for name, m in block.named_modules()]


def empty(config_json: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model without memory for its parameters, and with its buffers as they are for weights of this type."""
    config = _tuning_config(configuration(config_json))
    with init_empty_weights(include_buffers=False), no_init_weights(), _nothing_filled():
        model = model_class(config)._from_config(config, dtype=dtype)
    model.tie_weights()
    return model


@contextmanager
def _nothing_filled() -> Iterator[None]:
    """No numbers for tensors on their way to have no memory: with deterministic algorithms PyTorch fills each new one,
    and what was only asked for is touched, all of it."""
    settings: Any = torch.utils.deterministic  # a module with a property
    before, settings.fill_uninitialized_memory = settings.fill_uninitialized_memory, False
    try:
        yield
    finally:
        settings.fill_uninitialized_memory = before


def weights_layout(model: PreTrainedModel) -> Layout:
    """Every weight of the model as a flat vector; tied ones once."""
    named = dict(model.named_parameters())
    return Layout(tuple(named), tuple(tuple(tensor.shape) for tensor in named.values()))


def save_weights(directory: Path, foundation: Foundation, layout: Layout, weights_P: Tensor) -> None:
    """Write the foundation with these weights as a directory that `from_pretrained` reads."""
    model = load(foundation)
    for name, tensor in layout.unflatten(weights_P).items():
        model.get_parameter(name).data = tensor
    # accelerate loads DeepSpeed to save a model, which prints what it finds unless it is told
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    model.save_pretrained(directory)
    load_tokenizer(foundation.config_dir).save_pretrained(directory)


def load_tokenizer(config_dir: Path) -> PreTrainedTokenizerBase:
    """The tokenizer beside the model. Raises ModelError if there is none or it has no end-of-text token."""
    try:
        tokenizer = cast(PreTrainedTokenizerBase, AutoTokenizer.from_pretrained(config_dir, trust_remote_code=False))
    except (OSError, ValueError) as error:
        raise ModelError(f"{config_dir} holds no tokenizer: {str(error).splitlines()[0]}") from error
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # what transformers makes up where there are no files
        raise ModelError(f"{config_dir} holds no tokenizer, or one without a vocabulary")
    if tokenizer.eos_token_id is None and tokenizer.sep_token_id is not None:
        tokenizer.eos_token = tokenizer.sep_token  # what ends a text for BERT
    if tokenizer.eos_token_id is None:
        raise ModelError(f"the tokenizer in {config_dir} has no end-of-text token")
    return tokenizer


def block_list_name(model: PreTrainedModel) -> str:
    """Name of the list of transformer blocks, e.g. `transformer.h` or `model.layers`; the encoder's where there are
    two."""
    return block_list_names(model)[0]


def block_list_names(model: PreTrainedModel) -> list[str]:
    """Those of an encoder and of a decoder, where a model has both. Raises ModelError if there is none."""
    depth = model.config.num_hidden_layers
    names = [n for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    if not names:
        raise ModelError(f"{type(model).__name__} has no list of {depth} blocks")
    if not model.config.is_encoder_decoder:
        return names[:1]
    decoder_depth = getattr(model.config, "num_decoder_layers", None) or model.config.decoder_layers
    behind = [n for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == decoder_depth]
    return [names[0], next(name for name in behind if name.split("decoder")[0] != name)]


def block_view(blocks: nn.Module, numbers: Iterable[int], stand_ins: Blocks | None = None) -> nn.ModuleList:
    """Some of the blocks under their own numbers, those in `stand_ins` in place of the model's."""
    view = nn.ModuleList()
    for number in numbers:
        view.add_module(str(number), (stand_ins or {}).get(number) or blocks.get_submodule(str(number)))
    return view


def linear_widths(module: nn.Module) -> tuple[int, int]:
    """(I, O) of a Linear (weight (O, I)) or a Conv1D (weight (I, O))."""
    rows, columns = module.get_parameter("weight").shape
    return (rows, columns) if isinstance(module, Conv1D) else (columns, rows)


def plain_head(model: PreTrainedModel) -> Tensor | None:
    """The output layer (V, D) where logits are hidden states times its transpose and nothing else.

    None for a head that is more (a bias, a scale, a soft cap), or that this process does not hold whole.
    """
    head, traits = linear_head(model), getattr(model, "traits", None)
    if head is None or traits is None or not traits.plain_head or is_sharded(model):
        return None
    return head.weight


def is_sharded(model: nn.Module) -> bool:
    """Whether the parameters are divided over processes (ZeRO-3): only calling a layer brings them together."""
    return any(hasattr(parameter, "ds_id") for parameter in model.parameters())


def max_positions(model: PreTrainedModel) -> int:
    """Longest sequence the model can read; NO_LIMIT where there is none."""
    traits = getattr(model, "traits", None)
    return traits.max_positions if traits else configured_positions(model)


def model_dir(name: str, field: str = "foundation.name", weights: bool = True) -> Path:
    """Where a model lies: embedded, a local directory, or downloaded from Hugging Face, with or without its weights.
    Raises ConfigError."""
    if name in EMBEDDED:
        return _EMBEDDED_DIR / name
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").exists():
            raise ConfigError.of(field, name, "a directory with config.json and safetensors")
        return path.resolve()
    try:
        patterns = ["*.json", "*.model", "*.txt", *(["*.safetensors"] if weights else [])]
        return Path(snapshot_download(name, allow_patterns=patterns))
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


def _started(
    setting: str, config_dir: Path | None, config_json: str, head: Head, dtype: torch.dtype
) -> PreTrainedModel:
    """The model with the weights of a directory, what is lacking of the head random; all of it without a directory."""
    config = configuration(config_json)
    kind = model_class(config)
    with _drawn_alike(), _quiet():
        if config_dir is None:
            return kind._from_config(config, dtype=dtype)
        try:
            model, info = cast(Any, kind).from_pretrained(
                config_dir,
                config=config,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=False,
                ignore_mismatched_sizes=bool(head.labels),
                output_loading_info=True,
            )
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            reason = str(error).splitlines()[0]
            raise ModelError(f"{setting} is no {kind.__name__} that can be read: {reason}") from error
    inside = f"{model.base_model_prefix}."
    lacking = [name for name in info["missing_keys"] if name.startswith(inside) and ".pooler." not in name]
    if lacking or (info["missing_keys"] and not head.labels):
        raise ModelError(f"{setting} has no weights for {sorted(lacking or info['missing_keys'])[0]}")
    return model


@contextmanager
def _drawn_alike() -> Iterator[None]:
    """transformers draws from PyTorch's global generator: for that time it starts from a seed of ours."""
    before = torch.get_rng_state()
    torch.set_rng_state(torch.Generator().manual_seed(derive_seed(0, "initial weights")).get_state())
    try:
        yield
    finally:
        torch.set_rng_state(before)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' report of what it found in a file: what matters of it is an error here."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(before)


def _end_token(config_dir: Path, head: Head) -> int | None:
    """Of the tokenizer, if there is one, for a head that must know where a text ends."""
    if not head.labels:
        return None
    try:
        return load_tokenizer(config_dir).eos_token_id
    except ModelError:
        return None


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
        config._experts_implementation = "eager"  # as fast as the grouped kernel, which knows no float64
    return config
