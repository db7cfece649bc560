import pickle
from argparse import ArgumentParser
from copy import deepcopy
from pathlib import Path

from mmengine.config import Config
from torch import distributed

from mmcnv2.engine.launch import add_config_arguments, leave_process_group, read_config

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
