"""Gradients of a batch of examples, part by part: what hosts work out side by side for one step of one model."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from fedpeat_ray.models.foundation import Backbone
from fedpeat_ray.records import NON_FINITE, SERVER, Arrays, ClientReport
from fedpeat_ray.tasks.language_modelling import LANGUAGE_MODELLING
from fedpeat_ray.tasks.task import Task
from fedpeat_ray.trainable.part import Part, stacked
from fedpeat_ray.training.client_batch import ClientUpdate, together, training_dtype


@dataclass(frozen=True)
class Gradient:
    """`train(backbone, adapter_P, batches)`: the gradient of each batch's mean loss, its weight the number of labels.

    So the weighted mean over the parts of a batch is the gradient of the whole.
    """

    part: Part
    task: Task = LANGUAGE_MODELLING

    def __call__(self, backbone: Backbone, adapter_P: Tensor, batches: Sequence[Arrays]) -> list[ClientUpdate]:
        model, updates = backbone.training, []
        device = next(model.parameters()).device
        with stacked(model, self.part) as set_tensors:
            for batch in batches:
                started = time.perf_counter()
                theta_KP = nn.Parameter(adapter_P.to(device, training_dtype(model)).unsqueeze(0))
                set_tensors(theta_KP)
                loss_N, count_N = self.task.losses(model, together([batch], model))
                num_labels = int(count_N.sum())
                loss = loss_N.sum() / max(1, num_labels)
                loss.backward()
                assert theta_KP.grad is not None
                gradient_P = theta_KP.grad[0].double().cpu()
                failure = None if gradient_P.isfinite().all() else NON_FINITE
                report = ClientReport(SERVER, loss.item(), failure, time.perf_counter() - started)
                updates.append(ClientUpdate(report, float(num_labels), gradient_P))
        return updates
