"""Studies of modules, families and emulators, as small as they can be: they end with a table and a picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from task_models import data_for, public_data_for

from fedpeat_ray.config import DataConfig, DistilConfig, HostsConfig
from workloads import emulator_tradeoff, families, peft_modules

SERIAL = HostsConfig("serial")


def left(directory: Path, name: str) -> pd.DataFrame:
    """The table that a study wrote, beside its text and its picture."""
    assert (directory / f"{name}.png").stat().st_size > 10_000 and (directory / f"{name}.md").read_text()
    return pd.read_csv(directory / f"{name}.csv")


def shares(table: pd.DataFrame, *columns: str) -> np.ndarray:
    """Whether each value of these columns is between 0 and 1."""
    values = table[list(columns)].to_numpy(float)
    return (values >= 0) & (values <= 1)


def test_modules_are_compared_by_split_participation_bytes_and_start(tmp_path, capsys):
    settings = peft_modules.Settings(
        modules=("full", "head"),
        alphas=(1.0,),
        participation=(0.5,),
        seeds=(0,),
        rounds=1,
        num_devices=4,
        documents_per_device=8,
        num_heldout=40,
        hosts=SERIAL,
        out=tmp_path,
    )
    assert peft_modules.main(settings) == 0
    table = left(tmp_path, "peft_modules")
    assert set(table["module"]) == {"full", "head"} and set(table["alpha"]) == {1.0}
    assert set(table["condition"].fillna("")) == {"", "scratch", "shards", "dropouts"}
    assert (table[table["round"] == 0]["bytes"] == 0).all() and np.all(shares(table, "score"))
    of_module = table.groupby("module")["payload"].first()
    assert of_module["full"] > 100 * of_module["head"]
    assert "| head | 76,900 | 0.29 |" in capsys.readouterr().out


def test_families_are_tuned_whole_and_on_emulators(tmp_path):
    settings = families.Settings(("ViT",), (0,), rounds=1, num_devices=4, distil_steps=2, hosts=SERIAL, out=tmp_path)
    assert families.main(settings) == 0
    table = left(tmp_path, "families")
    assert table["algorithm"].tolist() == ["fed-peft", "fed-peat"] and np.all(shares(table, "zero_shot", "tuned"))
    asked = table[["payload_bytes", "memory_bytes"]].to_numpy(float)
    assert np.all(asked[1] < asked[0])


@pytest.mark.parametrize("family", ["BERT", "T5", "LLaMA"])
def test_a_family_without_an_embedded_model_is_pre_trained_on_public_text(family, tmp_path, monkeypatch):
    model = families.FAMILIES[family].model
    assert isinstance(model, families.Untrained)
    size = {key: 2 for key in model.values if "layers" in key}
    short = families.Untrained(model.kind, {**model.values, **size}, model.task, model.tokenizer, 2, 1e-3)
    text = DataConfig(public_data_for("classification"), data_for("classification"))
    monkeypatch.setattr(families, "DataConfig", lambda: text)
    monkeypatch.setitem(families.FAMILIES, family, families.Family("", short))
    settings = families.Settings(out=tmp_path, sequence_length=16)
    (directory,) = {families.foundation(family, settings) for _ in range(2)}
    assert (Path(directory) / "model.safetensors").exists() and (Path(directory) / "tokenizer.json").exists()


def test_the_depth_of_emulators_is_tried_on_images(tmp_path):
    settings = emulator_tradeoff.Settings(
        "images",
        "glyph-vit",
        "digits",
        "workloads/pretrain_vit.py:letters",
        seeds=(0,),
        shares=(0.5,),
        distil=DistilConfig(steps=2, batch_size=4),
        num_steps=2,
        batch_size=4,
        num_sequences=20,
        hosts=SERIAL,
        out=tmp_path,
    )
    assert emulator_tradeoff.main(settings) == 0
    table = left(tmp_path, "tradeoff")
    assert table["kind"].tolist() == ["uniform", "influence", "distilled", "elastic"]
    assert np.all(shares(table, "emulator_zero_shot", "emulator_tuned", "plug_in", "zero_shot", "centralised"))
