"""The scripts for several processes. There is no cluster: ``srun`` only takes note."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[2] / 'tools'
SRUN = """#!/usr/bin/env bash
printf '%q ' "$@" > "$SRUN_LOG"
"""


def call(folder: Path, script: str, *args: str, **resources: str) -> list[str]:
    """Return the arguments that ``srun`` got."""
    srun, log = folder / 'srun', folder / 'log'
    srun.write_text(SRUN)
    srun.chmod(0o755)
    path = f'{folder}{os.pathsep}{os.environ["PATH"]}'
    env = {**os.environ, **resources, 'PATH': path, 'SRUN_LOG': str(log)}
    command = ['bash', str(TOOLS / script), *args]
    subprocess.run(command, env=env, check=True, stderr=subprocess.PIPE, text=True)
    return shlex.split(log.read_text())


@pytest.mark.parametrize(
    ('script', 'last', 'command'),
    [
        ('slurm_train.sh', 'work dir', ['config.py', '--work-dir=work dir']),
        ('slurm_test.sh', 'last one.pth', ['config.py', 'last one.pth']),
    ],
)
def test_arguments_arrive(
    script: str, last: str, command: list[str], tmp_path: Path
) -> None:
    options = ['--cfg-options', 'train_cfg.max_epochs=3', 'name=two words']
    given = ['gpu', 'job', 'config.py', last, *options]
    resources = dict(GPUS='16', GPUS_PER_NODE='4', SRUN_ARGS='--mem=8G --time=1:00')
    asked = call(tmp_path, script, *given, **resources)
    start = asked.index('python')
    tool = script.removeprefix('slurm_').replace('.sh', '.py')
    assert asked[:start] == [
        '-p',
        'gpu',
        '--job-name=job',
        '--gres=gpu:4',
        '--ntasks=16',
        '--ntasks-per-node=4',
        '--cpus-per-task=5',
        '--kill-on-bad-exit=1',
        *(['--signal=TERM@120'] if tool == 'train.py' else []),
        '--mem=8G',
        '--time=1:00',
    ]
    assert asked[start : start + 2] == ['python', '-u']
    assert Path(asked[start + 2]) == TOOLS / tool
    assert sorted(asked[start + 3 :]) == sorted(
        [*command, '--launcher=slurm', *options]
    )


@pytest.mark.parametrize(
    ('script', 'given'),
    [
        ('dist_train.sh', ['config.py']),
        ('dist_test.sh', ['config.py', 'last.pth']),
        ('slurm_train.sh', ['gpu', 'job', 'config.py']),
        ('slurm_test.sh', ['gpu', 'job', 'config.py']),
    ],
)
def test_too_few_arguments(script: str, given: list[str], tmp_path: Path) -> None:
    with pytest.raises(subprocess.CalledProcessError) as failed:
        call(tmp_path, script, *given)
    assert f'usage: tools/{script} ' in failed.value.stderr
    assert not (tmp_path / 'log').exists()
