"""Proxy-tuning: a small model, before and after tuning, steers a large one through its logits alone.

    l_proxy = l_large + alpha (l_tuned - l_original)        in float32; softmax afterwards

Liu et al. 2024, "Tuning Language Models by Proxy" (section 2), with alpha as in their released code. The
distribution is p_large (p_tuned / p_original)^alpha, normalised. The original is the small model as it
was before any tuning, in every round.

Legend: B sequences, T tokens, V vocabulary.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor
from transformers import LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase

from fedpeat_ray.errors import ConfigError


def proxy_logits(large_BTV: Tensor, tuned_BTV: Tensor, original_BTV: Tensor, alpha: float) -> Tensor:
    """Shifted logits over the vocabulary that the models share: the first columns of each, in float32 at least."""
    width = min(large_BTV.shape[-1], tuned_BTV.shape[-1])
    large, tuned, original = (_wide(logits[..., :width]) for logits in (large_BTV, tuned_BTV, original_BTV))
    return large + alpha * (tuned - original)


def check_vocabularies(
    large: PreTrainedTokenizerBase, large_width: int, small: PreTrainedTokenizerBase, small_width: int
) -> None:
    """Raise ConfigError unless the models read and write the same tokens; widths may differ by padding beyond them."""
    ours, theirs = small.get_vocab(), large.get_vocab()
    if ours != theirs:
        different = sorted(set(ours.items()) ^ set(theirs.items()))[0]
        allowed = f"a model with the vocabulary of foundation.name; token {different[0]!r} differs, for one"
        raise ConfigError.of("proxy.small", small.name_or_path, allowed)
    if min(large_width, small_width) <= (last := max(ours.values())):
        allowed = f"a model whose output is wide enough for token {last}, as that of foundation.name"
        raise ConfigError.of("proxy.small", small.name_or_path, allowed)


class ProxyLogits(LogitsProcessor):
    """For `large.generate(logits_processor=[...])`, first in the list; the small models have caches of their own."""

    def __init__(self, tuned: PreTrainedModel, original: PreTrainedModel, alpha: float):
        self._tuned, self._original, self._alpha = _Follower(tuned), _Follower(original), alpha

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        shifted = proxy_logits(scores, self._tuned(input_ids), self._original(input_ids), self._alpha)
        if shifted.shape[-1] < scores.shape[-1]:  # columns without a token
            out = torch.full_like(scores, -torch.inf)
            out[..., : shifted.shape[-1]] = shifted
            return cast(torch.FloatTensor, out)
        return cast(torch.FloatTensor, shifted)


class _Follower:
    """Next-token logits (B, V) of a model for texts that grow; what it has read already is cached."""

    def __init__(self, model: PreTrainedModel):
        self._model = model
        self._read: Tensor | None = None
        self._cache: Any = None

    def __call__(self, input_ids: Tensor) -> Tensor:
        read = self._read
        num_read = 0 if read is None else read.shape[1]
        if read is None or num_read >= input_ids.shape[1] or not torch.equal(input_ids[:, :num_read], read):
            num_read, self._cache = 0, None
        new = input_ids[:, num_read:]
        with torch.no_grad():
            out = self._model(input_ids=new, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._read, self._cache = input_ids, out.past_key_values
        return out.logits[:, -1]


def _wide(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
