"""Models of many families: the numbers of plain PEFT and of the models themselves, or one line that says no."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import whole_runs
from plain_loops import train_lora
from sweeps import sweep
from tiny_models import FAMILIES, VOCABULARY, write_family
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.pytorch_utils import Conv1D

from fedpeat_ray import Simulation
from fedpeat_ray.config import LocalConfig, LoraConfig
from fedpeat_ray.errors import ConfigError, ModelError
from fedpeat_ray.models import foundation as foundations
from fedpeat_ray.models.foundation import block_list_name, load, load_backbone, max_positions, plain_head, prepare
from fedpeat_ray.models.traits import NO_LIMIT
from fedpeat_ray.records import ClientTask, sequences
from fedpeat_ray.trainable.lora import find_lora
from fedpeat_ray.trainable.shape import model_shape
from fedpeat_ray.training.client_batch import TrainClientBatch
from fedpeat_ray.training.evaluation import Evaluate, ScoreSum, evaluation_tasks
from fedpeat_ray.training.stacking import check_stacking

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT calls what transformers will rename

SUPPORTED = [family for family in FAMILIES if family != "Mamba"]
QUICK = ["GPT2", "Llama", "FalconH1"]
NOT_FOR_PEFT = {"FalconH1": ("gate_proj", "up_proj", "down_proj", "in_proj", "q_proj", "k_proj", "v_proj", "o_proj")}
SGD = functools.partial(torch.optim.SGD, lr=0.1)


@pytest.fixture(scope="module")
def family_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Where a family's model lies; written when it is first asked for."""
    return functools.cache(lambda family: write_family(tmp_path_factory.mktemp(family), family))


def tasks() -> list[ClientTask]:
    """Two clients with padding, and different numbers of steps."""
    rng = np.random.default_rng(0)
    return [
        ClientTask(i, 1, sequences(rng.integers(2, 250, (steps, 2, 12)), rng.integers(3, 13, (steps, 2))))
        for i, steps in enumerate((1, 2))
    ]


@pytest.mark.parametrize("family", sweep(SUPPORTED, quick=QUICK))
def test_each_client_of_a_batch_gets_what_plain_peft_gives_it_alone(family_dir, family):
    foundation = prepare(str(family_dir(family)), "float64")
    backbone = load_backbone(foundation)
    lora = find_lora(backbone.exact, LoraConfig(rank=2, alpha=4.0, targets=NOT_FOR_PEFT.get(family, ())))
    check_stacking(foundation, lora)
    start_P = 0.1 * torch.randn(lora.layout.num_elements, generator=torch.Generator().manual_seed(1))
    start = lora.layout.unflatten(start_P)
    updates = TrainClientBatch(lora, LocalConfig(optimizer="sgd", learning_rate=0.1))(backbone, start_P, tasks())
    # Falcon-H1 computes its state space in float32 whatever the weights are: a few roundings of that
    tolerance = 1e-6 if family == "FalconH1" else 1e-12
    for task, update in zip(tasks(), updates, strict=True):
        expected, loss = train_lora(
            family_dir(family),
            start,
            (task.arrays["tokens"], task.arrays["lengths"]),
            SGD,
            rank=2,
            alpha=4.0,
            dtype=torch.float64,
            targets=[name for name, _, _ in lora.modules],
        )
        assert update.report.train_loss == pytest.approx(loss, rel=tolerance)
        for name, delta in lora.layout.unflatten(update.delta_P).items():
            assert (start[name].double() + delta - expected[name]).abs().max() <= tolerance, name
    assert all(update.delta_P.abs().max() > 1e-4 for update in updates)


@pytest.mark.parametrize("family", sweep(SUPPORTED, quick=QUICK))
def test_evaluation_gives_the_models_own_loss(family_dir, family):
    foundation = prepare(str(family_dir(family)), "float64")
    backbone = load_backbone(foundation)
    lora = find_lora(backbone.exact, LoraConfig(rank=2))
    tokens = np.random.default_rng(1).integers(2, 250, (5, 12))
    scores = Evaluate(lora)(backbone, lora.init(0), evaluation_tasks("all", sequences(tokens, np.full(5, 12))))
    kinds = {"attn_implementation": "eager", "experts_implementation": "eager"}
    plain = AutoModelForCausalLM.from_pretrained(family_dir(family), dtype=torch.float64, **kinds).eval()
    with torch.no_grad():
        logits = plain(input_ids=torch.from_numpy(tokens)).logits.double()
    labels = torch.from_numpy(tokens)[:, 1:].flatten()
    own = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels, reduction="sum").item()
    assert ScoreSum().add(scores).result()["all"].loss == pytest.approx(
        own, rel=1e-6 if family == "FalconH1" else 1e-12
    )


