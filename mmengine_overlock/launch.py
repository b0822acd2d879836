"""Set up distributed runs, also on machines without a GPU."""

from __future__ import annotations

import os
from typing import Any

from mmengine.config import Config
from mmengine.device import get_device
from mmengine.model import MMDistributedDataParallel
from mmengine.registry import MODEL_WRAPPERS
from torch import distributed, nn

from overlock.layers.sync_norm import synchronize_on_cpus
from overlock.utils.distributed import check_gpus
from overlock.utils.errors import UserError

# The variables that tell a process its rank, the number of processes, and its rank on the machine.
_VARIABLES = {
    'pytorch': ('RANK', 'WORLD_SIZE', 'LOCAL_RANK'),
    'slurm': ('SLURM_PROCID', 'SLURM_NTASKS', 'SLURM_LOCALID'),
    'mpi': ('OMPI_COMM_WORLD_RANK', 'OMPI_COMM_WORLD_SIZE', 'OMPI_COMM_WORLD_LOCAL_RANK'),
}


def prepare_launch(cfg: Config) -> None:
    """Prepare this process and its configuration for a distributed run; without a launcher nothing changes.

    Args:
        cfg: Changed in place.

    Raises:
        UserError: The launcher did not start this process, or started more processes than there are GPUs.
    """
    if cfg.launcher == 'none':
        return
    names = _VARIABLES[cfg.launcher]
    missing = [name for name in names if name not in os.environ]
    if missing:
        raise UserError(
            f'--launcher {cfg.launcher} needs {", ".join(missing)} in the environment; start the run with '
            'tools/dist_train.sh, tools/dist_test.sh, tools/slurm_train.sh or tools/slurm_test.sh.'
        )
    device = get_device()
    if device == 'cuda':
        check_gpus()
    elif device == 'cpu':
        # mmengine sets a CUDA device before it forms the process group.
        if not distributed.is_initialized():
            os.environ.update(zip(_VARIABLES['pytorch'], [os.environ[name] for name in names], strict=True))
            os.environ.setdefault('MASTER_ADDR', '127.0.0.1')
            os.environ.setdefault('MASTER_PORT', '29500')
            distributed.init_process_group('gloo')
        find_unused = cfg.get('find_unused_parameters', False)
        cfg.model_wrapper_cfg = dict(type='CPUDistributedDataParallel', find_unused_parameters=find_unused)


def finish_launch() -> None:
    """Leave the process group together: a process that exits after its peers can abort."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()


@MODEL_WRAPPERS.register_module()
class CPUDistributedDataParallel(MMDistributedDataParallel):
    """MMDistributedDataParallel for CPUs, where SyncBN needs a class of its own; arguments are the same."""

    def __init__(self, module: nn.Module, **kwargs: Any) -> None:
        synchronize_on_cpus(module)
        # mmengine gives the number of a GPU.
        super().__init__(module, **{**kwargs, 'device_ids': None, 'broadcast_buffers': False})
