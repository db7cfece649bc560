"""Our tools as processes of their own that start at once."""

import gc
import os
import runpy
import signal
import sys
from collections.abc import Sequence
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import cast

# What takes the tools seconds to import, as far as it is installed.
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


def start_tool(command: Sequence[str], log: Path) -> BaseProcess:
    """Start a script of Python, here and now: in this folder, with this environment.

    It is a fork of a process that has imported what the tools need, and done nothing
    else. This one may have trained, and forks of such lack autograd's threads.

    Args:
        command: The script and its arguments.
        log: File for what it prints.

    Returns:
        The process.
    """
    context = get_context('forkserver')
    context.set_forkserver_preload(_IMPORTED)
    work = (list(command), str(log), str(Path.cwd()), dict(os.environ))
    job = context.Process(target=_run, args=work)
    job.start()
    return job


def stop_tool(job: BaseProcess) -> None:
    """Send SIGTERM to a tool and all that it has started, such as loader workers.

    Args:
        job: What :func:`start_tool` has returned.
    """
    try:
        os.killpg(cast(int, job.pid), signal.SIGTERM)
    except ProcessLookupError:
        # It has begun this very moment, and leads no group yet.
        job.terminate()


def _run(
    command: list[str], log: str, folder: str, environment: dict[str, str]
) -> None:
    # MMEngine collects garbage with each data set, and need not look at all modules.
    gc.freeze()
    os.setsid()
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = command
    runpy.run_path(command[0], run_name='__main__')
