"""Seconds that a whole model takes for one image: this package's prediction next to its exported files.

The model has random weights; a detector returns its hundred best boxes and masks. Every candidate starts from the
resized image, returns results in pixels of the image, and runs in turn with the others in each round.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from benchmarks.predict import draw_photos, make_predictor
from convnext_dense.export.files import WRITERS
from convnext_dense.export.program import ExportOptions, trace
from convnext_dense.inference.checkpoint_config import find_model
from convnext_dense.inference.model import Predictor, build_predictor, load_model
from convnext_dense.inference.sessions import session_class

CPU = torch.device('cpu')
FILES = {  # what a candidate is called: suffix and precision of its session
    'ONNX Runtime': ('.onnx', 'float32'),
    'OpenVINO': ('.xml', 'float32'),
    'OpenVINO, bfloat16': ('.xml', 'bfloat16'),
    'torch.export': ('.pt2', 'float32'),
}


def export_files(folder: Path, config) -> None:
    """Write model.onnx, model.xml and model.pt2 beside the checkpoint."""
    predictor = build_predictor(find_model(folder / 'model.pth', config), CPU, optimized=False)
    for suffix in ('.pt2', '.xml', '.onnx'):  # a program is written as ONNX only once
        WRITERS[suffix](trace(predictor, ExportOptions()), folder / f'model{suffix}')


def make_candidates(folder: Path, predictor: Predictor, image: np.ndarray) -> dict[str, Callable[[], None]]:
    """What runs on an image (H, W, 3) of BGR, by name."""
    candidates = {}
    for name, dtype in (('PyTorch', 'float32'), ('PyTorch, bfloat16', 'bfloat16')):
        model = load_model(folder / 'model.pth', predictor.config, 'cpu', amp_dtype=dtype)
        item = model.prepare(image)
        candidates[name] = lambda model=model, item=item: model.predict_arrays([item])
    images = item['inputs'].flip(0)[None].numpy()
    for name, (suffix, dtype) in FILES.items():
        path = folder / f'model{suffix}'
        session = session_class(path)(str(path), CPU, dtype)
        candidates[name] = lambda session=session: session.run(images, image.shape[:2])
    return candidates


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--recipe', default='mask_rcnn/convnext_t', help='config without its suffix')
    parser.add_argument('--size', default='1280x800', help='width and height of the image (default: %(default)s)')
    parser.add_argument('--rounds', type=int, default=5, help='runs of each, after one that warms up')
    parser.add_argument('--threads', type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        predictor = make_predictor(args.recipe, folder, 'cpu')
        draw_photos(folder / 'photos', 1, tuple(map(int, args.size.split('x'))))
        export_files(folder, predictor.config)
        candidates = make_candidates(folder, predictor, predictor.read(folder / 'photos' / '000000.jpg'))
        seconds = {name: [] for name in candidates}
        for i in range(args.rounds + 1):
            for name, run in candidates.items():
                start = time.perf_counter()
                run()
                if i:
                    seconds[name].append(time.perf_counter() - start)
    print(f'{args.recipe}, {args.size}, {args.threads} threads, seconds:')
    for name, values in seconds.items():
        print(f'{name:20} median {statistics.median(values):6.2f}   least {min(values):6.2f}')


if __name__ == '__main__':
    sys.exit(main())
