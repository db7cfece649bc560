"""ConvNeXt V2 checkpoints of other libraries, converted from and to ours.

Libraries store the same parameters by names and shapes of their own, and each of
:data:`FORMATS` says how one of them does. All but 'official-sparse' are written too,
and tensors keep every bit.

The official code, timm and transformers' classifier have one norm, after the last stage
and the pooling. It is ``norm3`` here, as in mmpretrain, so that a classifier keeps it
in any format; ours pools before it if ``gap_before_final_norm`` is set, and computes it
at every position otherwise. The norms after the other stages, which detectors and
segmentors train, have a place in ours, mmpretrain and 'transformers-backbone'. FCMAE's
decoder has one in ours alone, of those that are written.
"""

import itertools
import os
import re
from argparse import Namespace
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from mmengine.runner import CheckpointLoader
from torch import Tensor, nn

from ..models.convnextv2 import NUM_STAGES, ConvNeXtV2, describe_arch, has_grn
from ..models.fcmae import FCMAEDecoder
from .checkpoint import import_safetensors, renamed_when_whole

Weights = dict[str, Tensor]

SUFFIXES = ('.pth', '.pt', '.bin', '.safetensors')

_DECODER = 'neck.'
_NORMS_BETWEEN = ('backbone.norm0.', 'backbone.norm1.', 'backbone.norm2.')
_FIRST = 'backbone.stages.0.0.dwconv.weight'
_STEM = 'backbone.downsample_layers.0.0.weight'
# Of the first version, which has it in place of GRN.
_LAYER_SCALE = 'backbone.stages.0.0.gamma'


@dataclass(frozen=True)
class CheckpointFormat:
    """How a library stores ConvNeXt V2.

    Attributes:
        rules: Patterns and replacements, which make our names theirs, one after the
            other.
        no_place: How those of our names begin that have no place in it.
        prefix: How the names of the backbone begin, if other modules may be beside it.
        holder: The key of the weights in a ``.pth`` file; None if the file holds
            nothing but the weights.
        flat_grn: Whether GRN's parameters are vectors, and not ``(1, 1, 1, C)``.
        conv_sizes: The sizes whose pointwise layers are 1x1 convolutions, and not
            linear.
        first_version: Whether the first ConvNeXt, without GRN, is stored so too.
    """

    rules: tuple[tuple[str, str], ...] = ()
    no_place: tuple[str, ...] = ()
    prefix: str = ''
    holder: str | None = None
    flat_grn: bool = False
    conv_sizes: tuple[str, ...] = ()
    first_version: bool = True

    def name(self, ours: str) -> str | None:
        """Return their name of a parameter, or None if there is no place for it."""
        if ours.startswith(self.no_place):
            return None
        for pattern, replacement in self.rules:
            ours = re.sub(pattern, replacement, ours)
        return ours

    def reshape(self, value: Tensor, ours: str, size: str) -> Tensor:
        """Bring a parameter, by our name, into their shape."""
        if self.flat_grn and '.grn.' in ours:
            return value.flatten()
        if size in self.conv_sizes and re.search(r'pwconv\d\.weight', ours):
            return value[..., None, None]
        return value


_TRANSFORMERS_RULES = (
    (r'downsample_layers\.0\.0', 'embeddings.patch_embeddings'),
    (r'downsample_layers\.0\.1', 'embeddings.layernorm'),
    (r'downsample_layers\.(\d)', r'encoder.stages.\1.downsampling_layer'),
    (r'stages\.(\d)\.(\d+)\.', r'encoder.stages.\1.layers.\2.'),
    (r'(layers\.\d+)\.norm', r'\1.layernorm'),
    (r'grn\.gamma', 'grn.weight'),
    (r'grn\.beta', 'grn.bias'),
)

