"""How many processes a launcher started."""

import os

from ..errors import UsageError

# The variable in which each launcher gives the number of processes, and the command that is one.
WORLD_SIZE_VARIABLES = {
    'pytorch': ('WORLD_SIZE', 'torchrun'),
    'slurm': ('SLURM_NTASKS', 'srun'),
    'mpi': ('OMPI_COMM_WORLD_SIZE', 'mpirun'),
}


def world_size_from_env(launcher: str) -> int:
    """How many processes a launcher ('none', 'pytorch', 'slurm' or 'mpi') started, one a GPU.

    Raises:
        UsageError: it did not start this process.
    """
    if launcher == 'none':
        return 1
    variable, command = WORLD_SIZE_VARIABLES[launcher]
    if variable not in os.environ:
        raise UsageError(f'--launcher {launcher}: {variable} is not set; start the tool with {command}')
    value = os.environ[variable].strip()
    if not (value.isascii() and value.isdigit() and int(value) > 0):
        raise UsageError(f"--launcher {launcher}: {variable}='{value}' is no number of processes; start with {command}")
    return int(value)
