"""Images to tell apart: scikit-learn's handwritten digits, a folder of images, a table or dataset with an image column,
or a function of your own.

They are read once, scaled to the size that the model wants, and lie in one file that every process maps.

Shapes: D images, C channels, H rows, W columns.
"""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from fedpeat_ray import own
from fedpeat_ray.config import DataConfig, PartitionConfig
from fedpeat_ray.data import hub
from fedpeat_ray.data.corpus import Corpus, grouped, mapped
from fedpeat_ray.data.documents import Removed
from fedpeat_ray.data.python_docs import mark_heldout, mark_heldout_sources
from fedpeat_ray.errors import ConfigError, DataError, ModelError
from fedpeat_ray.files import sha256_of, user_cache_dir, written_whole

DIGITS = "digits"
PRIVATE = "data.name"
FORMATS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
_MODES = {1: "L", 3: "RGB"}
_CACHE_VERSION = 1  # part of the cache key: raise it when the same files give other pixels


class Picture(NamedTuple):
    """What a function of your own gives for data.name: `pictures(config: DataConfig) -> Iterable[Picture]`."""

    image: np.ndarray | Image.Image
    """uint8 (H, W) or (H, W, C), or what Pillow opened."""
    label: str
    source: str = "own"
    """Where it comes from: what partitions can group by."""
    name: str = ""
    """Decides whether it is held out; empty: its pixels do."""


@dataclass(frozen=True)
class ImageFormat:
    """What a model takes."""

    shape: tuple[int, int, int]
    """C, H, W."""
    mean: tuple[float, ...] = (0.5,)
    """Of each channel, or of all, on a scale from 0 to 1."""
    std: tuple[float, ...] = (0.5,)


def image_format(directory: Path) -> ImageFormat:
    """That of the model in a directory: its config.json, and preprocessor_config.json if there is one.

    Raises ModelError for a model that does not read images of one size.
    """
    config = json.loads((directory / "config.json").read_text())
    side, channels = config.get("image_size"), config.get("num_channels", 3)
    if not isinstance(side, int) or channels not in _MODES:
        raise ModelError(f"{directory} holds no model for square images of one or three channels")
    path = directory / "preprocessor_config.json"
    values = json.loads(path.read_text()) if path.exists() else {}
    defaults = ImageFormat((channels, side, side))
    mean, std = (tuple(values.get(f"image_{name}", getattr(defaults, name))) for name in ("mean", "std"))
    return ImageFormat(defaults.shape, mean, std)


def load_images(config: DataConfig, format: ImageFormat, public: bool = False, cache_dir: Path | None = None) -> Corpus:
    """The images of `config.name`, with their classes, as documents whose tokens are pixels (C, H, W) each; or, with
    `public`, those of `config.public_name` that are no device's, which need no classes and none of which are held out.

    Equal images of one class are read once. Raises DataError if nothing can be read, or is left to train on;
    ConfigError where it is not said which.
    """
    shape, of_devices = format.shape, set[bytes]()
    if public:
        if config.public_name is None:
            allowed = "the name of the server's images, which have no embedded part (or --emulator.weights foundation)"
            raise ConfigError.of("data.public_name", None, allowed)
        of_devices = {picture.image.tobytes() for picture in _scaled_pictures(config, PRIVATE, shape)}
        partition = PartitionConfig(group_by="source")
        config = dataclasses.replace(config, name=config.public_name, partition=partition)
    field = "data.public_name" if public else PRIVATE
    pictures = _scaled_pictures(config, field, shape)
    seen: set[tuple[bytes, str]] = set()
    distinct = [p for p in pictures if not ((key := (p.image.tobytes(), p.label)) in seen or seen.add(key))]
    kept = [picture for picture in distinct if picture.image.tobytes() not in of_devices]
    if not kept:
        why = (
            "nothing left: its images are all among those of data.name"
            if distinct
            else f"no images: {', '.join(FORMATS)}"
        )
        raise DataError(f"{field} = {config.name!r} has {why}")
    sources, labels = [p.source for p in kept], [p.label for p in kept]
    if public:
        heldout = [False] * len(kept)
    elif config.heldout_by == "source":
        heldout = mark_heldout_sources(sources, config.heldout_share)
    else:
        heldout = mark_heldout(labels, [p.name or p.image.tobytes().hex() for p in kept], config.heldout_share)
    if not public and (all(heldout) or not any(heldout)):
        raise DataError(f"{field} = {config.name!r}: {sum(heldout)} of {len(kept)} images are held out")
    key = sha256_of([str(_CACHE_VERSION), str(shape), *(p.image.tobytes().hex() for p in kept)])
    path = (cache_dir or user_cache_dir()) / f"images-{key[:16]}.npy"
    if not path.exists():
        with written_whole(path) as part, part.open("wb") as file:
            np.save(file, np.concatenate([p.image.reshape(-1) for p in kept]))
    names: Any = labels if config.partition.group_by == "label" else sources
    return Corpus(
        tokens=mapped(path),
        offsets=np.arange(len(kept) + 1, dtype=np.int64) * int(np.prod(shape)),
        eos_id=0,
        removed=Removed(equal=len(pictures) - len(distinct), private=len(distinct) - len(kept)),
        image_shape=shape,
        **grouped(names, np.array(heldout), list(labels), key),
    )


