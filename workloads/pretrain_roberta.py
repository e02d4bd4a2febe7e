"""Train an embedded masked language model, `pydoc-roberta`, on the public part of python_docs.

    python workloads/pretrain_roberta.py --out DIR [--num-tokens N] [--num-threads 1]

Public text only, documents closed by </s> and packed into rows that start with <s> and end with </s>;
masked tokens are to be guessed, at first 40 %, at the end 15 %. Muon (Jordan 2024) for the blocks'
matrices, AdamW for the rest; a learning rate that warms up, is constant and then falls to zero. DIR then
holds the model as safetensors, its tokenizer, and held-out losses and accuracies as `curve.csv` and
`curve.png`.
"""

from __future__ import annotations

import copy
import csv
import dataclasses
import math
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
import tyro
from matplotlib.figure import Figure
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast, RobertaConfig, RobertaForMaskedLM

from fedpeat_ray.data import python_docs

NAME = "pydoc-roberta"
BOS, PAD, EOS, MASK = range(4)  # <s> <pad> </s> <mask>: RoBERTa's positions start at PAD + 1
SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<mask>")
VOCABULARY_SIZE = 4096
NUM_POSITIONS = 256
NUM_SHORT = 128  # tokens of the rows that most steps see
MASKED_SHARE = 0.15  # at the end of the training and in what is held out
POSITION_SCALE = 0.05  # of the sinusoids, against 0.02 of the tokens' embeddings at the start
SHARPNESS = 1.7  # of the heads that start at a neighbour
NEIGHBOURS = (-1, 1, -2, 2)  # where the four heads look
LONG_EVERY = 4  # every fourth step has rows of NUM_POSITIONS tokens, so that late positions are learned too


@dataclasses.dataclass(frozen=True)
class PretrainConfig:
    out: Path = Path("build/pydoc-roberta")
    """Where the model, the tokenizer and the curve are written."""
    num_tokens: int = 4_096_000
    """Training tokens in all (several passes over the public text)."""
    batch_size: int = 32
    """Sequences of 128 tokens a step."""
    muon_lr: float = 5e-3
    """Peak learning rate of the blocks' matrices (an update has root mean square 0.2 times this)."""
    adam_lr: float = 2e-3
    """Peak learning rate of embeddings, norms and biases."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices and embeddings."""
    first_masked_share: float = 0.4
    """Share of the tokens to be guessed at the start; it falls linearly to 15 %. More guesses a step teach sooner."""
    warmup: int = 100
    """Steps over which the learning rate rises."""
    decay_share: float = 0.5
    """The last share of the steps, over which the learning rate falls linearly to zero."""
    eval_every: int = 100
    """Steps between held-out evaluations; the model is saved at each."""
    autocast: bool = False
    """Compute in bfloat16: faster where the CPU has instructions for it, three times slower elsewhere."""
    num_threads: int = 1
    """CPU threads."""
    seed: int = 0
    """Seed of initialisation, order and masks."""


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of VOCABULARY_SIZE entries, RoBERTa's special tokens first; it puts <s> ... </s> around."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[AddedToken(token, normalized=False, special=True) for token in SPECIAL_TOKENS],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", cls_token="<s>", eos_token="</s>", sep_token="</s>",
        pad_token="<pad>", mask_token="<mask>", model_max_length=NUM_POSITIONS,
        model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip


def tokenize(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[np.ndarray]:
    """One array of token ids a document, </s> last; "<pad>" in a text is ordinary characters."""
    ids = tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]
    return [np.array([*row, EOS], dtype=np.int64) for row in ids]


