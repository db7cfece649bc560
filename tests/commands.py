"""Our tools as commands, each in a process of its own, without a start of its own."""

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
    command: Sequence[str], cwd: Path, modules: Sequence[str] = ()
) -> subprocess.CompletedProcess:
    """Run a script of Python.

    Args:
        command: The script and its arguments.
        cwd: Where to run it.
        modules: Folders of further modules.

    Returns:
        What came of it, with all that it has printed.
    """
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.chdir(cwd)
        patch.setattr(sys, 'path', [*modules, *sys.path])
        patch.setenv('PYTHONPATH', os.pathsep.join(modules))
        log = Path(folder, 'log')
        job = start_tool(command, log)
        job.join()
        return subprocess.CompletedProcess(command, job.exitcode, log.read_text())


def free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(('127.0.0.1', 0))
        return listener.getsockname()[1]