def _scaled_pictures(config: DataConfig, field: str, shape: tuple[int, int, int]) -> list[Any]:
    return [_scaled(picture, shape, f"{field} = {config.name!r}") for picture in _pictures(config, field)]


def _pictures(config: DataConfig, field: str) -> Iterator[Picture]:
    path = Path(config.name).expanduser()
    if config.name == DIGITS:
        yield from _digits()
    elif path.is_dir():
        found = sorted(p for p in path.rglob("*") if p.suffix.lower() in FORMATS and p.is_file())
        if found:
            yield from (_of_file(p, path, field) for p in found)
        else:
            yield from _of_tables(config, field)
    elif own.is_import_path(config.name):
        yield from _own(config, field)
    else:
        yield from _of_tables(config, field)


def _digits() -> Iterator[Picture]:
    """1,797 handwritten digits of 8 x 8 pixels (Alpaydin and Kaynak 1998, UCI), as they come with scikit-learn."""
    from sklearn.datasets import load_digits

    data: Any = load_digits()
    pixels = np.round(data.images * (255 / 16)).astype(np.uint8)
    for i, (image, label) in enumerate(zip(pixels, data.target.tolist(), strict=True)):
        yield Picture(image, str(label), DIGITS, str(i))


def _of_file(path: Path, root: Path, field: str) -> Picture:
    """The class is the folder that the file is in; the source is the one above it, if that is below the root."""
    folders = path.relative_to(root).parts[:-1]
    if not folders and field == PRIVATE:
        raise DataError(f"{field} = {str(root)!r}: {path.name} is in no folder that names its class")
    source = folders[-2] if len(folders) > 1 else root.name
    try:
        with Image.open(path) as image:
            return Picture(image.copy(), folders[-1] if folders else "", source, str(path.relative_to(root)))
    except (UnidentifiedImageError, OSError) as error:
        raise DataError(f"{field} = {str(root)!r}: {path} cannot be read: {error}") from error


def _of_tables(config: DataConfig, field: str) -> Iterator[Picture]:
    """Rows of Parquet files or of a dataset of the hub, with images as these store them: {bytes, path}, or bytes."""
    if config.label_column is None and field == PRIVATE:
        raise ConfigError.of("data.label_column", None, "a column with the class of each image")
    for name, table in hub.tables(config, field):
        images = hub.column(table, "data.image_column", config.image_column, name)
        labels, sources = [""] * table.num_rows, [name] * table.num_rows
        if config.label_column is not None and field == PRIVATE:
            labels = hub.names(table, "data.label_column", config.label_column, name).fill_null("unknown").to_pylist()
        if config.source_column is not None:
            sources = (
                hub.names(table, "data.source_column", config.source_column, name).fill_null("unknown").to_pylist()
            )
        for i, value in enumerate(images.to_pylist()):
            content: Any = value.get("bytes") if isinstance(value, dict) else value
            try:
                with Image.open(io.BytesIO(content)) as image:
                    yield Picture(image.copy(), labels[i], sources[i], f"{name} {i}")
            except (UnidentifiedImageError, OSError, TypeError) as error:
                place = f"data.image_column = {config.image_column!r}: row {i} of {name}"
                raise DataError(f"{place} holds no image ({images.type}): {error}") from error


def _own(config: DataConfig, field: str) -> Iterator[Picture]:
    for picture in own.find(field, config.name, {})(config):
        if not isinstance(picture, Picture):
            kind = type(picture).__name__
            raise DataError(f"{field} = {config.name!r} gives {kind}, not {Picture.__module__}.Picture")
        yield picture


def _scaled(picture: Picture, shape: tuple[int, int, int], place: str) -> Any:
    """The same with uint8 pixels (C, H, W)."""
    image = picture.image
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim not in (2, 3):
            raise DataError(f"{place}: an image is {image.dtype} {image.shape}, not uint8 (H, W[, C])")
        image = Image.fromarray(image.squeeze())
    image = image.convert(_MODES[shape[0]])
    if image.size != (shape[2], shape[1]):
        image = image.resize((shape[2], shape[1]), Image.Resampling.BILINEAR)
    pixels = np.asarray(image, dtype=np.uint8)
    pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    return picture._replace(image=np.ascontiguousarray(pixels))