FORMATS: dict[str, CheckpointFormat] = {
    # facebookresearch/ConvNeXt-V2: models/convnextv2.py.
    'official': CheckpointFormat(
        rules=(
            (r'^backbone\.norm3', 'norm'),
            (r'^backbone\.', ''),
            (r'^head\.fc', 'head'),
        ),
        no_place=(*_NORMS_BETWEEN, _DECODER),
        holder='model',
    ),
    # models/fcmae.py there, with MinkowskiEngine's modules in the encoder.
    'official-sparse': CheckpointFormat(
        rules=(
            (r'^backbone\.', 'encoder.'),
            (r'^neck\.', ''),
            (r'^(encoder\..*\.dwconv)\.weight', r'\1.kernel'),
            (r'^(encoder\..*\.norm)\.', r'\1.ln.'),
            (r'^(encoder\..*\.pwconv\d)\.', r'\1.linear.'),
            (r'^(encoder\.downsample_layers\.[1-3]\.0)\.', r'\1.ln.'),
            (r'^(encoder\.downsample_layers\.[1-3]\.1)\.weight', r'\1.kernel'),
        ),
        no_place=('backbone.norm', 'head.'),
    ),
    'timm': CheckpointFormat(
        rules=(
            (r'^backbone\.norm3', 'head.norm'),
            (r'^backbone\.downsample_layers\.0', 'stem'),
            (r'^backbone\.downsample_layers\.(\d)', r'stages.\1.downsample'),
            (r'^backbone\.stages\.(\d)\.(\d+)\.', r'stages.\1.blocks.\2.'),
            (r'dwconv', 'conv_dw'),
            (r'pwconv', 'mlp.fc'),
            (r'grn\.gamma', 'mlp.grn.weight'),
            (r'grn\.beta', 'mlp.grn.bias'),
        ),
        no_place=(*_NORMS_BETWEEN, _DECODER),
        flat_grn=True,
        conv_sizes=('atto', 'femto', 'pico', 'nano'),
    ),
    # ConvNextV2ForImageClassification.
    'transformers': CheckpointFormat(
        rules=(
            *_TRANSFORMERS_RULES,
            (r'^backbone\.norm3', 'convnextv2.layernorm'),
            (r'^backbone\.', 'convnextv2.'),
            (r'^head\.fc', 'classifier'),
        ),
        no_place=(*_NORMS_BETWEEN, _DECODER),
        first_version=False,
    ),
    # ConvNextV2Backbone, which counts its stages from one.
    'transformers-backbone': CheckpointFormat(
        rules=(
            *_TRANSFORMERS_RULES,
            *(
                (rf'^backbone\.norm{i}', f'hidden_states_norms.stage{i + 1}')
                for i in range(NUM_STAGES)
            ),
            (r'^backbone\.', ''),
        ),
        no_place=('head.', _DECODER),
        first_version=False,
    ),
    'mmpretrain': CheckpointFormat(
        rules=(('dwconv', 'depthwise_conv'), ('pwconv', 'pointwise_conv')),
        no_place=(_DECODER,),
        prefix='backbone.',
        holder='state_dict',
        flat_grn=True,
    ),
    'ours': CheckpointFormat(prefix='backbone.', holder='state_dict'),
}

# Ours pre-trains on visible patches with the dense weights, so nothing becomes sparse.
TARGETS = tuple(name for name in FORMATS if name != 'official-sparse')


@dataclass(frozen=True)
class Conversion:
    """Converted weights, and what became of them.

    Attributes:
        weights: By the names of the target format.
        source: The source format.
        target: The target format.
        size: A key of :data:`ARCHITECTURES`, or depths and dims.
        left_out: Names in the source of what has no place in the target.
    """

    weights: Weights
    source: str
    target: str
    size: str
    left_out: tuple[str, ...]

    def __str__(self) -> str:
        """Tell all of it in a line."""
        modules = Counter(map(_module, self.left_out))
        counts = [f'{module} ({n})' for module, n in modules.items()]
        return (
            f'{self.source} -> {self.target}: {self.size}, {len(self.weights)} tensors '
            f'converted, left out: {", ".join(counts) or "nothing"}'
        )


