"""Predict videos: write an annotated video, and the predictions of all frames in one JSON file."""

import itertools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import cv2
import numpy as np
from mmengine.structures import BaseDataElement

from ..errors import UnreadableImageError
from .batch_prediction import LoadedInput, PredictionRun, RunReport, prepare_input
from .coco_writer import CocoWriter
from .images import from_array
from .inputs import InputFile
from .model import Predictor
from .options import PredictOptions
from .output import OutputFolder, Written, write_file
from .progress import Progress

CODEC, SUFFIX = 'mp4v', '.mp4'  # every build of OpenCV with FFmpeg can write these
DEFAULT_FPS = 25.0  # for videos without a frame rate


class VideoReader:
    """Iterates over the frames of a video, rotated according to its metadata.

    Args:
        path: Path of the file.

    Attributes:
        fps (float): Frames per second.
        num_frames (int): Number of frames according to the file, which may be wrong; 0 if unknown.

    Raises:
        UnreadableImageError: If the video cannot be read; the message is the reason without the path.
    """

    def __init__(self, path: str | Path):
        self.capture = cv2.VideoCapture(str(path))
        self.first = self.read() if self.capture.isOpened() else None
        if self.first is None:
            reason = 'the file is empty' if os.path.isfile(path) and not os.path.getsize(path) else 'no readable video'
            raise UnreadableImageError(reason)
        fps = self.capture.get(cv2.CAP_PROP_FPS)
        self.fps = fps if 0 < fps < 1000 else DEFAULT_FPS
        self.num_frames = max(int(self.capture.get(cv2.CAP_PROP_FRAME_COUNT)), 0)

    def read(self) -> np.ndarray | None:
        """Return the next frame (H, W, 3), BGR; None at the end."""
        has_frame, frame = self.capture.read()
        return frame if has_frame else None

    def __iter__(self) -> Iterator[np.ndarray]:
        frame, self.first = self.first, None
        while frame is not None:
            yield frame
            frame = self.read()
        self.capture.release()


class VideoWriter:
    """Writes an MP4 file, which appears under its name when it is complete."""

    def __init__(self, path: Path, fps: float):
        self.path, self.fps = path, fps
        self.tmp_path = path.with_name(f'{path.stem}.part{path.suffix}')
        self._writer = None

    def write(self, picture: np.ndarray) -> None:
        """Append a frame (H, W, 3), BGR; all frames must have the same size."""
        height, width = (side + side % 2 for side in picture.shape[:2])  # the codec needs even sides
        if self._writer is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            fourcc = cv2.VideoWriter_fourcc(*CODEC)
            self._writer = cv2.VideoWriter(str(self.tmp_path), fourcc, self.fps, (width, height))
            if not self._writer.isOpened():
                raise OSError(None, 'OpenCV cannot write videos here: use --no-pictures', str(self.path))
        bottom, right = height - picture.shape[0], width - picture.shape[1]
        self._writer.write(cv2.copyMakeBorder(picture, 0, bottom, 0, right, cv2.BORDER_REPLICATE))

    def close(self) -> None:
        """Complete the file."""
        if self._writer is not None:
            self._writer.release()
            os.replace(self.tmp_path, self.path)


def is_done(file: InputFile, output: OutputFolder) -> bool:
    """Whether an earlier run has finished a video; the JSON file is written last."""
    return _json_path(file, output).exists()


def predict_video(
    predictor: Predictor,
    file: InputFile,
    options: PredictOptions,
    output: OutputFolder,
    show: Callable[[np.ndarray], None] | None = None,
) -> RunReport:
    """Predict all frames of a video; `show` is called with each picture, in this thread.

    The results are `videos/NAME.mp4` and `videos/NAME.json` in the output folder, for segmentation also
    `masks/NAME/*.png`.

    Raises:
        UnreadableImageError: If the video cannot be read.
    """
    reader = VideoReader(file.path)
    results = _FrameResults(file, output, reader.fps)
    images = iter(reader)

    def load(_: InputFile) -> LoadedInput | None:
        image = next(images, None)
        if image is None:
            return None
        return LoadedInput(image, prepare_input(predictor, from_array(image, 'bgr', predictor.color_type), options))

    run = _VideoRun(predictor, options, results, Progress(reader.num_frames, 'frames'), show)
    frames = (InputFile(file.path, f'{file.file_name}#{i}', f'{file.stem}/{i:06}') for i in itertools.count())
    report = run.run(frames, load)
    results.finish()
    if report.num_done < reader.num_frames:
        run.progress.print(f'{file.path}: {report.num_done} of {reader.num_frames} frames could be read')
    return report


class _VideoRun(PredictionRun):
    def skip(self, file: InputFile, error: UnreadableImageError) -> None:
        """Skip the whole video: its frames are all alike."""
        raise error


def _json_path(file: InputFile, output: OutputFolder) -> Path:
    return output.path / 'videos' / f'{file.stem}.json'


class _FrameResults:
    """Writes the results of the frames of a video."""

    def __init__(self, file: InputFile, output: OutputFolder, fps: float):
        self.file, self.output, self.fps, self.num_recorded = file, output, fps, 0
        path = _json_path(file, output)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix('.jsonl').unlink(missing_ok=True)  # left by an interrupted run
        self.coco = CocoWriter(path.parent, output.classes, path.stem, output.format, output.description)
        self.video = VideoWriter(path.with_suffix(SUFFIX), fps) if output.pictures else None

    def write(self, frame: InputFile, image: np.ndarray, sample: BaseDataElement) -> Written:
        """Write the mask and the picture of a frame; to be called in one thread, in frame order."""
        annotations, picture = self.output.convert(frame, image, sample, legend=False)
        if self.video:
            self.video.write(picture)
        return Written(image.shape[:2], annotations, picture if self.output.show else None)

    def record(self, frame: InputFile, written: Written) -> None:
        """Record a frame as done; to be called in frame order."""
        fields = dict(frame_index=self.num_recorded, timestamp=round(self.num_recorded / self.fps, 6))
        if self.output.coco is None:
            fields['mask'] = f'masks/{frame.stem}.png'
        self.coco.add(frame.file_name, written.size, written.annotations, **fields)
        self.num_recorded += 1

    def finish(self) -> None:
        """Complete the video, then the JSON file."""
        if self.video:
            self.video.close()
        if self.output.coco is None:
            path = self.coco.path
            frames = [image for image, _ in self.coco.iter_lines()]
            content = dict(video=self.file.file_name, fps=self.fps, frames=frames, classes=list(self.output.classes))
            write_file(path, (json.dumps(content) + '\n').encode())
        else:
            self.coco.finish()
        self.coco.lines_path.unlink(missing_ok=True)
