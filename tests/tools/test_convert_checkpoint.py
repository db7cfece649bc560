"""The tool converts, says in a line what it did, and stops with a message."""

import pytest
import torch

from mmcnv2.models import ConvNeXtV2


@pytest.fixture
def official(tmp_path):
    """Save a classifier as the official code does."""
    weights = ConvNeXtV2('atto', out_indices=(3,)).state_dict()
    weights['norm.weight'] = weights.pop('norm3.weight')
    weights['norm.bias'] = weights.pop('norm3.bias')
    head = {'head.weight': torch.randn(10, 320), 'head.bias': torch.randn(10)}
    torch.save({'model': {**weights, **head}}, tmp_path / 'official.pt')
    return tmp_path / 'official.pt'


def test_there_and_back(official, run_here, capsys, tmp_path):
    there, back = tmp_path / 'timm.safetensors', tmp_path / 'back.pth'
    run_here('convert_checkpoint.py', str(official), str(there), '--to', 'timm')
    line = capsys.readouterr().out
    assert line == (
        'official -> timm: atto, 140 tensors converted, left out: nothing\n'
    )
    where = [str(there), str(back), '--from', 'timm']
    run_here('convert_checkpoint.py', *where, '--to', 'official')
    expected = torch.load(official)['model']
    found = torch.load(back)['model']
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_tells_what_is_left_out(official, run_here, capsys, tmp_path):
    new = tmp_path / 'new.pth'
    where = [str(official), str(new), '--to', 'transformers-backbone']
    run_here('convert_checkpoint.py', *where)
    assert capsys.readouterr().out == (
        'official -> transformers-backbone: atto, 138 tensors converted, left out: '
        'head (2)\n'
    )
    assert torch.equal(
        torch.load(new)['hidden_states_norms.stage4.weight'],
        torch.load(official)['model']['norm.weight'],
    )


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['none.pth', 'new.pth'], r'There is no checkpoint file none\.pth'),
        (['odd.pth', 'new.pth'], r"odd\.pth: it is no ConvNeXt V2 .*'conv1'"),
        (['broken.pth', 'new.pth'], r'Cannot read broken\.pth \(3 bytes\)'),
        (['odd.pth', 'new.txt'], r'new\.txt ends in none of'),
        (['odd.pth', 'new.pth', '--from', 'timm'], 'no ConvNeXt V2'),
        (['odd.pth', './odd.pth'], r'odd\.pth is the checkpoint itself'),
    ],
)
def test_stops_with_a_message(
    arguments, message, run_here, tools_folder, monkeypatch, tmp_path
):
    torch.save({'conv1.weight': torch.ones(1)}, tools_folder / 'odd.pth')
    (tools_folder / 'broken.pth').write_bytes(b'odd')
    with pytest.raises(SystemExit, match=message):
        run_here('convert_checkpoint.py', *arguments, '--to', 'ours')
    assert not list(tools_folder.glob('*new*'))


def test_wrong_format(run_here, capsys):
    with pytest.raises(SystemExit):
        run_here('convert_checkpoint.py', 'a.pth', 'b.pth', '--to', 'official-sparse')
    assert 'choose from' in capsys.readouterr().err
