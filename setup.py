"""Compiles the kernels, and puts what OpenMMLab's tools look for into ``mmcnv2/.mim``.

Metadata and dependencies are in setup.cfg.
"""

import shutil
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
EXTRAS = ('configs', 'tools', 'model-index.yml')


class BuildPyWithMim(build_py):
    """Link the extras for an in-place install, copy them into the build otherwise.

    Copies go to the build folder only, so none can shadow a later edit.
    """

    def run(self) -> None:
        """Build the package, then add the extras."""
        super().run()
        target = ROOT if self.editable_mode else Path(self.build_lib)
        mim = target / 'mmcnv2' / '.mim'
        shutil.rmtree(mim, ignore_errors=True)
        mim.mkdir(parents=True)
        for name in EXTRAS:
            if self.editable_mode:
                (mim / name).symlink_to(Path('..', '..', name))
            elif (ROOT / name).is_dir():
                ignored = shutil.ignore_patterns('__pycache__')
                shutil.copytree(ROOT / name, mim / name, ignore=ignored)
            else:
                shutil.copy2(ROOT / name, mim / name)


# A library of plain functions, which mmcnv2/models/kernels loads. Where it cannot be
# compiled the install goes on: PyTorch's own operations take its place.
KERNELS = Extension(
    'mmcnv2.models.kernels._compiled',
    sources=[
        f'mmcnv2/models/kernels/{name}.cpp'
        for name in ('depthwise', 'gelu', 'mlp', 'product')
    ],
    depends=[
        *(f'mmcnv2/models/kernels/{name}.h' for name in ('kernels', 'lanes')),
        'setup.py',
    ],
    extra_compile_args=[
        '-std=c++17',
        '-O3',
        '-fopenmp',
        '-ffp-contract=fast',
        '-Wno-psabi',
    ],
    extra_link_args=['-fopenmp'],
    optional=True,
)

setup(cmdclass={'build_py': BuildPyWithMim}, ext_modules=[KERNELS])
