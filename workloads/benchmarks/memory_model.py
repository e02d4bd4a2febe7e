"""The memory model against what PyTorch allocates on the CPU, for families of models in random settings.

    python workloads/benchmarks/memory_model.py [--settings 40] [--families gpt2 llama] [--seed 0]

A setting is a model of random widths, depth, heads and vocabulary, a batch, what is trained, and perhaps an emulator
with a frozen middle, in float32 or bfloat16. Measured is the plain loop of transformers, PEFT and torch.optim: the
peak of a step once the optimizer's state exists. Columns: modelled over measured of the whole peak, and of what a
step adds to weights, adapter and optimizer state: median, least and greatest; and how many settings are not within
10 %.
"""

from __future__ import annotations

import logging
import random
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import transformers
import tyro
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.pytorch_utils import Conv1D

from fedpeat_ray.fleet.memory import Memory, Trainable, training_memory
from fedpeat_ray.models.foundation import block_list_name
from fedpeat_ray.models.shape import TESTED_FAMILIES, model_shape


@dataclass(frozen=True)
class BenchmarkConfig:
    families: tuple[str, ...] = TESTED_FAMILIES
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

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        emulator = "-" + "+".join(map(str, self.emulator)) if self.emulator else ""
        return (
            f"{self.family}-{self.num_blocks}x{self.width}-vocabulary{self.vocabulary}{'' if self.tied else '-untied'}-"
            f"{dtype}-{self.batch_size}x{self.sequence_length}-{self.trainable}-{self.optimizer}"
            f"{emulator}{'-int8' if self.int8 else ''}"
        )


def random_setting(family: str, seed: int) -> Setting:
    """One of many, small enough for a fraction of a second."""
    rng = random.Random(f"{family} {seed}")
    kinds: tuple[Trainable, ...] = ("lora", "blocks", "all", *(("bias",) if family in ("gpt2", "opt") else ()))
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
        sequence_length=rng.randint(8, 160),
        trainable=trainable,
        optimizer=rng.choice(("adamw", "adamw", "sgd")),
        dtype=rng.choice((torch.float32, torch.float32, torch.bfloat16)),
        tied=rng.choice((True, False)),
        rank=rng.choice((1, 4, 8, 16, 32)),
        emulator=None if trainable == "all" or rng.random() < 0.4 else emulator,
        num_heads=num_heads,
        num_kv_heads=rng.choice([n for n in (1, 2, 4, 8) if num_heads % n == 0]),
        head_dim=rng.choice((16, 32, 48, 64)),
        mlp_width=8 * rng.randint(8, 100),
        experts=rng.choice(((4, 1), (4, 2), (6, 3), (8, 2))),
    )


def model_config(setting: Setting) -> PretrainedConfig:
    """The configuration of the model, dropout 0."""
    heads = setting.num_heads or (setting.width // 64 if setting.family == "gpt2" else 8)
    mlp_width = setting.mlp_width or (4 * setting.width if setting.family == "gpt2" else setting.width * 11 // 4)
    sizes = {
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
    wide = {"intermediate_size": mlp_width, "num_key_value_heads": setting.num_kv_heads}
    own = {
        "gpt2": {
            "n_inner": mlp_width,
            "n_positions": setting.sequence_length,
            "activation_function": "gelu_pytorch_tanh",
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
        },
        "opt": {
            "ffn_dim": mlp_width,
            "word_embed_proj_dim": setting.width,
            "max_position_embeddings": setting.sequence_length,
            "dropout": 0.0,
        },
        "llama": wide,
        "qwen3": wide | {"head_dim": setting.head_dim or 2 * setting.width // heads},
        "gemma2": wide | {"head_dim": setting.head_dim or 2 * setting.width // heads},
        "phi3": wide,
        "mixtral": wide | {"num_local_experts": setting.experts[0], "num_experts_per_tok": setting.experts[1]},
    }
    return AutoConfig.for_model(setting.family, **(sizes | own[setting.family]))


def build(setting: Setting, device: str) -> tuple[Memory, nn.Module, Callable[[], None], torch.optim.Optimizer]:
    """The modelled memory, and the model, step and optimizer to measure it on."""
    backbone = AutoModelForCausalLM.from_config(model_config(setting))
    nn.Module.to(backbone, device, setting.dtype)
    shape = model_shape(backbone, setting.dtype.itemsize)
    name = block_list_name(backbone)
    first, frozen, last = setting.emulator or (0, 0, setting.num_blocks)
    blocks = list(backbone.get_submodule(name).children())
    adapter = blocks[:first] + blocks[len(blocks) - last :]
    middle = blocks[first : first + frozen]
    if setting.int8:
        for block in middle:
            hold_in_8_bits(block)
    modelled = training_memory(
        shape,
        batch_size=setting.batch_size,
        sequence_length=setting.sequence_length,
        trainable=setting.trainable,
        lora_rank=setting.rank,
        optimizer="sgd" if setting.optimizer == "sgd" else "adamw",
        num_blocks=first + frozen + last,
        adapter_blocks=(first, last) if setting.emulator else None,
        frozen_block_bytes=num_bytes([*middle[0].parameters(), *middle[0].buffers()]) if setting.int8 else None,
    )
    backbone.set_submodule(name, nn.ModuleList(adapter[:first] + middle + adapter[first:]))
    model: nn.Module = backbone
    if setting.trainable == "lora":
        config = LoraConfig(
            r=setting.rank,
            target_modules=[
                f"{name}.{i}.{inner}"
                for i, block in enumerate(backbone.get_submodule(name).children())
                for inner, layer in block.named_modules()
                if isinstance(layer, nn.Linear | Conv1D) and block in adapter
            ],
            lora_dropout=0.0,
            fan_in_fan_out=setting.family == "gpt2",
        )
        model = get_peft_model(backbone, config)
    elif setting.trainable != "all":
        backbone.requires_grad_(False)
        for block in adapter:
            for parameter_name, parameter in block.named_parameters():
                parameter.requires_grad = setting.trainable == "blocks" or parameter_name.endswith("bias")
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[setting.optimizer](trained, lr=1e-3)
    tokens = torch.arange(setting.batch_size * setting.sequence_length, device=device) % setting.vocabulary
    tokens = tokens.view(setting.batch_size, setting.sequence_length)

    def step() -> None:
        model(input_ids=tokens, labels=tokens).loss.backward()
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
