"""Sharding a model over processes, block by block."""

from typing import Any

from mmengine._strategy.fsdp import FSDPStrategy as _FSDPStrategy
from mmengine.device import get_device
from mmengine.optim import BaseOptimWrapper
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from ..models.layers import Block
from ..registry import FUNCTIONS, STRATEGIES


@FUNCTIONS.register_module()
def wrap_blocks(module: nn.Module, recurse: bool, nonwrapped_numel: int) -> bool:
    """Tell PyTorch's FSDP to gather the parameters of one ConvNeXt V2 block at a time.

    An ``auto_wrap_policy`` for configs.

    Args:
        module (nn.Module): Asked about.
        recurse (bool): Whether the question is to look into it, and not to wrap it.
        nonwrapped_numel (int): Its parameters that are not wrapped yet.

    Returns:
        bool: The answer.
    """
    return recurse or isinstance(module, Block)


@STRATEGIES.register_module()
class FSDPStrategy(_FSDPStrategy):
    """MMEngine's FSDP strategy for models with this backbone.

    It shards by blocks and writes whole checkpoints, which load anywhere. It resumes,
    which MMEngine's does not under PyTorch 2.2 and newer (the order of arguments
    changed there), and runs without accelerators.

    Args:
        model_wrapper (dict, optional): Settings of MMFullyShardedDataParallel that
            differ from its defaults and from ``wrap_blocks``. Defaults to none.
        **kwargs: Others of MMEngine's FSDPStrategy.
    """

    def __init__(self, *, model_wrapper: dict | None = None, **kwargs: Any) -> None:
        wrapper = dict(
            type='MMFullyShardedDataParallel',
            auto_wrap_policy=dict(type='mmcnv2.wrap_blocks'),
        )
        if get_device() == 'cpu':
            wrapper['device_id'] = 'cpu'
        # Not by way of the CPU, as 'full' has it: PyTorch crashes if it starts there.
        whole = dict(
            state_dict_type='FULL_STATE_DICT',
            state_dict_config=dict(type='FullStateDictConfig', rank0_only=True),
            optim_state_dict_config=dict(
                type='FullOptimStateDictConfig', rank0_only=True
            ),
        )
        kwargs.setdefault('state_dict_cfg', whole)
        super().__init__(model_wrapper={**wrapper, **(model_wrapper or {})}, **kwargs)

    def build_optim_wrapper(
        self, optim_wrapper: dict | BaseOptimWrapper, model: nn.Module | None = None
    ) -> BaseOptimWrapper:
        """Build the optimizer while parameters are whole.

        Of a shard every parameter is a vector, and no constructor could tell a weight,
        which decays, from a bias.

        Args:
            optim_wrapper (dict | BaseOptimWrapper): Its config.
            model (nn.Module, optional): The sharded model.

        Returns:
            BaseOptimWrapper: The optimizer.
        """
        with FullyShardedDataParallel.summon_full_params(model or self.model):
            return super().build_optim_wrapper(optim_wrapper, model)

    def load_optim_state_dict(self, state_dict: dict) -> None:
        """Load the optimizer's state.

        Args:
            state_dict (dict): As in a checkpoint.
        """
        self.optim_wrapper.load_state_dict(
            FullyShardedDataParallel.optim_state_dict_to_load(
                self.model, self.optim_wrapper.optimizer, state_dict
            )
        )
