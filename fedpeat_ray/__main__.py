"""Commands about runs that were made.

python -m fedpeat_ray generate RUN_DIR --prompt "Return the"
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, cast

import tyro
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text
from safetensors.torch import load_file
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase, set_seed
from transformers.utils.logging import disable_progress_bar

from fedpeat_ray.algorithms.find import find_algorithm
from fedpeat_ray.config import SimulationConfig
from fedpeat_ray.errors import ConfigError, FedPeatError, RunDirError
from fedpeat_ray.models import foundation as foundations
from fedpeat_ray.models.lora import load_adapter, saved_lora
from fedpeat_ray.models.traits import check_tokenizer
from fedpeat_ray.runtime.run_log import read_settings
from fedpeat_ray.training.client_batch import stacked_lora


def generate(
    run_dir: Annotated[Path, tyro.conf.Positional],
    prompt: str = "",
    max_new_tokens: int = 60,
    temperature: float = 0.0,
    alpha: float | None = None,
    seed: int = 0,
) -> None:
    """Go on with a text by the model before the run, and after it; for FedPT by base, tuned small and both together.

    Args:
        run_dir: a finished run.
        prompt: the beginning of the text.
        max_new_tokens: at most so many tokens are added.
        temperature: 0 takes the likeliest token; above, tokens are drawn.
        alpha: weight of the small model's change in FedPT; unset: the run's own.
        seed: of the draws.
    """
    if temperature < 0:
        raise ConfigError.of("temperature", temperature, "at least 0")
    if max_new_tokens < 1:
        raise ConfigError.of("max_new_tokens", max_new_tokens, "at least 1")
    config = read_settings(run_dir)
    algorithm, alpha = find_algorithm(config.algorithm), config.proxy.alpha if alpha is None else alpha
    large, tuned_name = _model(config.foundation.name), algorithm.tuned_model(config)
    tuned = large if tuned_name == config.foundation.name else _model(tuned_name)
    tokenizer = foundations.load_tokenizer(foundations.model_dir(config.foundation.name))
    check_tokenizer(tokenizer, large, f"foundation.name = {config.foundation.name!r}")
    positions = min(map(foundations.max_positions, (large, tuned)))

    def text(model: PreTrainedModel, *processors: LogitsProcessor) -> str:
        set_seed(seed)
        return complete(model, tokenizer, prompt, max_new_tokens, temperature, positions, *processors)

    texts = {f"{config.foundation.name}, as it was": text(large)}
    with plugged(tuned, config, run_dir):
        texts[f"{tuned_name}, tuned"] = text(tuned)
        if steer := algorithm.steering(config, tuned, alpha):
            texts[f"{config.foundation.name}, steered (alpha = {alpha:g})"] = text(large, steer)
    table = Table(*map(escape, texts), box=box.SIMPLE)
    table.add_row(*map(Text, texts.values()))  # as it is: brackets are no markup
    Console().print(table)


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
def plugged(model: PreTrainedModel, config: SimulationConfig, run_dir: Path) -> Iterator[None]:
    """The model with what the run tuned."""
    directory = run_dir / "adapter"
    if not directory.is_dir():
        raise RunDirError(f"{run_dir} has no adapter: the run is not finished")
    if (directory / "adapter_config.json").exists():
        lora = saved_lora(model, directory, config.lora)
        with stacked_lora(model, lora) as set_factors:
            set_factors(load_adapter(directory, lora).unsqueeze(0))
            yield
    else:
        (file,) = directory.glob("*.safetensors")
        model.load_state_dict(load_file(file), strict=False, assign=True)
        model.tie_weights()
        yield


def _model(name: str) -> PreTrainedModel:
    return foundations.load(foundations.prepare(name, "float32"))


def main(arguments: list[str]) -> int:
    """Do what the command line says; returns the exit status."""
    disable_progress_bar()
    try:
        tyro.extras.subcommand_cli_from_dict({"generate": generate}, args=arguments, description=__doc__)
    except FedPeatError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