@pytest.mark.parametrize(
    ("family", "changes", "plain"),
    [
        ("Llama", {}, True),
        ("FalconH1", {}, False),
        ("FalconH1", {"lm_head_multiplier": 1.0}, True),
        ("Gemma2", {}, False),
        ("Gemma2", {"final_logit_softcapping": None}, True),
        ("Cohere", {}, False),
        ("Cohere", {"logit_scale": 1.0}, True),
        ("Roberta", {}, False),  # its head has two layers
    ],
)
@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_the_fast_loss_is_taken_where_it_is_the_models_own(tmp_path, family, changes, plain, dtype):
    foundation = prepare(str(write_family(tmp_path, family, **changes)), dtype)
    backbone = load_backbone(foundation)
    assert foundation.traits and foundation.traits.plain_head == plain
    assert (plain_head(backbone.exact) is not None) == (plain_head(backbone.training) is not None) == plain


def test_what_was_found_out_about_a_model_is_asked_once(family_dir, monkeypatch):
    one = prepare(str(family_dir("Gemma2")), "float32")
    monkeypatch.setattr(foundations, "examine", None)
    assert prepare(str(family_dir("Gemma2")), "float32") == one
    monkeypatch.setattr(peft, "__version__", "9.9")
    with pytest.raises(ModelError, match="cannot be run on its inputs alone: 'NoneType'"):
        prepare(str(family_dir("Gemma2")), "float32")


def test_a_model_that_looks_ahead_is_refused(tmp_path):
    directory = write_family(tmp_path, "Roberta", is_decoder=False)
    with pytest.raises(ModelError) as caught:
        prepare(str(directory), "float32")
    said = "RobertaForCausalLM is not causal: a token changes the logits of those before it"
    assert str(caught.value) == f"foundation.name = {str(directory)!r}: {said}"


def test_a_model_without_attention_is_refused(family_dir):
    with pytest.raises(ModelError) as caught:
        prepare(str(family_dir("Mamba")), "float32")
    said = "MambaForCausalLM has no num_attention_heads in its configuration: only transformers whose blocks have"
    assert said in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("family", "positions"), [("GPT2", 64), ("OPT", 64), ("Roberta", 62), ("Mpt", 64), ("Bloom", NO_LIMIT)]
)
def test_the_longest_sequence_is_the_one_that_the_model_can_read(family_dir, family, positions):
    model = load(prepare(str(family_dir(family)), "float32"))
    assert max_positions(model) == positions
    model(input_ids=torch.full((1, min(positions, 200)), 9), use_cache=False)
    if family != "Bloom":
        with pytest.raises((IndexError, RuntimeError)):
            model(input_ids=torch.full((1, positions + 1), 9), use_cache=False)


def test_sequences_longer_than_a_models_table_of_positions_are_refused(family_dir, text_dir, tmp_path):
    config = whole_runs.tiny(family_dir("Roberta"), text_dir, local={"sequence_length": 63}, algorithm="fed-peft")
    with pytest.raises(ConfigError, match="local.sequence_length = 63 is not allowed: at most 62, the positions of"):
        Simulation(whole_runs.changed(config, out=tmp_path / "run")).run()


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(family_dir, text_dir, tmp_path):
    directory = Path(shutil.copytree(family_dir("GPT2"), tmp_path / "model"))
    tokenizer = foundations.load_tokenizer(directory)
    tokenizer.add_tokens(["<one>", "<two>"])
    tokenizer.save_pretrained(directory)
    config = whole_runs.tiny(directory, text_dir, algorithm="fed-peft", out=tmp_path / "run")
    with pytest.raises(ModelError) as caught:
        Simulation(config).run()
    said = f"its tokenizer has tokens up to number {VOCABULARY + 1}, its weights are for {VOCABULARY} tokens"
    assert str(caught.value) == f"foundation.name = {str(directory)!r}: {said}"


