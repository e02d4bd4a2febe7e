"""Ray's workers, forked from one process that has loaded what they need: to load it takes each of them seven seconds.

    python warm_workers.py SOCKET                   loads, then forks a worker for whoever asks, until its input ends
    python warm_workers.py SOCKET worker.py WORDS   asks for one, and ends with it

Ray takes the second for its Python (`py_executable` of a runtime environment). Before it is forked a worker has done
nothing but load modules; it gets the words, environment, folder and outputs of who asked. What workers are elsewhere,
new processes that load everything, the tests in own_processes have.
"""

import json
import os
import socket
import sys
from pathlib import Path


def ask(path: str, words: list[str]) -> None:
    """As long as the worker lives, its end of the connection is open."""
    with socket.socket(socket.AF_UNIX) as server:
        server.connect(path)
        what = {"words": words, "environment": dict(os.environ), "folder": str(Path.cwd())}
        socket.send_fds(server, [b" "], [0, 1, 2])
        server.sendall(json.dumps(what).encode())
        server.shutdown(socket.SHUT_WR)
        server.recv(1)


def serve(path: str) -> None:
    """Load, and fork until nobody holds the other end of the input; how a worker ended nobody asks."""
    import gc
    import select
    import signal

    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()
        print("listens", flush=True)
        load()
        gc.freeze()
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        while server in select.select([server, sys.stdin], [], [])[0]:
            client, _ = server.accept()
            if os.fork():
                client.close()
                continue
            server.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            work(client)
            return


def load() -> None:
    """What hosts and ranks import. Not Ray: it reads the environment when it is loaded, and never again."""
    from fedpeat_ray.loading import loading

    with loading():
        import torch

        import fedpeat_ray.runtime.serial
        import fedpeat_ray.world  # noqa: F401

        os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # a process that has asked CUDA itself cannot be forked
        if not torch.cuda.is_available():
            os.environ["DS_ACCELERATOR"] = "cpu"  # as ranks set it
            import deepspeed  # noqa: F401
    assert "ray" not in sys.modules


def work(client: socket.socket) -> None:
    """Be the process that was asked for."""
    import runpy

    for number, descriptor in enumerate(socket.recv_fds(client, 1, 3)[1]):
        os.dup2(descriptor, number)
        os.close(descriptor)
    what = json.loads(b"".join(iter(lambda: client.recv(2**16), b"")))
    os.chdir(what["folder"])
    os.environ.clear()
    os.environ.update(what["environment"])
    sys.argv = what["words"]
    sys.path[0] = str(Path(sys.argv[0]).parent)
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    _, path, *words = sys.argv
    if words:
        ask(path, words)
    else:
        serve(path)
