"""The memory model against what PyTorch allocates for the plain loop: transformers, PEFT, torch.optim."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fedpeat_ray.fleet.memory import Memory, lora_parameters, training_memory
from fedpeat_ray.models.foundation import block_list_name
from fedpeat_ray.models.shape import model_shape

RANK = 8


@dataclass(frozen=True)
class Setting:
    family: Literal["gpt2", "llama"]
    num_blocks: int
    width: int
    vocabulary: int
    batch_size: int
    sequence_length: int
    trainable: Literal["all", "lora", "bias", "blocks"]
    optimizer: Literal["adamw", "sgd"] = "adamw"
    dtype: torch.dtype = torch.float32
    tied: bool = True
    rank: int = RANK
    emulator: tuple[int, int, int] | None = None
    """Blocks kept at the start, in the middle, at the end; those of the middle are frozen. None: all, trained."""
    int8: bool = False
    """The frozen blocks' matrices are held in 8 bits."""

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        emulator = "-" + "+".join(map(str, self.emulator)) if self.emulator else ""
        return (
            f"{self.family}-{self.num_blocks}x{self.width}-vocabulary{self.vocabulary}{'' if self.tied else '-untied'}-"
            f"{dtype}-{self.batch_size}x{self.sequence_length}-{self.trainable}-{self.optimizer}"
            f"{emulator}{'-int8' if self.int8 else ''}"
        )


SETTINGS = [
    Setting("gpt2", 4, 128, 4096, 1, 32, "lora"),
    Setting("gpt2", 4, 128, 4096, 8, 64, "all", "sgd"),
    Setting("gpt2", 6, 256, 4096, 2, 64, "lora"),
    Setting("gpt2", 6, 256, 4096, 2, 64, "lora", dtype=torch.bfloat16),
    Setting("gpt2", 12, 192, 4096, 2, 64, "all"),
    Setting("gpt2", 12, 256, 4096, 1, 128, "lora", "sgd"),
    Setting("gpt2", 12, 192, 4096, 8, 32, "lora", rank=32),
    Setting("gpt2", 6, 128, 512, 2, 256, "lora"),
    Setting("gpt2", 6, 128, 512, 2, 256, "lora", dtype=torch.bfloat16),
    Setting("gpt2", 6, 128, 512, 8, 128, "all"),
    Setting("gpt2", 3, 768, 8192, 1, 64, "lora"),
    Setting("gpt2", 3, 768, 8192, 1, 32, "all"),
    Setting("llama", 4, 256, 2048, 2, 64, "lora"),
    Setting("llama", 4, 256, 512, 4, 128, "lora", dtype=torch.bfloat16),
    Setting("llama", 4, 256, 2048, 2, 64, "all", tied=False),
    Setting("llama", 4, 256, 2048, 1, 32, "all", "sgd", tied=False),
]