def convert_checkpoint(
    source: str | Path, target: str | Path, to: str, source_format: str | None = None
) -> Conversion:
    """Convert a file.

    Args:
        source: Path or URL of the checkpoint. Nothing in it is run.
        target: Path of the new file, whose name ends in one of :data:`SUFFIXES`. It is
            there as a whole or not at all, and replaces what was there.
        to: Format of the new file, one of :data:`TARGETS`.
        source_format: A key of :data:`FORMATS`. Defaults to what the names say.

    Returns:
        What was done.

    Raises:
        FileNotFoundError: There is no such checkpoint.
        ImportError: A file is to be of safetensors, which is not installed.
        RuntimeError: The file is no checkpoint, or loading it could run code.
        ValueError: It holds no ConvNeXt V2, the new file would take its place, or an
            argument is none of the above.
    """
    target = Path(target).expanduser()
    if target.suffix not in SUFFIXES:
        raise ValueError(
            f'the name of {target} ends in none of {", ".join(SUFFIXES)}; give it an '
            'ending that says what kind of file to write'
        )
    given = Path(source).expanduser()
    if given.exists() and target.exists() and target.samefile(given):
        raise ValueError(
            f'{target} is the checkpoint itself, of which a conversion keeps the '
            'weights alone; give the new file another name'
        )
    weights = load_weights(source)
    try:
        conversion = convert_weights(weights, to, source_format)
    except ValueError as error:
        raise ValueError(f'Cannot convert {source}: {error}') from None
    save_weights(conversion.weights, target, FORMATS[to].holder)
    return conversion


def convert_weights(
    weights: Mapping[str, Tensor], to: str, source_format: str | None = None
) -> Conversion:
    """Convert weights.

    Args:
        weights: All that a checkpoint holds, by name.
        to: One of :data:`TARGETS`.
        source_format: A key of :data:`FORMATS`. Defaults to what the names say.

    Returns:
        The weights, and what became of them.

    Raises:
        ValueError: They are no ConvNeXt V2, or not of that format, or a format is
            unknown.
    """
    _check_known(to, TARGETS)
    source = find_format(weights) if source_format is None else source_format
    _check_known(source, tuple(FORMATS))
    if FORMATS[source].name(_FIRST) not in weights:
        raise ValueError(
            f"it is not in the format '{source}', which has a tensor "
            f"'{FORMATS[source].name(_FIRST)}'; by its names it is in the format "
            f"'{find_format(weights)}'"
        )
    looked_up = _Source(weights, source)
    model = _empty_model(looked_up)
    shapes = {name: param.shape for name, param in model.named_parameters()}
    backbone = cast(ConvNeXtV2, model['backbone'])
    if not (backbone.use_grn or FORMATS[to].first_version):
        raise ValueError(
            f"it is a ConvNeXt without GRN, of the first version, which '{to}' has no "
            'place for; convert it to another format, or take one with GRN'
        )
    size = describe_arch(backbone.depths, backbone.dims)
    converted, used = {}, set()
    for ours, name in _match(looked_up, shapes).items():
        value = _reshape(weights[name], shapes[ours], name)
        target = FORMATS[to].name(ours)
        if target is not None:
            converted[target] = FORMATS[to].reshape(value, ours, size)
            used.add(name)
    left_out = tuple(name for name in weights if name not in used)
    return Conversion(converted, source, to, size, left_out)


def find_format(weights: Mapping[str, Tensor]) -> str:
    """Tell by the names what format weights are in.

    Args:
        weights: All that a checkpoint holds, by name.

    Returns:
        A key of :data:`FORMATS`.

    Raises:
        ValueError: They are in none of them.
    """
    for key, form in FORMATS.items():
        if form.name(_FIRST) in weights:
            return key
    firsts = [f'  {form.name(_FIRST)} ({key})' for key, form in FORMATS.items()]
    modules = list({name.split('.')[0]: None for name in weights})
    raise ValueError(
        f'it is no ConvNeXt V2 in any known format. It holds {len(weights)} tensors in '
        f"{_some(modules)}, such as '{next(iter(weights), None)}'; expected was one of"
        '\n' + '\n'.join(firsts)
    )


