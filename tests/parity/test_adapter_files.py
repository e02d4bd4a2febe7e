"""A saved adapter is PEFT's: the plain transformers base with PeftModel gives what the engine evaluates.

All in float64: in float32 two ways of summing differ by as much as the machine likes.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from fedpeat_ray.config import LoraConfig
from fedpeat_ray.errors import ModelError
from fedpeat_ray.models.foundation import load, load_backbone, prepare, save_weights, weights_layout
from fedpeat_ray.records import sequences
from fedpeat_ray.trainable.lora import find_lora
from fedpeat_ray.trainable.part import stacked
from fedpeat_ray.trainable.peft_files import load as load_adapter
from fedpeat_ray.trainable.peft_files import save
from fedpeat_ray.training.evaluation import Evaluate, EvaluateWeights, ScoreSum, evaluation_tasks

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT calls what transformers will rename

LORA = LoraConfig(rank=3, alpha=12.0)
# LLaMA's norms and softmax are float32 whatever the weights are. Sums in another order (2**-53) can tip one of these
# roundings: 2**-24 of a number near 1, and what follows in two blocks and the head makes of it no more than 2**4 times.
LOGIT = 2.0**-20
PERPLEXITY = 2.0**-24  # relative: such a logit in one of 595 tokens, and the loss has no more than its share of it


@pytest.fixture
def foundation(model_dir):
    return prepare(str(model_dir), "float64")


@pytest.fixture
def lora(foundation):
    return find_lora(load(foundation), LORA)


@pytest.fixture
def adapter_P(lora):
    return 0.3 * torch.randn(lora.layout.num_elements, generator=torch.Generator().manual_seed(1))


def heldout() -> tuple[np.ndarray, np.ndarray]:
    """19 sequences, so that the last task is a part of one; the last is padded, one holds nothing to predict."""
    rng = np.random.default_rng(0)
    lengths = np.full(19, 32)
    lengths[-1], lengths[4] = 7, 1
    return rng.integers(0, 250, (19, 32)), lengths


def perplexity(model: torch.nn.Module) -> float:
    """A sequence at a time, without padding."""
    loss, num_tokens = 0.0, 0
    for tokens, length in zip(*heldout(), strict=True):
        if length > 1:
            row = torch.from_numpy(tokens[None, :length])
            with torch.no_grad():
                logits = model(input_ids=row).logits[0, :-1]
            loss += torch.nn.functional.cross_entropy(logits, row[0, 1:], reduction="sum").item()
            num_tokens += length - 1
    return math.exp(loss / num_tokens)


def plain_model(directory: Path) -> PreTrainedModel:
    """transformers' own, with the attention that the engine takes on a CPU."""
    kind = {} if torch.cuda.is_available() else {"attn_implementation": "eager"}
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64, **kind).eval()


def test_peft_loads_a_saved_adapter_and_finds_the_same_perplexity(model_dir, foundation, lora, adapter_P, tmp_path):
    save(tmp_path, lora, adapter_P, str(model_dir))
    plain = plain_model(model_dir)
    zero_shot = perplexity(plain)
    theirs = PeftModel.from_pretrained(plain, str(tmp_path)).eval()

    tasks = evaluation_tasks("all", sequences(*heldout()))
    assert [len(task.arrays["tokens"]) for task in tasks] == [8, 8, 3]
    backbone = load_backbone(foundation)
    score = ScoreSum().add(Evaluate(lora)(backbone, adapter_P, tasks)).result()["all"]
    assert score.num_tokens == 17 * 31 + 6
    assert score.perplexity == pytest.approx(perplexity(theirs), rel=PERPLEXITY)
    assert abs(score.perplexity - zero_shot) > 0.01 * zero_shot, "the adapter does something"
    assert theirs.peft_config["default"].base_model_name_or_path == str(model_dir)

    tokens = torch.from_numpy(heldout()[0][:5])
    with torch.no_grad(), stacked(backbone.exact, lora) as set_factors:
        set_factors(adapter_P[None])
        logits = backbone.exact(input_ids=tokens).logits
        torch.testing.assert_close(logits, theirs(input_ids=tokens).logits, rtol=0, atol=LOGIT)
        greedy = theirs(input_ids=tokens).logits[:, :-1].argmax(-1)
    accuracy = Evaluate(lora)(backbone, adapter_P, evaluation_tasks("all", sequences(tokens.numpy(), np.full(5, 32))))
    assert accuracy[0].score.num_correct == (greedy == tokens[:, 1:]).sum().item()


