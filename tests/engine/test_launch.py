import os
import pickle
from argparse import ArgumentParser
from copy import deepcopy
from pathlib import Path

import pytest
from mmengine.config import Config
from torch import distributed

from mmcnv2.engine.launch import (
    _save_safely,
    add_common_arguments,
    add_config_arguments,
    leave_process_group,
    load_config,
    read_config,
)

CONFIGS = Path(__file__).resolve().parents[2] / 'configs'
CONFIG = CONFIGS / 'demo' / 'upernet_convnextv2-atto_demo.py'


def test_a_process_group_is_left(tmp_path: Path) -> None:
    where = f'file://{tmp_path}/meeting'
    distributed.init_process_group('gloo', init_method=where, rank=0, world_size=1)
    leave_process_group()
    assert not distributed.is_initialized()


def test_there_may_be_none() -> None:
    leave_process_group()
    assert not distributed.is_initialized()


def read(*options: str) -> Config:
    parser = ArgumentParser()
    add_config_arguments(parser)
    given = ['--cfg-options', *options] if options else []
    return read_config(parser.parse_args([str(CONFIG), *given]))


@pytest.mark.parametrize(
    ('wrong', 'right'),
    [('train_dataloder.batch_size=2', 'train_dataloader'), ('resum=1', 'resume')],
)
def test_settings_that_are_misspelt(wrong: str, right: str) -> None:
    with pytest.raises(SystemExit, match=f"Did you mean '{right}'"):
        read(wrong)


def test_settings_that_the_config_does_not_have() -> None:
    assert 'sync_bn' not in read()
    cfg = read('sync_bn=torch', 'strategy.type=x', 'tta_model.type=y', 'my_own=1')
    assert (cfg.sync_bn, cfg.strategy.type, cfg.tta_model.type) == ('torch', 'x', 'y')


@pytest.mark.parametrize('hooks', [{}, {'default_hooks': None}, {'default_hooks': {}}])
def test_checkpoints_are_safe_without_a_word_of_them(hooks: dict) -> None:
    cfg = Config(hooks)
    _save_safely(cfg)
    assert cfg.default_hooks.checkpoint.type == 'mmcnv2.CheckpointHook'


def test_there_may_be_no_checkpoints() -> None:
    cfg = Config(dict(default_hooks=dict(checkpoint=None)))
    _save_safely(cfg)
    assert cfg.default_hooks.checkpoint is None


def test_local_ranks_are_those_of_open_mpi(monkeypatch: pytest.MonkeyPatch) -> None:
    parser = ArgumentParser()
    add_common_arguments(parser)
    for known, expected in (('3', '3'), (None, '1')):
        monkeypatch.delenv('LOCAL_RANK', raising=False)
        if known:
            monkeypatch.setenv('OMPI_COMM_WORLD_LOCAL_RANK', known)
        else:
            monkeypatch.delenv('OMPI_COMM_WORLD_LOCAL_RANK', raising=False)
        load_config(parser.parse_args([str(CONFIG), '--local-rank', '1']))
        assert os.environ['LOCAL_RANK'] == expected
    monkeypatch.delenv('LOCAL_RANK')


def test_a_config_is_laid_out_as_mmengine_does() -> None:
    """Once, and anew when it has changed."""
    cfg, expected = read('train_cfg.max_iters=2'), Config.fromfile(CONFIG)
    expected.merge_from_dict({'train_cfg.max_iters': 2})
    assert cfg.pretty_text == expected.pretty_text
    assert cfg.pretty_text is cfg.pretty_text
    cfg.model.backbone.arch = expected.model.backbone.arch = 'pico'
    assert cfg.pretty_text == expected.pretty_text


def test_a_copied_config_goes_its_own_way(tmp_path: Path) -> None:
    cfg = read()
    text = cfg.pretty_text
    for other in (deepcopy(cfg), pickle.loads(pickle.dumps(cfg))):
        assert other.pretty_text == text
        other.work_dir = 'elsewhere'
        assert "work_dir = 'elsewhere'" in other.pretty_text
    assert cfg.pretty_text == text
    cfg.dump(tmp_path / 'config.py')
    assert (tmp_path / 'config.py').read_text() == text
