"""Predict files with concurrent reading, inference and writing, in bounded memory."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
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
from .row_reader import whole_image_note

T, R = TypeVar('T'), TypeVar('R')
MAX_WAITING = 4  # results that wait to be written


class LoadedInput(NamedTuple):
    """An image that was loaded for the model.

    Attributes:
        pixels (np.ndarray | None): The image (H, W, C) to be drawn on; None if it is read in tiles.
        model_input (dict | np.ndarray | str): Result of the test pipeline; for tiles and several views, the pixels or
            the path of the file.
        note (str): Note on the image for the user; '' for none.
    """

    pixels: np.ndarray | None
    model_input: dict | np.ndarray | str
    note: str = ''


@dataclass
class RunReport:
    """Summary of a prediction run: what was done with its images or frames, and the time in all and in the model."""

    num_done: int = 0
    num_skipped: int = 0
    num_detections: int = 0
    model_seconds: float = 0.0
    seconds: float = 0.0

    def add(self, report: 'RunReport') -> None:
        """Add the numbers of another report."""
        for name, value in vars(report).items():
            setattr(self, name, getattr(self, name) + value)


def predict_files(
    predictor: Predictor,
    files: Sequence[InputFile],
    options: PredictOptions,
    output: OutputFolder,
    show: Callable[[np.ndarray], None] | None = None,
) -> RunReport:
    """Predict image files and write the results; `show` is called with each picture, in this thread.

    Some threads read the next images while the model runs, others write the last results; the number of images in
    memory is bounded. An unreadable image is reported and skipped.
    """

    def load(file: InputFile) -> LoadedInput:
        if options.tile:
            return LoadedInput(None, file.path, whole_image_note(file.path))
        image = read_image(file.path, predictor.color_type)
        return LoadedInput(image.pixels, prepare_input(predictor, image.pixels, options), image.note)

    n_readers = 1 if predictor.device.type == 'cpu' else min(n_threads(), 8)
    with _single_threaded_opencv():
        return PredictionRun(predictor, options, output, Progress(len(files)), show).run(files, load, n_readers, 2)


def prepare_input(predictor: Predictor, pixels: np.ndarray, options: PredictOptions) -> dict | np.ndarray:
    """Return what the model takes for an image: the result of the test pipeline, or the pixels for several views."""
    return pixels if options.tile or options.multiscale else predictor.prepare(pixels)


class PredictionRun:
    """Predicts images, or the frames of a video, while the next ones are read and the last ones are written.

    Args:
        predictor: The model.
        options: Options of the prediction.
        output: What writes results (`write`, in threads) and then records them (`record`, in order, in this thread).
        progress: Progress bar.
        show: Function that is called with each picture, in this thread.
    """

    def __init__(self, predictor: Predictor, options: PredictOptions, output, progress: Progress, show=None):
        self.predictor, self.options, self.output, self.progress = predictor, options, output, progress
        self.show, self.report = show, RunReport()

    def run(
        self,
        files: Iterable[InputFile],
        load: Callable[[InputFile], LoadedInput | None],
        n_readers: int = 1,
        n_writers: int = 1,
    ) -> RunReport:
        """Load files in threads until there are no more, or `load` returns None; predict them and write the results."""
        start, batch_size = time.monotonic(), self.options.batch_size
        with pool(n_readers) as readers, pool(n_writers) as writers:
            writing = OrderedWriting(writers, self._record)
            loads = self._iter_loaded(prefetch(readers, load, files, batch_size + n_readers))
            while batch := list(islice(loads, batch_size)):
                for file, pixels, sample in self._predict(batch):
                    writing.submit(file, self.output.write, file, pixels, sample)
            writing.finish()
        self.progress.close()
        self.report.seconds = time.monotonic() - start
        return self.report

    def skip(self, file: InputFile, error: UnreadableImageError) -> None:
        """Report an image that cannot be read."""
        self.report.num_skipped += 1
        self.progress.print(f'skipped {file.path}: {error}')
        self.progress.update()

    def _iter_loaded(self, loads: Iterator[tuple[InputFile, Future]]) -> Iterator[tuple[InputFile, LoadedInput]]:
        for file, future in loads:
            try:
                loaded = future.result()
            except UnreadableImageError as error:
                self.skip(file, error)
                continue
            if loaded is None:
                return
            if loaded.note:
                self.progress.print(f'{file.path}: {loaded.note}')
            yield file, loaded

    def _predict(self, batch: Sequence[tuple[InputFile, LoadedInput]]) -> Iterator[tuple]:
        """Iterate over files, pixels and samples, without those that turn out to be unreadable."""
        if isinstance(batch[0][1].model_input, dict):
            samples = self._predict_timed([loaded.model_input for _, loaded in batch])
            yield from ((file, loaded.pixels, sample) for (file, loaded), sample in zip(batch, samples))
            return
        for file, loaded in batch:
            try:
                (sample,) = self._predict_timed([loaded.model_input])
            except UnreadableImageError as error:
                self.skip(file, error)
                continue
            yield file, loaded.pixels, sample

    def _predict_timed(self, images: list) -> list[BaseDataElement]:
        start = time.monotonic()
        with explain_out_of_memory(self.options):
            samples = self.predictor.predict_arrays(images, **vars(self.options))
        self.report.model_seconds += time.monotonic() - start
        return samples

    def _record(self, file: InputFile, written: Written) -> None:
        self.output.record(file, written)
        self.report.num_done += 1
        self.report.num_detections += len(written.annotations)
        self.progress.update()
        if self.show and written.picture is not None:
            self.show(written.picture)


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
