"""Predict files with concurrent reading, inference and writing, in bounded memory."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple, TypeVar

import cv2
import numpy as np
import torch
from mmengine.structures import BaseDataElement

from ..datasets.check_images import n_threads
from ..errors import TrainingError, UnreadableImageError
from .images import read_image
from .inputs import InputFile
from .model import Predictor
from .options import PredictOptions
from .output import OutputFolder, Written
from .progress import Progress
from .reduced import read_reduced
from .row_reader import whole_image_note

T, R = TypeVar('T'), TypeVar('R')
MAX_WAITING = 4  # results that wait to be written


class LoadedInput(NamedTuple):
    """An image that was loaded for the model.

    Attributes:
        pixels (np.ndarray | None): The image (H, W, C); None if the model reads it in tiles.
        prepared (dict | None): Result of the test pipeline; None if several views are predicted.
        note (str): Note on the image for the user; '' for none.
    """

    pixels: np.ndarray | None
    prepared: dict | None
    note: str


@dataclass
class RunReport:
    """Summary of a prediction run.

    Attributes:
        num_done: Number of predicted images or frames.
        num_skipped: Number of unreadable images.
        num_detections: Number of detections in all images.
        model_seconds: Time in the model.
        seconds: Total time.
    """

    num_done: int = 0
    num_skipped: int = 0
    num_detections: int = 0
    model_seconds: float = 0.0
    seconds: float = field(default=0.0)

    def add(self, report: 'RunReport') -> None:
        """Add the numbers of another report."""
        for name, value in vars(report).items():
            setattr(self, name, getattr(self, name) + value)


def make_recorder(
    output, report: RunReport, progress: Progress, show: Callable[[np.ndarray], None] | None
) -> Callable[[object, Written], None]:
    """Return a function that records a written result in `output`, counts it and shows its picture."""

    def record(key: object, written: Written) -> None:
        output.record(key, written)
        report.num_done += 1
        report.num_detections += len(written.annotations)
        progress.update()
        if show and written.picture is not None:
            show(written.picture)

    return record


def predict_files(
    predictor: Predictor,
    files: Sequence[InputFile],
    options: PredictOptions,
    output: OutputFolder,
    show: Callable[[np.ndarray], None] | None = None,
) -> RunReport:
    """Predict image files and write the results.

    Some threads read the next images while the model runs, others write the last results; the number of images in
    memory is bounded. An unreadable image is reported and skipped.

    Args:
        predictor: The model.
        files: The images.
        options: Options of the prediction.
        output: Output folder.
        show: Function that is called with the picture of each image, in this thread.

    Returns:
        A summary of the run.
    """
    report, progress, start = RunReport(), Progress(len(files)), time.monotonic()
    n_readers = 1 if predictor.device.type == 'cpu' else min(n_threads(), 8)

    record = make_recorder(output, report, progress, show)
    with _single_threaded_opencv(), pool(n_readers) as readers, pool(2) as writers:
        writing = OrderedWriting(writers, record)
        loads = prefetch(readers, lambda file: _load(predictor, file, options), files, options.batch_size + n_readers)
        while batch := list(islice(loads, options.batch_size)):
            images = []
            for file, future in batch:
                try:
                    loaded = future.result()
                except UnreadableImageError as error:
                    _skip(file, error, report, progress)
                    continue
                if loaded.note:
                    progress.print(f'{file.path}: {loaded.note}')
                images.append((file, loaded))
            for file, pixels, sample in _predict(predictor, images, options, report, progress):
                writing.submit(file, _write, predictor, output, file, pixels, sample)
        writing.finish()
    progress.close()
    report.seconds = time.monotonic() - start
    return report


class OrderedWriting:
    """Writes results in threads and records them in order, with a bound on the number that wait.

    Args:
        executor: Executor for the tasks.
        record: Function that is called with the key and the result of each task, in order, in the calling thread.
    """

    def __init__(self, executor: ThreadPoolExecutor, record: Callable):
        self.executor, self.record = executor, record
        self.waiting: deque[tuple[object, Future]] = deque()

    def submit(self, key: object, function: Callable, *args) -> None:
        """Have a thread call a function; wait while too many results are pending."""
        self.waiting.append((key, self.executor.submit(function, *args)))
        while self.waiting and (len(self.waiting) > MAX_WAITING or self.waiting[0][1].done()):
            self._record_first()

    def finish(self) -> None:
        """Wait for all tasks."""
        while self.waiting:
            self._record_first()

    def _record_first(self) -> None:
        key, future = self.waiting.popleft()
        self.record(key, future.result())


def prefetch(
    executor: Executor, function: Callable[[T], R], items: Iterable[T], depth: int
) -> Iterator[tuple[T, Future]]:
    """Iterate over items and the futures of a function of each, with at most `depth` calls ahead."""
    queue: deque[tuple[T, Future]] = deque()
    for item in items:
        queue.append((item, executor.submit(function, item)))
        if len(queue) >= depth:
            yield queue.popleft()
    while queue:
        yield queue.popleft()


@contextmanager
def explain_out_of_memory(options: PredictOptions) -> Iterator[None]:
    """Context manager that turns an out-of-memory error of a GPU into one line."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        fix = f'a --batch-size below {options.batch_size}' if options.batch_size > 1 else '--tile, or --device cpu'
        raise TrainingError(f'the GPU has too little memory for this: give {fix}') from error


