"""What emulators cost: the devices that get one of a level, and the server that makes them.

Legend: N devices, L levels, from 1.
"""

from __future__ import annotations

import numpy as np
import torch

from fedpeat_ray.config import EmulatorConfig, SimulationConfig
from fedpeat_ray.emulators.ladder import Ladder, block_number, emulator_shapes
from fedpeat_ray.fleet.costs import ServerCosts, added_parameters, forward_flops, training_flops
from fedpeat_ray.fleet.levels import EmulatorCosts
from fedpeat_ray.fleet.memory import ModelShape, training_memory
from fedpeat_ray.models import weight_files
from fedpeat_ray.models.foundation import Foundation
from fedpeat_ray.training.adapters import Adapter


def emulator_costs(
    config: SimulationConfig, foundation: Foundation, shape: ModelShape, ladder: Ladder, adapter: Adapter
) -> EmulatorCosts:
    """What FedPEAT costs. LoRA in middle blocks too is counted as if it were in all blocks."""
    emulator, local, shapes = config.emulator, config.local, foundation.shapes
    dtype = torch.float32 if config.fleet.precision == "float32" else torch.float16
    files = [
        emulator_shapes(shapes, ladder, level, dtype, emulator.eight_bit and level < ladder.top)
        for level in range(1, ladder.top + 1)
    ]
    layouts = [adapter.within(ladder.block_list, rung.blocks).layout for rung in ladder.rungs]
    num_blocks_L = np.array([len(rung.blocks) for rung in ladder.rungs])
    in_middle = any(block_number(name, ladder.block_list) in ladder.middle_blocks for name in adapter.layout.names)
    adapter_blocks = None if in_middle else (ladder.first, ladder.last)
    frozen_block_bytes_L = np.array([_middle_block_bytes(file, ladder, i) for i, file in enumerate(files, start=1)])
    memory = training_memory(
        shape,
        batch_size=local.batch_size,
        sequence_length=local.sequence_length,
        trainable=adapter.kind,
        lora_rank=adapter.rank or 0,
        optimizer=local.optimizer,
        num_blocks=num_blocks_L,
        adapter_blocks=adapter_blocks,
        frozen_block_bytes=frozen_block_bytes_L,
    )
    num_trained_L = np.array([layout.num_elements for layout in layouts])
    flops_L = np.asarray(
        training_flops(
            shape,
            1,
            local.sequence_length,
            adapter.kind,
            added_parameters(shape, adapter.kind, num_trained_L),
            num_blocks=num_blocks_L,
            adapter_blocks=adapter_blocks,
        )
    )
    memory_bytes_L = np.asarray(memory.peak_bytes)
    step = ServerCosts(float(local.batch_size * local.sequence_length * flops_L[-1]), int(memory_bytes_L[-1]))
    return EmulatorCosts(
        emulator_bytes_L=np.array([weight_files.num_bytes(file) for file in files]),
        adapter_bytes_L=np.array([layout.payload_bytes() for layout in layouts]),
        memory_bytes_L=memory_bytes_L,
        weights_bytes_L=np.broadcast_to(memory.weights_bytes, memory_bytes_L.shape),
        flops_per_token_L=flops_L,
        server_tuning=step.times(emulator.server_steps),
        realignment=realignment_costs(emulator, shape, ladder),
    )


def realignment_costs(config: EmulatorConfig, shape: ModelShape, ladder: Ladder) -> ServerCosts:
    """Of one re-alignment: in each step a forward pass of the foundation, and training of one level's middle blocks.

    An elastic emulator draws a level for each step: their mean counts. Memory is that of the largest, its last
    blocks counted as if they were trained, too.
    """
    distil, levels = config.distil, [rung for rung in ladder.rungs[:-1] if ladder.kept_middle(rung.level)]
    tokens, length = distil.batch_size * distil.sequence_length, distil.sequence_length
    teacher = forward_flops(shape, length)
    teacher -= 2.0 * (shape.head_parameters + shape.output_products / length)  # its output layer is not asked
    steps = []
    for rung in levels:
        num_blocks = len(rung.blocks)
        depth = {"num_blocks": num_blocks, "adapter_blocks": (0, num_blocks - ladder.first)}
        flops = tokens * teacher + training_flops(shape, tokens, length, "blocks", **depth)
        flops -= 2 * tokens * ladder.last * shape.used_parameters  # the last blocks have no gradients of weights
        memory = training_memory(
            shape, batch_size=distil.batch_size, sequence_length=length, trainable="blocks", **depth
        )
        steps.append((float(flops), shape.num_parameters * shape.weight_bytes + int(memory.peak_bytes)))
    if not steps:
        return ServerCosts()
    flops, memory_bytes = zip(*steps, strict=True)
    num_steps = config.realign_steps * (len(steps) if config.weights == "per_level" else 1)
    return ServerCosts(sum(flops) / len(flops), max(memory_bytes)).times(num_steps)


def _middle_block_bytes(file: weight_files.Shapes, ladder: Ladder, level: int) -> int:
    """Bytes of the weights of one middle block on a device; of an end block where a level keeps none."""
    number = next(iter(ladder.kept_middle(level)), ladder.adapter_blocks[0])
    block = {name: entry for name, entry in file.items() if block_number(name, ladder.block_list) == number}
    return sum(dtype.itemsize * int(np.prod(shape)) for dtype, shape in block.values())
