"""Distributed runs, on machines without a GPU too."""

from __future__ import annotations

import logging
import os

from mmengine.config import Config
from mmengine.device import get_device
from mmengine.logging import print_log
from mmengine.utils.dl_utils import set_multi_processing
from torch import distributed

from mmengine_overlock.config import nodes
from overlock.utils.distributed import check_gpus, local_rank
from overlock.utils.errors import UserError

# Where each launcher tells a process its rank, the number of processes, and its rank on the machine.
_VARIABLES = {
    'pytorch': ('RANK', 'WORLD_SIZE', 'LOCAL_RANK'),
    'slurm': ('SLURM_PROCID', 'SLURM_NTASKS', 'SLURM_LOCALID'),
    'mpi': ('OMPI_COMM_WORLD_RANK', 'OMPI_COMM_WORLD_SIZE', 'OMPI_COMM_WORLD_LOCAL_RANK'),
}


def is_first_of_machine(launcher: str) -> bool:
    """Whether this process is the one that does what one process of each machine has to do."""
    return launcher == 'none' or local_rank() == 0


def prepare_launch(cfg: Config) -> None:
    """Get a configuration ready for its launcher; without a launcher nothing changes.

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
    if device == 'cpu':
        _prepare_cpu(cfg, [os.environ[name] for name in names])
    elif device == 'cuda':
        check_gpus()


def finish_launch() -> None:
    """Leave the process group together: at exit, a process whose peers are gone already can abort."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()


def _prepare_cpu(cfg: Config, ranks: list[str]) -> None:
    """Form the process group here, because mmengine sets a CUDA device before it does, and wrap the model for CPUs."""
    env_cfg = cfg.get('env_cfg', {})
    if not distributed.is_initialized():
        os.environ.update(zip(_VARIABLES['pytorch'], ranks, strict=True))
        os.environ.setdefault('MASTER_ADDR', '127.0.0.1')
        os.environ.setdefault('MASTER_PORT', '29500')
        set_multi_processing(**env_cfg.get('mp_cfg', {}), distributed=True)
        distributed.init_process_group('gloo')
    cfg.env_cfg = {**env_cfg, 'dist_cfg': dict(backend='gloo')}
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
            'SyncBN needs GPUs: on CPUs it becomes BN, each process normalising by its own images.',
            'current',
            logging.WARNING,
        )
