"""Train the embedded foundations, `pydoc-base` and `pydoc-small`, on the public part of python_docs.

    python workloads/pretrain.py --name pydoc-base --out DIR [--num-threads 1] [--resume]

Public text only, packed into sequences with an end-of-text token after every document; bfloat16
autocast; Muon (Jordan 2024) for the blocks' matrices, AdamW for the rest; a learning rate that is
constant and then falls to zero over the last part. DIR then holds the model as safetensors, the shared
tokenizer, and held-out perplexities as `curve.csv` and `curve.png`. Interrupted, it goes on with
--resume from the last evaluation.
"""

from __future__ import annotations

import copy
import csv
import dataclasses
import math
import time
from pathlib import Path

import numpy as np
import torch
import tyro
from matplotlib.figure import Figure
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from fedpeat_ray.data import python_docs

END_OF_TEXT = "<|endoftext|>"
VOCABULARY_SIZE = 4096
NUM_POSITIONS = 256

SHAPES = {"pydoc-base": (12, 256, 4), "pydoc-small": (4, 128, 4)}  # blocks, width, heads


@dataclasses.dataclass(frozen=True)
class PretrainConfig:
    name: str = "pydoc-base"
    """Which model: pydoc-base or pydoc-small."""
    out: Path = Path("build/pydoc-base")
    """Where the model, the tokenizer and the curve are written."""
    num_tokens: int = 12_000_000
    """Training tokens in all (several passes over the public text)."""
    batch_size: int = 16
    """Sequences of 256 tokens a step."""
    muon_lr: float = 5e-3
    """Peak learning rate of the blocks' matrices (an update has root mean square 0.2 times this)."""
    adam_lr: float = 6e-3
    """Peak learning rate of embeddings, norms and biases."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices and embeddings."""
    decay_share: float = 0.5
    """The last share of the steps, over which the learning rate falls linearly to zero."""
    eval_every: int = 200
    """Steps between held-out evaluations (and checkpoints)."""
    num_threads: int = 1
    """CPU threads."""
    seed: int = 0
    """Seed of initialisation and order."""
    resume: bool = False
    """Go on from DIR/training.pt (a file of your own making)."""


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE (GPT-2's kind) of VOCABULARY_SIZE entries, the last of them end-of-text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE - 1, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([END_OF_TEXT])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT)


def tokenize(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[np.ndarray]:
    """One array of token ids a document, end-of-text included."""
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [np.array([*row, tokenizer.eos_token_id], dtype=np.int64) for row in ids]


def pack(documents: list[np.ndarray], order: np.random.Generator) -> torch.Tensor:
    """All documents in a new order, cut into rows; (rows, NUM_POSITIONS), the rest is dropped."""
    flat = np.concatenate([documents[i] for i in order.permutation(len(documents))])
    rows = flat[: len(flat) // NUM_POSITIONS * NUM_POSITIONS].reshape(-1, NUM_POSITIONS)
    return torch.from_numpy(rows[order.permutation(len(rows))])


def build_model(name: str) -> GPT2LMHeadModel:
    """A GPT-2 from its configuration; no dropout: the text is passed over only a few times."""
    num_blocks, width, num_heads = SHAPES[name]
    config = GPT2Config(
        n_layer=num_blocks, n_embd=width, n_head=num_heads,
        vocab_size=VOCABULARY_SIZE, n_positions=NUM_POSITIONS, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        activation_function="gelu_pytorch_tanh", bos_token_id=VOCABULARY_SIZE - 1, eos_token_id=VOCABULARY_SIZE - 1,
        use_cache=False,
    )  # fmt: skip
    config._attn_implementation = "eager"  # faster than the fused kernel on a CPU
    return GPT2LMHeadModel(config)


def build_optimizers(model: GPT2LMHeadModel, config: PretrainConfig) -> list[torch.optim.Optimizer]:
    blocks = [p for p in model.transformer.h.parameters() if p.ndim == 2]
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


def learning_rate_factor(step: int, num_steps: int, decay_share: float) -> float:
    """Short linear warm-up, constant, then linear to zero."""
    return min(1.0, (step + 1) / 50, (num_steps - step) / max(1.0, decay_share * num_steps))


@torch.no_grad()
def perplexity(model: GPT2LMHeadModel, rows: torch.Tensor) -> float:
    """exp of the mean next-token loss over rows (rows, NUM_POSITIONS)."""
    losses = [forward_loss(model, batch).item() for batch in rows.split(16)]
    return math.exp(sum(losses) / len(losses))


def forward_loss(model: GPT2LMHeadModel, rows: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(rows).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), rows[:, 1:].flatten())


def half_middle_perplexity(model: GPT2LMHeadModel, rows: torch.Tensor, num_end_blocks: int = 2) -> float:
    """Perplexity with every second middle block left out: do the blocks matter?"""
    blocks = model.transformer.h
    last = len(blocks) - num_end_blocks
    kept = [b for i, b in enumerate(blocks) if not (num_end_blocks <= i < last and (i - num_end_blocks) % 2)]
    model.transformer.h = torch.nn.ModuleList(kept)
    try:
        return perplexity(model, rows)
    finally:
        model.transformer.h = blocks


def draw_curve(folder: Path, name: str) -> None:
    """curve.png from curve.csv: held-out perplexity over training tokens."""
    with (folder / "curve.csv").open() as file:
        rows = list(csv.DictReader(file))
    figure = Figure(figsize=(6.5, 3.6), layout="constrained")
    axes = figure.subplots()
    tokens = [int(row["tokens"]) / 1e6 for row in rows]
    lines = {
        "private_perplexity_half_middle": "private, every second middle block left out",
        "private_perplexity": "private",
        "public_perplexity": "public",
    }
    for column, label in lines.items():
        axes.plot(tokens, [float(row[column]) for row in rows], label=label)
    axes.set(xlabel="training tokens (million)", ylabel="held-out perplexity", yscale="log", title=name)
    axes.set_yticks([10, 20, 50, 100, 200], ["10", "20", "50", "100", "200"])
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
    heldout_rows = {
        side: pack(tokenize(tokenizer, text[side == "public", True]), fixed)[:64] for side in ("public", "private")
    }
    model = build_model(config.name)
    optimizers = build_optimizers(model, config)
    tokens_per_step = config.batch_size * NUM_POSITIONS
    num_steps = config.num_tokens // tokens_per_step
    config.out.mkdir(parents=True, exist_ok=True)
    checkpoint, first_step = config.out / "training.pt", 0
    if config.resume:
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        for optimizer, state in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        first_step = saved["step"]
    print(
        f"{config.name}: {sum(p.numel() for p in model.parameters()):,} parameters, "
        f"{sum(map(len, documents)):,} public tokens, steps {first_step} to {num_steps} of {tokens_per_step} tokens",
        flush=True,
    )
    base_lrs = [[group["lr"] for group in optimizer.param_groups] for optimizer in build_optimizers(model, config)]
    epoch, rows, cursor, train_loss, started = -1, torch.empty(0), 0, 0.0, time.monotonic()
    for step in range(first_step, num_steps):
        rows_per_epoch = sum(map(len, documents)) // NUM_POSITIONS // config.batch_size
        if step // rows_per_epoch != epoch:
            epoch = step // rows_per_epoch
            rows = pack(documents, np.random.default_rng((config.seed, epoch)))
        cursor = step % rows_per_epoch * config.batch_size
        factor = learning_rate_factor(step, num_steps, config.decay_share)
        for optimizer, lrs in zip(optimizers, base_lrs, strict=True):
            for group, lr in zip(optimizer.param_groups, lrs, strict=True):
                group["lr"] = lr * factor
        loss = forward_loss(model, rows[cursor : cursor + config.batch_size])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        train_loss += (loss.item() - train_loss) * (1.0 if step == first_step else 0.02)
        if (step + 1) % config.eval_every == 0 or step + 1 == num_steps:
            row = {
                "step": step + 1,
                "tokens": (step + 1) * tokens_per_step,
                "lr_factor": round(factor, 4),
                "train_loss": round(train_loss, 4),
                "public_perplexity": round(perplexity(model, heldout_rows["public"]), 3),
                "private_perplexity": round(perplexity(model, heldout_rows["private"]), 3),
                "private_perplexity_half_middle": round(half_middle_perplexity(model, heldout_rows["private"]), 3),
            }
            with (config.out / "curve.csv").open("a", newline="") as file:
                writer = csv.DictWriter(file, row)
                if file.tell() == 0:
                    writer.writeheader()
                writer.writerow(row)
            rate = (step + 1 - first_step) * tokens_per_step / (time.monotonic() - started)
            print(" ".join(f"{key}={value}" for key, value in row.items()), f"tokens/s={rate:.0f}", flush=True)
            states = [optimizer.state_dict() for optimizer in optimizers]
            part = checkpoint.with_suffix(".part")
            torch.save({"model": model.state_dict(), "optimizers": states, "step": step + 1}, part)
            part.replace(checkpoint)
            copy.deepcopy(model).bfloat16().save_pretrained(config.out)
            tokenizer.save_pretrained(config.out)
            draw_curve(config.out, config.name)


if __name__ == "__main__":
    main(tyro.cli(PretrainConfig, description=__doc__))
