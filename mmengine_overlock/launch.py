"""Set up distributed runs, also on machines without a GPU."""

from __future__ import annotations

import functools
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mmengine.config import Config
from mmengine.device import get_device
from mmengine.model import MMDistributedDataParallel
from mmengine.registry import MODEL_WRAPPERS
from torch import distributed, nn
from torch.distributed import PrefixStore, Store, rendezvous

from overlock.layers.sync_norm import synchronize_on_cpus
from overlock.utils.distributed import check_gpus
from overlock.utils.errors import UserError

# The variables that tell a process its rank, the number of processes, and its rank on the machine.
_VARIABLES = {
    'pytorch': ('RANK', 'WORLD_SIZE', 'LOCAL_RANK'),
    'slurm': ('SLURM_PROCID', 'SLURM_NTASKS', 'SLURM_LOCALID'),
    'mpi': ('OMPI_COMM_WORLD_RANK', 'OMPI_COMM_WORLD_SIZE', 'OMPI_COMM_WORLD_LOCAL_RANK'),
}


def is_first(launcher: str) -> bool:
    """Return whether this process is the first of its run; a shell inside a Slurm job has a rank, too."""
    return launcher == 'none' or os.environ.get(_VARIABLES[launcher][0]) == '0'


def processes(launcher: str) -> int:
    """Return the number of processes of a run."""
    return 1 if launcher == 'none' else int(os.environ[_VARIABLES[launcher][1]])


@contextmanager
def agreed(launcher: str) -> Iterator[None]:
    """Run what a process does before its group forms; where one of them fails, all of them end.

    srun and mpirun end the other processes themselves. torchrun ends those of the same machine only: the others learn
    of the failure by its store.

    Raises:
        UserError: The launcher did not start this process, or started more processes than there are GPUs, or the block
            raised in another process.
    """
    missing = [name for name in _VARIABLES.get(launcher, ()) if name not in os.environ]
    if missing:
        raise UserError(
            f'--launcher {launcher} needs {", ".join(missing)} in the environment; start the run with '
            'tools/dist_train.sh, tools/dist_test.sh, tools/slurm_train.sh or tools/slurm_test.sh.'
        )
    tells = launcher == 'pytorch' and 'MASTER_ADDR' in os.environ
    try:
        if launcher != 'none' and get_device() == 'cuda':
            check_gpus()
        yield
    except BaseException as error:
        if tells:
            _store().set('failed', f'Process {os.environ["RANK"]} on {socket.gethostname()}: {error!s}')
        raise
    if tells:
        store = _store()
        # The last to come speaks for all. Those on the machine of a failed process may never come.
        if store.add('ready', 1) == int(os.environ['WORLD_SIZE']):
            store.set('failed', '')
        # Waits until it is set.
        if failed := store.get('failed').decode():
            raise UserError(failed)


@functools.cache
def _store() -> Store:
    return PrefixStore('overlock', next(rendezvous('env://'))[0])


def prepare_launch(cfg: Config) -> None:
    """Prepare this process and its configuration for a distributed run; without a launcher nothing changes.

    Args:
        cfg: Changed in place.
    """
    if cfg.launcher != 'none' and get_device() == 'cpu':
        # mmengine sets a CUDA device before it forms the process group.
        if not distributed.is_initialized():
            given = [os.environ[name] for name in _VARIABLES[cfg.launcher]]
            os.environ.update(zip(_VARIABLES['pytorch'], given, strict=True))
            os.environ.setdefault('MASTER_ADDR', '127.0.0.1')
            os.environ.setdefault('MASTER_PORT', '29500')
            distributed.init_process_group('gloo')
        find_unused = cfg.get('find_unused_parameters', False)
        cfg.model_wrapper_cfg = dict(type='CPUDistributedDataParallel', find_unused_parameters=find_unused)


@MODEL_WRAPPERS.register_module()
class CPUDistributedDataParallel(MMDistributedDataParallel):
    """MMDistributedDataParallel for CPUs, where SyncBN needs a class of its own; arguments are the same."""

    def __init__(self, module: nn.Module, **kwargs: Any) -> None:
        synchronize_on_cpus(module)
        # mmengine gives the number of a GPU.
        super().__init__(module, **{**kwargs, 'device_ids': None, 'broadcast_buffers': False})
