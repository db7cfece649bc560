"""Safe checkpoints: loaded so that nothing else gets in, written whole or not at all.

torch 2.6 and later load with ``weights_only=True`` and refuse what they do not know.
MMEngine's training checkpoints hold a few such types besides tensors. Importing this
module allows exactly those, and replaces MMEngine's loaders of local files and of URLs
by ones that always load safely and say in one message what is wrong with a file. It
also replaces how MMEngine writes local checkpoints by a way that leaves either the old
file or the new one, whenever it is interrupted.
"""

import logging
import os
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from pickle import UnpicklingError
from types import FunctionType, ModuleType
from typing import Any
from urllib.parse import urlparse

import numpy as np
import torch
from mmengine.dist import barrier, is_main_process
from mmengine.fileio.backends import LocalBackend, register_backend
from mmengine.logging import HistoryBuffer, print_log
from mmengine.optim.scheduler.param_scheduler import OneCycleParamScheduler
from mmengine.runner.checkpoint import (
    CheckpointLoader,
    _get_mmengine_home,
    get_deprecated_model_names,
    get_external_models,
    get_mmcls_models,
    get_torchvision_models,
)
from torch import Tensor

# The methods that MMEngine pickles: a log buffer stores its statistics, a one-cycle
# schedule its annealing function. Pickle writes each as ``getattr(class, name)``.
_STORED_METHODS = (
    (HistoryBuffer, ('min', 'max', 'current', 'mean')),
    (OneCycleParamScheduler, ('_annealing_cos', '_annealing_linear')),
)

# What MMEngine's names of checkpoints stand for; its own loaders of them are unsafe.
_MODEL_ZOOS = {
    'mmcls': get_mmcls_models,
    'modelzoo': get_torchvision_models,
    'open-mmlab': get_external_models,
    'openmmlab': get_external_models,
    'torchvision': get_torchvision_models,
}

# How a file ends that is being written.
PARTIAL = '.partial'

# What torch says of a device that is not there, and of memory that does not suffice.
_NOT_THE_FILE = re.compile(r'map_location|allocate|out of memory')

# Times are float64, counts int64, and mmseg's scores float32.
_ARRAY_TYPES = (np.float32, np.float64, np.int64)


def _stored_method(owner: object, name: str) -> FunctionType:
    """Stand in for ``getattr``, which could reach anything, while unpickling."""
    for known, names in _STORED_METHODS:
        if owner is known and name in names:
            return getattr(known, name)
    raise UnpicklingError(f'GLOBAL builtins.getattr of {name!r} from {owner!r}')


def _safe_globals() -> list[Any]:
    """List what MMEngine stores in a training checkpoint besides tensors."""
    reconstruct: Any = np.zeros(1).__reduce__()[0]
    scalar: Any = np.float64(0).__reduce__()[0]
    # numpy 2 renamed the module, and a checkpoint outlives the numpy that wrote it.
    functions = [
        (function, f'numpy.{core}.multiarray.{function.__name__}')
        for core in ('core', '_core')
        for function in (reconstruct, scalar)
    ]
    dtypes = [type(np.dtype(kind)) for kind in _ARRAY_TYPES]
    methods = [(_stored_method, 'builtins.getattr'), OneCycleParamScheduler]
    return [HistoryBuffer, np.ndarray, np.dtype, *dtypes, *functions, *methods]


def _failure(path: Path, error: Exception) -> RuntimeError:
    refused = re.search(
        r"(?:GLOBAL|function|but got) (?:<[\w-]+ '?)?([\w.]+)", str(error)
    )
    if isinstance(error, UnpicklingError) and refused:
        return RuntimeError(
            f'Refused to load {path}: it holds {refused[1]}, which is neither '
            'a tensor nor a type that MMEngine stores, and loading it could run code. '
            'Nothing was loaded. If you trust where the file comes from and can import '
            'the type, call torch.serialization.add_safe_globals with it in a module '
            'named in custom_imports; otherwise ask for a file of plain tensors.'
        )
    reason = next(iter(str(error).splitlines()), 'no more is known')
    return RuntimeError(
        f'Cannot read {path} ({path.stat().st_size} bytes) as a checkpoint: it is '
        'truncated, damaged, or was never one. Nothing was loaded. Copy or download it '
        'again, or resume from an earlier checkpoint by --resume PATH. '
        f'({type(error).__name__}: {reason})'
    )