def pack(documents: list[np.ndarray], order: np.random.Generator) -> torch.Tensor:
    """All documents in a new order, cut into passages; (passages, NUM_POSITIONS - 2), the rest is dropped."""
    flat = np.concatenate([documents[i] for i in order.permutation(len(documents))])
    length = NUM_POSITIONS - 2
    passages = flat[: len(flat) // length * length].reshape(-1, length)
    return torch.from_numpy(passages[order.permutation(len(passages))])


def rows_of(passages: torch.Tensor, *, long: bool) -> torch.Tensor:
    """<s> passage </s>, or the passages' halves so: (n, 254) -> (n, 256) or (2 n, 128)."""
    length = (NUM_POSITIONS if long else NUM_SHORT) - 2
    pieces = passages[:, : passages.shape[1] // length * length].reshape(-1, length)
    return torch.nn.functional.pad(torch.nn.functional.pad(pieces, (1, 0), value=BOS), (0, 1), value=EOS)


def mask_rows(
    rows: torch.Tensor, randomness: torch.Generator, masked_share: float = MASKED_SHARE
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows with a share of their tokens changed, where): of these 80 % <mask>, 10 % random, 10 % kept."""
    score = torch.rand(rows.shape, generator=randomness).masked_fill_(rows < len(SPECIAL_TOKENS), -1.0)
    chosen = score.topk(round(masked_share * rows.shape[1]), dim=1).indices
    where = torch.zeros_like(rows, dtype=torch.bool).scatter_(1, chosen, True) & (score >= 0)
    kind = torch.rand(rows.shape, generator=randomness)
    other = torch.randint(len(SPECIAL_TOKENS), VOCABULARY_SIZE, rows.shape, generator=randomness)
    masked = torch.where(where & (kind < 0.8), MASK, rows)
    return torch.where(where & (kind >= 0.8) & (kind < 0.9), other, masked), where


def build_model() -> RobertaForMaskedLM:
    """A RoBERTa from its configuration; no dropout: the text is passed over only a few times."""
    config = RobertaConfig(
        num_hidden_layers=8, hidden_size=128, num_attention_heads=4, intermediate_size=512,
        vocab_size=VOCABULARY_SIZE, max_position_embeddings=PAD + 1 + NUM_POSITIONS, type_vocab_size=1,
        layer_norm_eps=1e-5, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, tie_word_embeddings=True,
        bos_token_id=BOS, pad_token_id=PAD, eos_token_id=EOS, use_cache=False,
    )  # fmt: skip
    model = RobertaForMaskedLM(config)
    start_local(model)
    return model


@torch.no_grad()
def start_local(model: RobertaForMaskedLM) -> None:
    """Initialise so that a short training gets beyond the tokens' frequencies.

    What a block adds starts at nothing. Positions start as sinusoids (Vaswani 2017) and the heads of the first
    half of the blocks look at the neighbours, NEIGHBOURS further on: which a token's guess needs first.
    """
    positions = model.roberta.embeddings.position_embeddings.weight
    pairs, layers = positions.shape[1] // 2, model.roberta.encoder.layer
    frequencies = 2 * math.pi / (3 * 100 ** torch.linspace(0, 1, pairs))  # wavelengths from 3 to 300
    angles = torch.arange(NUM_POSITIONS)[:, None] * frequencies
    positions[PAD + 1 :] = POSITION_SCALE * math.sqrt(2) * torch.cat([angles.sin(), angles.cos()], dim=1)
    for block in layers:
        torch.nn.init.zeros_(block.get_parameter("attention.output.dense.weight"))
        torch.nn.init.zeros_(block.get_parameter("output.dense.weight"))
    for block in layers[: len(layers) // 2]:
        query, key = (
            block.get_parameter(f"attention.self.{name}.weight").unflatten(0, (len(NEIGHBOURS), 2, -1))
            for name in ("query", "key")
        )  # rows: head, sine or cosine, frequency
        for head, offset in enumerate(NEIGHBOURS):
            mine = torch.arange(head, pairs, len(NEIGHBOURS))  # this head's frequencies
            sine, cosine = (SHARPNESS * turn for turn in ((offset * frequencies).sin(), (offset * frequencies).cos()))
            row = torch.arange(len(mine))
            key[head, 0, row, mine] += SHARPNESS
            key[head, 1, row, pairs + mine] += SHARPNESS
            query[head, 0, row, mine] += cosine[mine]
            query[head, 0, row, pairs + mine] += sine[mine]
            query[head, 1, row, pairs + mine] += cosine[mine]
            query[head, 1, row, mine] -= sine[mine]


def build_optimizers(model: RobertaForMaskedLM, config: PretrainConfig) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, AdamW for embeddings, head, norms and biases."""
    blocks = [p for p in model.roberta.encoder.layer.parameters() if p.ndim == 2]
    in_blocks = {id(p) for p in blocks}
    others = [p for p in model.parameters() if id(p) not in in_blocks]
    muon = torch.optim.Muon(blocks, lr=config.muon_lr, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw")
    adam = torch.optim.AdamW(
        [
            {"params": [p for p in others if p.ndim == 2], "weight_decay": config.weight_decay},
            {"params": [p for p in others if p.ndim != 2], "weight_decay": 0.0},
        ],
        lr=config.adam_lr, betas=(0.9, 0.98), fused=True,
    )  # fmt: skip
    return [muon, adam]


def learning_rate_factor(step: int, num_steps: int, config: PretrainConfig) -> float:
    """Linear warm-up, constant, then linear to zero."""
    return min(1.0, (step + 1) / config.warmup, (num_steps - step) / max(1.0, config.decay_share * num_steps))


def masked_logits(model: RobertaForMaskedLM, rows: torch.Tensor, where: torch.Tensor, autocast: bool) -> torch.Tensor:
    """Logits at the chosen places alone, in row order; (chosen, VOCABULARY_SIZE)."""
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        hidden = model.roberta(rows).last_hidden_state
        return model.lm_head(hidden[where]).float()


@torch.no_grad()
def evaluate(
    model: RobertaForMaskedLM, rows: torch.Tensor, masked: torch.Tensor, where: torch.Tensor, autocast: bool
) -> tuple[float, float]:
    """(mean loss, accuracy) over the chosen places of masked rows."""
    logits = torch.cat(
        [
            masked_logits(model, part, places, autocast)
            for part, places in zip(masked.split(32), where.split(32), strict=True)
        ]
    )
    target = rows[where]
    return torch.nn.functional.cross_entropy(logits, target).item(), (logits.argmax(1) == target).float().mean().item()


def append_row(path: Path, row: dict[str, float]) -> None:
    """One more line of a CSV file, after a header if it is the first."""
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, row)
        if file.tell() == 0:
            writer.writeheader()
        writer.writerow(row)


def draw_curve(folder: Path) -> None:
    """curve.png from curve.csv: held-out loss and accuracy over training tokens."""
    with (folder / "curve.csv").open() as file:
        rows = list(csv.DictReader(file))
    figure = Figure(figsize=(6.5, 3.6), layout="constrained")
    figure.suptitle(NAME)
    tokens = [int(row["tokens"]) / 1e6 for row in rows]
    for axes, (column, label) in zip(
        figure.subplots(1, 2), (("loss", "held-out masked loss (nats)"), ("accuracy", "held-out masked accuracy")),
        strict=True,
    ):  # fmt: skip
        for side, colour in (("private", "tab:orange"), ("public", "tab:green")):
            axes.plot(tokens, [float(row[f"{side}_{column}"]) for row in rows], label=side, color=colour)
        axes.set(xlabel="training tokens (million)", ylabel=label)
        axes.grid(axis="y", alpha=0.3)
        axes.legend(frameon=False)
    figure.savefig(folder / "curve.png", dpi=120)


def main(config: PretrainConfig) -> None:
    torch.manual_seed(config.seed)
    torch.set_num_threads(config.num_threads)
    table = python_docs.load()
    text = {
        (public, heldout): python_docs.select(table, public=public, heldout=heldout)["text"].to_pylist()
        for public, heldout in ((True, False), (True, True), (False, True))
    }
    tokenizer = train_tokenizer(text[True, False])
    documents = tokenize(tokenizer, text[True, False])
    fixed = np.random.default_rng(config.seed)
    fixed_masks = torch.Generator().manual_seed(config.seed)
    heldout = {}
    for side in ("public", "private"):
        rows = rows_of(pack(tokenize(tokenizer, text[side == "public", True]), fixed)[:128], long=False)
        heldout[side] = (rows, *mask_rows(rows, fixed_masks))
    model = build_model()
    optimizers = build_optimizers(model, config)
    base_lrs = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    tokens_per_step, passages_per_step = config.batch_size * NUM_SHORT, config.batch_size // 2
    num_steps = config.num_tokens // tokens_per_step
    num_tokens = sum(map(len, documents))
    config.out.mkdir(parents=True, exist_ok=True)
    (config.out / "curve.csv").unlink(missing_ok=True)
    print(
        f"{NAME}: {sum(p.numel() for p in model.parameters()):,} parameters, {num_tokens:,} public tokens, "
        f"{num_steps} steps of {tokens_per_step} tokens",
        flush=True,
    )
    masks = torch.Generator().manual_seed(config.seed + 1)
    steps_per_epoch = num_tokens // (NUM_POSITIONS - 2) // passages_per_step
    passages, train_loss, started = torch.empty(0), 0.0, time.monotonic()
    for step in range(num_steps):
        epoch, place = divmod(step, steps_per_epoch)
        if place == 0:
            passages = pack(documents, np.random.default_rng((config.seed, epoch)))
        factor = learning_rate_factor(step, num_steps, config)
        for optimizer, lrs in zip(optimizers, base_lrs, strict=True):
            for group, lr in zip(optimizer.param_groups, lrs, strict=True):
                group["lr"] = lr * factor
        taken = passages[place * passages_per_step : (place + 1) * passages_per_step]
        rows = rows_of(taken, long=step % LONG_EVERY == LONG_EVERY - 1)
        masked_share = config.first_masked_share + (MASKED_SHARE - config.first_masked_share) * step / num_steps
        masked, where = mask_rows(rows, masks, masked_share)
        loss = torch.nn.functional.cross_entropy(masked_logits(model, masked, where, config.autocast), rows[where])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        train_loss += (loss.item() - train_loss) * (1.0 if step == 0 else 0.02)
        if (step + 1) % config.eval_every == 0 or step + 1 == num_steps:
            row: dict[str, float] = {
                "step": step + 1,
                "tokens": (step + 1) * tokens_per_step,
                "lr_factor": round(factor, 4),
                "train_loss": round(train_loss, 4),
            }
            for side, masked_text in heldout.items():
                loss_there, accuracy = evaluate(model, *masked_text, config.autocast)
                row |= {f"{side}_loss": round(loss_there, 4), f"{side}_accuracy": round(accuracy, 4)}
            append_row(config.out / "curve.csv", row)
            rate = (step + 1) * tokens_per_step / (time.monotonic() - started)
            print(" ".join(f"{key}={value}" for key, value in row.items()), f"tokens/s={rate:.0f}", flush=True)
            copy.deepcopy(model).bfloat16().save_pretrained(config.out)
            tokenizer.save_pretrained(config.out)
            draw_curve(config.out)


if __name__ == "__main__":
    main(tyro.cli(PretrainConfig, description=__doc__))
