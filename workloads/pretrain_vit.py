"""Train an embedded image classifier, `glyph-vit`, to tell rendered letters apart.

    python workloads/pretrain_vit.py --out DIR [--num-images N] [--num-threads 1]

The images are the letters A-Z and a-z in the fonts that come with matplotlib, moved, bent, thinned or
thickened at random and reduced to 8x8 pixels of 17 shades as scikit-learn's handwritten digits are:
public, and without a single digit. Muon (Jordan 2024) for the blocks' matrices, AdamW for the rest; a
learning rate that warms up, is constant and then falls to zero over the last part. DIR then holds the
model as safetensors, its preprocessor_config.json, and the accuracies in fonts held out as `curve.csv`
and `curve.png`.
"""

from __future__ import annotations

import copy
import csv
import dataclasses
import json
import math
import string
import time
from contextlib import nullcontext
from pathlib import Path

import matplotlib
import numpy as np
import torch
import tyro
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from torch.nn.functional import affine_grid, avg_pool2d, conv2d, cross_entropy, grid_sample, interpolate
from transformers import ViTConfig, ViTForImageClassification

from fedpeat_ray.config import DataConfig
from fedpeat_ray.data.images import Picture

NAME = "glyph-vit"
LETTERS = string.ascii_uppercase + string.ascii_lowercase
WITHOUT_LETTERS = ("STIXNonUni", "STIXSiz", "cmex", "cmsy", "LastResort", "DejaVuSansDisplay", "DejaVuSerifDisplay")
HELDOUT_FONTS = ("DejaVuSansMono-Oblique", "DejaVuSerif-Bold", "STIXGeneralItalic", "cmss10")
GLYPH_SIZE = 64  # pixels of a rendered letter's frame
DRAWN_SIZE = 32  # pixels before the reduction, as in the digits' bitmaps
IMAGE_SIZE = 8
MOST_SHADE = 16  # pixels set in a block of 4x4

PREPROCESSOR = {
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5],
    "image_processor_type": "ViTImageProcessor",
    "image_std": [0.5],
    "resample": 2,
    "rescale_factor": 1 / 255,
    "size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
}


@dataclasses.dataclass(frozen=True)
class PretrainConfig:
    out: Path = Path("build/glyph-vit")
    """Where the model, the preprocessor's settings and the curve are written."""
    num_images: int = 420_000
    """Training images in all, each drawn anew."""
    batch_size: int = 128
    """Images a step."""
    muon_lr: float = 5e-3
    """Peak learning rate of the blocks' matrices (an update has root mean square 0.2 times this)."""
    adam_lr: float = 3e-3
    """Peak learning rate of embeddings, head, norms and biases."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices."""
    warmup: int = 200
    """Steps over which the learning rate rises."""
    decay_share: float = 0.5
    """The last share of the steps, over which the learning rate falls linearly to zero."""
    eval_every: int = 200
    """Steps between held-out evaluations; the model is saved at each."""
    autocast: bool = False
    """Compute in bfloat16: faster where the CPU has instructions for it, three times slower elsewhere."""
    num_threads: int = 1
    """CPU threads."""
    seed: int = 0
    """Seed of initialisation and images."""


def font_paths(*, heldout: bool) -> list[Path]:
    """matplotlib's fonts that have letters: those held out, or the others."""
    paths = sorted(Path(matplotlib.get_data_path(), "fonts", "ttf").glob("*.ttf"))
    return [p for p in paths if not p.stem.startswith(WITHOUT_LETTERS) and (p.stem in HELDOUT_FONTS) == heldout]