@pytest.mark.parametrize("family", ["Bloom", "Mpt"])
def test_models_with_names_of_their_own_run_from_end_to_end(family_dir, text_dir, tmp_path, family):
    config = whole_runs.tiny(family_dir(family), text_dir, algorithm="fed-peft", rounds=2, out=tmp_path / "run")
    perplexity = Simulation(config).run()["perplexity"]
    assert perplexity["tuned"] < 0.9 * perplexity["zero_shot"]


def _in_another_order(self: LlamaMLP, x: torch.Tensor) -> torch.Tensor:
    return self.down_proj(self.act_fn(self.gate_proj(x.flip(0))) * self.up_proj(x.flip(0))).flip(0)


def _some_rows(self: LlamaMLP, x: torch.Tensor) -> torch.Tensor:
    """As an expert: rows that are sent to it, however many that are."""
    chosen = x[..., 0] > 0
    out = torch.zeros_like(x)
    out[chosen] = self.down_proj(self.act_fn(self.gate_proj(x[chosen])) * self.up_proj(x[chosen]))
    return out


def _reading_weights(self: LlamaMLP, x: torch.Tensor) -> torch.Tensor:
    gate, up, down = (layer.weight for layer in (self.gate_proj, self.up_proj, self.down_proj))
    return (nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T


@pytest.mark.parametrize("forward", [_in_another_order, _some_rows, _reading_weights])
def test_layers_in_which_clients_would_be_mixed_up_are_refused_and_the_others_are_named(
    llama_dir, text_dir, tmp_path, monkeypatch, forward
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # nothing is known of this model
    monkeypatch.setattr(LlamaMLP, "forward", forward)
    config = whole_runs.tiny(llama_dir, text_dir, algorithm="fed-peft", out=tmp_path / "run", rounds=1)
    with pytest.raises(ConfigError) as caught:
        Simulation(config).run()
    asked_for = "down_proj gate_proj k_proj o_proj q_proj up_proj v_proj"
    good = "self_attn.k_proj self_attn.o_proj self_attn.q_proj self_attn.v_proj"
    allowed = f"layers that PEFT can adapt and in which the clients of a batch stay apart: {good}"
    assert str(caught.value) == f"lora.targets = {asked_for!r} is not allowed: {allowed}"
    Simulation(whole_runs.changed(config, lora={"targets": tuple(good.split())})).run()


def test_a_layer_that_peft_cannot_adapt_is_refused(family_dir):
    foundation = prepare(str(family_dir("FalconH1")), "float32")
    lora = find_lora(load(foundation), LoraConfig())
    with pytest.raises(ConfigError, match="stay apart: feed_forward.down_proj .*mamba.in_proj self_attn") as caught:
        check_stacking(foundation, lora)
    assert "mamba.out_proj" not in str(caught.value)


def test_as_many_first_blocks_are_asked_as_have_all_kinds(tmp_path):
    kinds = ["full_attention", "full_attention", "sliding_attention", "full_attention"]
    directory = write_family(tmp_path, "Gemma2", num_hidden_layers=4, layer_types=kinds)
    foundation = prepare(str(directory), "float32")
    name = foundations.block_list_name(load(foundation))
    answer = foundations.asked(
        foundation, "how many", lambda model: {"blocks": len(list(model.get_submodule(name).children()))}
    )
    assert answer == {"blocks": 3}


def test_the_shape_of_a_model_does_not_depend_on_the_names_in_its_configuration(family_dir):
    models = {family: load(prepare(str(family_dir(family)), "float32")) for family in SUPPORTED}
    for family, model in models.items():
        shape, block = model_shape(model, 4), next(model.get_submodule(block_list_name(model)).children())
        assert shape.block_parameters == sum(parameter.numel() for parameter in block.parameters()), family
        linears = [module for module in block.modules() if isinstance(module, nn.Linear | Conv1D)]
        assert shape.lora_features == sum(sum(module.weight.shape) for module in linears), family
        assert shape.num_blocks == len(list(model.get_submodule(block_list_name(model)).children())), family
