"""The C files compiled with the address and undefined-behavior sanitizers, and processes that use them."""

import hashlib
import os
import runpy
import shutil
import subprocess
import sys
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from unittest import mock

import pytest

from helpers.paths import ROOT

SANITIZERS = ['-fsanitize=address,undefined', '-fno-omit-frame-pointer']
OPS = ROOT / 'convnext_dense' / 'ops'


def compiled_modules() -> dict[str, tuple[str, list[str]]]:
    """By extension module, its source and the compiler's flags, as setup.py has them."""
    with mock.patch('setuptools.setup'):
        return runpy.run_path(str(ROOT / 'setup.py'))['KERNELS']


def sanitizer_library() -> str:
    """The library of the address sanitizer; skips the test where there is none."""
    if not shutil.which('gcc'):
        pytest.skip('gcc is not installed')
    path = subprocess.run(['gcc', '-print-file-name=libasan.so'], capture_output=True, text=True).stdout.strip()
    if not Path(path).is_absolute():
        pytest.skip("gcc's libasan is not installed")
    return path


def build(name: str, folder: Path, *flags: str) -> Path:
    """Compile an extension module of setup.py into a folder, beside its source."""
    source, own_flags = compiled_modules()[name]
    shutil.copy(OPS / source, folder)
    digest = hashlib.sha256((OPS / source).read_bytes()).hexdigest()[:16]
    object_file, library = folder / f'{name}.o', folder / f'{name}{EXTENSION_SUFFIXES[0]}'
    compile_flags = [*own_flags, *SANITIZERS, *flags, '-Werror=vla', '-g1', '-fPIC', f'-DSOURCE="{digest}"']
    for command in (
        [*compile_flags, '-c', folder / source, '-o', object_file],
        [*SANITIZERS, '-shared', object_file, '-o', library, '-lm'],
    ):
        subprocess.run(['gcc', *command], check=True, capture_output=True, text=True)
    return library


def run_script(script: str, *args) -> subprocess.CompletedProcess:
    """Run a script under the sanitizers."""
    environment = dict(
        # libstdc++ before torch: the sanitizer intercepts its exceptions.
        LD_PRELOAD=f'{sanitizer_library()} libstdc++.so.6',
        PYTHONPATH=str(ROOT / 'tests'),
        ASAN_OPTIONS='detect_leaks=0:allocator_may_return_null=1',
        UBSAN_OPTIONS='print_stacktrace=1',
    )
    command = [sys.executable, script, *map(str, args)]
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)