def test_a_new_adapter_changes_nothing(model_dir, foundation, lora):
    scores = Evaluate(lora)(load_backbone(foundation), lora.init(0), evaluation_tasks("all", sequences(*heldout())))
    own = perplexity(plain_model(model_dir))
    assert ScoreSum().add(scores).result()["all"].perplexity == pytest.approx(own, rel=PERPLEXITY)


def test_what_is_saved_is_loaded_bit_for_bit_and_is_the_factors_alone(lora, adapter_P, tmp_path):
    save(tmp_path / "deep" / "adapter", lora, adapter_P, "base")
    assert load_adapter(tmp_path / "deep" / "adapter", lora).equal(adapter_P)
    stored = load_file(tmp_path / "deep" / "adapter" / "adapter_model.safetensors")
    assert len(stored) == 2 * len(lora.modules)
    assert all(".lora_A." in name or ".lora_B." in name for name in stored), "no weight of the base"
    assert sum(tensor.numel() for tensor in stored.values()) == lora.layout.num_elements
    assert {path.name for path in (tmp_path / "deep" / "adapter").iterdir()} == {
        *("adapter_config.json", "adapter_model.safetensors")
    }


def test_an_adapter_that_peft_saved_is_loaded(model_dir, lora, adapter_P, tmp_path):
    save(tmp_path / "ours", lora, adapter_P, str(model_dir))
    plain = AutoModelForCausalLM.from_pretrained(model_dir)
    PeftModel.from_pretrained(plain, str(tmp_path / "ours")).save_pretrained(str(tmp_path / "theirs"))
    assert load_adapter(tmp_path / "theirs", lora).equal(adapter_P)


def test_an_adapter_of_another_shape_is_refused(foundation, lora, adapter_P, tmp_path):
    save(tmp_path, lora, adapter_P, "base")
    model = load(foundation)
    for wrong, said in (
        (LoraConfig(rank=4, alpha=12.0), "rank 3 and alpha 12.0, expected rank 4 and alpha 12.0"),
        (LoraConfig(rank=3, alpha=6.0), "expected rank 3 and alpha 6.0"),
    ):
        with pytest.raises(ModelError, match=said):
            load_adapter(tmp_path, find_lora(model, wrong))
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "r": 4}))
    with pytest.raises(ModelError, match="does not fit this model"):
        load_adapter(tmp_path, find_lora(model, LoraConfig(rank=4, alpha=12.0)))


def test_an_adapter_of_another_model_is_refused(gpt2_dir, llama_dir, tmp_path):
    gpt2, llama = (find_lora(load(prepare(str(path), "float32")), LORA) for path in (gpt2_dir, llama_dir))
    save(tmp_path, gpt2, gpt2.init(0), "gpt2")
    with pytest.raises(ModelError, match="does not fit this model"):
        load_adapter(tmp_path, llama)


def test_a_model_saved_with_all_its_weights_is_read_by_transformers(foundation, tmp_path):
    backbone = load_backbone(foundation)
    layout = weights_layout(backbone.exact)
    weights_P = layout.flatten(backbone.exact.state_dict())
    weights_P = weights_P + 0.02 * torch.randn(
        len(weights_P), generator=torch.Generator().manual_seed(1), dtype=weights_P.dtype
    )
    save_weights(tmp_path, foundation, layout, weights_P)

    theirs = plain_model(tmp_path)
    assert layout.flatten(theirs.state_dict()).equal(weights_P)
    scores = EvaluateWeights(layout)(backbone, weights_P, evaluation_tasks("all", sequences(*heldout())))
    assert ScoreSum().add(scores).result()["all"].perplexity == pytest.approx(perplexity(theirs), rel=PERPLEXITY)
    again = prepare(str(tmp_path), "float64")
    assert layout.flatten(load(again).state_dict()).equal(weights_P)
    assert Path(again.weights) != Path(foundation.weights)
