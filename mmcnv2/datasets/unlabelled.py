"""Pictures without labels: from a folder tree or a list, broken ones replaced."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from mmengine.dataset import BaseDataset, Compose
from mmengine.fileio import join_path, list_from_file
from mmengine.logging import print_log

from ..arguments import check_arguments
from ..registry import DATASETS

EXTENSIONS = frozenset(
    ['.bmp', '.jpeg', '.jpg', '.pgm', '.png', '.ppm', '.tif', '.tiff', '.webp']
)


def find_pictures(folder: str | os.PathLike[str]) -> list[str]:
    """Find the pictures of a folder tree, by their extensions in any case.

    Files and folders whose names start with a dot are left out, since some systems put
    thumbnails and attributes there. Links are followed, and each folder is taken once,
    whatever leads to it.

    Args:
        folder: The topmost folder.

    Returns:
        The paths, sorted, each starting with ``folder``.

    Raises:
        FileNotFoundError: If there is no such folder or there is no picture in it.
    """
    folder = os.fspath(folder)
    if not os.path.isdir(folder):
        raise FileNotFoundError(
            f'There is no folder {folder!r} to take pictures from (working '
            f'folder: {Path.cwd()}).'
        )
    found = [
        path
        for path in _walk(folder)
        if os.path.splitext(path)[1].lower() in EXTENSIONS
    ]
    if not found:
        raise FileNotFoundError(
            f'There is no picture in {folder!r} or below it: looked for '
            f'{" ".join(sorted(EXTENSIONS))}, in lower and upper case.'
        )
    return sorted(found)


def _walk(folder: str) -> Iterator[str]:
    """List the files of a folder tree, but hidden ones."""
    taken: set[str] = set()
    for parent, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in taken:
            folders.clear()
            continue
        taken.add(real)
        # Sorted, so that of several links to a folder the same one counts every time.
        folders[:] = sorted(name for name in folders if not name.startswith('.'))
        yield from (os.path.join(parent, n) for n in names if not n.startswith('.'))


@DATASETS.register_module()
@check_arguments
class UnlabelledImages(BaseDataset):
    """All pictures of a folder tree, or those that a list names.

    It takes the pictures of data sets that have labels as well, by their folders:
    ``data_prefix=dict(img_path='train2017')`` for COCO and
    ``dict(img_path='images/training')`` for ADE20K.

    A file that cannot be read is logged, once, and another one is taken at random in
    its place. That one brings the paths of those it stands for as ``broken_paths``,
    which ``PackPretrainInputs`` hands on: in training to
    :class:`~mmcnv2.engine.BrokenImagesHook`, and in validation to
    :class:`~mmcnv2.evaluation.ReconstructionMetric`, which leaves that one out. In
    ``test_mode`` it is an error.

    What counts as broken is what the first transform of the pipeline, which has to be
    the one that reads the file, fails for. Errors of other transforms are errors.
    MMCV's reader fails for missing, empty and foreign files, with OpenCV 5 also for
    truncated ones. Earlier OpenCV fills the rest of a truncated JPEG with grey and says
    nothing; ``LoadImageFromFile`` with ``imdecode_backend='pillow'`` fails for these
    with any version. No reader sees bytes that changed within a JPEG.

    Args:
        ann_file: A text file with one path a line, relative to the folder of pictures,
            or the empty text for all pictures of the folder tree.
        data_root: What ``data_prefix`` and ``ann_file`` are relative to.
        data_prefix: The folder of pictures, as ``img_path``.
        max_refetch: The number of replacements to try in a row before it is an error.
        **kwargs: See :class:`mmengine.dataset.BaseDataset`; ``pipeline``, ``indices``
            and ``test_mode`` among them.

    Raises:
        FileNotFoundError: If the folder or the list does not exist, or there is no
            picture in it.
        ValueError: If it is not said where to look, or by another name than
            ``img_path``, or the list is in JSON format.
    """

    METAINFO: ClassVar[dict] = dict(
        dataset_type='UnlabelledImages', task_name='pretraining'
    )

    def __init__(
        self,
        ann_file: str = '',
        data_root: str = '',
        data_prefix: dict[str, str] | None = None,
        max_refetch: int = 100,
        **kwargs: Any,
    ) -> None:
        unknown = set(data_prefix or {}) - {'img_path'}
        if unknown:
            raise ValueError(
                f'data_prefix of UnlabelledImages is {data_prefix}; it holds nothing '
                "but 'img_path', the folder of pictures"
            )
        # Broken files that the next readable one stands for.
        self._replaced: list[str] = []
        super().__init__(
            ann_file=ann_file,
            data_root=data_root,
            data_prefix={'img_path': '', **(data_prefix or {})},
            max_refetch=max_refetch,
            **kwargs,
        )

    def full_init(self) -> None:
        """Look for the pictures, unless that was done before."""
        if self._fully_initialized:
            return
        super().full_init()
        # In shared memory, so that of all loader workers only one logs a file.
        self._logged = torch.zeros(len(self), dtype=torch.bool).share_memory_()

    def load_data_list(self) -> list[dict[str, str]]:
        """List the pictures.

        Returns:
            For each picture a dict with its ``img_path``.
        """
        folder = self.data_prefix['img_path']
        if not folder and not self.ann_file:
            raise ValueError(
                'Where are the pictures? Set data_root, data_prefix=dict(img_path=...) '
                'or ann_file.'
            )
        paths = self._listed(folder) if self.ann_file else find_pictures(folder)
        return [{'img_path': path} for path in paths]

    def _listed(self, folder: str) -> list[str]:
        if self.ann_file.lower().endswith('.json'):
            raise ValueError(
                f'{self.ann_file!r} is not a text file with a path a line. For all '
                'pictures of a folder leave ann_file out and set data_prefix.'
            )
        if not Path(self.ann_file).is_file():
            raise FileNotFoundError(
                f'There is no list of pictures {self.ann_file!r} (working folder: '
                f'{Path.cwd()}).'
            )
        lines = [line.strip() for line in list_from_file(self.ann_file)]
        paths = [join_path(folder, line) for line in lines if line]
        if not paths:
            raise FileNotFoundError(
                f'There is no path in the list of pictures {self.ann_file!r}.'
            )
        return paths

    def prepare_data(self, idx: int) -> Any:
        """Read a picture and put it through the pipeline.

        Args:
            idx: Number of the picture.

        Returns:
            What the pipeline gives, or None if the file is broken; MMEngine then asks
            for another one.

        Raises:
            RuntimeError: If the file is broken and the data set is in test mode, or
                ``max_refetch`` others were broken just before.
        """
        info = self.get_data_info(idx)
        path = info['img_path']
        try:
            sample = self._read(info)
        # Each of the decoders has its own exceptions.
        except Exception as error:
            self._note_broken(idx, path, error)
            return None
        sample['broken_paths'] = tuple(dict.fromkeys(self._replaced))
        sample = Compose(self.pipeline.transforms[1:])(sample)
        if sample is not None:
            self._replaced.clear()
        return sample

    def _read(self, info: dict[str, Any]) -> dict[str, Any]:
        sample = Compose(self.pipeline.transforms[:1])(info)
        if sample is None:
            # LoadImageFromFile with ignore_empty=True.
            raise ValueError('the first transform of the pipeline gave nothing')
        return sample

    def _note_broken(self, idx: int, path: str, error: Exception) -> None:
        reason = f'{type(error).__name__}: {str(error).strip()}'
        if self.test_mode:
            raise RuntimeError(f'Cannot read the picture {path}. ({reason})') from error
        self._replaced.append(path)
        if len(self._replaced) > self.max_refetch:
            raise RuntimeError(
                f'Cannot read any of {len(self._replaced)} pictures taken in a row. Do '
                'the paths exist, and is LoadImageFromFile set up for these files? The '
                f'last one was {path}. ({reason})'
            ) from error
        if not self._logged[idx]:
            self._logged[idx] = True
            print_log(
                f'Cannot read the picture {path}; another one takes its place. '
                f'({reason})',
                logger='current',
                level=logging.WARNING,
            )
