"""Prediction of files: images per second of the whole command next to the model's own, and memory over many images.

The model has random weights; a detector returns its hundred best boxes and masks, whatever their scores. Images per
second are measured in turns within one run, memory in one run of the command over all images. Where other programs are
at work, compare CPU times, with OMP_NUM_THREADS=1: threads of OpenMP that wait for one another burn time.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import cv2
import numpy as np
import psutil
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

from convnext_dense.inference import batch_prediction
from convnext_dense.inference.inputs import find_inputs
from convnext_dense.inference.model import Predictor, load_model
from convnext_dense.inference.options import PredictOptions
from convnext_dense.inference.output import OutputFolder

ROOT = Path(__file__).parents[1]
MB = 2**20


def make_predictor(recipe: str, folder: Path, device: str) -> Predictor:
    config = Config.fromfile(ROOT / 'configs' / f'{recipe}.py')
    init_default_scope(config.default_scope)
    if config.default_scope == 'mmdet':
        config.model.test_cfg.rcnn.score_thr = 0.0
    config.model.backbone.init_cfg = None
    model = MODELS.build(config.model)
    torch.save(dict(state_dict=model.state_dict()), folder / 'model.pth')
    return load_model(folder / 'model.pth', config, device)


def draw_photos(folder: Path, count: int, size: tuple[int, int]) -> None:
    """Write JPEGs with about as much detail as photos."""
    folder.mkdir()
    rng = np.random.RandomState(0)
    width, height = size
    for i in range(count):
        coarse = rng.randint(0, 255, (max(height // 16, 2), max(width // 16, 2), 3), dtype=np.uint8)
        photo = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
        noise = rng.randint(0, 16, photo.shape, dtype=np.uint8)
        cv2.imwrite(str(folder / f'{i:06}.jpg'), cv2.add(photo, noise))


def seconds() -> np.ndarray:
    """Time on the wall, and of all cores in this process."""
    return np.array([time.perf_counter(), time.process_time()])


def run_command(predictor: Predictor, photos: Path, out: Path, pictures: bool = True) -> np.ndarray:
    """Predict all photos as the command does; returns `seconds`."""
    out.mkdir()
    files = find_inputs([str(photos)]).images
    output = OutputFolder(out, predictor.task, predictor.classes, predictor.palette, pictures=pictures)
    start = seconds()
    report = batch_prediction.predict_files(predictor, files, PredictOptions(), output)
    output.finish()
    assert report.num_done == len(files)
    return seconds() - start


def run_model(predictor: Predictor, photos: Path) -> np.ndarray:
    """The model alone, on images that are read and resized before; returns its `seconds`."""
    total = 0.0
    for file in find_inputs([str(photos)]).images:
        item = predictor.prepare(predictor.read(file.path))
        start = seconds()
        predictor.predict_arrays([item])
        total = total + seconds() - start
    return total


def measure_rate(predictor: Predictor, photos: Path, folder: Path, rounds: int) -> None:
    n, ratios = len(list(photos.iterdir())), []
    run_command(predictor, photos, folder / 'warm up')
    for i in range(rounds):
        model_times = run_model(predictor, photos)
        command_times = run_command(predictor, photos, folder / f'out{i}')
        ratios.append(model_times / command_times)
        rates = f'model {n / model_times}, command {n / command_times}'
        print(f'round {i + 1}: images per second on the wall and of CPU: {rates}')
    wall, cpu = (statistics.median(values) for values in zip(*ratios))
    print(f'command / model: median {wall:.3f} on the wall, {cpu:.3f} in CPU time')


class MemoryLog:
    """Resident memory of this process, after every tenth of the images."""

    def __init__(self, output: type, total: int):
        self.process, self.done, self.step, self.values = psutil.Process(), 0, max(total // 10, 1), []
        record = output.record

        def record_and_measure(*args):
            record(*args)
            self.done += 1
            if self.done % self.step == 0:
                self.values.append(self.process.memory_info().rss / MB)

        self.record = record_and_measure


def measure_memory(predictor: Predictor, photos: Path, folder: Path) -> None:
    log = MemoryLog(OutputFolder, len(list(photos.iterdir())))
    record = OutputFolder.record
    OutputFolder.record = lambda self, *args: log.record(self, *args)
    try:
        duration, _ = run_command(predictor, photos, folder / 'out')
    finally:
        OutputFolder.record = record
    print(f'{log.done} images in {duration:.0f} s; MB after each tenth: {", ".join(f"{v:.0f}" for v in log.values)}')
    print(f'growth from the second tenth to the last: {log.values[-1] - log.values[1]:.1f} MB')


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--recipe', default='mask_rcnn/convnext_t', help='config without its suffix')
    parser.add_argument('--images', type=int, default=8)
    parser.add_argument('--size', default='640x480', help='of the images')
    parser.add_argument('--rounds', type=int, default=3)
    parser.add_argument('--device', default='cpu')
    parser.add_argument('--memory', action='store_true', help='memory over all images instead of images per second')
    args = parser.parse_args()
    size = tuple(map(int, args.size.split('x')))
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        predictor = make_predictor(args.recipe, folder, args.device)
        draw_photos(folder / 'photos', args.images, size)
        if args.memory:
            measure_memory(predictor, folder / 'photos', folder)
        else:
            measure_rate(predictor, folder / 'photos', folder, args.rounds)


if __name__ == '__main__':
    sys.exit(main())
