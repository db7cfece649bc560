"""Each command of the documents is one that its tool understands.

Their shell blocks run as they stand, with our scripts, loops and variables; only what
these call takes note of its arguments instead of doing anything. What goes to one of
our tools is then read by its parser, and settings by the config that they are for.
"""

import os
import runpy
import shlex
import shutil
import subprocess
import sys
from argparse import Namespace
from copy import deepcopy
from functools import cache
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from packaging.requirements import Requirement

from .test_docs import PAGES, ROOT, blocks, python_blocks

# What the blocks, and the scripts that they run, may call.
PROGRAMS = [
    'apt-get',
    'dpkg',
    'mim',
    'mypy',
    'pip',
    'pytest',
    'python',
    'ruff',
    'srun',
    'sudo',
    'tensorboard',
]
TAKE_NOTE = """#!/usr/bin/env bash
printf '%q ' "${0##*/}" "$@" >> "$CALLS"
echo >> "$CALLS"
"""
# Settings that a config need not have before they are given.
NEW = {
    'default_hooks.diversity.type',
    'randomness.seed',
    'runner_type',
    'strategy.type',
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Make a checkout to work in, as far as the documents go."""
    for name in ('configs', 'tools'):
        (tmp_path / name).symlink_to(ROOT / name)
    programs = tmp_path / 'programs'
    programs.mkdir()
    for name in PROGRAMS:
        (programs / name).write_text(TAKE_NOTE)
        (programs / name).chmod(0o755)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def calls_of(page: str, folder: Path) -> list[list[str]]:
    """Run the shell blocks of a page; return what was called, with all arguments."""
    script = 'set -euo pipefail\n' + '\n'.join(blocks(page, 'bash'))
    path = os.pathsep.join([str(folder / 'programs'), '/usr/bin', '/bin'])
    env = {'PATH': path, 'CALLS': str(folder / 'calls')}
    subprocess.run([shutil.which('bash'), '-c', script], env=env, check=True)
    return [shlex.split(line) for line in (folder / 'calls').read_text().splitlines()]


def write_configs(page: str) -> None:
    """Write what the page calls its config, which is the first that it shows."""
    whole = [block for block in python_blocks(page) if '_base_' in block]
    for name in ('my_config.py', 'my_pretraining.py') if whole else ():
        Path(name).write_text(whole[0])


@pytest.mark.parametrize('page', [each for each in PAGES if blocks(each, 'bash')])
def test_commands(page, folder, monkeypatch):
    write_configs(page)
    calls = calls_of(page, folder)
    assert calls
    for program, *args in calls:
        if program == 'srun':
            args = args[args.index('python') + 1 :]
        if program in ('python', 'srun'):
            check_python(args, monkeypatch)
        elif program == 'pip':
            check_pip(args)


def check_pip(args: list[str]) -> None:
    command, *args = args
    assert command == 'install'
    wanted = [each for each in args if not each.startswith(('-', '.'))]
    assert all(Requirement(each).name for each in wanted)


def check_python(args: list[str], monkeypatch) -> None:
    if args[0] == '-c':
        exec(args[1], {})
        return
    # After what starts the processes, if anything does.
    at = next(i for i, each in enumerate(args) if each.endswith('.py'))
    script, given = args[at], args[at + 1 :]
    # DeepSpeed's own, which comes with its checkpoints.
    if not Path(script).exists():
        return
    for name in given:
        if not name.startswith('-') and '://' not in name and not Path(name).exists():
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            Path(name).touch()
    monkeypatch.setattr(sys, 'argv', [script, *given])
    parsed = runpy.run_path(script)['parse_args']()
    if script.endswith(('/train.py', '/test.py')):
        check_settings(parsed)


@cache
def read(path: Path, _content: str) -> dict:
    return Config.fromfile(path).to_dict()


def check_settings(parsed: Namespace) -> None:
    path, given = Path(parsed.config), parsed.cfg_options
    # Some commands say CONFIG, and mean any.
    if not path.read_text() or not given:
        return
    cfg = read(path.resolve(), path.read_text())
    for key in given:
        assert key in NEW or knows(cfg, key.split('.')[:-1]), key
    changed = Config(deepcopy(cfg))
    changed.merge_from_dict(given)
    if any(key.startswith('model.') for key in given):
        init_default_scope(changed.default_scope)
        # Without memory; a setting that a module does not know is an error.
        with torch.device('meta'):
            MODELS.build(changed.model)


def knows(node: dict, keys: list[str]) -> bool:
    """Whether a config has what settings are for."""
    for key in keys:
        if isinstance(node, list) and key.isdecimal() and int(key) < len(node):
            node = node[int(key)]
        elif isinstance(node, dict) and key in node:
            node = node[key]
        else:
            return False
    return True
