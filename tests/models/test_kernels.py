"""What is loaded, and what is not."""

import subprocess

import pytest
import torch

from mmcnv2.models import kernels
from mmcnv2.models.kernels import cpu


@pytest.fixture
def compile_library(tmp_path):
    def run(code):
        source, library = tmp_path / 'library.cpp', tmp_path / 'library.so'
        source.write_text(code)
        subprocess.run(['g++', '-shared', '-fPIC', source, '-o', library], check=True)
        return library

    return run


def test_a_library_of_another_version_is_not_used(compile_library):
    library = compile_library('extern "C" int mmcnv2_interface() { return -1; }')
    with pytest.warns(UserWarning, match=r'another version.*pip install'):
        assert cpu._load(library) is None


def test_a_library_of_something_else_is_not_used(compile_library):
    with pytest.warns(UserWarning, match='undefined symbol: mmcnv2_interface'):
        assert cpu._load(compile_library('int x;')) is None


def test_a_broken_file_is_not_used(tmp_path):
    (tmp_path / 'library.so').write_text('nothing')
    with pytest.warns(UserWarning, match='CPUs are slower without'):
        assert cpu._load(tmp_path / 'library.so') is None


def test_none_is_needed(tmp_path, recwarn):
    assert cpu._load(tmp_path / 'absent.so') is None
    assert not recwarn


def test_what_they_take():
    x = torch.zeros(2, 8)
    assert kernels.fit(x, torch.zeros(3))
    assert not kernels.fit(x, torch.zeros(3, device='meta'))
    assert not kernels.fit(x[:, :7])
    # Before, compiling could be exporting.
    compiled = torch.compile(lambda x: kernels.fit(x), backend='eager')
    assert compiled(x) == (torch.__version__ >= '2.13')
