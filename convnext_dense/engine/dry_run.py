"""A training that ends after two iterations: the picture of their batches, time and memory, and nothing is saved."""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import NoReturn

import cv2
import numpy as np
import torch
from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.structures import BaseDataElement

from .progress import broadcast_from_rank0

NUM_ITERS = 2
SLOW_ITERATION = 30  # seconds, after which the second batch is drawn, but not trained on
MAX_IMAGES = 8  # of a batch that are drawn
SIDE = 600  # pixels: longer side of an image in the picture
HEARTBEAT_SECONDS = 8  # between signs of life
PICTURE = 'batches.png'  # in the log folder

Draw = Callable[[np.ndarray, BaseDataElement, Sequence[str], Sequence, int], np.ndarray]


class TrialEnd(BaseException):
    """Ends a trial run; no error, so that nothing saves or explains it."""


class DryRunHook(Hook):
    """Draws the first batches with their annotations, measures an iteration, and ends the run."""

    priority = 'LOWEST'

    def __init__(self, draw: Draw):
        self.draw, self.rows, self.seconds = draw, [], []

    def before_train_iter(self, runner, batch_idx: int, data_batch=None) -> None:
        """Draw a batch as the model will see it."""
        if is_main_process():
            self.rows.append(draw_batch(self.draw, data_batch, runner.train_dataloader.dataset.metainfo))
        if self.seconds and broadcast_from_rank0(self.seconds[0] > SLOW_ITERATION, runner):
            self._finish(runner)
        self.start = time.perf_counter()

    def after_train_iter(self, runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        """Measure the iteration, and end the run after the last one."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.start)
        if len(self.seconds) == min(NUM_ITERS, runner.max_iters):
            self._finish(runner)

    def _finish(self, runner) -> NoReturn:
        if is_main_process():
            picture = os.path.join(runner.log_dir, PICTURE)
            cv2.imwrite(picture, stack_rows(self.rows))
            runner.logger.info(self._summarize(runner))
            config = os.path.join(runner.work_dir, os.path.basename(runner.cfg.filename or 'config.py'))
            runner.logger.info(f'dry run: the config that would run is {config}, its first batches are {picture}')
        raise TrialEnd

    def _summarize(self, runner) -> str:
        hours = self.seconds[-1] * runner.max_iters / 3600
        duration = f'{hours:.1f} h' if hours >= 1 else f'{max(60 * hours, 1):.0f} min'
        loss = runner.message_hub.get_scalar('train/loss').current()
        return (
            f'dry run: an iteration takes {self.seconds[-1]:.2f} s and {_peak_memory()}; {runner.max_iters:,} of them '
            f'about {duration}, reading and evaluation aside; loss {loss:.3g}'
        )


def dry_run(runner, draw: Draw) -> None:
    """Train for two iterations and report on them; nothing is saved.

    Args:
        runner: of the training.
        draw: returns the picture of an image (H, W, C) with the annotations of its data sample, from both, the names of
            the classes, their palette, and the longer side of the picture.
    """
    runner.register_hook(DryRunHook(draw))
    with suppress(TrialEnd):
        runner.train()


@contextmanager
def heartbeat(enabled: bool) -> Iterator[None]:
    """Print a sign of life every few seconds while something takes long.

    Args:
        enabled: False to print nothing.
    """
    finished, start = threading.Event(), time.monotonic()

    def beat() -> None:
        while not finished.wait(HEARTBEAT_SECONDS):
            print(f'dry run: at work for {time.monotonic() - start:.0f} s', file=sys.stderr, flush=True)

    thread = threading.Thread(target=beat, daemon=True)
    if enabled:
        thread.start()
    try:
        yield
    finally:
        finished.set()
        if enabled:
            thread.join()


def draw_batch(draw: Draw, data_batch: dict, meta: Mapping) -> list[np.ndarray]:
    """Draw the images of a batch with their annotations.

    Args:
        draw: See `dry_run`.
        data_batch: as the DataLoader returns it, before the data preprocessor.
        meta: with the `classes` and the `palette` of the data set, if it names them.

    Returns:
        BGR images, at most `MAX_IMAGES`.
    """
    classes = meta.get('classes') or [*map(str, range(256))]
    samples = list(zip(data_batch['inputs'], data_batch['data_samples']))[:MAX_IMAGES]
    return [
        draw(image.permute(1, 2, 0).cpu().numpy(), sample.cpu(), classes, meta.get('palette') or (), SIDE)
        for image, sample in samples
    ]


def stack_rows(rows: list[list[np.ndarray]]) -> np.ndarray:
    """Put images into one picture, those of a row side by side, on white."""
    height, width = (max(image.shape[i] for row in rows for image in row) for i in (0, 1))
    columns = max(map(len, rows))
    picture = np.full((len(rows) * height, columns * width, 3), 255, np.uint8)
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            picture[y * height :, x * width :][: image.shape[0], : image.shape[1]] = image
    return picture


def _peak_memory() -> str:
    if torch.cuda.is_available():
        return f'{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB of GPU memory'
    try:
        import resource  # of Unix alone
    except ImportError:
        return 'an amount of memory that this system does not tell'
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == 'darwin' else 1)
    return f'{kilobytes / 2**20:.1f} GiB of memory'
