"""The processes that a launcher started: their number, and the rank of this one."""

import os

from mmengine.config import Config
from mmengine.device import get_device

from ..errors import UsageError

# By launcher: the environment variable with the number of processes, and the command that sets it.
WORLD_SIZE_VARIABLES = {
    'pytorch': ('WORLD_SIZE', 'torchrun'),
    'slurm': ('SLURM_NTASKS', 'srun'),
    'mpi': ('OMPI_COMM_WORLD_SIZE', 'mpirun'),
}
RANK_VARIABLES = ('RANK', 'SLURM_PROCID', 'OMPI_COMM_WORLD_RANK')


def world_size_from_env(launcher: str) -> int:
    """Return the number of processes that a launcher started, one per GPU.

    Args:
        launcher: 'none', 'pytorch', 'slurm' or 'mpi'.

    Raises:
        UsageError: If the launcher did not start this process.
    """
    if launcher == 'none':
        return 1
    variable, command = WORLD_SIZE_VARIABLES[launcher]
    if variable not in os.environ:
        raise UsageError(f'--launcher {launcher}: {variable} is not set: start the tool with {command}')
    value = os.environ[variable].strip()
    if not (value.isascii() and value.isdigit() and int(value) > 0):
        raise UsageError(
            f"--launcher {launcher}: {variable}='{value}' is not a number of processes: start the tool with {command}"
        )
    return int(value)


def is_rank0() -> bool:
    """Whether this process has rank 0 according to the environment; no process group is needed."""
    ranks = (os.environ[name] for name in RANK_VARIABLES if name in os.environ)
    return next(ranks, '0') == '0'


def check_launcher(config: Config, launcher: str) -> None:
    """Raise UsageError if a launcher did not start this process, or its processes cannot connect by the config."""
    world_size_from_env(launcher)
    backend = ((config.get('env_cfg') or {}).get('dist_cfg') or {}).get('backend', 'nccl')
    if launcher != 'none' and backend == 'nccl' and get_device() == 'cpu':
        raise UsageError(
            f'--launcher {launcher} needs a GPU for each process and none was found: run without --launcher'
        )
    if launcher == 'mpi' and 'MASTER_ADDR' not in os.environ:
        raise UsageError(
            '--launcher mpi: MASTER_ADDR is not set: give the address of the first node with '
            'mpirun -x MASTER_ADDR=ADDRESS'
        )
