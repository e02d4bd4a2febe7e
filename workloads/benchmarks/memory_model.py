"""The memory model against what PyTorch allocates on the CPU, for families of models in random settings.

    python workloads/benchmarks/memory_model.py [--settings 40] [--families gpt2 BertForMaskedLM] [--seed 0]

A family is that of a causal language model, or a class of transformers. A setting is a model of random widths, depth,
heads and vocabulary, a batch, what is trained, and perhaps an emulator with a frozen middle, in float32, or bfloat16
if it is a language model of a family. Measured is the plain loop of transformers, PEFT and torch.optim: the
peak of a step once the optimizer's state exists. Columns: modelled over measured of the whole peak, and of what a
step adds to weights, adapter and optimizer state: median, least and greatest; and how many settings are not within
10 %.
"""

from __future__ import annotations

import contextlib
import logging
import random
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
import tyro
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fedpeat_ray.fleet.memory import WHOLE, Memory, Trainable, training_memory
from fedpeat_ray.models.architecture import TARGET_LENGTH, is_classifier, model_class
from fedpeat_ray.models.foundation import Foundation, block_list_names
from fedpeat_ray.trainable.houlsby import find_houlsby
from fedpeat_ray.trainable.ia3 import find_ia3
from fedpeat_ray.trainable.part import Part
from fedpeat_ray.trainable.prompt import find_prefix, find_prompt
from fedpeat_ray.trainable.shape import TESTED_CLASSES, TESTED_FAMILIES, model_shape, put_in
from fedpeat_ray.trainable.weights import head_parameters

