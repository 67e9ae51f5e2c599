"""Dry run: train for two iterations, draw their batches, and report time and memory; nothing is saved."""

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
SLOW_ITERATION = 30  # seconds; if the first iteration takes longer, the second batch is drawn but not trained on
MAX_IMAGES = 8  # images that are drawn of a batch
SIDE = 600  # longer side of an image in the plot, in pixels
HEARTBEAT_SECONDS = 8  # seconds between two lines
PICTURE = 'batches.png'  # in the log folder

Draw = Callable[[np.ndarray, BaseDataElement, Sequence[str], Sequence, int], np.ndarray]


class TrialEnd(BaseException):
    """Ends a trial run. It is not an Exception, so that no handler saves or diagnoses it."""


class DryRunHook(Hook):
    """Draws the first batches with their annotations, measures an iteration, and ends the run."""

    priority = 'LOWEST'

    def __init__(self, draw: Draw):
        self.draw, self.rows, self.seconds = draw, [], []

    def before_train_iter(self, runner, batch_idx: int, data_batch=None) -> None:
        """Draw a batch as the model receives it; after a slow iteration, end the run."""
        if is_main_process():
            self.rows.append(draw_batch(self.draw, data_batch, runner.train_dataloader.dataset.metainfo))
        if self.seconds and broadcast_from_rank0(self.seconds[0] > SLOW_ITERATION, runner):
            self._finish(runner)
        self.start = time.perf_counter()

    def after_train_iter(self, runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        """Measure the iteration; end the run after the last one."""
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
        runner: Runner of the training.
        draw: Function that draws annotations: (image (H, W, C) BGR, data sample, class names, palette, longer side of
            the plot in pixels) -> (h, w, 3) BGR.
    """
    runner.register_hook(DryRunHook(draw))
    with suppress(TrialEnd):
        runner.train()


@contextmanager
def heartbeat(enabled: bool) -> Iterator[None]:
    """Context manager that prints a line every few seconds if enabled, so that a long start does not look stuck."""
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
        data_batch: Batch as the DataLoader returns it, before the data preprocessor.
        meta: Metainfo of the data set, with `classes` and `palette` if it has them.

    Returns:
        At most `MAX_IMAGES` images (h, w, 3), BGR of uint8.
    """
    classes = meta.get('classes') or [*map(str, range(256))]
    samples = list(zip(data_batch['inputs'], data_batch['data_samples']))[:MAX_IMAGES]
    return [
        draw(image.permute(1, 2, 0).cpu().numpy(), sample.cpu(), classes, meta.get('palette') or (), SIDE)
        for image, sample in samples
    ]


def stack_rows(rows: list[list[np.ndarray]]) -> np.ndarray:
    """Arrange images (h, w, 3) in a grid on white, one list per row: (H, W, 3) of uint8."""
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
        import resource  # only on Unix
    except ImportError:
        return 'an unknown amount of memory'
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == 'darwin' else 1)
    return f'{kilobytes / 2**20:.1f} GiB of memory'
