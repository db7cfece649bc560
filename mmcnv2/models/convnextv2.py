"""ConvNeXt V2, the backbone: one set of weights, however it is run."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from mmengine.model import BaseModule, PretrainedInit
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..arguments import check_arguments
from ..registry import MODELS
from .layers import INIT_CFG, Block
from .layouts import (
    DenseLayout,
    Layout,
    MinkowskiLayout,
    PackedLayout,
    import_minkowski_engine,
)
from .shortcuts import is_recorded
from .tiles import STRIDE

# The official repository's table, by its names.
ARCHITECTURES: dict[str, dict[str, Sequence[int]]] = {
    'atto': dict(depths=(2, 2, 6, 2), dims=(40, 80, 160, 320)),
    'femto': dict(depths=(2, 2, 6, 2), dims=(48, 96, 192, 384)),
    'pico': dict(depths=(2, 2, 6, 2), dims=(64, 128, 256, 512)),
    'nano': dict(depths=(2, 2, 8, 2), dims=(80, 160, 320, 640)),
    'tiny': dict(depths=(3, 3, 9, 3), dims=(96, 192, 384, 768)),
    'base': dict(depths=(3, 3, 27, 3), dims=(128, 256, 512, 1024)),
    'large': dict(depths=(3, 3, 27, 3), dims=(192, 384, 768, 1536)),
    'huge': dict(depths=(3, 3, 27, 3), dims=(352, 704, 1408, 2816)),
}

# How masked pictures are run.
SPARSE_LAYOUTS = dict(packed=PackedLayout, minkowski=MinkowskiLayout)

NUM_STAGES = 4


@MODELS.register_module()
@check_arguments
class ConvNeXtV2(BaseModule):
    """ConvNeXt V2 backbone (https://arxiv.org/abs/2301.00808).

    Parameter names are those of the official checkpoints; the norm over the output of
    stage ``i`` is ``norm{i}``.

    Args:
        arch (str | dict): A key of :data:`ARCHITECTURES` ('atto', 'femto', 'pico',
            'nano', 'tiny', 'base', 'large', 'huge'), or a dict of ``depths`` and
            ``dims``, blocks and channels of each of the four stages.
            Defaults to 'tiny'.
        in_channels (int): Channels of a picture. Defaults to 3.
        out_indices (Sequence[int]): The stages whose features are returned, 0 to 3,
            or -4 to -1 counted from the last. Stages after the last of them are not
            built. Defaults to (0, 1, 2, 3).
        drop_path_rate (float): Stochastic depth rate of the last block; it grows
            linearly from 0 at the first. Defaults to 0.
        frozen_stages (int): Freeze the stem and the stages up to this number, as in
            MMDetection: -1 freezes nothing, 0 the stem, 1 the stem and the first
            stage, and so on. Defaults to -1.
        output_norm (bool): Normalise the features of each stage. FCMAE's decoder takes
            them as they are. Defaults to True.
        use_grn (bool): Whether blocks have GRN. Those without are of the first ConvNeXt
            and have LayerScale, as the paper compares them. Defaults to True.
        gap_before_final_norm (bool): Average the features of each stage over the
            picture before they are normalised, and return vectors, as classifiers
            need them. Defaults to False.
        sparse (str): What computes on the visible patches of masked pictures: 'packed',
            mmcnv2 itself, or 'minkowski', MinkowskiEngine, with equal results.
            Defaults to 'packed'.
        with_cp (bool): Checkpoint the activations of each block: less memory, more
            time. Defaults to False.
        init_cfg (dict | list[dict], optional): Initialisation, MMEngine's. Of type
            'Pretrained', it loads checkpoints of other libraries too
            (:class:`mmcnv2.engine.PretrainedBackbone`). Defaults to the paper's:
            truncated normal weights (std 0.02) and zero biases.

    Raises:
        ValueError: If an argument is none of the above.
        ImportError: If MinkowskiEngine is asked for and not installed.
    """

    def __init__(
        self,
        arch: str | dict[str, Sequence[int]] = 'tiny',
        in_channels: int = 3,
        out_indices: Sequence[int] = (0, 1, 2, 3),
        drop_path_rate: float = 0.0,
        frozen_stages: int = -1,
        output_norm: bool = True,
        use_grn: bool = True,
        gap_before_final_norm: bool = False,
        sparse: str = 'packed',
        with_cp: bool = False,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        super().__init__(_resolve_init_cfg(init_cfg))
        self.depths, self.dims = _resolve_arch(arch)
        self.in_channels = in_channels
        self.out_indices = _resolve_out_indices(out_indices)
        self.frozen_stages = frozen_stages
        self.use_grn = use_grn
        self.gap_before_final_norm = gap_before_final_norm
        self.sparse = sparse
        self.with_cp = with_cp
        _check_sparse(sparse)
        if frozen_stages not in range(-1, NUM_STAGES + 1):
            raise ValueError(
                f'frozen_stages is {frozen_stages}; give it from -1 (nothing) to '
                f'{NUM_STAGES} (all stages; output norms are never frozen)'
            )
        if not _is_positive(in_channels):
            raise ValueError(f'in_channels is {in_channels}; give a positive number')
        if not 0 <= drop_path_rate < 1:
            raise ValueError(f'drop_path_rate is {drop_path_rate}; give it in [0, 1)')

        # On the CPU even where the model is built on the meta device.
        rates = torch.linspace(0, drop_path_rate, sum(self.depths), device='cpu')
        rate = iter(rates.tolist())
        self.downsample_layers = nn.ModuleList()
        self.stages = nn.ModuleList()
        for i in range(self.out_indices[-1] + 1):
            dim = self.dims[i]
            self.downsample_layers.append(self._make_downsample(i))
            blocks = [Block(dim, next(rate), use_grn) for _ in range(self.depths[i])]
            self.stages.append(nn.Sequential(*blocks))
            if i in self.out_indices:
                norm = nn.LayerNorm(dim, eps=1e-6) if output_norm else nn.Identity()
                self.add_module(f'norm{i}', norm)
        self._freeze()
        self._built = self._shapes()

    def _make_downsample(self, stage: int) -> nn.Sequential:
        dim = self.dims[stage]
        if stage == 0:
            conv = nn.Conv2d(self.in_channels, dim, kernel_size=4, stride=4)
            return nn.Sequential(conv, nn.LayerNorm(dim, eps=1e-6))
        previous = self.dims[stage - 1]
        conv = nn.Conv2d(previous, dim, kernel_size=2, stride=2)
        return nn.Sequential(nn.LayerNorm(previous, eps=1e-6), conv)

    def forward(
        self, x: Tensor, mask: Tensor | None = None, num_visible: int | None = None
    ) -> tuple[Tensor, ...]:
        """Compute the features of pictures, or of their visible patches alone.

        Args:
            x (Tensor): Pictures, ``(N, in_channels, H, W)``, each side at least 32
                pixels; it need not be a multiple of 32 unless there is a mask.
            mask (Tensor, optional): ``(N, H / 32, W / 32)``, bool, True where a patch
                is hidden, with equally many visible patches in every picture.
            num_visible (int, optional): That number, where it is known beforehand.
                ``torch.compile`` and CUDA graphs need it, and take it as true, to make
                a single graph that serves all masks. Counted by default.

        Returns:
            tuple[Tensor]: For each of ``out_indices``, in ascending order, features
            ``(N, dims[i], H // 2**(i + 2), W // 2**(i + 2))``. With a mask, those of
            the visible positions, ``(N, T, dims[i])``, by patch, row and column. With
            ``gap_before_final_norm``, means over them, ``(N, dims[i])``.

        Raises:
            ValueError: If the pictures or the mask have the wrong shape, if they are on
                different devices, if a mask hides a picture entirely or there is none,
                if pictures differ in their number of visible patches, if that is not
                ``num_visible``, or if there is that number and no mask.
        """
        self._check_pictures(x)
        layout = self._layout(x, mask, num_visible)
        outs = []
        for i, stage in enumerate(self.stages):
            x = self._downsample(i, x, layout)
            for block in stage:
                x = self._run(block, x, layout)
            if i in self.out_indices:
                outs.append(self._output(i, x, layout))
        return tuple(outs)

    def _layout(
        self, x: Tensor, mask: Tensor | None, num_visible: int | None
    ) -> Layout:
        if mask is None and num_visible is not None:
            raise ValueError(
                f'num_visible is {num_visible}, but there is no mask that hides the '
                'other patches; give both or neither'
            )
        if mask is None:
            return DenseLayout()
        _check_mask(x, mask)
        if num_visible is None or not is_recorded(mask):
            num_visible = _count_visible(mask, num_visible)
        return SPARSE_LAYOUTS[self.sparse](mask, num_visible)

    def _downsample(self, stage: int, x: Tensor, layout: Layout) -> Tensor:
        first, second = self.downsample_layers[stage]
        if stage == 0:
            return second(layout.stem(first, x))
        return layout.downsample(second, first(x))

    def _run(self, block: Block, x: Tensor, layout: Layout) -> Tensor:
        if self.with_cp and torch.is_grad_enabled():
            return checkpoint(block, x, layout, use_reentrant=False)
        return block(x, layout)

    def _output(self, stage: int, x: Tensor, layout: Layout) -> Tensor:
        norm = getattr(self, f'norm{stage}')
        if self.gap_before_final_norm:
            return norm(x.flatten(1, -2).mean(1))
        return layout.output(norm(x))

    def _check_pictures(self, x: Tensor) -> None:
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise ValueError(
                f'pictures of shape (N, {self.in_channels}, H, W) expected, but got '
                f'{tuple(x.shape)}; for pictures with another number of channels, '
                'set in_channels of the backbone'
            )
        if min(x.shape[2:]) < STRIDE:
            raise ValueError(
                f'pictures of at least {STRIDE} pixels on each side expected, but got '
                f'{tuple(x.shape[2:])}; resize or pad them in the data pipeline'
            )

    def _frozen_modules(self) -> list[nn.Module]:
        if self.frozen_stages < 0:
            return []
        count = self.frozen_stages
        return [*self.downsample_layers[: max(count, 1)], *self.stages[:count]]

    def _freeze(self) -> None:
        for module in self._frozen_modules():
            module.requires_grad_(False)

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        """Load, by mmpretrain's names too, but nothing of another network."""
        _rename_from_mmpretrain(state_dict, prefix)
        self._check_weights(
            {k[len(prefix) :]: v for k, v in state_dict.items() if k.startswith(prefix)}
        )
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _shapes(self) -> dict[str, torch.Size]:
        return {name: param.shape for name, param in self.named_parameters()}

    def _check_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Refuse what MMEngine would only warn of, leaving weights at random."""
        ours = self._shapes()
        # Sharded over processes, say, which PyTorch sees to.
        if ours != self._built:
            return
        if not weights:
            raise RuntimeError(
                "the checkpoint has no weights by the backbone's names. Where a whole "
                'model is loaded (load_from, --resume, testing) it has to be one of '
                'the whole model, as training writes them; one of a backbone alone, '
                "of whichever library, goes into the backbone's init_cfg="
                "dict(type='Pretrained', checkpoint=...)"
            )
        blocks = tuple(f'stages.{i}.' for i in range(len(self.stages)))
        found = {
            name: value.shape
            for name, value in weights.items()
            if name in ours or name.startswith(blocks)
        }
        # Networks that were trained for other ends have no output norms.
        norms = {name for name in ours if name.startswith('norm')} - set(found)
        names = sorted((set(ours) | set(found)) - norms)
        name = next((n for n in names if found.get(n) != ours.get(n)), None)
        if name is None:
            return
        shapes = [tuple(at[name]) if name in at else 'absent' for at in (found, ours)]
        raise RuntimeError(
            f'the backbone is a ConvNeXt V2 of {describe_arch(self.depths, self.dims)}'
            f'{_describe_block(self.use_grn)} for pictures of {self.in_channels} '
            f'channels, but the checkpoint holds {_describe_weights(weights)}; '
            f"'{name}' is {shapes[0]} there, and {shapes[1]} in the backbone. Take a "
            "checkpoint of this size, or set the backbone's arch, in_channels and "
            'use_grn to those of the checkpoint; if nothing but the channels differ, '
            'set adapt_stem=True in its init_cfg, and adapt_grn=True if nothing but '
            'GRN does'
        )

    def train(self, mode: bool = True) -> 'ConvNeXtV2':
        """Set training mode; what is frozen stays in evaluation mode."""
        super().train(mode)
        for module in self._frozen_modules():
            module.eval()
        return self


def _check_sparse(sparse: str) -> None:
    if sparse not in SPARSE_LAYOUTS:
        raise ValueError(
            f"sparse is '{sparse}'; give one of {', '.join(SPARSE_LAYOUTS)}"
        )
    if sparse == 'minkowski':
        import_minkowski_engine()


def check_masked_size(x: Tensor) -> None:
    """Check that pictures can be cut into patches.

    Args:
        x (Tensor): Pictures, ``(N, C, H, W)``.

    Raises:
        ValueError: If they have another shape, or sides that are no multiples of 32.
    """
    if x.dim() != 4:
        raise ValueError(
            f'pictures of shape (N, C, H, W) expected, but got {tuple(x.shape)}'
        )
    height, width = x.shape[2:]
    if height % STRIDE or width % STRIDE:
        raise ValueError(
            f'to be masked, pictures need sides that are multiples of {STRIDE}, but '
            f'got {(height, width)}; resize or crop them in the data pipeline'
        )


def _check_mask(x: Tensor, mask: Tensor) -> None:
    check_masked_size(x)
    n, _, height, width = x.shape
    expected = (n, height // STRIDE, width // STRIDE)
    if mask.dtype != torch.bool or mask.shape != expected:
        raise ValueError(
            f'a bool mask of shape {expected} expected, but got {mask.dtype} of shape '
            f'{tuple(mask.shape)}'
        )
    if n == 0:
        raise ValueError('there are no pictures to mask; give one at least')
    if mask.device != x.device:
        raise ValueError(
            f'the mask is on {mask.device} and the pictures on {x.device}; move the '
            'mask there'
        )


def _count_visible(mask: Tensor, expected: int | None) -> int:
    """Return how many patches each picture shows."""
    counts = (~mask).flatten(1).sum(1).tolist()
    if 0 in counts:
        raise ValueError(
            'the mask hides a picture entirely; leave at least one of its patches '
            'visible'
        )
    if len(set(counts)) > 1:
        raise ValueError(
            'a mask hides equally many patches of each picture, but the numbers of '
            f'visible ones are {counts}'
        )
    if expected not in (None, counts[0]):
        raise ValueError(
            f'num_visible is {expected}, but the mask shows {counts[0]} patches of '
            'each picture; give that number, or none'
        )
    return counts[0]


def _resolve_arch(
    arch: str | dict[str, Sequence[int]],
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return depths and dims."""
    if isinstance(arch, str):
        if arch not in ARCHITECTURES:
            raise ValueError(
                f"unknown arch '{arch}'; choose one of {', '.join(ARCHITECTURES)}, "
                'or give a dict of depths and dims'
            )
        arch = ARCHITECTURES[arch]
    if not isinstance(arch, Mapping) or set(arch) != {'depths', 'dims'}:
        raise ValueError(
            f'arch is {arch!r}; give one of {", ".join(ARCHITECTURES)}, or a dict of '
            "'depths' and 'dims'"
        )
    for name, numbers in arch.items():
        valid = isinstance(numbers, Sequence) and len(numbers) == NUM_STAGES
        if not valid or not all(map(_is_positive, numbers)):
            raise ValueError(
                f'{name} holds {NUM_STAGES} positive whole numbers, one a stage, but '
                f'got {numbers!r}'
            )
    return tuple(arch['depths']), tuple(arch['dims'])


def describe_arch(depths: Sequence[int], dims: Sequence[int]) -> str:
    """Name an architecture.

    Args:
        depths (Sequence[int]): Blocks of each stage.
        dims (Sequence[int]): Channels of each stage.

    Returns:
        str: Its key in :data:`ARCHITECTURES`, or else depths and dims.
    """
    for name, arch in ARCHITECTURES.items():
        if (arch['depths'], arch['dims']) == (tuple(depths), tuple(dims)):
            return name
    return f'depths {tuple(depths)} and dims {tuple(dims)}'


def _describe_weights(weights: Mapping[str, Tensor]) -> str:
    """Tell what weights by our names seem to be of."""
    firsts = [f'stages.{i}.0.dwconv.bias' for i in range(NUM_STAGES)]
    if not all(name in weights for name in firsts):
        names = ', '.join(list(weights)[:3])
        return f'no whole ConvNeXt V2 there: {len(weights)} tensors ({names})'
    blocks = re.compile(r'stages\.(\d)\.\d+\.dwconv\.bias').fullmatch
    stages = Counter(match[1] for match in map(blocks, weights) if match)
    depths = [stages[str(i)] for i in range(NUM_STAGES)]
    what = describe_arch(depths, [len(weights[name]) for name in firsts])
    return f'that of {what}{_describe_block(has_grn(weights))}'


def _describe_block(use_grn: bool) -> str:
    return '' if use_grn else ' without GRN (V1)'


def has_grn(weights: Iterable[str]) -> bool:
    """Tell by the names of weights, whoever has given them, whether there is GRN.

    Args:
        weights (Iterable[str]): The names.

    Returns:
        bool: Whether there is.
    """
    return any('.grn.' in name for name in weights)


def _rename_from_mmpretrain(weights: dict[str, Tensor], prefix: str) -> None:
    """Give the parameters of mmpretrain's ConvNeXt our names and shapes, in place."""
    for name in [name for name in weights if name.startswith(prefix)]:
        ours = name.replace('.depthwise_conv.', '.dwconv.')
        ours = ours.replace('.pointwise_conv', '.pwconv')
        value = weights.pop(name)
        flat = '.grn.' in name and value.dim() == 1
        weights[ours] = value[None, None, None] if flat else value


def _resolve_init_cfg(init_cfg: dict | list[dict] | None) -> list[dict]:
    """Let ours load checkpoints, after all else has been initialised.

    It stands in mmcnv2.engine, and MMEngine's registry brings it.
    """
    if init_cfg is None:
        return [INIT_CFG]
    cfgs = [init_cfg] if isinstance(init_cfg, dict) else init_cfg
    if untyped := [c for c in cfgs if 'type' not in c]:
        raise ValueError(
            f"init_cfg holds {untyped[0]!r}, which has no type; give type='Pretrained' "
            'for a checkpoint, or that of an initialiser of MMEngine'
        )
    loaders = [c for c in cfgs if c['type'] in ('Pretrained', PretrainedInit)]
    others = [c for c in cfgs if c not in loaders]
    return [*others, *({**c, 'type': 'mmcnv2.PretrainedBackbone'} for c in loaders)]


def _is_positive(number: Any) -> bool:
    return isinstance(number, int) and number > 0


def _resolve_out_indices(out_indices: Sequence[int]) -> tuple[int, ...]:
    """Return the stages counted from 0, in ascending order."""
    valid = range(-NUM_STAGES, NUM_STAGES)
    resolved = {i % NUM_STAGES for i in out_indices if i in valid}
    if not out_indices or len(resolved) != len(out_indices):
        raise ValueError(
            f'out_indices holds different stages from {valid[0]} to {valid[-1]}, at '
            f'least one, but got {out_indices!r}'
        )
    return tuple(sorted(resolved))
