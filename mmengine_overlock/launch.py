"""Set up distributed runs, also on machines without a GPU."""

from __future__ import annotations

import logging
import os

from mmengine.config import Config
from mmengine.device import get_device
from mmengine.logging import print_log
from torch import distributed

from mmengine_overlock.config import nodes
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
        _wrap_for_cpus(cfg)


def finish_launch() -> None:
    """Leave the process group together: a process that exits after its peers can abort."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()


def _wrap_for_cpus(cfg: Config) -> None:
    """Make a configuration wrap its model without a CUDA device, and use BN instead of SyncBN."""
    cfg.model_wrapper_cfg = dict(
        type='MMDistributedDataParallel',
        device_ids=None,
        broadcast_buffers=False,
        find_unused_parameters=cfg.get('find_unused_parameters', False),
    )
    synced = [node for node in nodes(cfg.model) if node.get('type') in ('SyncBN', 'MMSyncBN')]
    for node in synced:
        node['type'] = 'BN'
    if synced or cfg.get('sync_bn'):
        cfg.sync_bn = None
        print_log(
            'SyncBN needs GPUs: on CPUs it becomes BN, and each process normalizes by its own images.',
            'current',
            logging.WARNING,
        )
