from pathlib import Path

from torch import distributed

from mmcnv2.engine.launch import leave_process_group


def test_a_process_group_is_left(tmp_path: Path) -> None:
    where = f'file://{tmp_path}/meeting'
    distributed.init_process_group('gloo', init_method=where, rank=0, world_size=1)
    leave_process_group()
    assert not distributed.is_initialized()


def test_there_may_be_none() -> None:
    leave_process_group()
    assert not distributed.is_initialized()