def _load(predictor: Predictor, file: InputFile, options: PredictOptions) -> LoadedInput:
    if options.tile:
        return LoadedInput(None, None, whole_image_note(file.path))
    image = read_image(file.path, predictor.color_type)
    prepared = None if options.multiscale else predictor.prepare(image.pixels)
    return LoadedInput(image.pixels, prepared, image.note)


def _predict(
    predictor: Predictor,
    images: Sequence[tuple[InputFile, LoadedInput]],
    options: PredictOptions,
    report: RunReport,
    progress: Progress,
) -> Iterator[tuple[InputFile, np.ndarray | None, BaseDataElement]]:
    """Predict loaded images; those that turn out to be unreadable are skipped."""
    if images and images[0][1].prepared is not None:
        samples = _timed(report, options, predictor.predict_prepared, [loaded.prepared for _, loaded in images])
        for (file, loaded), sample in zip(images, samples):
            yield file, loaded.pixels, sample
        return
    for file, loaded in images:
        try:
            image = file.path if options.tile else loaded.pixels
            (sample,) = _timed(report, options, predictor.predict_arrays, [image])
        except UnreadableImageError as error:
            _skip(file, error, report, progress)
            continue
        yield file, loaded.pixels, sample


def _timed(report: RunReport, options: PredictOptions, function: Callable, images: list) -> list[BaseDataElement]:
    start = time.monotonic()
    with explain_out_of_memory(options):
        samples = function(images, **vars(options))
    report.model_seconds += time.monotonic() - start
    return samples


def _write(
    predictor: Predictor, output: OutputFolder, file: InputFile, pixels: np.ndarray | None, sample: BaseDataElement
) -> Written:
    size = None
    if pixels is None and output.draws:
        pixels, size = read_reduced(file.path, predictor.color_type)
    return output.write(file, pixels, sample, size)


def _skip(file: InputFile, error: Exception, report: RunReport, progress: Progress) -> None:
    report.num_skipped += 1
    progress.print(f'skipped {file.path}: {error}')
    progress.update()


@contextmanager
def pool(n: int) -> Iterator[ThreadPoolExecutor]:
    """Context manager of a thread pool that cancels pending tasks when it ends."""
    pool = ThreadPoolExecutor(n)
    try:
        yield pool
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _single_threaded_opencv() -> Iterator[None]:
    """Context manager that disables OpenCV's own threads, because the pools already use all cores."""
    num_threads = cv2.getNumThreads()
    cv2.setNumThreads(1)
    try:
        yield
    finally:
        cv2.setNumThreads(num_threads)
