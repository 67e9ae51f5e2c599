#!/usr/bin/env python
"""What it costs to load weights of ConvNeXt-XL: time against reading the file alone, and memory beyond the model's own.

Writes 1.6 GB of made weights into a temporary folder. Prints one line a round; the file is in the page cache.
"""

import tempfile
import time
from pathlib import Path

import torch

from convnext_dense import load_backbone
from convnext_dense.models.convnext import ConvNeXt


def resident(key: str) -> float:
    """Memory of this process in GB, 'VmRSS' now or 'VmHWM' at most (Linux)."""
    return int(next(line for line in open('/proc/self/status') if line.startswith(key)).split()[1]) / 1e6


def timed(function, *args) -> float:
    start = time.perf_counter()
    function(*args)
    return time.perf_counter() - start


def main():
    model = ConvNeXt('xlarge')
    weights = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith('norm')}
    weights |= {'norm.weight': torch.ones(2048), 'head.weight': torch.zeros(21841, 2048)}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, 'xlarge.pth')
        torch.save({'model': weights}, file)
        del weights
        for _ in range(4):
            read = timed(lambda: torch.load(file, weights_only=True))
            Path('/proc/self/clear_refs').write_text('5')  # the peak starts anew
            initial = resident('VmRSS')
            load = timed(load_backbone, model, file)
            growth = resident('VmHWM') - initial
            print(
                f'read {read:.2f} s  load {load:.2f} s  ratio {load / read:.2f}  '
                f'memory beyond the model {growth:.2f} GB'
            )


if __name__ == '__main__':
    main()
