"""Where adapters go, and their tensors as one flat vector."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load
from torch import nn

from fedpeat_ray.config import LoraConfig
from fedpeat_ray.errors import ConfigError, ModelError
from fedpeat_ray.models import foundation as foundations
from fedpeat_ray.models.layout import Layout
from fedpeat_ray.trainable.lora import find_lora


@pytest.fixture
def gpt2(gpt2_dir):
    return foundations.load(foundations.prepare(str(gpt2_dir), "float32"))


@pytest.fixture
def llama(llama_dir):
    return foundations.load(foundations.prepare(str(llama_dir), "float32"))


def test_without_targets_every_linear_layer_of_every_block_is_adapted(gpt2, llama):
    lora = find_lora(gpt2, LoraConfig(rank=3))
    expected = [("attn.c_attn", 32, 96), ("attn.c_proj", 32, 32), ("mlp.c_fc", 32, 128), ("mlp.c_proj", 128, 32)]
    assert lora.modules == tuple((f"transformer.h.{i}.{name}", *widths) for i in (0, 1) for name, *widths in expected)
    assert lora.fan_in_fan_out
    lora = find_lora(llama, LoraConfig(rank=3))
    widths = {name.removeprefix("model.layers.1."): tuple(shape) for name, *shape in lora.modules if ".1." in name}
    assert widths == {
        "self_attn.q_proj": (32, 32),
        "self_attn.k_proj": (32, 16),  # half as many heads
        "self_attn.v_proj": (32, 16),
        "self_attn.o_proj": (32, 32),
        "mlp.gate_proj": (32, 48),
        "mlp.up_proj": (32, 48),
        "mlp.down_proj": (48, 32),
    }
    assert not lora.fan_in_fan_out and len(lora.modules) == 14


@pytest.mark.parametrize(
    ("targets", "number"),
    [
        (("c_fc",), 2),
        (("c_attn", "c_fc"), 4),
        (("c_proj",), 4),
        (("mlp.c_proj",), 2),
        (("transformer.h.0.mlp.c_fc",), 1),
    ],
)
def test_targets_are_last_parts_of_names_or_whole_names(gpt2, targets, number):
    lora = find_lora(gpt2, LoraConfig(targets=targets))
    assert len(lora.modules) == number
    assert all(any(name.endswith(target) for target in targets) for name, _, _ in lora.modules)


@pytest.mark.parametrize("target", ["q_proj", "attn", "lm_head", "fc", ""])
def test_a_target_that_is_no_linear_layer_is_refused_with_those_there_are(gpt2, target):
    with pytest.raises(ConfigError) as caught:
        find_lora(gpt2, LoraConfig(targets=("c_fc", target)))
    known = "linear layers of this model: c_attn, c_fc, c_proj"
    assert str(caught.value) == f"lora.targets = {target!r} is not allowed: {known}"


def test_a_model_without_linear_layers_is_refused(gpt2):
    for block in gpt2.transformer.h:
        block.attn = block.mlp = nn.Identity()
    with pytest.raises(ModelError, match="no linear layers in transformer.h"):
        find_lora(gpt2, LoraConfig())


def test_the_layout_has_a_then_b_module_by_module(gpt2):
    lora = find_lora(gpt2, LoraConfig(rank=3, alpha=6.0, targets=("c_fc",)))
    assert lora.layout.names[:2] == ("transformer.h.0.mlp.c_fc.lora_A.weight", "transformer.h.0.mlp.c_fc.lora_B.weight")
    assert lora.layout.shapes == ((3, 32), (128, 3)) * 2
    assert lora.layout.num_elements == 2 * 3 * (32 + 128) and lora.scaling == 2.0


LAYOUT = Layout(("b", "a", "one"), ((2, 3), (4,), ()))


def test_a_flat_vector_and_its_tensors_are_the_same_numbers():
    flat = torch.arange(11.0)
    tensors = LAYOUT.unflatten(flat)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {"b": (2, 3), "a": (4,), "one": ()}
    assert tensors["b"].tolist() == [[0, 1, 2], [3, 4, 5]] and tensors["one"].item() == 10
    assert tensors["b"].data_ptr() == flat.data_ptr(), "views, not copies"
    again = LAYOUT.flatten(tensors)
    assert again.equal(flat) and again.data_ptr() != flat.data_ptr()
    stacked = LAYOUT.unflatten(torch.arange(22.0).view(2, 11))
    assert stacked["b"].shape == (2, 2, 3) and stacked["b"][1, 0, 0] == 11 and stacked["one"].tolist() == [10, 21]


def test_tensors_that_do_not_fit_a_layout_are_refused():
    tensors = LAYOUT.unflatten(torch.arange(11.0))
    with pytest.raises(ValueError, match=r"tensor b has shape \(3, 2\), expected \(2, 3\)"):
        LAYOUT.flatten({**tensors, "b": torch.zeros(3, 2)})
    with pytest.raises(KeyError):
        LAYOUT.flatten({name: tensor for name, tensor in tensors.items() if name != "a"})


def test_the_payload_is_the_safetensors_file_and_its_hash_depends_on_every_bit():
    flat = torch.arange(11.0)
    payload = LAYOUT.serialize(flat)
    assert LAYOUT.flatten(load(payload)).equal(flat)
    assert LAYOUT.payload_bytes() == len(payload) == LAYOUT.payload_bytes(torch.float32)
    assert len(payload) - 2 * 11 >= LAYOUT.payload_bytes(torch.bfloat16) - 8  # the header is padded to 8 bytes
    other = flat.clone()
    other[7] = torch.nextafter(other[7], torch.tensor(torch.inf))
    assert LAYOUT.sha256(flat) == LAYOUT.sha256(flat.clone()) != LAYOUT.sha256(other)
