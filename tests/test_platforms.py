"""The package on platforms without fcntl, /proc or compiled kernels."""

import subprocess
import sys

import pytest

# Hides modules, files and libraries from the code after it. The audit hook is called for every file that is opened and
# every library that is loaded.
HIDING = """
import os, sys

modules, files = {modules}, {files}
for module in modules:
    sys.modules[module] = None

def hide(event, args):
    if event in ('open', 'ctypes.dlopen') and args[0] is not None:
        if any(part in os.fspath(args[0]) for part in files if isinstance(args[0], (str, os.PathLike))):
            raise FileNotFoundError(2, 'hidden', args[0])

sys.addaudithook(hide)
"""
FORWARD = """
import torch
import convnext_dense
from convnext_dense import ConvNeXt
from convnext_dense.ops import dispatch

torch.manual_seed(0)
backbone, image = ConvNeXt('atto').eval(), torch.randn(1, 3, 64, 64)
feats = backbone(image)
sum(f.sum() for f in feats).backward()
with torch.no_grad():
    for f, no_grad in zip(feats, backbone(image)):
        torch.testing.assert_close(f, no_grad)
    with dispatch.disabled():
        for f, reference in zip(feats, backbone(image)):
            torch.testing.assert_close(f, reference, rtol=1e-4, atol=1e-4)
assert all(p.grad is not None for p in backbone.parameters())
print(dispatch.backend_summary())
"""
POSIX = ['fcntl', 'resource', 'termios', 'pwd', 'grp', 'syslog']  # modules that do not exist on Windows


def run_without(modules=(), files=(), script=FORWARD) -> subprocess.CompletedProcess:
    code = HIDING.format(modules=list(modules), files=list(files)) + script
    return subprocess.run([sys.executable, '-c', code], text=True, capture_output=True)


@pytest.mark.parametrize(
    'modules, files, message',
    [
        (POSIX, (), ''),
        ((), ('/proc/',), 'no AVX-512 kernels (they are for Linux on x86-64'),
        ((), ('ops/avx512_kernels.',), 'no AVX-512 kernels'),
        (POSIX, ('/proc/', 'ops/avx512_kernels.'), 'no AVX-512 kernels'),
    ],
    ids=['fcntl', '/proc', 'kernels', 'all'],
)
def test_backbone_runs_without_platform_features(modules, files, message):
    process = run_without(modules, files)
    assert process.returncode == 0, process.stderr[-3000:]
    assert message in process.stdout


def test_weights_are_read_without_locks(tmp_path):
    code = f"""
import torch
from convnext_dense import ConvNeXt, load_backbone

backbone = ConvNeXt('atto')
weights = {{f'backbone.{{name}}': tensor for name, tensor in backbone.state_dict().items()}}
torch.save(dict(state_dict=weights), {str(tmp_path / 'x.pth')!r})
load_backbone(other := ConvNeXt('atto'), {str(tmp_path / 'x.pth')!r})
assert all(torch.equal(a, b) for a, b in zip(backbone.parameters(), other.parameters()))
"""
    process = run_without(POSIX, ('/proc/', 'ops/avx512_kernels.'), code)
    assert process.returncode == 0, process.stderr[-3000:]
