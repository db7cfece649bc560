"""Pictures in, reconstructions out."""

import os
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, count
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.infer import BaseInferencer
from mmengine.registry import init_default_scope
from mmengine.runner.checkpoint import _load_checkpoint_to_model
from mmengine.structures import BaseDataElement
from PIL import Image
from rich.progress import track
from torch import nn

from ..datasets.unlabelled import find_pictures
from ..evaluation import hidden_psnr
from ..models import FCMAE
from ..registry import INFERENCERS
from ..visualization import reconstruction_grid

PictureInput = str | os.PathLike | np.ndarray


@INFERENCERS.register_module()
class FCMAEInferencer(BaseInferencer):
    """Hide patches of pictures and reconstruct them with a pre-trained FCMAE.

    Pictures go through the test pipeline of the config. The mask of each depends only
    on its place among the inputs and on the model's ``test_mask_seed``.

    Args:
        model: A config, or the path of one; None takes the config that is stored in
            the checkpoint.
        weights: Path or URL of a checkpoint, whose keys have to be the model's.
        device: ``cpu``, ``cuda:0``, ...; an accelerator if there is one, by default.
        show_progress: Whether to show a progress bar.

    Raises:
        FileNotFoundError: If ``model`` is a path where there is no config.
        RuntimeError: If the weights do not fit the model.
        TypeError: If the config is of another model.
    """

    visualize_kwargs: set[str] = {'out_dir', 'return_vis'}  # noqa: RUF012
    postprocess_kwargs: set[str] = {'return_reconstruction'}  # noqa: RUF012

    def __init__(
        self,
        model: str | os.PathLike | Config | dict | None = None,
        weights: str | None = None,
        device: str | None = None,
        show_progress: bool = False,
    ) -> None:
        model = os.fspath(model) if isinstance(model, os.PathLike) else model
        # BaseInferencer would look for the name of a model, and not find it.
        if isinstance(model, str):
            model = Config.fromfile(model)
        super().__init__(model, weights, device, 'mmcnv2', show_progress)

    def __call__(
        self,
        inputs: PictureInput | Sequence[PictureInput],
        return_datasamples: bool = False,
        batch_size: int = 1,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Reconstruct pictures.

        One batch is done with before the next one is read, so a folder of any size
        will do if the pictures go to ``out_dir``.

        Args:
            inputs: Path of a picture or of a folder, whose whole tree is taken; or a
                picture as an array (H, W, C) with MMCV's order of channels, blue,
                green, red; or a sequence of any of these.
            return_datasamples: Whether to return the predictions as data samples.
            batch_size: Number of pictures to reconstruct at once.
            **kwargs: ``out_dir``, a folder to write a grid with original, masked input
                and reconstruction of each picture to, by the name of its file within
                the folder given; ``return_vis``, whether to return these grids, uint8
                RGB arrays; ``return_reconstruction``, whether predictions include the
                reconstruction, a float array (C, H, W) with the model's order of
                channels.

        Returns:
            ``predictions``, for each picture a dict with ``img_path`` (None for an
            array), ``loss``, ``psnr`` in dB and perhaps ``reconstruction``, or else a
            data sample; and ``visualization``, a list of grids, perhaps empty.

        Raises:
            FileNotFoundError: If there is no such file, or no picture in a folder.
            RuntimeError: If a file cannot be read as a picture.
        """
        _, _, visualize_kwargs, postprocess_kwargs = self._dispatch_kwargs(**kwargs)
        pictures = self._inputs_to_list(inputs)
        chunks = self._get_chunk_data(pictures, batch_size)
        if self.show_progress:
            total = -(-len(pictures) // batch_size)
            chunks = track(chunks, description='Inference', total=total)
        results: dict[str, Any] = {'predictions': [], 'visualization': []}
        for chunk in chunks:
            (batch,) = self.preprocess(chunk, batch_size)
            samples = self.forward(batch)
            grids = self.visualize(chunk, samples, **visualize_kwargs)
            done = self.postprocess(
                samples, grids, return_datasamples, **postprocess_kwargs
            )
            for key, values in done.items():
                results[key] += values
        return results

    def visualize(
        self,
        inputs: list[dict[str, Any]],
        preds: list[BaseDataElement],
        show: bool = False,
        out_dir: str | os.PathLike | None = None,
        return_vis: bool = False,
    ) -> list[np.ndarray]:
        """Make a grid of each picture.

        Args:
            inputs: What the pictures are and what to name the grids.
            preds: What the model predicts for them.
            show: Not used; :class:`mmengine.infer.BaseInferencer` asks for it.
            out_dir: A folder to write the grids to.
            return_vis: Whether to return them.

        Returns:
            The grids, or nothing.
        """
        if out_dir is None and not return_vis:
            return []
        grids = [reconstruction_grid([pred]) for pred in preds]
        if out_dir is not None:
            for picture, grid in zip(inputs, grids, strict=True):
                _write(Path(out_dir, picture['name']), grid)
        return grids if return_vis else []

    def postprocess(
        self,
        preds: list[BaseDataElement],
        visualization: list[np.ndarray],
        return_datasample: bool = False,
        return_reconstruction: bool = False,
    ) -> dict[str, Any]:
        """Put the results of a batch together; see :meth:`__call__`."""
        if return_datasample:
            predictions = [pred.cpu() for pred in preds]
        else:
            predictions = [self._summary(pred, return_reconstruction) for pred in preds]
        return {'predictions': predictions, 'visualization': visualization}

    def _summary(
        self, pred: BaseDataElement, return_reconstruction: bool
    ) -> dict[str, Any]:
        psnr = hidden_psnr(
            pred.mask, pred.picture, pred.reconstruction, pred.data_range
        )
        summary = {'img_path': pred.img_path, 'loss': float(pred.loss), 'psnr': psnr}
        if return_reconstruction:
            summary['reconstruction'] = pred.reconstruction.cpu().numpy()
        return summary

    def _init_model(
        self, cfg: Config, weights: str | None, device: str = 'cpu'
    ) -> nn.Module:
        init_default_scope('mmcnv2')
        return super()._init_model(cfg, weights, device)

    def _load_weights_to_model(
        self, model: nn.Module, checkpoint: dict | None, cfg: Config | None
    ) -> None:
        if not isinstance(model, FCMAE):
            raise TypeError(
                f'the config is of {type(model).__name__}, but reconstructing takes '
                'FCMAE; give the config that the backbone was pre-trained with'
            )
        if checkpoint is None:
            super()._load_weights_to_model(model, checkpoint, cfg)
        else:
            # Weights that are left out would make the reconstruction noise.
            _load_checkpoint_to_model(model, checkpoint, strict=True)

    def _init_visualizer(self, cfg: Config) -> None:
        """Build none: grids are returned or written as they are."""

    def _init_pipeline(self, cfg: Config) -> Callable[[dict[str, Any]], dict]:
        dataset = cfg.test_dataloader.dataset
        while 'dataset' in dataset:
            dataset = dataset.dataset
        reader, *others = Compose(dataset.pipeline).transforms
        rest = Compose(others)

        def pipeline(picture: dict[str, Any]) -> dict:
            sample = {key: picture[key] for key in picture if key != 'name'}
            return rest(sample if 'img' in sample else _read(reader, sample))

        return pipeline

    def _inputs_to_list(
        self, inputs: PictureInput | Sequence[PictureInput]
    ) -> list[dict[str, Any]]:
        if isinstance(inputs, PictureInput):
            inputs = [inputs]
        found = [each for given in inputs for each in _pictures_of(given)]
        taken: set[Path] = set()
        for i, picture in enumerate(found):
            plain = picture['name'].with_suffix('.png')
            numbered = (plain.with_stem(f'{plain.stem}_{n}') for n in count(i))
            name = next(n for n in chain([plain], numbered) if n not in taken)
            taken.add(name)
            picture.update(name=name, sample_idx=i)
        return found


def _pictures_of(given: PictureInput) -> Iterator[dict[str, Any]]:
    if isinstance(given, np.ndarray):
        shape = given.shape[:2]
        known = {'img_path': None, 'img_shape': shape, 'ori_shape': shape}
        yield {'img': given, 'name': Path('array.png'), **known}
        return
    paths = [os.fspath(given)]
    folder = os.path.dirname(paths[0])
    if os.path.isdir(given):
        folder, paths = paths[0], find_pictures(given)
    for path in paths:
        yield {'img_path': path, 'name': Path(os.path.relpath(path, folder))}


def _read(reader: Callable, sample: dict[str, Any]) -> dict[str, Any]:
    path = sample['img_path']
    try:
        return reader(sample)
    except FileNotFoundError:
        raise FileNotFoundError(
            f'There is no picture {path!r} (working folder: {Path.cwd()}).'
        ) from None
    # Each of the decoders has its own exceptions.
    except Exception as error:
        reason = f'{type(error).__name__}: {str(error).strip()}'
        raise RuntimeError(f'Cannot read the picture {path}. ({reason})') from error


def _write(path: Path, grid: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(grid).save(path)