def _check_sums(path: Path) -> None:
    """Compare checksums, as torch does not: a flipped bit would be another weight.

    Only the zip files that torch writes since version 1.6 have some.
    """
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        if damaged := archive.testzip():
            raise zipfile.BadZipFile(f'the checksum of {damaged} is another one')


def _with_state_dict(checkpoint: Any) -> Any:
    """Call the weights what MMEngine calls them; the official files have 'model'."""
    official = isinstance(checkpoint, dict) and isinstance(
        checkpoint.get('model'), dict
    )
    if official and 'state_dict' not in checkpoint:
        checkpoint['state_dict'] = checkpoint.pop('model')
    return checkpoint


# MMEngine logs the part of a loader's name after 'load_from_'.
@CheckpointLoader.register_scheme(prefixes='', force=True)
def load_from_local(filename: str, map_location: Any = None) -> Any:
    """Load a local checkpoint safely.

    Args:
        filename: Path of the file; ``~`` is the home folder. A name that ends in
            ``.safetensors`` says what it is; any other file is torch's.
        map_location: As in :func:`torch.load`.

    Returns:
        What the file holds, usually a dict.

    Raises:
        FileNotFoundError: There is no such file.
        ImportError: It is of safetensors, which is not installed.
        MemoryError: It is too large.
        PermissionError: It may not be read.
        RuntimeError: The file is not a checkpoint, is truncated or damaged, or holds
            something that is neither a tensor nor stored by MMEngine; or its tensors
            are of a device that is not there, and no ``map_location`` is given.
    """
    path = Path(filename).expanduser()
    if not path.is_file():
        raise FileNotFoundError(
            f'There is no checkpoint file {path} (working folder: {Path.cwd()}).'
        )
    if path.suffix == '.safetensors':
        return {'state_dict': _load_safetensors(path)}
    try:
        _check_sums(path)
        checkpoint = torch.load(path, map_location=map_location, weights_only=True)
    except (PermissionError, MemoryError):
        raise
    # A broken file surfaces as any of a dozen exception types.
    except Exception as error:
        if isinstance(error, RuntimeError) and _NOT_THE_FILE.search(str(error)):
            raise
        raise _failure(path, error) from None
    return _with_state_dict(checkpoint)


@CheckpointLoader.register_scheme(prefixes=('http://', 'https://'), force=True)
def load_from_http(filename: str, map_location: Any = None) -> Any:
    """Load a checkpoint from a URL, through torch's download cache, safely.

    MMEngine's own loader leaves safe loading off for downloads. A file whose name holds
    no hash, as ``model.safetensors`` of many a model, gets one of its URL in the cache.

    Args:
        filename: The URL.
        map_location: As in :func:`torch.load`.

    Returns:
        What the file holds, usually a dict.
    """
    path = Path(torch.hub.get_dir(), 'checkpoints', _cached_name(filename))
    if is_main_process():
        _download(filename, path)
    barrier()
    # The other nodes of a cluster have discs of their own.
    _download(filename, path)
    return load_from_local(str(path), map_location)


@CheckpointLoader.register_scheme(
    prefixes=[f'{zoo}://' for zoo in _MODEL_ZOOS], force=True
)
def load_from_model_zoo(filename: str, map_location: Any = None) -> Any:
    """Load a checkpoint by a name such as ``open-mmlab://resnet50``, safely.

    Args:
        filename: The zoo, ``://`` and the name in it.
        map_location: As in :func:`torch.load`.

    Returns:
        What the file holds, usually a dict; for 'mmcls' the backbone alone, as
        MMEngine gives it.

    Raises:
        KeyError: The zoo has no such name.
    """
    zoo, _, name = filename.partition('://')
    urls = _MODEL_ZOOS[zoo]()
    name = get_deprecated_model_names().get(name, name)
    if name not in urls:
        raise KeyError(f'{zoo} has no checkpoint {name!r}, but {", ".join(urls)}')
    address = urls[name]
    if address.startswith(('http://', 'https://')):
        checkpoint = load_from_http(address, map_location)
    else:
        # Users list files of their own in open_mmlab.json, relative to that folder.
        path = Path(_get_mmengine_home(), address)
        checkpoint = load_from_local(str(path), map_location)
    if zoo != 'mmcls':
        return checkpoint
    weights = checkpoint.get('state_dict', checkpoint)
    backbone = {
        key.removeprefix('backbone.'): value
        for key, value in weights.items()
        if key.startswith('backbone.')
    }
    return {'state_dict': backbone}


