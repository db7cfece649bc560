"""Our tools as commands, each in processes of its own, without a start of their own."""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from mmcnv2.engine.jobs import start_tool


def run_tool(
    command: Sequence[str], cwd: Path, modules: Sequence[str] = (), processes: int = 1
) -> subprocess.CompletedProcess:
    """Run a script of Python.

    Args:
        command: The script and its arguments.
        cwd: Where to run it.
        modules: Folders of further modules.
        processes: How many run it together, as torchrun would start them.

    Returns:
        What came of it, with all that it has printed.
    """
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.chdir(cwd)
        patch.setattr(sys, 'path', [*modules, *sys.path])
        patch.setenv('PYTHONPATH', os.pathsep.join(modules))
        logs = [Path(folder, str(rank)) for rank in range(processes)]
        port, jobs = free_port(), []
        for rank, log in enumerate(logs):
            if processes > 1:
                set_process(patch, rank, processes, port)
            jobs.append(start_tool(command, log))
        for job in jobs:
            job.join()
        status = next((job.exitcode for job in jobs if job.exitcode), 0)
        printed = ''.join(log.read_text() for log in logs)
        return subprocess.CompletedProcess(command, status, printed)


def set_process(
    patch: pytest.MonkeyPatch, rank: int, processes: int, port: int
) -> None:
    """Set what a launcher tells a process of this machine."""
    machine = dict(MASTER_ADDR='127.0.0.1', MASTER_PORT=port)
    process = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=processes)
    for name, value in (machine | process).items():
        patch.setenv(name, str(value))


def free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(('127.0.0.1', 0))
        return listener.getsockname()[1]
