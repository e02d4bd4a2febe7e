"""Gradients of a batch of text, part by part: what hosts work out side by side for one step of one model.

Legend: B sequences, T tokens, K = 1 client, N = B T, P trained elements.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from fedpeat_ray.models.foundation import Backbone
from fedpeat_ray.models.lora import Lora
from fedpeat_ray.records import NON_FINITE, SERVER, ClientReport, TextBatch
from fedpeat_ray.training.client_batch import (
    IGNORED,
    ClientUpdate,
    next_token_labels,
    stacked_lora,
    summed_losses,
    tensors,
    training_dtype,
)


@dataclass(frozen=True)
class LoraGradient:
    """`train(backbone, adapter_P, batches)`: the gradient of each batch's mean loss, its weight the predicted tokens.

    So the weighted mean over the parts of a batch is the gradient of the whole.
    """

    lora: Lora

    def __call__(self, backbone: Backbone, adapter_P: Tensor, batches: Sequence[TextBatch]) -> list[ClientUpdate]:
        model, updates = backbone.training, []
        device = next(model.parameters()).device
        with stacked_lora(model, self.lora) as set_factors:
            for batch in batches:
                started = time.perf_counter()
                theta_KP = nn.Parameter(adapter_P.to(device, training_dtype(model)).unsqueeze(0))
                tokens_BT, lengths_B = tensors(batch, device)
                labels_KN = next_token_labels(tokens_BT, lengths_B).view(1, -1)
                num_tokens = int((labels_KN != IGNORED).sum())
                set_factors(theta_KP)
                loss = summed_losses(model, tokens_BT.unsqueeze(0), labels_KN)[0] / max(1, num_tokens)
                loss.backward()
                assert theta_KP.grad is not None
                gradient_P = theta_KP.grad[0].double().cpu()
                failure = None if gradient_P.isfinite().all() else NON_FINITE
                report = ClientReport(SERVER, loss.item(), failure, time.perf_counter() - started)
                updates.append(ClientUpdate(report, float(num_tokens), gradient_P))
        return updates