IMAGE_SIZE, PATCH_SIZE = 32, 4
IMAGE_TOKENS = (IMAGE_SIZE // PATCH_SIZE) ** 2 + 1


@dataclass(frozen=True)
class BenchmarkConfig:
    families: tuple[str, ...] = (*TESTED_FAMILIES, *TESTED_CLASSES)
    """Of those that are tested."""
    settings: int = 40
    """Random settings of each."""
    seed: int = 0


@dataclass(frozen=True)
class Setting:
    """A model, what is trained of it, and on what."""

    family: str
    num_blocks: int
    width: int
    vocabulary: int
    batch_size: int
    sequence_length: int
    trainable: Trainable
    optimizer: str = "adamw"
    dtype: torch.dtype = torch.float32
    tied: bool = True
    rank: int = 8
    emulator: tuple[int, int, int] | None = None
    """Blocks kept at the start, in the middle, at the end; those of the middle are frozen. None: all, trained."""
    int8: bool = False
    """The frozen blocks' matrices are held in 8 bits."""
    num_heads: int | None = None
    """None: 8, or with GPT-2 one for 64 features."""
    num_kv_heads: int = 2
    """Where the family knows the difference."""
    head_dim: int | None = None
    """Where it may be other than width / num_heads."""
    mlp_width: int | None = None
    """None: 11/4 of the width, or with GPT-2 4 times."""
    experts: tuple[int, int] = (4, 2)
    """How many, and to how many of them a token goes."""
    architecture: str | None = None
    """Class of transformers; None: the family's causal language model."""
    part_size: int = 4
    """Width of bottlenecks, or learned tokens."""

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        emulator = "-" + "+".join(map(str, self.emulator)) if self.emulator else ""
        kind = f"-{self.architecture}" if self.architecture else ""
        return (
            f"{self.family}{kind}-{self.num_blocks}x{self.width}-vocabulary{self.vocabulary}"
            f"{'' if self.tied else '-untied'}-{dtype}-{self.batch_size}x{self.sequence_length}-{self.trainable}"
            f"-{self.optimizer}{emulator}{'-int8' if self.int8 else ''}"
        )


def random_setting(family: str, seed: int) -> Setting:
    """One of many, small enough for a fraction of a second."""
    rng = random.Random(f"{family} {seed}")
    architecture = family if family in TESTED_CLASSES else None
    kinds: tuple[Trainable, ...] = ("lora", "blocks", "all", *(("bias",) if family in ("gpt2", "opt") else ()))
    if architecture:
        family, kinds = getattr(transformers, architecture).config_class.model_type, TESTED_CLASSES[architecture]
    trainable = rng.choice(kinds)
    depth, num_heads = rng.randint(2, 6), rng.choice((2, 4, 8))
    first = rng.randint(0, depth - 1)
    emulator = (first, depth - first, rng.randint(0 if first else 1, 2))
    return Setting(
        family=family,
        num_blocks=sum(emulator),
        width=num_heads * rng.choice((16, 24, 32, 64)),
        vocabulary=rng.randint(300, 5000),
        batch_size=rng.randint(1, 6),
        sequence_length=IMAGE_TOKENS if family == "vit" else rng.randint(8, 160),
        trainable=trainable,
        optimizer=rng.choice(("adamw", "adamw", "sgd")),
        dtype=torch.float32 if architecture else rng.choice((torch.float32, torch.float32, torch.bfloat16)),
        tied=rng.choice((True, False)),
        rank=rng.choice((1, 4, 8, 16, 32)),
        emulator=None if trainable in (*WHOLE, "head") or rng.random() < 0.4 else emulator,
        num_heads=num_heads,
        num_kv_heads=rng.choice([n for n in (1, 2, 4, 8) if num_heads % n == 0]),
        head_dim=rng.choice((16, 32, 48, 64)),
        mlp_width=8 * rng.randint(8, 100),
        experts=rng.choice(((4, 1), (4, 2), (6, 3), (8, 2))),
        architecture=architecture,
        part_size=rng.choice((2, 8, 20)),
    )


def model_config(setting: Setting) -> PretrainedConfig:
    """The configuration of the model, dropout 0."""
    heads = setting.num_heads or (setting.width // 64 if setting.family == "gpt2" else 8)
    mlp_width = setting.mlp_width or (4 * setting.width if setting.family == "gpt2" else setting.width * 11 // 4)
    positions = setting.sequence_length + (setting.part_size if setting.trainable in ("prompt", "prefix") else 0)
    sizes: dict[str, Any] = {
        "num_hidden_layers": setting.num_blocks,
        "hidden_size": setting.width,
        "num_attention_heads": heads,
        "vocab_size": setting.vocabulary,
        "tie_word_embeddings": setting.tied,
        "use_cache": False,
        "pad_token_id": 0,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    if setting.architecture:
        sizes |= {"architectures": [setting.architecture], "num_labels": 3}
    if setting.family == "t5":
        sizes |= {"num_layers": sizes.pop("num_hidden_layers"), "d_model": sizes.pop("hidden_size")}
        sizes |= {"num_heads": sizes.pop("num_attention_heads"), "decoder_start_token_id": 0}
    both_ways = {
        "intermediate_size": mlp_width,
        "max_position_embeddings": max(64, positions + 2),  # RoBERTa counts them from 2
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    wide = {"intermediate_size": mlp_width, "num_key_value_heads": setting.num_kv_heads}
    own = {
        "gpt2": {
            "n_inner": mlp_width,
            "n_positions": positions,
            "activation_function": "gelu_pytorch_tanh",
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
        },
        "opt": {
            "ffn_dim": mlp_width,
            "word_embed_proj_dim": setting.width,
            "max_position_embeddings": positions,
            "dropout": 0.0,
        },
        "llama": wide,
        "qwen3": wide | {"head_dim": setting.head_dim or 2 * setting.width // heads},
        "gemma2": wide | {"head_dim": setting.head_dim or 2 * setting.width // heads},
        "phi3": wide,
        "bert": both_ways,
        "roberta": both_ways,
        "t5": {"d_ff": mlp_width, "d_kv": setting.width // heads, "num_decoder_layers": 2, "dropout_rate": 0.0},
        "vit": both_ways | {"image_size": IMAGE_SIZE, "patch_size": PATCH_SIZE},
        "mixtral": wide | {"num_local_experts": setting.experts[0], "num_experts_per_tok": setting.experts[1]},
    }
    return AutoConfig.for_model(setting.family, **(sizes | own[setting.family]))


def part_of(setting: Setting, model: PreTrainedModel) -> Part | None:
    """What is put into the model, if it is not LoRA."""
    match setting.trainable:
        case "ia3":
            return find_ia3(model)
        case "houlsby":
            return find_houlsby(model, setting.part_size, both=True)
        case "prompt":
            nowhere = Foundation("", Path(), "", Path(), "float32", "")
            return find_prompt(model, nowhere, setting.part_size)
        case "prefix":
            return find_prefix(model, setting.part_size)
        case _:
            return None


def inputs_of(setting: Setting, model: PreTrainedModel, device: str = "cpu") -> dict[str, torch.Tensor]:
    """A batch with labels."""
    count = setting.batch_size * setting.sequence_length
    tokens = (torch.arange(count, device=device) % setting.vocabulary).view(setting.batch_size, -1)
    if setting.family == "vit":
        shape = (setting.batch_size, 3, IMAGE_SIZE, IMAGE_SIZE)
        return {
            "pixel_values": torch.zeros(shape, device=device, dtype=setting.dtype),
            "labels": torch.zeros(setting.batch_size, dtype=torch.long, device=device),
        }
    labels = tokens[:, 0] % 3 if is_classifier(model) else tokens
    if setting.family == "t5":
        labels = torch.ones(setting.batch_size, TARGET_LENGTH, dtype=torch.long, device=device)
    return {"input_ids": tokens, "labels": labels}


def build(setting: Setting, device: str) -> tuple[Memory, nn.Module, Callable[[], None], torch.optim.Optimizer]:
    """The modelled memory, and the model, step and optimizer to measure it on."""
    config = model_config(setting)
    backbone: PreTrainedModel = model_class(config)._from_config(config)
    nn.Module.to(backbone, device, setting.dtype)
    shape = model_shape(backbone, setting.dtype.itemsize)
    name, *others = names = block_list_names(backbone)
    decoder = [block for other in others for block in backbone.get_submodule(other).children()]
    first, frozen, last = setting.emulator or (0, 0, setting.num_blocks)
    blocks = list(backbone.get_submodule(name).children())
    adapter = blocks[:first] + blocks[len(blocks) - last :]
    middle = blocks[first : first + frozen]
    if setting.int8:
        for block in middle:
            hold_in_8_bits(block)
    head = [parameter for _, parameter in head_parameters(backbone)] if is_classifier(backbone) else []
    part = part_of(setting, backbone)
    modelled = training_memory(
        shape,
        batch_size=setting.batch_size,
        sequence_length=setting.sequence_length,
        trainable=setting.trainable,
        lora_rank=setting.rank,
        part_size=setting.part_size,
        trained_elements=part.layout.num_elements + sum(p.numel() for p in head) if part else None,
        optimizer="sgd" if setting.optimizer == "sgd" else "adamw",
        num_blocks=first + frozen + last,
        adapter_blocks=(first, last) if setting.emulator else None,
        frozen_block_bytes=num_bytes([*middle[0].parameters(), *middle[0].buffers()]) if setting.int8 else None,
    )
    backbone.set_submodule(name, nn.ModuleList(adapter[:first] + middle + adapter[first:]))
    model: nn.Module = backbone
    if setting.trainable == "lora":
        lora = LoraConfig(
            r=setting.rank,
            target_modules=[
                f"{block_list}.{i}.{inner}"
                for block_list in names
                for i, block in enumerate(backbone.get_submodule(block_list).children())
                for inner, layer in block.named_modules()
                if isinstance(layer, nn.Linear | Conv1D) and block in (*adapter, *decoder)
            ],
            lora_dropout=0.0,
            fan_in_fan_out=setting.family == "gpt2",
        )
        model = get_peft_model(backbone, lora)
    elif setting.trainable != "all":
        backbone.requires_grad_(False)
        for block in adapter if setting.trainable in ("bias", "blocks") else ():
            for parameter_name, parameter in block.named_parameters():
                parameter.requires_grad = setting.trainable == "blocks" or parameter_name.endswith("bias")
    kept_in = contextlib.ExitStack()  # the step below has it: the part stays in the model as long as there is a step
    if part:
        own = kept_in.enter_context(put_in(part, backbone))
        backbone.own = nn.ParameterList(own.values())  # weights as others are
    for parameter in head:
        parameter.requires_grad = True
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[setting.optimizer](trained, lr=1e-3)
    inputs = inputs_of(setting, backbone, device)

    def step(kept_in: contextlib.ExitStack = kept_in) -> None:
        model(**inputs).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return modelled, model, step, optimizer


def measured_peak_bytes(model: nn.Module, step: Callable[[], None], optimizer: torch.optim.Optimizer) -> int:
    """Weights and optimizer state, and the most that a step allocates above them once the state exists."""
    step()
    resident = num_bytes([*model.parameters(), *model.buffers(), *optimizer_tensors(optimizer)])
    if next(model.parameters()).is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()  # with the libraries' workspaces, which are not the step's
        step()
        return resident + torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    events = profiler.profiler.kineto_results.events()
    allocated = [event.nbytes() for event in events if event.name() == "[memory]"]  # type: ignore[attr-defined]  # its stub has less
    return resident + int(np.cumsum(allocated).max())


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """State as large as what it belongs to; the scalar step counts are left out."""
    return [tensor for state in optimizer.state.values() for tensor in state.values() if tensor.dim() > 0]


def num_bytes(tensors: list[nn.Parameter] | list[torch.Tensor]) -> int:
    """Bytes of distinct tensors."""
    return sum({id(tensor): tensor.nbytes for tensor in tensors}.values())


class Linear8(nn.Module):
    """A frozen linear layer of a byte a weight and a scale a row, unpacked when it is needed and then forgotten."""

    def __init__(self, weight: torch.Tensor, bias: nn.Parameter | None) -> None:
        super().__init__()
        scales = weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("codes", (weight / scales).round().to(torch.int8))
        self.register_buffer("scales", scales)
        self.bias = bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The layer's output."""
        y = _Linear8.apply(x, self.codes, self.scales)
        assert isinstance(y, torch.Tensor)
        return y if self.bias is None else y.add_(self.bias)


class _Linear8(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(codes, scales)
        return x @ codes.to(x.dtype).mul_(scales).t()

    @staticmethod
    def backward(ctx, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        codes, scales = ctx.saved_tensors
        return gradients[0] @ codes.to(gradients[0].dtype).mul_(scales), None, None


def hold_in_8_bits(block: nn.Module) -> None:
    """Replace the linear layers of a block."""
    for name, module in list(block.named_modules()):
        if isinstance(module, nn.Linear | Conv1D):
            weight = module.weight.detach()
            block.set_submodule(name, Linear8(weight.t() if isinstance(module, Conv1D) else weight, module.bias))


def main() -> None:
    """Measure all families and print a table."""
    config = tyro.cli(BenchmarkConfig, description=__doc__)
    logging.getLogger("transformers").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    table = Table("family", "peak: median", "least", "greatest", "step: median", "least", "greatest", "beyond 10 %")
    for family in config.families:
        peaks, steps = [], []
        for number in range(config.settings):
            torch.manual_seed(0)
            setting = random_setting(family, config.seed + number)
            modelled, model, step, optimizer = build(setting, "cpu")
            measured = measured_peak_bytes(model, step, optimizer)
            resident = modelled.peak_bytes - modelled.step_bytes
            peaks.append(float(modelled.peak_bytes / measured))
            steps.append(float(modelled.step_bytes / (measured - resident)))
        figures = [f"{figure(ratios):.3f}" for ratios in (peaks, steps) for figure in (statistics.median, min, max)]
        beyond = sum(abs(ratio - 1) > 0.1 for ratio in peaks)
        table.add_row(family, *figures, f"{beyond} of {config.settings}")
    Console(width=120).print(f"{config.settings} random settings of each family; {versions}", table)


if __name__ == "__main__":
    main()
