"""FCMAE: mask -> backbone -> neck (decoder) -> head (loss) (ConvNeXt V2, section 3)."""

from typing import Any

import torch
from mmengine.model import BaseModel, BaseModule, trunc_normal_init
from mmengine.structures import BaseDataElement
from torch import Tensor, nn

from ..arguments import check_arguments
from ..registry import MODELS, WEIGHT_INITIALIZERS
from .convnextv2 import ConvNeXtV2, check_masked_size
from .layers import INIT_CFG, Block
from .layouts import DenseLayout, find_visible
from .shortcuts import is_recorded
from .tiles import STRIDE


@MODELS.register_module()
@check_arguments
class FCMAE(BaseModel):
    """Fully convolutional masked autoencoder.

    Args:
        backbone (dict): The encoder, a :class:`ConvNeXtV2`. Its ``out_indices``,
            ``output_norm`` and ``gap_before_final_norm`` are set here: the last stage
            alone, as it is.
        neck (dict): The decoder, a :class:`FCMAEDecoder`; its ``in_channels``,
            ``picture_channels`` and ``use_grn`` follow from the backbone.
        head (dict): The loss, a :class:`FCMAEHead`.
        data_preprocessor (dict): A :class:`FCMAEDataPreprocessor`.
        mask_ratio (float): Share of the patches that is hidden, in (0, 1).
            Defaults to 0.6.
        test_mask_seed (int): Seed of the masks in validation and testing, where each
            picture gets its own by its place in the data set. Defaults to 0.
        init_cfg (dict | list[dict], optional): Initialisation, MMEngine's. Defaults to
            None: each part has its own.

    Raises:
        TypeError: If ``backbone`` is another network, which cannot run on visible
            patches.
        ValueError: If ``mask_ratio`` is out of range, or ``backbone`` has what is set
            here.
    """

    def __init__(
        self,
        backbone: dict,
        neck: dict,
        head: dict,
        data_preprocessor: dict,
        mask_ratio: float = 0.6,
        test_mask_seed: int = 0,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        super().__init__(MODELS.build(data_preprocessor), init_cfg)
        if not 0 < mask_ratio < 1:
            raise ValueError(f'mask_ratio is {mask_ratio}; give it in (0, 1)')
        self.mask_ratio = mask_ratio
        self.test_mask_seed = test_mask_seed
        self.backbone = _build_encoder(backbone)
        follows = dict(
            in_channels=self.backbone.dims[-1],
            picture_channels=self.backbone.in_channels,
            use_grn=self.backbone.use_grn,
        )
        self.neck = MODELS.build({**follows, **neck})
        self.head = MODELS.build(head)

    def forward(
        self,
        inputs: Tensor,
        data_samples: list[BaseDataElement] | None = None,
        mode: str = 'tensor',
        mask: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Any:
        """Run the model.

        Args:
            inputs (Tensor): Normalised pictures, ``(N, C, H, W)``, each side a multiple
                of 32 pixels.
            data_samples (list[BaseDataElement], optional): What is known of the
                pictures; 'predict' seeds the masks by their ``sample_idx``.
            mode (str): 'loss', 'predict' or 'tensor'.
            mask (Tensor, optional): ``(N, H / 32, W / 32)``, bool, True where a patch
                is hidden. Drawn at random by default.
            generator (torch.Generator, optional): Where the random masks of 'loss' and
                'tensor' come from; those of 'predict' depend on the place of the
                picture alone. Defaults to torch's own.

        Returns:
            dict[str, Tensor] | list[BaseDataElement] | Tensor: For 'loss', ``loss``.
            For 'predict', the data samples with ``mask``, ``picture``,
            ``reconstruction`` (both ``(C, H, W)`` in the units of the pixels),
            ``loss`` and the ``data_range`` of the data preprocessor. For 'tensor', the
            predicted patches ``(N, H / 32, W / 32, 32 * 32 * C)``.

        Raises:
            ValueError: If the mode is unknown, the pictures or the mask have the
                wrong shape, or the mask hides nothing or everything.
        """
        if mask is not None:
            mask = mask.to(inputs.device)
        if mode == 'predict':
            return self.predict(inputs, data_samples, mask)
        num_visible = None
        if mask is None:
            mask = self.random_mask(inputs, generator)
            num_visible = count_visible(inputs, self.mask_ratio)
        if mode == 'tensor':
            return self.reconstruct(inputs, mask, num_visible)
        if mode == 'loss':
            prediction = self.reconstruct(inputs, mask, num_visible)
            return dict(loss=self.head.loss(prediction, inputs, mask).mean())
        raise ValueError(f"mode is '{mode}'; give 'loss', 'predict' or 'tensor'")

    def reconstruct(
        self, inputs: Tensor, mask: Tensor, num_visible: int | None = None
    ) -> Tensor:
        """Predict every patch from the visible ones.

        Args:
            inputs (Tensor): Normalised pictures, ``(N, C, H, W)``.
            mask (Tensor): ``(N, h, w)``, bool, True where a patch is hidden.
            num_visible (int, optional): Patches of each picture that are not, as
                :meth:`ConvNeXtV2.forward` takes it.

        Returns:
            Tensor: ``(N, h, w, 32 * 32 * C)``.

        Raises:
            ValueError: If the mask hides nothing or everything, or has the wrong shape.
        """
        if not is_recorded(mask) and not mask.any():
            raise ValueError(
                'the mask hides no patch, so there is nothing to reconstruct; hide at '
                'least one of each picture'
            )
        (features,) = self.backbone(inputs, mask, num_visible)
        return self.neck(features, mask)

    def random_mask(
        self, inputs: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        """Hide ``mask_ratio`` of the patches of each picture at random.

        Args:
            inputs (Tensor): Pictures, ``(N, C, H, W)``.
            generator (torch.Generator, optional): Defaults to torch's own.

        Returns:
            Tensor: ``(N, H / 32, W / 32)``, bool, True where a patch is hidden.

        Raises:
            ValueError: If all patches would be hidden, or all visible, or if sides are
                no multiples of 32.
        """
        return draw_mask(inputs, self.mask_ratio, generator)

    def predict(
        self,
        inputs: Tensor,
        data_samples: list[BaseDataElement] | None = None,
        mask: Tensor | None = None,
    ) -> list[BaseDataElement]:
        """Reconstruct pictures under masks that depend on nothing but their place.

        Args:
            inputs (Tensor): Normalised pictures, ``(N, C, H, W)``.
            data_samples (list[BaseDataElement], optional): With ``sample_idx``.
                Defaults to new ones, counted from 0.
            mask (Tensor, optional): ``(N, h, w)``, bool, True where a patch is hidden.

        Returns:
            list[BaseDataElement]: The samples, completed as :meth:`forward` says.

        Raises:
            ValueError: If a mask has to be drawn for a sample without ``sample_idx``.
        """
        if data_samples is None:
            places = range(len(inputs))
            data_samples = [
                BaseDataElement(metainfo=dict(sample_idx=i)) for i in places
            ]
        if mask is None:
            masks = [
                self.random_mask(picture[None], self._test_generator(sample))
                for picture, sample in zip(inputs, data_samples, strict=True)
            ]
            mask = torch.cat(masks)
        prediction = self.reconstruct(inputs, mask)
        losses = self.head.loss(prediction, inputs, mask)
        filled = self.head.fill_in(prediction, inputs, mask)
        denormalise = self.data_preprocessor.denormalise
        fields = zip(
            mask, denormalise(inputs), denormalise(filled), losses, strict=True
        )
        for sample, values in zip(data_samples, fields, strict=True):
            names = ('mask', 'picture', 'reconstruction', 'loss')
            sample.set_data(dict(zip(names, values, strict=True)))
            sample.set_metainfo(dict(data_range=self.data_preprocessor.data_range))
        return data_samples

    def _test_generator(self, sample: BaseDataElement) -> torch.Generator:
        if 'sample_idx' not in sample:
            raise ValueError(
                "a data sample has no sample_idx, from which 'predict' draws the mask "
                f'of its picture, but {sample.all_keys()}; name it in meta_keys of '
                'PackPretrainInputs, or give the mask'
            )
        seed = self.test_mask_seed * 2**32 + sample.sample_idx
        return torch.Generator().manual_seed(seed)


@MODELS.register_module()
@check_arguments
class FCMAEDecoder(BaseModule):
    """Predict patches: projection, mask tokens, ConvNeXt V2 blocks, prediction.

    Args:
        in_channels (int): Channels of the encoder's features.
        picture_channels (int): Channels of the pictures. Defaults to 3.
        decoder_dim (int): Width. Defaults to 512.
        decoder_depth (int): Number of blocks. Defaults to 1.
        use_grn (bool): Whether blocks have GRN, or else LayerScale. Defaults to True.
        init_cfg (dict | list[dict], optional): Initialisation, MMEngine's. Defaults to
            truncated normal weights (std 0.02) and zero biases.

    Raises:
        ValueError: If ``decoder_dim`` or ``decoder_depth`` is too small.
    """

    def __init__(
        self,
        in_channels: int,
        picture_channels: int = 3,
        decoder_dim: int = 512,
        decoder_depth: int = 1,
        use_grn: bool = True,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        super().__init__(INIT_CFG if init_cfg is None else init_cfg)
        if decoder_dim < 1 or decoder_depth < 0:
            raise ValueError(
                f'decoder_dim is {decoder_dim} and decoder_depth {decoder_depth}; give '
                'a positive width, and a number of blocks'
            )
        self.proj = nn.Linear(in_channels, decoder_dim)
        self.mask_token = nn.Parameter(torch.empty(decoder_dim))
        self.decoder = nn.ModuleList(
            Block(decoder_dim, use_grn=use_grn) for _ in range(decoder_depth)
        )
        self.pred = nn.Linear(decoder_dim, STRIDE * STRIDE * picture_channels)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, features: Tensor, mask: Tensor) -> Tensor:
        """Predict every patch.

        Args:
            features (Tensor): Of the visible patches, ``(N, V, in_channels)``.
            mask (Tensor): ``(N, h, w)``, bool, True where a patch is hidden.

        Returns:
            Tensor: ``(N, h, w, 32 * 32 * picture_channels)``; a patch is ordered by
            row, column and channel.
        """
        tokens = self.proj(features)
        places = find_visible(mask, tokens.shape[1])[..., None].expand_as(tokens)
        x = self.mask_token.to(tokens.dtype).expand(*mask.flatten(1).shape, -1)
        x = x.scatter(1, places, tokens).unflatten(1, mask.shape[1:])
        layout = DenseLayout()
        for block in self.decoder:
            x = block(x, layout)
        return self.pred(x)


@MODELS.register_module()
@check_arguments
class FCMAEHead(BaseModule):
    """Mean squared error on hidden patches.

    Args:
        norm_pix (bool): Normalise each target patch by its own mean and variance.
            Defaults to True.
    """

    def __init__(self, norm_pix: bool = True) -> None:
        super().__init__()
        self.norm_pix = norm_pix

    def loss(self, prediction: Tensor, pictures: Tensor, mask: Tensor) -> Tensor:
        """Compare hidden patches.

        Args:
            prediction (Tensor): ``(N, h, w, 32 * 32 * C)``.
            pictures (Tensor): Normalised, ``(N, C, H, W)``.
            mask (Tensor): ``(N, h, w)``, bool, True where a patch is hidden.

        Returns:
            Tensor: The mean squared error over the hidden patches of each picture,
            ``(N,)``, in float32 at least.
        """
        target = _precise(patchify(pictures))
        if self.norm_pix:
            mean, std = _patch_statistics(target)
            target = (target - mean) / std
        error = (_precise(prediction) - target).square().mean(-1)
        hidden = error.masked_fill(~mask, 0).flatten(1).sum(1)
        return hidden / mask.flatten(1).sum(1)

    def fill_in(self, prediction: Tensor, pictures: Tensor, mask: Tensor) -> Tensor:
        """Put the predicted patches into the hidden places of pictures.

        A prediction is of the patch normalised by its own mean and variance, which
        only the original knows; they are undone with the original's.

        Args:
            prediction (Tensor): ``(N, h, w, 32 * 32 * C)``.
            pictures (Tensor): Normalised, ``(N, C, H, W)``.
            mask (Tensor): ``(N, h, w)``, bool, True where a patch is hidden.

        Returns:
            Tensor: Pictures, ``(N, C, H, W)``.
        """
        patches = patchify(pictures)
        predicted = prediction.to(patches.dtype)
        if self.norm_pix:
            mean, std = _patch_statistics(patches)
            predicted = predicted * std + mean
        return unpatchify(torch.where(mask[..., None], predicted, patches))


@WEIGHT_INITIALIZERS.register_module()
class FCMAEInit:
    """How the paper's code starts the weights of pre-training.

    An initialiser of MMEngine for the encoder and the decoder: truncated normal weights
    and zero biases, of standard deviation 0.02 in the downsampling between stages and 1
    elsewhere. The decoder's pointwise layers keep PyTorch's default. (``FCMAE`` in
    models/fcmae.py of facebookresearch/ConvNeXt-V2.)
    """

    def __call__(self, module: nn.Module) -> None:
        """Initialise.

        Args:
            module (nn.Module): A :class:`ConvNeXtV2` or an :class:`FCMAEDecoder`.
        """
        for name, layer in module.named_modules():
            kept = isinstance(layer, nn.Linear) and name.startswith('decoder.')
            if kept or not isinstance(layer, nn.Conv2d | nn.Linear):
                continue
            downsamples = isinstance(layer, nn.Conv2d) and layer.kernel_size == (2, 2)
            trunc_normal_init(layer, std=0.02 if downsamples else 1.0)


def _build_encoder(backbone: dict) -> ConvNeXtV2:
    ours = dict(out_indices=(-1,), output_norm=False, gap_before_final_norm=False)
    if given := [name for name in ours if name in backbone]:
        raise ValueError(
            'FCMAE takes the last stage of its backbone as it is, so it sets '
            f'{", ".join(ours)} itself; leave {", ".join(given)} out'
        )
    kind = backbone.get('type')
    kind = MODELS.get(kind) if isinstance(kind, str) else kind
    if isinstance(kind, type) and not issubclass(kind, ConvNeXtV2):
        raise TypeError(
            f'the backbone is a {kind.__name__}, but FCMAE needs one that runs on '
            'visible patches alone; take mmcnv2.ConvNeXtV2'
        )
    return MODELS.build({**backbone, **ours})


def draw_mask(
    pictures: Tensor, mask_ratio: float, generator: torch.Generator | None = None
) -> Tensor:
    """Hide a share of the patches of each picture at random.

    Args:
        pictures (Tensor): ``(N, C, H, W)``.
        mask_ratio (float): The share, in (0, 1).
        generator (torch.Generator, optional): Defaults to torch's own.

    Returns:
        Tensor: ``(N, H / 32, W / 32)``, bool, True where a patch is hidden.

    Raises:
        ValueError: If all patches would be hidden, or all visible, or if sides are no
            multiples of 32.
    """
    visible = count_visible(pictures, mask_ratio)
    n, _, height, width = pictures.shape
    h, w = height // STRIDE, width // STRIDE
    device = pictures.device if generator is None else generator.device
    order = torch.rand(n, h * w, device=device, generator=generator).argsort(1)
    mask = torch.ones_like(order, dtype=torch.bool)
    mask.scatter_(1, order[:, :visible], False)
    return mask.view(n, h, w).to(pictures.device)


def count_visible(pictures: Tensor, mask_ratio: float) -> int:
    """Count the patches of each picture that a mask leaves visible.

    Args:
        pictures (Tensor): ``(N, C, H, W)``.
        mask_ratio (float): The share that it hides, in (0, 1).

    Returns:
        int: How many, rounded down as in the paper's code.

    Raises:
        ValueError: If all patches would be hidden, or all visible, or if sides are no
            multiples of 32.
    """
    check_masked_size(pictures)
    height, width = pictures.shape[2:]
    patches = (height // STRIDE) * (width // STRIDE)
    # The tiny number mends 10 * (1 - 0.9) < 1.
    visible = int(patches * (1 - mask_ratio) + 1e-6)
    if not 0 < visible < patches:
        raise ValueError(
            f'a mask_ratio of {mask_ratio} leaves {visible} of the {patches} '
            f'patches of {height} x {width} pixels visible; take larger pictures '
            'or another ratio, so that some are visible and some hidden'
        )
    return visible


def patchify(pictures: Tensor) -> Tensor:
    """Cut pictures into patches.

    Args:
        pictures (Tensor): ``(N, C, H, W)``, each side a multiple of 32.

    Returns:
        Tensor: ``(N, H / 32, W / 32, 32 * 32 * C)``, by row, column and channel.
    """
    patches = pictures.unflatten(3, (-1, STRIDE)).unflatten(2, (-1, STRIDE))
    return patches.permute(0, 2, 4, 3, 5, 1).flatten(3)


def unpatchify(patches: Tensor) -> Tensor:
    """Undo :func:`patchify`.

    Args:
        patches (Tensor): ``(N, h, w, 32 * 32 * C)``.

    Returns:
        Tensor: ``(N, C, 32 * h, 32 * w)``.
    """
    pictures = patches.unflatten(3, (STRIDE, STRIDE, -1))
    return pictures.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def _precise(values: Tensor) -> Tensor:
    """Return values in 32 bits at least, for their squares overflow 16."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _patch_statistics(patches: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation of each patch."""
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return mean, (variance + 1e-6).sqrt()
