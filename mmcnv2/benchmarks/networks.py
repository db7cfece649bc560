"""Our network, and the same in other libraries with the same weights."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any, TypeVar

import torch
from mmengine.model import trunc_normal_init
from torch import Tensor, nn

from ..engine.conversion import convert_weights
from ..models import ConvNeXtV2
from ..models.convnextv2 import NUM_STAGES, describe_arch
from ..models.grn import GRN

Built = TypeVar('Built')

LIBRARIES = ('transformers', 'timm', 'mmpretrain')


def import_torchvision() -> None:
    """Make timm and mmpretrain, which import torchvision, importable.

    The build on PyPI is for CUDA. Beside a torch without, its compiled operators do not
    load, and it fails to import only because two are unknown. Nothing here uses them.
    """
    if find_spec('torchvision') is None:
        return
    try:
        import torchvision  # noqa: F401
    except RuntimeError:
        for name in ('nms', 'qnms'):
            schema = '(Tensor dets, Tensor scores, float iou_threshold) -> Tensor'
            torch.library.define(f'torchvision::{name}', schema)


def build_present(
    builders: Mapping[str, tuple[Callable[[], Any], Callable[[], Built]]],
) -> tuple[dict[str, Built], dict[str, str]]:
    """Build what can be built here.

    Args:
        builders: What imports the library, and what builds it then, by name.

    Returns:
        What was built, and why the others are absent, each by name.
    """
    import_torchvision()
    built, absent = {}, {}
    for name, (import_library, build) in builders.items():
        try:
            import_library()
        # Libraries that do not fit together fail to import in many ways.
        except Exception as error:
            reason = str(error).splitlines() or ['']
            absent[name] = f'{type(error).__name__}: {reason[0]}'
            continue
        built[name] = build()
    return built, absent


def build_ours(arch: str, **kwargs: Any) -> ConvNeXtV2:
    """Build our network with weights that do something, GRN's too.

    Args:
        arch: Its size.
        **kwargs: What else :class:`ConvNeXtV2` takes.

    Returns:
        The network, the same one each time.
    """
    torch.manual_seed(0)
    ours = ConvNeXtV2(arch, **kwargs)
    for module in ours.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            trunc_normal_init(module, std=0.02)
        if isinstance(module, GRN):
            nn.init.normal_(module.gamma, std=0.5)
            nn.init.normal_(module.beta, std=0.5)
    return ours


def other_backbones(
    ours: ConvNeXtV2, names: Sequence[str] = LIBRARIES
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Build the backbones of other libraries, which return the maps that ours does.

    Args:
        ours: A backbone with the output norms of all four stages.
        names: Which libraries, of :data:`LIBRARIES`.

    Returns:
        The backbones, and why the others are absent, each by name.
    """
    builders = {
        'transformers': (
            partial(import_module, 'transformers.models.convnextv2'),
            lambda: TransformersBackbone(ours),
        ),
        'timm': (partial(import_module, 'timm.models'), lambda: TimmBackbone(ours)),
        'mmpretrain': (
            partial(import_module, 'mmpretrain.models'),
            lambda: mmpretrain_backbone(ours),
        ),
    }
    return build_present({name: builders[name] for name in names})


def weights_as(form: str, ours: ConvNeXtV2) -> dict[str, Tensor]:
    """Return the weights of a backbone as another library names them."""
    weights = {f'backbone.{k}': v for k, v in ours.state_dict().items()}
    converted = convert_weights(weights, form).weights
    return {k.removeprefix('backbone.'): v for k, v in converted.items()}


class TransformersBackbone(nn.Module):
    """transformers' ``ConvNextV2Backbone``.

    Args:
        ours: The backbone whose weights it gets.
    """

    def __init__(self, ours: ConvNeXtV2) -> None:
        super().__init__()
        from transformers import ConvNextV2Backbone, ConvNextV2Config

        settings: dict[str, Any] = dict(
            depths=list(ours.depths),
            hidden_sizes=list(ours.dims),
            out_features=[f'stage{i + 1}' for i in range(NUM_STAGES)],
        )
        self.backbone = ConvNextV2Backbone(ConvNextV2Config(**settings))
        self.backbone.load_state_dict(weights_as('transformers-backbone', ours))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the maps of all stages."""
        return self.backbone(x).feature_maps


class TimmBackbone(nn.Module):
    """timm's ``convnextv2_*``, with its own norm after each stage.

    timm has one norm, after the last stage, so the four are put behind it here.

    Args:
        ours: The backbone whose weights it gets, of a size that has a name.
    """

    def __init__(self, ours: ConvNeXtV2) -> None:
        super().__init__()
        import timm
        from timm.layers import LayerNorm2d

        name = f'convnextv2_{describe_arch(ours.depths, ours.dims)}'
        self.backbone = timm.create_model(name, num_classes=0)
        self.backbone.load_state_dict(weights_as('timm', ours))
        # It belongs to the pooled features, which nobody asks for.
        self.backbone.head = nn.Identity()
        self.norms = nn.ModuleList(LayerNorm2d(dim) for dim in ours.dims)
        for i, norm in enumerate(self.norms):
            norm.load_state_dict(getattr(ours, f'norm{i}').state_dict())

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the maps of all stages."""
        maps = self.backbone.forward_intermediates(x, intermediates_only=True)
        return tuple(norm(m) for norm, m in zip(self.norms, maps, strict=True))


def mmpretrain_backbone(ours: ConvNeXtV2) -> nn.Module:
    """Build mmpretrain's ``ConvNeXt``.

    Args:
        ours: The backbone whose weights it gets.

    Returns:
        The backbone, which returns the maps of all stages, normalised.
    """
    from mmpretrain.models import ConvNeXt

    backbone = ConvNeXt(
        _mmpretrain_arch(ours),
        use_grn=True,
        layer_scale_init_value=0.0,
        out_indices=tuple(range(NUM_STAGES)),
        gap_before_final_norm=False,
    )
    backbone.load_state_dict(weights_as('mmpretrain', ours))
    return backbone


class SparKEncoder(nn.Module):
    """mmpretrain's ``SparseConvNeXt``, the encoder of its SparK.

    Args:
        ours: The encoder whose weights it gets, without output norms.
    """

    def __init__(self, ours: ConvNeXtV2) -> None:
        super().__init__()
        from mmpretrain.models import SparseConvNeXt
        from mmpretrain.models.utils import SparseHelper

        self.helper = SparseHelper
        self.encoder = SparseConvNeXt(
            _mmpretrain_arch(ours),
            use_grn=True,
            layer_scale_init_value=0.0,
            gap_before_output=False,
        )
        self.encoder.load_state_dict(weights_as('mmpretrain', ours))

    def forward(self, image: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        """Return the last map, zero where it is hidden."""
        # Where mmpretrain looks for it.
        self.helper._cur_active = ~mask[:, None]
        return self.encoder(image)


def _mmpretrain_arch(ours: ConvNeXtV2) -> dict[str, list[int]]:
    return dict(depths=list(ours.depths), channels=list(ours.dims))
