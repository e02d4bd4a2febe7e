"""Proxy-tuning: what it is exactly, how it generates text, and how the small model learns from the large one."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LogitsProcessorList

from fedpeat_ray.config import LoraConfig, ProxyConfig
from fedpeat_ray.errors import ConfigError
from fedpeat_ray.models.foundation import Backbone, load, load_tokenizer, prepare
from fedpeat_ray.models.proxy import ProxyLogits, check_vocabularies, proxy_logits
from fedpeat_ray.records import Arrays, sequences
from fedpeat_ray.trainable.lora import find_lora
from fedpeat_ray.trainable.peft_files import save
from fedpeat_ray.training.evaluation import EvaluationTask
from fedpeat_ray.training.proxy_tuning import (
    EvaluateProxy,
    SmallModel,
    TeacherLogits,
    distil_small,
    distillation_loss,
)

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT calls what transformers will rename

END = 256
PROMPTS = torch.tensor([[72, 101, 108, 108, 111], [115, 104, 105, 112, 32]])
LOGITS = torch.randn(3, 2, 5, 257, generator=torch.Generator().manual_seed(1)) * 4
LARGE, TUNED, ORIGINAL = LOGITS


def plain(directory: Path) -> Any:
    """In float64, as here two computations are compared, with the attention that is taken here."""
    kind = {} if torch.cuda.is_available() else {"attn_implementation": "eager"}
    model: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64, **kind).eval()
    model.generation_config.eos_token_id = None  # texts of random models go on
    return model


@pytest.fixture
def three(model_dir: Path, request: pytest.FixtureRequest) -> tuple[Any, Any, Any]:
    """A deep model, a shallow one with noise on its weights, and this one as it was."""
    kind = "gpt2" if "gpt2" in model_dir.name else "llama"
    tuned = plain(model_dir)
    rng = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in tuned.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=rng)
    return plain(request.getfixturevalue(f"deep_{kind}_dir")), tuned, plain(model_dir)


def last_logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits[:, -1]


# What it is


def test_with_alpha_0_it_is_the_large_model(three):
    large, tuned, original = (last_logits(model, PROMPTS) for model in three)
    assert not tuned.equal(original)
    assert proxy_logits(large, tuned, original, 0.0).equal(large)


@pytest.mark.parametrize("alpha", [-1.0, 0.3, 1.0, 1e6])
def test_with_a_small_model_that_learnt_nothing_it_is_the_large_model(alpha):
    assert proxy_logits(LARGE, TUNED, TUNED, alpha).equal(LARGE)


def test_a_small_model_that_steers_itself_is_the_tuned_small_model():
    torch.testing.assert_close(proxy_logits(ORIGINAL, TUNED, ORIGINAL, 1.0), TUNED, rtol=0, atol=4e-6)
    whole, other = ORIGINAL.round(), TUNED.round()  # sums of integers are exact
    assert proxy_logits(whole, other, whole, 1.0).equal(other)


@pytest.mark.parametrize("alpha", [-0.5, 0.7, 1.0, 2.0])
def test_the_distribution_is_the_normalised_product(alpha):
    large, tuned, original = LOGITS.double().softmax(dim=-1)
    product = large * (tuned / original) ** alpha
    product /= product.sum(dim=-1, keepdim=True)
    found = proxy_logits(LARGE.double(), TUNED.double(), ORIGINAL.double(), alpha).softmax(dim=-1)
    torch.testing.assert_close(found, product, rtol=1e-12, atol=1e-12)


def test_logits_in_bfloat16_are_added_in_float32():
    large, tuned, original = LOGITS.bfloat16()
    assert proxy_logits(large, tuned, original, 1.0).equal(large.float() + (tuned.float() - original.float()))


@pytest.mark.parametrize(("large_width", "small_width"), [(257, 264), (264, 257), (260, 264)])
def test_columns_that_one_model_alone_has_are_left_out(large_width, small_width):
    large, tuned, original = torch.randn(3, 4, 264, generator=torch.Generator().manual_seed(0))
    width = min(large_width, small_width)
    found = proxy_logits(large[:, :large_width], tuned[:, :small_width], original[:, :small_width], 1.0)
    assert found.equal(proxy_logits(large[:, :width], tuned[:, :width], original[:, :width], 1.0))
    assert found.shape[1] == width


def test_models_of_one_vocabulary_fit_and_others_are_refused(gpt2_dir, deep_llama_dir):
    large, small = load_tokenizer(deep_llama_dir), load_tokenizer(gpt2_dir)
    for large_width, small_width in ((257, 257), (264, 257), (257, 264)):
        check_vocabularies(large, large_width, small, small_width)
    said = rf"^proxy.small = {re.escape(repr(str(gpt2_dir)))} is not allowed: "
    for large_width, small_width in ((256, 257), (257, 256)):
        with pytest.raises(ConfigError, match=said + "a model whose output is wide enough for token 256"):
            check_vocabularies(large, large_width, small, small_width)
    small.add_tokens(["harbour"])
    with pytest.raises(ConfigError, match=said + ".*token 'harbour' differs") as caught:
        check_vocabularies(large, 264, small, 264)
    assert "\n" not in str(caught.value)


# Text


def by_hand(models: Any, ids: Tensor, alpha: float, num_tokens: int, choose: Callable[[Tensor], Tensor]) -> Tensor:
    """Token by token, everything read anew each time."""
    for _ in range(num_tokens):
        large, tuned, original = (last_logits(model, ids) for model in models)
        ids = torch.cat([ids, choose(proxy_logits(large, tuned, original, alpha))], dim=1)
    return ids


def likeliest(logits: Tensor) -> Tensor:
    return logits.argmax(dim=-1, keepdim=True)


def drawn(logits: Tensor) -> Tensor:
    return torch.multinomial((logits / 0.8).softmax(dim=-1), 1)


def generated(large: Any, steer: ProxyLogits, ids: Tensor, num_tokens: int, **settings: Any) -> Tensor:
    return large.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=num_tokens,
        pad_token_id=END,
        use_cache=True,
        logits_processor=LogitsProcessorList([steer]),
        **settings,
    )


GREEDY = {"do_sample": False}
SAMPLING = {"do_sample": True, "temperature": 0.8, "top_k": 0}


@pytest.mark.parametrize(("settings", "choose"), [(GREEDY, likeliest), (SAMPLING, drawn)], ids=["greedy", "sampling"])
def test_text_is_that_of_a_loop_without_caches_also_for_two_prompts_and_for_a_second_text(three, settings, choose):
    large, tuned, original = three
    steer = ProxyLogits(tuned, original, 1.5)
    texts = []
    for prompts in (PROMPTS, PROMPTS[1:], PROMPTS[:1, :3], PROMPTS.flip(0)):
        torch.manual_seed(5)
        found = generated(large, steer, prompts, 12, **settings)
        torch.manual_seed(5)
        assert found.equal(by_hand(three, prompts, 1.5, 12, choose))
        texts.append(found)
    torch.manual_seed(5)
    assert not texts[0].equal(generated(large, ProxyLogits(tuned, original, 0.0), PROMPTS, 12, **settings))


@pytest.mark.parametrize("settings", [GREEDY, SAMPLING], ids=["greedy", "sampling"])
def test_columns_without_a_token_are_never_generated(deep_gpt2_dir, gpt2_dir, settings):
    large, small = plain(deep_gpt2_dir), plain(gpt2_dir)
    large.resize_token_embeddings(259, mean_resizing=False)
    with torch.no_grad():  # one of the two is always far ahead
        large.get_output_embeddings().weight[257] = 100.0 * torch.arange(32).remainder(3)
        large.get_output_embeddings().weight[258] = -large.get_output_embeddings().weight[257]
    torch.manual_seed(0)
    alone = large.generate(input_ids=PROMPTS, max_new_tokens=8, pad_token_id=END, **settings)[:, 5:]
    assert (alone > END).all()
    assert (generated(large, ProxyLogits(small, small, 1.0), PROMPTS, 8, **settings) <= END).all()


# What the small model learns


def loss_by_hand(logits: Tensor, labels: Tensor, teacher: Tensor, kl_weight: float, temperature: float) -> Tensor:
    """Over rows (N, V) and a teacher that has -inf for tokens it says nothing about."""
    known = teacher > -torch.inf
    q = logits.masked_fill(~known, -torch.inf).div(temperature).softmax(dim=1)
    p = teacher.div(temperature).softmax(dim=1)
    kl = torch.where(known, p * (p.clamp_min(1e-300).log() - q.clamp_min(1e-300).log()), 0.0).sum(dim=1).mean()
    labels_loss = -logits.softmax(dim=1)[torch.arange(len(labels)), labels].log().mean()
    return (1 - kl_weight) * labels_loss + kl_weight * temperature**2 * kl


@pytest.mark.parametrize("top_k", [None, 1, 5, 257])
@pytest.mark.parametrize(("kl_weight", "temperature"), [(0.0, 1.0), (0.5, 1.0), (0.3, 2.5), (1.0, 0.5)])
def test_the_loss_is_the_formula(kl_weight, temperature, top_k):
    logits, teacher = LOGITS[:2].double().flatten(1, 2)
    labels = torch.arange(len(logits)) * 7 % 257
    values, tokens = (teacher, None) if top_k is None else teacher.topk(top_k, dim=1)
    known = teacher if tokens is None else torch.full_like(teacher, -torch.inf).scatter(1, tokens, values)
    found = distillation_loss(logits, labels, values, tokens, kl_weight, temperature)
    expected = loss_by_hand(logits, labels, known, kl_weight, temperature)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    if kl_weight == 0:
        assert found.item() == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), rel=1e-12)


def test_a_student_that_is_its_teacher_has_nothing_to_learn_from_it():
    logits = LOGITS[0, 0].clone().requires_grad_()
    for tokens in (None, LOGITS[0, 0].topk(9, dim=1).indices):
        teacher = LOGITS[0, 0] if tokens is None else LOGITS[0, 0].gather(1, tokens)
        loss = distillation_loss(logits, torch.zeros(5, dtype=torch.long), teacher, tokens, 1.0, 2.0)
        (gradient,) = torch.autograd.grad(loss, logits)
        assert loss.item() == 0 and gradient.abs().max() < 1e-7


@pytest.fixture
def small(model_dir: Path) -> SmallModel:
    foundation = prepare(str(model_dir), "float64")
    return SmallModel(foundation, find_lora(load(foundation), LoraConfig(rank=2)))


@pytest.fixture
def adapter_P(small: SmallModel) -> Tensor:
    return small.lora.init(0) + 0.02 * torch.randn(small.lora.layout.num_elements, generator=torch.Generator())


def text(padding: int = END) -> Arrays:
    tokens_BT = np.random.default_rng(0).integers(0, 256, (5, 12)).astype(np.uint16)
    lengths_B = np.array([12, 7, 3, 12, 2])
    tokens_BT[np.arange(12) >= lengths_B[:, None]] = padding
    return sequences(tokens_BT, lengths_B)


def rows_and_labels(batch: Arrays) -> list[tuple[int, int, int]]:
    """(sequence, position, next token) of every token that is to be predicted."""
    return [(i, t, int(batch["tokens"][i, t + 1])) for i, n in enumerate(batch["lengths"]) for t in range(n - 1)]


def of_peft(model_dir: Path, small: SmallModel, adapter_P: Tensor, directory: Path, trainable: bool = False) -> Any:
    save(directory, small.lora, adapter_P, str(model_dir))
    return PeftModel.from_pretrained(plain(model_dir), str(directory), is_trainable=trainable)


@pytest.mark.parametrize(("steps", "kl_weight", "top_k"), [(3, 0.4, None), (3, 0.4, 6), (2, 0.0, None)])
def test_distillation_is_plain_training_of_the_lora_alone(
    small, adapter_P, model_dir, deep_gpt2_dir, tmp_path, steps, kl_weight, top_k
):
    config = ProxyConfig(kl_weight=kl_weight, temperature=2.0, top_k=top_k, learning_rate=0.01)
    batch, student = text(), load(small.foundation)
    tokens = torch.from_numpy(batch["tokens"].astype(np.int64))
    rows, positions, labels = (torch.tensor(part) for part in zip(*rows_and_labels(batch), strict=True))
    with torch.no_grad():
        teacher = plain(deep_gpt2_dir)(input_ids=tokens).logits
    values, kept = (teacher, None) if top_k is None else teacher.topk(top_k, dim=-1)
    before = {name: weight.clone() for name, weight in student.state_dict().items()}
    given_P = adapter_P.double()

    found_P = distil_small(student, small.lora, given_P, [batch] * steps, [(values, kept)] * steps, config)
    after = student.state_dict()
    assert before.keys() == after.keys() and all(after[name].equal(weight) for name, weight in before.items())
    assert given_P.equal(adapter_P.double())

    if kept is not None:
        teacher = torch.full_like(teacher, -torch.inf).scatter(2, kept, values)
    model = of_peft(model_dir, small, adapter_P, tmp_path / "start", trainable=True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, weight_decay=0.0)
    losses = []
    for _ in range(steps):
        logits = model(input_ids=tokens).logits[rows, positions]
        loss = loss_by_hand(logits.double(), labels, teacher[rows, positions].double(), kl_weight, 2.0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses == sorted(losses, reverse=True)
    trained = {name.replace(".default", ""): value for name, value in model.named_parameters() if value.requires_grad}
    for name, value in small.lora.layout.unflatten(found_P).items():
        torch.testing.assert_close(value, trained[f"base_model.model.{name}"].data, rtol=0, atol=1e-9)
        assert not value.equal(small.lora.layout.unflatten(adapter_P)[name])


def test_padding_teaches_nothing(small, adapter_P, deep_llama_dir):
    large = plain(deep_llama_dir)

    def distilled(padding: int) -> Tensor:
        batches, teacher = [text(padding)] * 2, TeacherLogits(small, 1.0, None)
        taught = [result.value for result in teacher(Backbone(large, large), adapter_P, batches)]
        return distil_small(load(small.foundation), small.lora, adapter_P, batches, taught, ProxyConfig())

    assert distilled(END).equal(distilled(17))


# The large model as a black box


@pytest.fixture
def black_box(deep_llama_dir: Path) -> tuple[Backbone, Any]:
    """A model that can be called, and of which nothing else is known; and the model itself."""
    model = plain(deep_llama_dir)

    def call(*, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
        assert not use_cache
        with torch.no_grad():
            return SimpleNamespace(logits=model(input_ids=input_ids.to(model.device)).logits.to(input_ids.device))

    bare: Any = call
    return Backbone(bare, bare), model


@pytest.fixture
def expected_BTV(small, adapter_P, model_dir, black_box, tmp_path) -> Tensor:
    """Logits of the text under the proxy-tuned model with alpha 0.7, by transformers and PEFT."""
    tokens = torch.from_numpy(text()["tokens"].astype(np.int64))
    with torch.no_grad():
        large, original = (model(input_ids=tokens).logits for model in (black_box[1], plain(model_dir)))
        tuned = of_peft(model_dir, small, adapter_P, tmp_path / "adapter")(input_ids=tokens).logits
    return large + 0.7 * (tuned - original)


def test_a_large_model_that_can_only_be_called_is_judged_with_the_small_one(small, adapter_P, black_box, expected_BTV):
    batch = text()
    task = EvaluationTask("all", sequences(batch["tokens"], batch["lengths"]))
    (found,) = EvaluateProxy(small, 0.7)(black_box[0], adapter_P, [task])
    rows, positions, labels = (torch.tensor(part) for part in zip(*rows_and_labels(batch), strict=True))
    logits = expected_BTV[rows, positions]
    assert (found.group, found.score.num_tokens) == ("all", len(labels))
    assert found.score.loss == pytest.approx(nn.functional.cross_entropy(logits, labels, reduction="sum").item(), 1e-5)
    assert found.score.num_correct == (logits.argmax(dim=1) == labels).sum()


@pytest.mark.parametrize("top_k", [None, 4, 1000])
def test_a_large_model_that_can_only_be_called_teaches(small, adapter_P, black_box, expected_BTV, top_k):
    first, second = TeacherLogits(small, 0.7, top_k)(black_box[0], adapter_P, [text(), text()])
    values, tokens = first.value
    assert values.equal(second.value[0])
    if top_k == 4:
        torch.testing.assert_close(values, expected_BTV.topk(4, dim=-1).values, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(expected_BTV.gather(2, tokens), values, rtol=1e-4, atol=1e-4)
    else:
        assert tokens is None
        torch.testing.assert_close(values, expected_BTV, rtol=1e-4, atol=1e-4)
