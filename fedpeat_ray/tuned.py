"""What a finished run tuned, as a model that can be used."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from safetensors.torch import load_file
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from fedpeat_ray.algorithms.find import find_algorithm
from fedpeat_ray.config import SimulationConfig
from fedpeat_ray.errors import ConfigError, RunDirError
from fedpeat_ray.models import foundation as foundations
from fedpeat_ray.models.architecture import CAUSAL, Head
from fedpeat_ray.models.traits import check_tokenizer
from fedpeat_ray.runtime.run_log import ADAPTER, read_config, read_settings
from fedpeat_ray.tasks.find import find_task
from fedpeat_ray.trainable.part import stacked
from fedpeat_ray.trainable.peft_files import load, saved_lora


def tuned_model(run_dir: Path) -> PreTrainedModel:
    """The model of a finished run with what it tuned, merged into its weights; float32, in evaluation mode.

    For FedPT it is the small one. Of what is no LoRA, but known to PEFT, it is PEFT's model. Raises RunDirError for a
    run that is not finished, or whose module only this engine knows.
    """
    config = read_settings(run_dir)
    head = Head(find_task(config.task).auto, tuple(read_config(run_dir)["resolved"].get("labels", ())))
    model = _load(find_algorithm(config.algorithm).tuned_model(config), head, config.foundation.pretrained)
    directory = _adapter_of(run_dir)
    if not (directory / "adapter_config.json").exists():
        return _with_weights(model, directory)
    import peft  # only where there is LoRA

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # PEFT calls what transformers will rename
        tuned: Any = peft.PeftModel.from_pretrained(model, str(directory))
        return tuned.merge_and_unload() if _is_lora(directory) else tuned


def texts(
    run_dir: Path, prompt: str, max_new_tokens: int, temperature: float, alpha: float | None, seed: int
) -> dict[str, str]:
    """How the models go on with a text, by what they are: as it was before, tuned, and steered where one steers.

    Args:
        run_dir: a finished run.
        prompt: the beginning of the text.
        max_new_tokens: at most so many tokens are added.
        temperature: 0 takes the likeliest token; above, tokens are drawn.
        alpha: weight of the small model's change in FedPT; None: the run's own.
        seed: of the draws.
    """
    if temperature < 0:
        raise ConfigError.of("temperature", temperature, "at least 0")
    if max_new_tokens < 1:
        raise ConfigError.of("max_new_tokens", max_new_tokens, "at least 1")
    config = read_settings(run_dir)
    if find_task(config.task).auto != CAUSAL.auto:
        raise RunDirError(f"{run_dir} is a run of {config.task}: only language models go on with a text")
    algorithm, alpha = find_algorithm(config.algorithm), config.proxy.alpha if alpha is None else alpha
    large, tuned_name = _load(config.foundation.name), algorithm.tuned_model(config)
    tuned = large if tuned_name == config.foundation.name else _load(tuned_name)
    tokenizer = foundations.load_tokenizer(foundations.model_dir(config.foundation.name))
    check_tokenizer(tokenizer, large, f"foundation.name = {config.foundation.name!r}")
    positions = min(map(foundations.max_positions, (large, tuned)))

    def text(model: PreTrainedModel, *processors: LogitsProcessor) -> str:
        set_seed(seed)
        return complete(model, tokenizer, prompt, max_new_tokens, temperature, positions, *processors)

    found = {f"{config.foundation.name}, as it was": text(large)}
    with plugged(tuned, config, run_dir) as tuned:
        found[f"{tuned_name}, tuned"] = text(tuned)
        if steer := algorithm.steering(config, tuned, alpha):
            found[f"{config.foundation.name}, steered (alpha = {alpha:g})"] = text(large, steer)
    return found


def complete(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    max_new_tokens: int,
    temperature: float,
    positions: int,
    *processors: LogitsProcessor,
) -> str:
    """The prompt and what the model adds to it, in no more than so many positions."""
    ids = tokenizer(prompt or str(tokenizer.eos_token), return_tensors="pt").input_ids
    room = positions - ids.shape[1]
    if room < 1:
        raise ConfigError.of("prompt", f"{ids.shape[1]} tokens", f"fewer than {positions} tokens")
    drawn = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature else {"do_sample": False}
    (out,) = cast(Any, model).generate(
        input_ids=ids,
        attention_mask=ids.new_ones(ids.shape),
        max_new_tokens=min(max_new_tokens, room),
        pad_token_id=tokenizer.eos_token_id,
        use_cache=True,
        logits_processor=LogitsProcessorList(processors),
        **drawn,
    )
    return str(tokenizer.decode(out, skip_special_tokens=True))


@contextlib.contextmanager
def plugged(model: PreTrainedModel, config: SimulationConfig, run_dir: Path) -> Iterator[PreTrainedModel]:
    """The model with what the run tuned, LoRA beside its weights."""
    directory = _adapter_of(run_dir)
    if not _is_lora(directory):
        yield tuned_model(run_dir)
    else:
        lora = saved_lora(model, directory, config.lora)
        with stacked(model, lora) as set_tensors:
            set_tensors(load(directory, lora).unsqueeze(0))
            yield model


def _is_lora(directory: Path) -> bool:
    path = directory / "adapter_config.json"
    return path.exists() and json.loads(path.read_text())["peft_type"] == "LORA"


def _adapter_of(run_dir: Path) -> Path:
    directory = run_dir / ADAPTER
    if not directory.is_dir():
        raise RunDirError(f"{run_dir} has no adapter: the run is not finished")
    return directory


def _with_weights(model: PreTrainedModel, directory: Path) -> PreTrainedModel:
    (file,) = directory.glob("*.safetensors")
    unknown = model.load_state_dict(load_file(file), strict=False, assign=True).unexpected_keys
    if unknown:
        raise RunDirError(f"{directory} holds what is beside the model's weights, {unknown[0]} for example")
    model.tie_weights()
    return model


def _load(name: str, head: Head = CAUSAL, pretrained: bool = True) -> PreTrainedModel:
    return foundations.load(foundations.prepare(name, "float32", head=head, pretrained=pretrained))