EMULATORS = [
    *(
        replace(whole, trainable=trainable, emulator=emulator)
        for whole in (Setting("gpt2", 10, 192, 1024, 2, 64, "all"), Setting("gpt2", 10, 192, 512, 2, 256, "all", "sgd"))
        for trainable in ("lora", "bias", "blocks")
        for emulator in ((1, 4, 1), (2, 3, 2), (0, 8, 1), (2, 6, 0))
    ),
    *(
        replace(whole, trainable=trainable, emulator=emulator)
        for whole in (Setting("llama", 10, 256, 512, 4, 64, "all"), Setting("llama", 10, 256, 512, 1, 32, "all", "sgd"))
        for trainable in ("lora", "blocks")
        for emulator in ((1, 4, 1), (2, 3, 2), (0, 6, 2), (2, 6, 0))
    ),
    Setting("gpt2", 6, 256, 4096, 4, 64, "lora", dtype=torch.bfloat16, emulator=(1, 3, 1)),
    Setting("llama", 6, 256, 512, 4, 128, "lora", dtype=torch.bfloat16, emulator=(1, 3, 1)),
    Setting("llama", 6, 256, 512, 4, 128, "blocks", dtype=torch.bfloat16, emulator=(1, 3, 1)),
    Setting("gpt2", 8, 256, 512, 1, 64, "lora", emulator=(1, 5, 1), int8=True),
    Setting("gpt2", 8, 256, 512, 1, 32, "bias", emulator=(0, 6, 1), int8=True),
    Setting("llama", 8, 256, 512, 1, 64, "lora", emulator=(1, 5, 1), int8=True),
    Setting("llama", 8, 256, 512, 1, 16, "lora", emulator=(0, 6, 1), int8=True),
]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Threads that wait for one another make these small steps many times slower on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("setting", SETTINGS + EMULATORS, ids=str)
def test_peak_is_within_10_percent_on_cpu(setting: Setting) -> None:
    modelled, model, step, optimizer = build(setting, "cpu")
    measured = measured_peak_bytes(model, step, optimizer)
    assert modelled.peak_bytes == pytest.approx(measured, rel=0.1)
    resident = modelled.peak_bytes - modelled.step_bytes  # exact, and most of the peak if little is trained
    assert modelled.step_bytes == pytest.approx(measured - resident, rel=0.1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA: measures torch.cuda.max_memory_allocated")
@pytest.mark.parametrize("setting", [s for s in SETTINGS if s.family == "gpt2" and s.trainable == "lora"], ids=str)
def test_peak_is_within_10_percent_on_gpu(setting: Setting) -> None:
    modelled, model, step, optimizer = build(setting, "cuda")
    measured = measured_peak_bytes(model, step, optimizer)
    assert modelled.peak_bytes == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("setting", [SETTINGS[2], SETTINGS[9], SETTINGS[13], *EMULATORS[::6], *EMULATORS[-3:]], ids=str)
def test_resident_terms_are_exact(setting: Setting) -> None:
    modelled, model, step, optimizer = build(setting, "cpu")
    step()
    held = [p for p in model.parameters() if setting.trainable != "lora" or not p.requires_grad]
    held += [buffer for name, buffer in model.named_buffers() if name.endswith(("codes", "scales"))]
    adapter = [p for p in model.parameters() if setting.trainable == "lora" and p.requires_grad]
    assert modelled.weights_bytes == num_bytes(held)
    assert modelled.adapter_bytes == num_bytes(adapter)
    assert modelled.optimizer_bytes == num_bytes(optimizer_tensors(optimizer))


def test_tied_output_layers_are_told_from_separate_ones() -> None:
    assert model_shape(gpt2(Setting("gpt2", 2, 64, 128, 1, 512, "all")), 4).tied_head  # more positions than tokens
    for tied in (True, False):
        assert model_shape(llama(Setting("llama", 2, 64, 128, 1, 16, "all", tied=tied)), 4).tied_head == tied


def test_fewer_blocks_are_the_smaller_model() -> None:
    full, smaller = (model_shape(gpt2(Setting("gpt2", depth, 64, 256, 1, 16, "lora")), 4) for depth in (6, 2))
    arguments = {"batch_size": 2, "sequence_length": 16, "trainable": "lora", "lora_rank": 4}
    assert training_memory(full, **arguments, num_blocks=2) == training_memory(smaller, **arguments)
    assert lora_parameters(full, 4, num_blocks=2) == lora_parameters(smaller, 4)


def test_arrays_give_what_single_devices_give() -> None:
    shape = model_shape(gpt2(Setting("gpt2", 4, 64, 256, 1, 16, "lora")), 4)
    batch_size, length, rank, depth = np.array([1, 2, 8]), np.array([16, 64, 32]), np.array([2, 8, 64]), np.arange(2, 5)
    together = training_memory(
        shape, batch_size=batch_size, sequence_length=length, trainable="lora", lora_rank=rank, num_blocks=depth
    )
    for i in range(3):
        alone = training_memory(
            shape,
            batch_size=int(batch_size[i]),
            sequence_length=int(length[i]),
            trainable="lora",
            lora_rank=int(rank[i]),
            num_blocks=int(depth[i]),
        )
        assert np.asarray(together.peak_bytes)[i] == alone.peak_bytes


def build(setting: Setting, device: str) -> tuple[Memory, nn.Module, Callable[[], None], torch.optim.Optimizer]:
    """The modelled memory, and the model, step and optimizer to measure it on."""
    backbone = gpt2(setting) if setting.family == "gpt2" else llama(setting)
    nn.Module.to(backbone, device, setting.dtype)
    shape = model_shape(backbone, setting.dtype.itemsize)
    first, frozen, last = setting.emulator or (0, 0, setting.num_blocks)
    blocks = list(block_list(backbone))
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
        optimizer=setting.optimizer,
        num_blocks=first + frozen + last,
        adapter_blocks=(first, last) if setting.emulator else None,
        frozen_block_bytes=num_bytes([*middle[0].parameters(), *middle[0].buffers()]) if setting.int8 else None,
    )
    name = "transformer.h" if setting.family == "gpt2" else "model.layers"
    backbone.set_submodule(name, nn.ModuleList(adapter[:first] + middle + adapter[first:]))
    model: nn.Module = backbone
    if setting.trainable == "lora":
        names = {
            "gpt2": ["c_attn", "c_proj", "c_fc"],
            "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        }[setting.family]
        config = LoraConfig(
            r=setting.rank,
            target_modules=names,
            layers_to_transform=[*range(first), *range(first + frozen, first + frozen + last)],
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


def block_list(model: PreTrainedModel) -> nn.ModuleList:
    blocks = model.get_submodule(block_list_name(model))
    assert isinstance(blocks, nn.ModuleList)
    return blocks


class Linear8(nn.Module):
    """A frozen linear layer of a byte a weight and a scale a row, unpacked when it is needed and then forgotten."""

    def __init__(self, weight: torch.Tensor, bias: nn.Parameter | None) -> None:
        super().__init__()
        scales = weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("codes", (weight / scales).round().to(torch.int8))
        self.register_buffer("scales", scales)
        self.bias = bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
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


def gpt2(setting: Setting) -> PreTrainedModel:
    return GPT2LMHeadModel(
        GPT2Config(
            n_layer=setting.num_blocks,
            n_embd=setting.width,
            n_head=setting.width // 64,
            n_positions=setting.sequence_length,
            vocab_size=setting.vocabulary,
            activation_function="gelu_pytorch_tanh",
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
            use_cache=False,
        )
    )


def llama(setting: Setting) -> PreTrainedModel:
    return LlamaForCausalLM(
        LlamaConfig(
            num_hidden_layers=setting.num_blocks,
            hidden_size=setting.width,
            intermediate_size=setting.width * 11 // 4,
            num_attention_heads=8,
            num_key_value_heads=2,
            vocab_size=setting.vocabulary,
            tie_word_embeddings=setting.tied,
            use_cache=False,
        )
    )


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
    allocated = [event.nbytes() for event in events if event.name() == "[memory]"]  # pyright: ignore
    return resident + int(np.cumsum(allocated).max())


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """State as large as what it belongs to; the scalar step counts are left out."""
    return [tensor for state in optimizer.state.values() for tensor in state.values() if tensor.dim() > 0]


def num_bytes(tensors: list[nn.Parameter] | list[torch.Tensor]) -> int:
    """Bytes of distinct tensors."""
    return sum({id(tensor): tensor.nbytes for tensor in tensors}.values())
