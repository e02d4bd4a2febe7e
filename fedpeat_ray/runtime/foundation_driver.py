"""The foundation in shards: MapClients by rank actors that hold one model together, with DeepSpeed's ZeRO-3.

Every rank holds a share of each tensor and runs the same training on the same tasks, gathering one
layer at a time as it goes through the model; rank 0's result is handed back. The work is replicated,
not divided, so the result does not depend on the number of shards. What training reads of the model
it must read by calling its modules: a parameter outside of them is an empty tensor.
"""

from __future__ import annotations

import contextlib
import os
import resource
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import ray
import torch
from ray.exceptions import RayActorError, RayTaskError
from torch import Tensor, distributed, nn
from torch.distributed import TCPStore

from fedpeat_ray import own
from fedpeat_ray.errors import ConfigError, DriverLostError
from fedpeat_ray.files import written_whole
from fedpeat_ray.models import weight_files
from fedpeat_ray.models.foundation import Backbone, Foundation, empty
from fedpeat_ray.runtime.driver_actor import RESUME, FoundationDriver
from fedpeat_ray.runtime.host_pool import start_or_join
from fedpeat_ray.runtime.node_files import Sent, files_of, receive, send, send_file, travel_by_value
from fedpeat_ray.runtime.serial import Serial
from fedpeat_ray.training.map_clients import Call, MapClients


class Shard:
    """What a rank does: it holds a share of every tensor, and is the serial side of the seam around the whole."""

    def __init__(self, rank: int, num_shards: int, num_threads: int):
        torch.set_num_threads(num_threads)
        self._rank, self._num_shards = rank, num_shards
        self._known_files: dict[Path, str] = {}

    def address(self) -> str:
        """Of the node this rank is on."""
        return ray.util.get_node_ip_address()

    def open_store(self, host: str) -> tuple[str, int]:
        """Where the ranks are to meet, on rank 0: at this address of it only, as everybody who comes is let in."""
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.create_server((host, 0), family=family)
        port = listener.getsockname()[1]
        settings = {"is_master": True, "wait_for_workers": False, "master_listen_fd": listener.detach()}
        self._store = TCPStore(host, port, self._num_shards, **settings)
        return host, port

    def build(self, foundation: Foundation, files: dict[Path, Sent], host: str, port: int) -> None:
        """Meet the others and fill the model tensor by tensor from rank 0's file."""
        if self._rank == 0:
            receive(files, self._known_files)
        self._device, backend = ("cuda", "nccl") if ray.get_gpu_ids() else ("cpu", "gloo")
        os.environ |= {"RANK": str(self._rank), "WORLD_SIZE": str(self._num_shards), "DS_ACCELERATOR": self._device}
        os.environ |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "LOCAL_SIZE": "1"}  # Ray shows a rank its GPU only
        import deepspeed  # reads the environment
        from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # would be compiled, for half a minute
        store = self._store if self._rank == 0 else TCPStore(host, port, self._num_shards)
        distributed.init_process_group(backend, store=store, rank=self._rank, world_size=self._num_shards)
        deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
        self._before_bytes = _reset_peak()
        model = empty(foundation.config_json, foundation.exact_dtype).eval()
        for name, shape in [(name, parameter.shape) for name, parameter in model.named_parameters()]:
            if self._rank == 0:
                whole = weight_files.read(foundation.weights, name)
            else:
                whole = torch.empty(shape, dtype=foundation.exact_dtype)
            parameter = nn.Parameter(whole, requires_grad=False)
            deepspeed.zero.Init(module=nn.ParameterList([parameter]))  # rank 0's values; each keeps its share
            module, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(module), leaf, parameter)
        model.tie_weights()
        model.to(self._device)  # type: ignore[arg-type]
        self._state = model.state_dict(keep_vars=True)
        for name, tensor in self._state.items():
            if not isinstance(tensor, nn.Parameter):
                if self._rank == 0:
                    tensor.copy_(weight_files.read(foundation.weights, name))
                distributed.broadcast(tensor, 0)
        self._zero = DeepSpeedZeRoOffload(
            model,
            timers=None,
            ds_config=None,
            overlap_comm=False,
            prefetch_bucket_size=0,
            max_reuse_distance=0,
            max_live_parameters=0,
            param_persistence_threshold=0,
        )
        self._gathered = deepspeed.zero.GatheredParameters
        self._backbone = Backbone(model, model)

    def run(self, call: Call, files: dict[Path, Sent]) -> tuple[Any, list[Any]] | None:
        """The seam; its result on rank 0."""
        receive(files, self._known_files)
        try:
            result = Serial(self._backbone).run(call)
        finally:
            self._zero.partition_all_parameters()
        return result if self._rank == 0 else None

    def export(self, path: Path, names: Sequence[str]) -> None:
        """Gather the tensors one by one; rank 0 writes them."""
        shapes = {}
        for name in names:
            tensor = self._state[name]
            shapes[name] = (tensor.dtype, tuple(getattr(tensor, "ds_shape", tensor.shape)))
        if self._rank == 0:
            with written_whole(path) as part:
                weight_files.write(part, shapes, self._whole)
        else:
            for name in weight_files.order(shapes):
                self._whole(name)

    def send(self, path: Path) -> Sent | None:
        """What rank 0 wrote, for the main process on another node."""
        return send_file(path) if self._rank == 0 else None

    def _whole(self, name: str) -> Tensor:
        tensor = self._state[name]
        with self._gathered([tensor]):
            return tensor.detach().cpu().clone()

    def share(self) -> float:
        """Fraction of the parameters' elements that lie in this process."""
        parameters: list[Any] = list(self._backbone.exact.parameters())
        held = sum(parameter.ds_tensor.numel() + parameter.numel() for parameter in parameters)
        return held / sum(parameter.ds_numel for parameter in parameters)

    def peak_memory_bytes(self) -> int:
        """The most that this process has held so far beyond what it held before there was a model."""
        return torch.cuda.max_memory_allocated() if self._device == "cuda" else _peak_bytes() - self._before_bytes

    def process_id(self) -> int:
        """For tests that kill a rank."""
        return os.getpid()


