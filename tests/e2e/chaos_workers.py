"""Dask workers that are started again whenever one ends: `python chaos_workers.py ADDRESS COUNT`.

Each is what `dask worker` runs, in a process of its own that is forked from this one after the
imports, which would take longer than a worker lives here.
"""

import os
import signal
import sys
import time

import distributed
import torch
from distributed.cli.dask_worker import main

import jobs.index
import jobs.score_columns

LOADED = (distributed, torch, jobs.index, jobs.score_columns)


def start(address: str) -> int:
    """A worker; returns its process."""
    pid = os.fork()
    if pid:
        return pid
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        arguments = ["--nthreads", "1", "--no-nanny", "--no-dashboard", "--memory-limit", "0"]
        main([address, *arguments, "--death-timeout", "60"], standalone_mode=False)
    finally:
        os._exit(0)


def keep(address: str, count: int) -> None:
    """Until this process is ended."""
    alive = {start(address) for _ in range(count)}
    print("started", flush=True)
    while True:
        pid, _ = os.wait()
        alive.discard(pid)
        time.sleep(0.2)
        alive.add(start(address))


if __name__ == "__main__":
    keep(sys.argv[1], int(sys.argv[2]))
