"""Processes that begin as copies of the test's own, so that nothing has to be loaded anew."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.process import BaseProcess

import torch


def start(function: Callable[[], object], environment: dict[str, str] | None = None) -> BaseProcess:
    """A copy of this process that runs the function on one thread, and ends with 0 or 1."""

    def body() -> None:
        os.environ.update(environment or {})
        torch.set_num_threads(1)
        try:
            function()
        except BaseException:  # whatever it was, the test shall see it
            traceback.print_exc()
            os._exit(1)
        os._exit(0)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside torch's idle threads
        process = multiprocessing.get_context("fork").Process(target=body)
        process.start()
    return process


def together(function: Callable[[], object], count: int) -> None:
    """The function in `count` processes that torch.distributed can join."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [start(function, shared | {"RANK": str(r), "LOCAL_RANK": str(r)}) for r in range(count)]
    for process in ranks:
        process.join(120)
        if process.exitcode != 0:
            for other in ranks:
                other.kill()
        assert process.exitcode == 0
