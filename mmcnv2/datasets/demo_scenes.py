"""The embedded data set: scenes painted on first use, the same ones from the same seed.

<root>/scenes.json                                what the folder holds
<root>/images/{train,val,unlabelled}/00000.jpg
<root>/annotations/{train,val}.json               COCO instances
<root>/semantic/{train,val}/00000.png             0 background, then the classes
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from filelock import FileLock
from mmengine.dataset import BaseDataset
from rich.progress import track

from ..registry import DATASETS
from .scene_painter import SIDE, Scene, paint_scene
from .scene_sprites import KINDS

# Raise it whenever the same seed gives other pictures or annotations than before.
VERSION = 1

CLASSES = tuple(KINDS)
PALETTE = [kind.colour for kind in KINDS.values()]
# Semantic maps count the background as class 0, instance annotations do not name it.
SEMANTIC_CLASSES = ('background', *CLASSES)
SEMANTIC_PALETTE = [(40, 44, 52), *PALETTE]

COUNTS = {'train': 320, 'val': 80, 'unlabelled': 2000}
LABELLED = ('train', 'val')
_JPEG_QUALITY = 90
_MOST_WORKERS = 8
# Pictures that take about as long as the start of a worker.
_WORTH_A_WORKER = 200


def make_demo_scenes(
    root: str | os.PathLike,
    seed: int = 0,
    counts: Mapping[str, int] | None = None,
    workers: int | None = None,
) -> Path:
    """Make the data set unless it is there already.

    Any number of processes may call this at once: one of them paints, the others wait.
    The folder appears under its name only when it is complete.

    Args:
        root: Folder of the data set.
        seed: Seed of all pictures.
        counts: Number of pictures by split, for the splits that shall have another
            number than in ``COUNTS``.
        workers: Number of processes to paint in; 1 paints in this one. By default as
            many as pay off. It has no influence on the pictures.

    Returns:
        The folder.

    Raises:
        ValueError: If ``counts`` names an unknown split.
        RuntimeError: If the folder exists and holds something else.
    """
    counts = {**COUNTS, **(counts or {})}
    if unknown := counts.keys() - COUNTS.keys():
        raise ValueError(
            f'counts has {sorted(unknown)}, but the splits are {list(COUNTS)}'
        )
    root = Path(root).absolute()
    wanted = {'version': VERSION, 'seed': seed, 'counts': counts}
    if root.exists():
        _check(root, wanted)
        return root

    root.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(root.with_name(f'.{root.name}.lock')):
        # Another process may have finished while this one waited for the lock.
        if root.exists():
            _check(root, wanted)
            return root
        # Left over from interrupted runs: nobody else works here under the lock.
        for leftover in root.parent.glob(f'.{root.name}.unfinished-*'):
            shutil.rmtree(leftover, ignore_errors=True)
        unfinished = root.with_name(f'.{root.name}.unfinished-{os.getpid()}')
        _make(unfinished, wanted, workers)
        unfinished.rename(root)
    return root


def _check(root: Path, wanted: dict[str, Any]) -> None:
    """Refuse a folder that is not the one asked for."""
    record = root / 'scenes.json'
    held = json.loads(record.read_text()) if record.exists() else None
    if held != wanted:
        raise RuntimeError(
            f'{root} exists and holds {held or "no demo scenes"}, but the scenes asked '
            f'for are {wanted}. Delete the folder or choose another data_root.'
        )


def _make(root: Path, wanted: dict[str, Any], workers: int | None) -> None:
    """Make all that ``wanted`` tells in a new folder."""
    for split in COUNTS:
        (root / 'images' / split).mkdir(parents=True)
    for split in LABELLED:
        (root / 'semantic' / split).mkdir(parents=True)
    (root / 'annotations').mkdir()

    scenes = _scenes(wanted)
    if workers is None:
        workers = min(
            _MOST_WORKERS, os.cpu_count() or 1, 1 + len(scenes) // _WORTH_A_WORKER
        )
    made = _by_workers(root, wanted, workers) if workers > 1 else _share(root, wanted)
    found: dict[str, list] = {split: [] for split in COUNTS}
    progress = track(made, 'Painting demo scenes', len(scenes))
    for (split, _), instances in zip(scenes, progress, strict=True):
        found[split].append(instances)

    for split in LABELLED:
        path = root / 'annotations' / f'{split}.json'
        path.write_text(json.dumps(_coco(split, found[split])))
    (root / 'scenes.json').write_text(json.dumps(wanted, indent=2) + '\n')


def _scenes(wanted: dict[str, Any]) -> list[tuple[str, int]]:
    """Split and index of every scene, in the order in which they are made."""
    counts = wanted['counts']
    return [(split, index) for split in COUNTS for index in range(counts[split])]


def _share(
    root: Path, wanted: dict[str, Any], worker: int = 0, workers: int = 1
) -> Iterator[list[dict]]:
    """Make every ``workers``-th scene and yield its instances."""
    for split, index in _scenes(wanted)[worker::workers]:
        yield _make_scene(root, wanted['seed'], split, index)


def _by_workers(
    root: Path, wanted: dict[str, Any], workers: int
) -> Iterator[list[dict]]:
    """Make all scenes in other processes and yield the instances of each, in order.

    The processes are started afresh: forking a program that trains is unsafe,
    ``multiprocessing`` would import the caller's script again, and its workers outlive
    a caller that is killed. These end when nobody reads what they print.
    """
    command = [sys.executable, '-c', f'from {__name__} import _work; _work()']
    environment = {**os.environ, 'PYTHONPATH': os.pathsep.join(sys.path)}
    with ExitStack() as stack:
        outputs = []
        for worker in range(workers):
            task = json.dumps([str(root), wanted, worker, workers])
            process = subprocess.Popen(
                [*command, task], stdout=subprocess.PIPE, env=environment
            )
            outputs.append(stack.enter_context(process).stdout)
        for number in range(len(_scenes(wanted))):
            line = outputs[number % workers].readline()
            if not line:
                raise RuntimeError('a process that paints demo scenes stopped early')
            yield json.loads(line)


def _work() -> None:
    """What a worker does: make its share and print the instances, a line a scene."""
    # End without a word when the reader is gone.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    cv2.setNumThreads(1)
    root, *task = json.loads(sys.argv[1])
    for instances in _share(Path(root), *task):
        print(json.dumps(instances), flush=True)


def _make_scene(root: Path, seed: int, split: str, index: int) -> list[dict]:
    """Paint one scene, store its picture and map, and return its instances."""
    rng = np.random.default_rng([seed, list(COUNTS).index(split), index])
    scene = paint_scene(rng)
    picture = cv2.cvtColor(scene.picture, cv2.COLOR_RGB2BGR)
    quality = [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY]
    _write(root / 'images' / split / f'{index:05}.jpg', picture, quality)
    if split not in LABELLED:
        return []
    of_owner = np.array([0, *(kind + 1 for kind in scene.classes)], np.uint8)
    semantic = of_owner[scene.owners]
    _write(root / 'semantic' / split / f'{index:05}.png', semantic)
    return _instances(scene)


def _write(path: Path, picture: np.ndarray, settings: Sequence[int] = ()) -> None:
    # OpenCV says nothing when a disk is full.
    if not cv2.imwrite(str(path), picture, settings):
        raise OSError(
            f'cannot write {path}: is the disk full, or the folder read-only?'
        )


def _instances(scene: Scene) -> list[dict]:
    """COCO annotations of the visible parts, without ids."""
    return [
        {
            'category_id': class_index + 1,
            'iscrowd': 0,
            **_outline(scene.owners == owner),
        }
        for owner, class_index in enumerate(scene.classes, start=1)
    ]


def _outline(mask: np.ndarray) -> dict[str, Any]:
    """Area, box and run lengths of a mask."""
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    x, y = int(columns[0]), int(rows[0])
    # COCO counts runs down the columns, first of zeros, then of ones, in turns.
    flat = mask.ravel(order='F').astype(np.int8)
    changes = np.flatnonzero(np.diff(flat, prepend=0))
    runs = np.diff(changes, prepend=0, append=flat.size)
    return {
        'area': int(mask.sum()),
        'bbox': [x, y, int(columns[-1]) - x + 1, int(rows[-1]) - y + 1],
        'segmentation': {'size': list(mask.shape), 'counts': runs.tolist()},
    }


def _coco(split: str, found: list[list[dict]]) -> dict[str, Any]:
    """The COCO annotation file of a split from the instances of each picture."""
    pictures = [
        {'id': index, 'file_name': f'{index:05}.jpg', 'width': SIDE, 'height': SIDE}
        for index in range(len(found))
    ]
    instances = [
        {'image_id': index, **instance}
        for index, of_picture in enumerate(found)
        for instance in of_picture
    ]
    return {
        'info': {'description': f'mmcnv2 demo scenes, {split}'},
        'images': pictures,
        'annotations': [
            {'id': number, **instance} for number, instance in enumerate(instances, 1)
        ],
        'categories': [{'id': i, 'name': name} for i, name in enumerate(CLASSES, 1)],
    }


@DATASETS.register_module()
def DemoScenes(  # noqa: N802 - in configs it stands where a class name does
    dataset_type: str,
    data_root: str,
    seed: int = 0,
    counts: Mapping[str, int] | None = None,
    **kwargs: Any,
) -> BaseDataset:
    """Make the demo scenes if absent, then build a data set over them.

    Args:
        dataset_type: The data set to build, such as 'mmdet.CocoDataset' or
            'mmseg.BaseSegDataset'.
        data_root: Folder of the scenes.
        seed: Seed of all pictures.
        counts: Number of pictures by split, see :func:`make_demo_scenes`.
        **kwargs: All else that the data set takes. ``metainfo`` defaults to the
            classes and their palette, with the background where ``data_prefix`` names
            semantic maps. With ``lazy_init``, by which inferencers ask for nothing but
            these, no scenes are made.

    Returns:
        The data set itself, nothing around it.
    """
    if not kwargs.get('lazy_init'):
        make_demo_scenes(data_root, seed, counts)
    semantic = 'seg_map_path' in kwargs.get('data_prefix', {})
    metainfo = {
        'classes': SEMANTIC_CLASSES if semantic else CLASSES,
        'palette': SEMANTIC_PALETTE if semantic else PALETTE,
    }
    kwargs = {'metainfo': metainfo, **kwargs}
    return DATASETS.build({'type': dataset_type, 'data_root': data_root, **kwargs})