def render(letter: str, font: ImageFont.FreeTypeFont) -> np.ndarray:
    """One letter, white on black, as high as the frame or as wide; (GLYPH_SIZE, GLYPH_SIZE) in 0..1."""
    left, top, right, bottom = font.getbbox(letter)
    glyph = Image.new("L", (round(right - left), round(bottom - top)))
    ImageDraw.Draw(glyph).text((-left, -top), letter, fill=255, font=font)
    glyph = glyph.crop(glyph.getbbox())
    scale = GLYPH_SIZE / max(glyph.size)
    size = (max(1, round(glyph.width * scale)), max(1, round(glyph.height * scale)))
    frame = Image.new("L", (GLYPH_SIZE, GLYPH_SIZE))
    place = ((GLYPH_SIZE - size[0]) // 2, (GLYPH_SIZE - size[1]) // 2)
    frame.paste(glyph.resize(size, Image.Resampling.BILINEAR), place)
    return np.asarray(frame, dtype=np.float32) / 255


def render_all(*, heldout: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(glyphs, labels) of every letter in every font; (G, GLYPH_SIZE, GLYPH_SIZE), (G,)."""
    fonts = [ImageFont.truetype(str(path), 2 * GLYPH_SIZE) for path in font_paths(heldout=heldout)]
    glyphs = [render(letter, font) for font in fonts for letter in LETTERS]
    labels = torch.arange(len(LETTERS)).repeat(len(fonts))
    return torch.from_numpy(np.stack(glyphs)), labels


def draw(glyphs: torch.Tensor, randomness: torch.Generator) -> torch.Tensor:
    """Glyphs moved, bent and with another stroke, as images; (n, GLYPH_SIZE, GLYPH_SIZE) -> (n, 8, 8) in 0..255."""
    n = len(glyphs)

    def uniform(low: float, high: float) -> torch.Tensor:
        return low + (high - low) * torch.rand(n, generator=randomness)

    angle, shear = uniform(-20, 20) * math.pi / 180, uniform(-0.25, 0.25)
    wider, higher = uniform(1.05, 1.6), uniform(0.85, 1.1)  # how much of the plane the frame shows
    cos, sin = angle.cos(), angle.sin()
    rows = [cos * wider, (shear * cos - sin) * higher, uniform(-0.12, 0.12)]
    rows += [sin * wider, (shear * sin + cos) * higher, uniform(-0.06, 0.06)]
    grid = affine_grid(torch.stack(rows, 1).view(n, 2, 3), [n, 1, DRAWN_SIZE, DRAWN_SIZE], align_corners=False)
    bends = torch.randn(n, 2, 4, 4, generator=randomness) * uniform(0.0, 0.10).view(n, 1, 1, 1)
    bends = interpolate(bends, size=(DRAWN_SIZE, DRAWN_SIZE), mode="bicubic", align_corners=True)
    drawn = grid_sample(glyphs[:, None], grid + bends.permute(0, 2, 3, 1), align_corners=False)
    offsets = torch.arange(-3.0, 4.0)
    kernel = torch.exp(-(offsets**2) / (2 * 1.4**2))
    kernel = (kernel / kernel.sum()).view(1, 1, 1, 7)
    blurred = conv2d(conv2d(drawn, kernel, padding=(0, 3)), kernel.transpose(2, 3), padding=(3, 0))
    threshold = uniform(0.08, 0.42).view(n, 1, 1, 1)  # a low one thickens the stroke, a high one thins it
    threshold = torch.minimum(threshold, 0.5 * blurred.amax(dim=(2, 3), keepdim=True))
    shades = avg_pool2d((blurred > threshold).float(), DRAWN_SIZE // IMAGE_SIZE) * MOST_SHADE
    return (shades[:, 0].round() * (255 / MOST_SHADE)).round()


def to_pixels(images: torch.Tensor) -> torch.Tensor:
    """What the preprocessor makes of images: (n, 8, 8) in 0..255 -> (n, 1, 8, 8) in -1..1."""
    return ((images / 255 - 0.5) / 0.5)[:, None]


def build_model() -> ViTForImageClassification:
    """A ViT from its configuration, one class a letter; no dropout: every image is new."""
    config = ViTConfig(
        image_size=IMAGE_SIZE, patch_size=2, num_channels=1, num_hidden_layers=8, hidden_size=96,
        num_attention_heads=4, intermediate_size=384, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        id2label=dict(enumerate(LETTERS)), label2id={letter: i for i, letter in enumerate(LETTERS)},
    )  # fmt: skip
    return ViTForImageClassification(config)


def build_optimizers(model: ViTForImageClassification, config: PretrainConfig) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, AdamW for embeddings, head, norms and biases."""
    blocks = [p for name, p in model.named_parameters() if p.ndim == 2 and not name.startswith("classifier")]
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


def logits_of(model: ViTForImageClassification, images: torch.Tensor, autocast: bool) -> torch.Tensor:
    """(n, 8, 8) in 0..255 -> (n, 52)."""
    with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
        return model(to_pixels(images)).logits.float()


@torch.no_grad()
def evaluate(
    model: ViTForImageClassification, images: torch.Tensor, labels: torch.Tensor, autocast: bool
) -> tuple[float, float, float]:
    """(mean loss, accuracy, accuracy if upper and lower case count as the same letter)."""
    logits = torch.cat([logits_of(model, part, autocast) for part in images.split(256)])
    guess = logits.argmax(1)
    accuracy, accuracy_any_case = (guess == labels).float().mean(), (guess % 26 == labels % 26).float().mean()
    return cross_entropy(logits, labels).item(), accuracy.item(), accuracy_any_case.item()


def letters(config: DataConfig) -> list[Picture]:
    """Public images for a server, each letter in a font and drawn in ten ways; for data.public_name."""
    glyphs, labels = (part.repeat_interleave(10, dim=0) for part in render_all(heldout=False))
    images = draw(glyphs, torch.Generator().manual_seed(0)).to(torch.uint8).numpy()
    return [Picture(image, LETTERS[label]) for image, label in zip(images, labels.tolist(), strict=True)]


def append_row(path: Path, row: dict[str, float]) -> None:
    """One more line of a CSV file, after a header if it is the first."""
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, row)
        if file.tell() == 0:
            writer.writeheader()
        writer.writerow(row)


def draw_curve(folder: Path) -> None:
    """curve.png from curve.csv: accuracy in held-out fonts over training images."""
    with (folder / "curve.csv").open() as file:
        rows = list(csv.DictReader(file))
    figure = Figure(figsize=(6.5, 3.6), layout="constrained")
    axes = figure.subplots()
    images = [int(row["images"]) / 1e3 for row in rows]
    lines = {
        "heldout_accuracy_any_case": "held-out fonts, case ignored",
        "heldout_accuracy": "held-out fonts",
        "train_accuracy": "training fonts (running mean)",
    }
    for column, label in lines.items():
        axes.plot(images, [float(row[column]) for row in rows], label=label)
    axes.set(xlabel="training images (thousand)", ylabel="accuracy, 52 letters", title=NAME)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(folder / "curve.png", dpi=120)


def main(config: PretrainConfig) -> None:
    torch.manual_seed(config.seed)
    torch.set_num_threads(config.num_threads)
    glyphs, labels = render_all(heldout=False)
    heldout_glyphs, heldout_labels = (part.repeat_interleave(10, dim=0) for part in render_all(heldout=True))
    heldout_images = draw(heldout_glyphs, torch.Generator().manual_seed(config.seed))
    model = build_model()
    optimizers = build_optimizers(model, config)
    base_lrs = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    num_steps = config.num_images // config.batch_size
    config.out.mkdir(parents=True, exist_ok=True)
    (config.out / "curve.csv").unlink(missing_ok=True)
    print(
        f"{NAME}: {sum(p.numel() for p in model.parameters()):,} parameters, {len(glyphs):,} glyphs "
        f"in {len(glyphs) // len(LETTERS)} fonts, {num_steps} steps of {config.batch_size} images",
        flush=True,
    )
    randomness = torch.Generator().manual_seed(config.seed + 1)
    train_loss, train_accuracy, started = 0.0, 0.0, time.monotonic()
    for step in range(num_steps):
        factor = learning_rate_factor(step, num_steps, config)
        for optimizer, lrs in zip(optimizers, base_lrs, strict=True):
            for group, lr in zip(optimizer.param_groups, lrs, strict=True):
                group["lr"] = lr * factor
        taken = torch.randint(len(glyphs), (config.batch_size,), generator=randomness)
        logits = logits_of(model, draw(glyphs[taken], randomness), config.autocast)
        loss = cross_entropy(logits, labels[taken])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        share = 1.0 if step == 0 else 0.02
        train_loss += (loss.item() - train_loss) * share
        train_accuracy += ((logits.argmax(1) == labels[taken]).float().mean().item() - train_accuracy) * share
        if (step + 1) % config.eval_every == 0 or step + 1 == num_steps:
            heldout_loss, accuracy, accuracy_any_case = evaluate(model, heldout_images, heldout_labels, config.autocast)
            row: dict[str, float] = {
                "step": step + 1,
                "images": (step + 1) * config.batch_size,
                "lr_factor": round(factor, 4),
                "train_loss": round(train_loss, 4),
                "train_accuracy": round(train_accuracy, 4),
                "heldout_loss": round(heldout_loss, 4),
                "heldout_accuracy": round(accuracy, 4),
                "heldout_accuracy_any_case": round(accuracy_any_case, 4),
            }
            append_row(config.out / "curve.csv", row)
            rate = (step + 1) * config.batch_size / (time.monotonic() - started)
            print(" ".join(f"{key}={value}" for key, value in row.items()), f"images/s={rate:.0f}", flush=True)
            copy.deepcopy(model).bfloat16().save_pretrained(config.out)
            (config.out / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR, indent=2) + "\n")
            draw_curve(config.out)


if __name__ == "__main__":
    main(tyro.cli(PretrainConfig, description=__doc__))