def load_weights(source: str | Path, map_location: str = 'cpu') -> Weights:
    """Load the weights of a checkpoint safely.

    Args:
        source: Path or URL of a ``.safetensors`` file, or of one that torch saved: the
            weights alone, or with others as 'state_dict' or 'model'.
        map_location: Device to load to. Defaults to the CPU.

    Returns:
        The weights by name.

    Raises:
        FileNotFoundError: There is no such file.
        ImportError: It is of safetensors, which is not installed.
        RuntimeError: It is no checkpoint, or loading it could run code.
        ValueError: It holds no weights.
    """
    # The official training code stores its arguments, and they run nothing.
    with torch.serialization.safe_globals([Namespace]):
        checkpoint = CheckpointLoader.load_checkpoint(
            str(source), map_location, 'silent'
        )
    weights = checkpoint
    if isinstance(checkpoint, dict):
        weights = checkpoint.get('state_dict', checkpoint)
    if not isinstance(weights, dict):
        raise ValueError(
            f'{source} holds a {type(weights).__name__}, but no dict of tensors'
        )
    others = [str(name) for name, value in weights.items() if not _fits(name, value)]
    if others or not weights:
        raise ValueError(
            f'{source} holds no weights; expected were dense tensors by name, alone or '
            f"as 'model' or 'state_dict', but got {', '.join(others[:8]) or 'nothing'}"
        )
    return weights


def _fits(name: Any, value: Any) -> bool:
    dense = isinstance(value, Tensor) and value.layout == torch.strided
    return isinstance(name, str) and dense and not value.is_complex()


def save_weights(weights: Weights, path: str | Path, holder: str | None = None) -> None:
    """Write a file as a whole, or not at all.

    Args:
        weights: The weights by name.
        path: Of the file. What ends in ``.safetensors`` is written so, anything else by
            torch.
        holder: The key of the weights in a file of torch. Defaults to none, and then
            the file holds nothing else.

    Raises:
        ImportError: It is to be of safetensors, which is not installed.
    """
    path = Path(path).expanduser()
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name that no other process takes, and a replacement within one file system.
    unfinished = path.with_name(f'.{path.name}.{os.getpid()}.unfinished')
    weights = {name: value.contiguous() for name, value in weights.items()}
    with renamed_when_whole(unfinished, path):
        if path.suffix == '.safetensors':
            unfinished.touch()
            mode = unfinished.stat().st_mode
            # transformers refuses files that do not say this.
            import_safetensors().torch.save_file(
                weights, unfinished, metadata={'format': 'pt'}
            )
            # It is for its owner alone otherwise.
            unfinished.chmod(mode)
        else:
            torch.save({holder: weights} if holder else weights, unfinished)


def _check_known(name: str, known: Sequence[str]) -> None:
    if name not in known:
        raise ValueError(f"unknown format '{name}'; give one of {', '.join(known)}")


class _Source:
    """Weights in a format, looked up by our names."""

    def __init__(self, weights: Mapping[str, Tensor], key: str) -> None:
        self.weights = weights
        self.key = key
        self.format = FORMATS[key]

    def __contains__(self, ours: str) -> bool:
        return self.format.name(ours) in self.weights

    def __getitem__(self, ours: str) -> Tensor:
        if ours not in self:
            raise self.incomplete([str(self.format.name(ours))])
        return self.weights[str(self.format.name(ours))]

    def count(self, pattern: str) -> int:
        """Count the blocks whose names a number completes."""
        return next(i for i in itertools.count() if pattern.format(i) not in self)

    def incomplete(self, missing: Sequence[str]) -> ValueError:
        """Return the error that tells what is missing."""
        if not has_grn(self.weights) and _LAYER_SCALE not in self:
            return ValueError(
                'it has neither GRN, as a ConvNeXt V2, nor LayerScale, as one of the '
                f'first version; expected was {_some(missing)}'
            )
        return ValueError(
            f"it is in the format '{self.key}' by its names, but without "
            f'{_some(missing)}; a whole ConvNeXt V2 is expected'
        )


