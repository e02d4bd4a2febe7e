"""Whether the clients of a batch stay apart in a model: tried once on its first blocks, for the layers that LoRA is in.

`StackedLoraLinear` takes the rows of its input to be the clients', one after the other, and the layer to
be its weights and bias. A layer that is given some of the rows, or all in another order (a mixture of
experts), would train one client's factors on another's text; one whose weights are read by others would
not have its LoRA. Such layers are refused.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping

import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from fedpeat_ray.errors import ConfigError
from fedpeat_ray.models.foundation import Foundation, asked, block_list_names, empty, linear_widths
from fedpeat_ray.models.traits import TOLERANCE, some_inputs
from fedpeat_ray.trainable.lora import Lora, linear_layers
from fedpeat_ray.trainable.part import stacked
from fedpeat_ray.trainable.peft_files import peft_config

_NUM_CLIENTS, _NUM_ROWS, _NUM_TOKENS = 2, 2, 6


def check_stacking(foundation: Foundation, lora: Lora) -> None:
    """Raise ConfigError, naming the layers that work, unless each layer of this LoRA gets clients' rows in order."""
    prefixes = tuple(f"{name}." for name in block_list_names(empty(foundation.config_json)))
    targets = sorted({_inside_block(name, prefixes) for name, _, _ in lora.modules})

    def stay_apart(model: PreTrainedModel) -> dict[str, bool]:
        inputs = some_inputs(model, _NUM_CLIENTS * _NUM_ROWS, _NUM_TOKENS)
        with torch.no_grad():
            model(**inputs)  # what the model itself raises is not the layers' doing
        linears = linear_layers(model, prefixes)

        def together(*some: str) -> bool:
            layers = {name: layer for name, layer in linears.items() if _inside_block(name, prefixes) in some}
            return _clients_stay_apart(model, layers, lora, inputs)

        return dict.fromkeys(targets, True) if together(*targets) else {target: together(target) for target in targets}

    found = asked(foundation, f"clients stay apart in {targets}", stay_apart)
    if not all(found.values()):
        good = " ".join(target for target in targets if found[target]) or "none of them"
        asked_for = " ".join(sorted({target.rsplit(".", 1)[-1] for target in targets}))
        allowed = f"layers that PEFT can adapt and in which the clients of a batch stay apart: {good}"
        raise ConfigError.of("lora.targets", asked_for, allowed)


def _inside_block(name: str, prefixes: tuple[str, ...]) -> str:
    prefix = next(prefix for prefix in prefixes if name.startswith(prefix))
    return name.removeprefix(prefix).split(".", 1)[1]


def _clients_stay_apart(
    model: PreTrainedModel, layers: Mapping[str, nn.Module], like: Lora, inputs: Mapping[str, Tensor]
) -> bool:
    """Whether a batch of clients with random factors in these layers has the logits that PEFT gives each alone."""
    modules = tuple((name, *linear_widths(layer)) for name, layer in layers.items())
    lora = dataclasses.replace(like, modules=modules, rank=2, alpha=2.0)
    rng = torch.Generator().manual_seed(0)
    dtype = next(model.parameters()).dtype
    theta_KP = torch.empty(_NUM_CLIENTS, lora.layout.num_elements, dtype=dtype).normal_(0, 0.3, generator=rng)
    with torch.no_grad():
        try:
            rows = [slice(i * _NUM_ROWS, (i + 1) * _NUM_ROWS) for i in range(_NUM_CLIENTS)]
            own = [{name: tensor[part] for name, tensor in inputs.items()} for part in rows]
            alone = [_alone(model, lora, *client) for client in zip(theta_KP, own, strict=True)]
            with stacked(model, lora) as set_tensors:
                set_tensors(theta_KP)
                together = model(**inputs).logits
        except Exception:  # PEFT refuses the layer, rows cannot be divided, the model's code reads what the layer lacks
            return False
    expected = torch.cat(alone)
    return bool((together - expected).abs().max() <= TOLERANCE * expected.abs().max())


def _alone(model: PreTrainedModel, lora: Lora, theta_P: Tensor, inputs: Mapping[str, Tensor]) -> Tensor:
    """Logits by PEFT itself."""
    frozen = {name: model.get_submodule(name) for name, _, _ in lora.modules}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PEFT calls what transformers will rename
            with_lora = get_peft_model(model, peft_config(lora, type(model).__name__, trainable=True))
        for name, tensor in lora.layout.unflatten(theta_P).items():
            with_lora.get_parameter(f"base_model.model.{name.removesuffix('.weight')}.default.weight").data = tensor
        return with_lora(**inputs).logits
    finally:  # also after a refusal half-way
        for name, layer in frozen.items():
            model.set_submodule(name, layer)
        vars(model).pop("peft_config", None)