def find_resumable(work_dir: str) -> str | None:
    """Find the last checkpoint of a run that can be resumed from.

    That is the one that ``last_checkpoint`` names or, if it cannot be read, the newest
    of the others that can. Each that cannot is named in a warning.

    Args:
        work_dir: Folder of the run.

    Returns:
        Its path; None if there is no checkpoint at all.

    Raises:
        SystemExit: There are checkpoints, but none can be read.
    """
    paths = _last_ones_first(Path(work_dir))
    for path in paths:
        # Only what is a local file can be looked into.
        if '://' in path or Path(path).is_dir():
            return path
        try:
            load_from_local(path, 'cpu')
        except (OSError, RuntimeError) as error:
            print_log(f'Skipped: {error}', 'current', logging.WARNING)
        else:
            return path
    if paths:
        raise SystemExit(
            f'Cannot resume: none of the checkpoints in {work_dir} can be read. To '
            'start anew leave --resume out.'
        )
    return None


def _last_ones_first(work_dir: Path) -> list[str]:
    note, last = work_dir / 'last_checkpoint', ''
    if note.is_file():
        last = note.read_text().strip()
    if '://' in last:
        return [last]
    # Of a copied folder the note names the original.
    if last and (own := work_dir / Path(last).name).exists():
        last = str(own)
    # The best ones, and published ones, have no state of the optimizer.
    pattern = re.compile(r'(?!best_).*?(_\d+|interrupted)\.pth')
    found = {
        path
        for folder in {work_dir, Path(last).parent if last else work_dir}
        for path in folder.glob('*.pth')
        if pattern.fullmatch(path.name) and path != Path(last)
    }
    newest = sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)
    return [last] * bool(last) + [str(path) for path in newest]


def write_whole(path: Path, content: bytes) -> None:
    """Write a file such that at any moment there is the whole old or the whole new one.

    Args:
        path: Of the file.
        content: Of the file.

    Raises:
        OSError: It cannot be written. The old one is still there.
    """
    partial = path.with_name(path.name + PARTIAL)
    with renamed_when_whole(partial, path):
        partial.write_bytes(content)


@contextmanager
def renamed_when_whole(partial: Path, path: Path) -> Iterator[None]:
    """Put what is written meanwhile in the place of a file, or leave that as it is.

    Args:
        partial: What is written, in the same folder. It is gone afterwards.
        path: The file.

    Raises:
        OSError: The disk cannot take it.
    """
    try:
        yield
        with open(partial, 'rb+') as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
    # The folder's entry too shall outlast a power cut, where the file system can do so.
    with suppress(OSError):
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)


@register_backend('local', force=True, prefixes='')
class WholeCheckpoints(LocalBackend):
    """MMEngine's way to files, which writes checkpoints by :func:`write_whole`."""

    def put(self, obj: bytes, filepath: str | os.PathLike[str]) -> None:
        """Write a file.

        Args:
            obj: Content of the file.
            filepath: Its path. Its folder need not exist.
        """
        path = Path(filepath)
        if path.suffix == '.pth':
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, obj)
        else:
            super().put(obj, path)


def import_safetensors() -> ModuleType:
    """Import safetensors.

    Returns:
        The package.

    Raises:
        ImportError: It is not installed; the message says how to.
    """
    try:
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            f'.safetensors files need the package safetensors, but: {error}. Install '
            'it by `pip install safetensors`, or take a .pth file'
        ) from error
    return safetensors


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    package = import_safetensors()
    try:
        return package.torch.load_file(path)
    except package.SafetensorError as error:
        raise _failure(path, error) from None


def _cached_name(url: str) -> str:
    name = Path(urlparse(url).path)
    if re.search(r'-[0-9a-f]{8,}$', name.stem):
        return name.name
    return f'{name.stem}-{sha256(url.encode()).hexdigest()[:8]}{name.suffix}'


def _download(url: str, path: Path) -> None:
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path))


torch.serialization.add_safe_globals(_safe_globals())