def _empty_model(source: _Source) -> nn.ModuleDict:
    """Build, without memory, what the weights are of; its names are ours."""
    stages = range(NUM_STAGES)
    depths = [source.count(f'backbone.stages.{i}.{{}}.dwconv.weight') for i in stages]
    if 0 in depths:
        raise ValueError(
            f'its stages have {depths} blocks; a whole ConvNeXt V2 is expected, with '
            f'some in each of {NUM_STAGES} stages'
        )
    dims = [source[f'backbone.stages.{i}.0.dwconv.bias'].numel() for i in stages]
    stem = source[_STEM]
    channels = stem.shape[1] if stem.dim() == 4 else 3
    with torch.device('meta'):
        use_grn = _LAYER_SCALE not in source
        backbone = ConvNeXtV2(dict(depths=depths, dims=dims), channels, use_grn=use_grn)
        model = nn.ModuleDict(dict(backbone=backbone))
        if 'head.fc.bias' in source:
            classifier = nn.Linear(dims[-1], source['head.fc.bias'].numel())
            model['head'] = nn.ModuleDict(dict(fc=classifier))
        if 'neck.mask_token' in source:
            width = source['neck.mask_token'].numel()
            depth = source.count('neck.decoder.{}.dwconv.weight')
            model['neck'] = FCMAEDecoder(dims[-1], channels, width, depth, use_grn)
    return model


def _match(source: _Source, ours: Iterable[str]) -> dict[str, str]:
    """Return which of their names belongs to which of ours."""
    every = {name: source.format.name(name) for name in ours}
    names = {
        name: theirs
        for name, theirs in every.items()
        if theirs is not None and theirs in source.weights
    }
    # Only detectors have norms between the stages, and FCMAE has none at all.
    missing = [
        str(theirs)
        for name, theirs in every.items()
        if name not in names and not name.startswith('backbone.norm')
    ]
    if missing:
        raise source.incomplete(missing)
    known = set(names.values())
    inside = (n for n in source.weights if n.startswith(source.format.prefix))
    unknown = [name for name in inside if name not in known]
    if unknown:
        raise ValueError(
            f"it is in the format '{source.key}' by its names, but no ConvNeXt V2 has "
            f'{_some(unknown)}; a file of a ConvNeXt V2 and nothing else is expected'
        )
    return names


def _reshape(value: Tensor, shape: torch.Size, name: str) -> Tensor:
    """Bring a tensor into our shape, if it differs in nothing but the way of writing.

    GRN's parameters are vectors in some formats, MinkowskiEngine's biases ``(1, C)``,
    and pointwise layers may be 1x1 convolutions.
    """
    dense = _dense_kernel(value, shape) if name.endswith('.kernel') else value
    if [n for n in dense.shape if n != 1] != [n for n in shape if n != 1]:
        raise ValueError(
            f"'{name}' has the shape {tuple(value.shape)}, but depths and dims, as the "
            f'first blocks of the stages give them, need {tuple(shape)}; its tensors '
            'are not of one ConvNeXt V2'
        )
    return dense.reshape(shape)


def _dense_kernel(kernel: Tensor, shape: torch.Size) -> Tensor:
    """Make MinkowskiEngine's kernel a weight; its rows vary faster than its columns.

    It is ``(k * k, in, out)``, or ``(k * k, C)`` if it is depthwise.
    """
    side = shape[-1]
    if kernel.dim() not in (2, 3) or len(kernel) != side**2:
        return kernel
    if kernel.dim() == 2:
        kernel = kernel[:, None]
    return kernel.unflatten(0, (side, side)).permute(3, 2, 1, 0)


def _some(names: Sequence[str]) -> str:
    """Name a few, and say how many there are."""
    more = f' and {len(names) - 3} more' if len(names) > 3 else ''
    return ', '.join(f"'{name}'" for name in names[:3]) + more


def _module(name: str) -> str:
    """Return what a parameter is part of; the backbone is large enough to tell more."""
    return '.'.join(name.split('.')[: 2 if name.startswith('backbone.') else 1])