class ShardedFoundation(MapClients):
    """The sharded model as the main process sees it; use as a context manager.

    Joins the Ray that is there or starts one, as RayHosts does.
    """

    def __init__(
        self,
        foundation: Foundation,
        num_shards: int,
        num_gpus: float | None,
        on_event: Callable[..., None],
        num_threads: int = 1,
        address: str | None = None,
    ):
        """`num_gpus`: share of a shard; unset: 1 where the cluster has GPUs. `on_event(kind, **facts)` hears of a loss;
        `address`: of Ray (`hosts.address`).

        Raises ConfigError for shards that the cluster has no room for.
        """
        self._on_event = on_event
        self._owns_ray = not ray.is_initialized()
        self._driver: Any = None
        self._sent: dict[Path, Sent] = {}
        try:
            if self._owns_ray:
                start_or_join(num_threads, address)
            cluster_gpus = ray.cluster_resources().get("GPU", 0)
            share = (1.0 if cluster_gpus else 0.0) if num_gpus is None else num_gpus
            if share * num_shards > cluster_gpus:
                allowed = f"the cluster has {cluster_gpus:g} GPUs for {num_shards} shards"
                raise ConfigError.of("foundation.num_gpus", num_gpus, allowed)
            if num_shards > 1 and 0 < share <= 0.5:
                raise ConfigError.of("foundation.num_gpus", num_gpus, "above 0.5, as NCCL wants a GPU for each shard")
            shard_bytes = -(-foundation.weights.stat().st_size // num_shards)
            self._driver = ray.remote(num_cpus=0)(FoundationDriver).remote(num_shards, share, num_threads)
            what = [ray.put(foundation), ray.put(send([foundation.weights], {}))]
            self._get(self._driver.start.remote(shard_bytes, what))  # type: ignore[attr-defined]  # annotated as its class
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the actors, and Ray if it was started here."""
        if self._driver:
            ray.kill(self._driver)  # the ranks are its own and end with it
        if self._owns_ray and ray.is_initialized():
            ray.shutdown()

    def run(self, call: Call) -> tuple[Any, list[Any]]:
        """See MapClients. Raises DriverLostError once a rank is lost."""
        self._sent = send(files_of(call.train), self._sent)
        travel_by_value(own.modules())
        return self._call("run", call, self._sent)[0]

    def export(self, path: Path, names: Sequence[str]) -> None:
        """Write these tensors, by the names of the model's state dict, to a safetensors file."""
        self._call("export", path, names)
        if not path.exists():  # rank 0 has a disk of its own
            receive({path: self._call("send", path)[0]}, {})

    def shares(self) -> list[float]:
        """Fraction of the model's elements that each rank holds."""
        return self._call("share")

    def peak_memory_bytes(self) -> list[int]:
        """The most that each rank has held because of the model."""
        return self._call("peak_memory_bytes")

    def process_ids(self) -> list[int]:
        """The ranks' processes."""
        return self._call("process_id")

    def _call(self, method: str, *arguments: Any) -> list[Any]:
        return ray.get(self._get(self._driver.call.remote(method, [ray.put(value) for value in arguments])))

    def _get(self, ref: ray.ObjectRef) -> Any:
        try:
            return ray.get(ref)
        except RayTaskError as error:
            raised, cause = error.cause, error
        except RayActorError as error:
            raised, cause = DriverLostError(f"the process that drives the ranks is lost; {RESUME}"), error
        if isinstance(raised, DriverLostError):
            self._on_event("driver_lost", error=str(raised))
        raise raised from cause


def _reset_peak() -> int:
    """Count this process's peak anew, where that is possible (Linux); returns it."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _peak_bytes()


def _peak_bytes() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
