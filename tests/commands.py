"""Our tools as commands, each in a process of its own, without a start of its own."""

import os
import runpy
import socket
import subprocess
import sys
from collections.abc import Sequence
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

# The processes are forks of one that has imported what takes the tools seconds. It has
# never trained, as this one may have: forks of such lack autograd's threads.
_IMPORTED = [
    'mmcnv2',
    'mmdet.datasets',
    'mmdet.engine',
    'mmdet.evaluation',
    'mmdet.models',
    'mmdet.visualization',
    'mmseg.datasets',
    'mmseg.engine',
    'mmseg.evaluation',
    'mmseg.models',
    'mmseg.visualization',
]


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
    context = get_context('forkserver')
    context.set_forkserver_preload(_IMPORTED)
    with TemporaryDirectory() as folder:
        output = Path(folder, 'output')
        work = (list(command), str(cwd), list(modules), str(output), dict(os.environ))
        job = context.Process(target=_run, args=work)
        job.start()
        job.join()
        return subprocess.CompletedProcess(command, job.exitcode, output.read_text())


def free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(('127.0.0.1', 0))
        return listener.getsockname()[1]


def _run(
    command: list[str],
    cwd: str,
    modules: list[str],
    output: str,
    environment: dict[str, str],
) -> None:
    file = os.open(output, os.O_WRONLY | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.environ.clear()
    os.environ.update(environment, PYTHONPATH=os.pathsep.join(modules))
    os.chdir(cwd)
    sys.argv = command
    sys.path[:0] = modules
    runpy.run_path(command[0], run_name='__main__')
