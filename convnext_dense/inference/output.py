"""The output folder of a prediction: results per image, and resuming after an interrupted run."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from mmengine.structures import BaseDataElement

from ..errors import UsageError
from .coco_writer import CocoWriter, to_annotations
from .colors import Color
from .drawing import SCORE_THR, draw
from .images import ColorType
from .inputs import InputFile
from .mask_writer import encode_mask, mask_colors
from .row_reader import read_reduced

SETTINGS_FILE = 'predict.json'
JPEG_QUALITY = 90


class Written(NamedTuple):
    """What was written of an image of size (H, W): its COCO annotations, none for segmentation.

    If it is to be shown, also its picture (H, W, 3), BGR.
    """

    size: tuple[int, int]
    annotations: list[dict]
    picture: np.ndarray | None


@dataclass
class OutputFolder:
    """Folder with predictions: `predictions.json`, or `masks/` and `classes.txt`; `pictures/`, `videos/`.

    Attributes:
        path: Path of the folder.
        task: 'detection' or 'segmentation'.
        classes: Names of the classes.
        palette: RGB color of each class; empty for distinguishable colors.
        format: Format of the JSON file: 'coco' or 'results'.
        pictures: Whether to write pictures.
        show: Whether to return pictures to be shown.
        score_thr: Score threshold for pictures.
        description: Description of the data set in the JSON file.
        color_type: How images are read for pictures, as for `read_image`.
    """

    path: Path
    task: str
    classes: Sequence[str]
    palette: Sequence[Color] = ()
    format: str = 'coco'
    pictures: bool = True
    show: bool = False
    score_thr: float = SCORE_THR
    description: str = ''
    color_type: ColorType = 'color'

    def __post_init__(self):
        self.coco = None
        if self.task == 'detection':
            self.coco = CocoWriter(self.path, self.classes, format=self.format, description=self.description)
        else:
            names = ''.join(f'{name}\n' for name in self.classes)  # line n, from 0, is the class of the value n
            (self.path / 'classes.txt').write_text(names, encoding='utf-8')

    def is_done(self, file: InputFile) -> bool:
        """Whether an earlier run has written all results of an image."""
        if self.pictures and not self.picture_path(file.stem).exists():
            return False
        return file.file_name in self.coco.done if self.coco else self.mask_path(file.stem).exists()

    def picture_path(self, stem: str) -> Path:
        """Path of the picture of an image."""
        return self.path / 'pictures' / f'{stem}.jpg'

    def mask_path(self, stem: str) -> Path:
        """Path of the segmentation mask of an image."""
        return self.path / 'masks' / f'{stem}.png'

    def write(self, file: InputFile, image: np.ndarray | None, sample: BaseDataElement) -> Written:
        """Write mask and picture of an image, and encode its detections; thread-safe.

        Pixels (H, W, C) that are None are read for the picture.
        """
        annotations, picture = self.convert(file, image, sample)
        if self.pictures:
            jpeg = cv2.imencode('.jpg', picture, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])[1]
            write_file(self.picture_path(file.stem), jpeg.tobytes())
        return Written(tuple(sample.ori_shape), annotations, picture if self.show else None)

    def convert(
        self, file: InputFile, image: np.ndarray | None, sample: BaseDataElement, legend: bool = True
    ) -> tuple[list[dict], np.ndarray | None]:
        """Write the mask of an image; return the annotations and the picture (H, W, 3), BGR, if they are needed."""
        annotations, picture = [], None
        if self.coco:
            annotations = to_annotations(sample.pred_instances, self.coco.category_ids)
        else:
            labels = sample.pred_sem_seg.data.squeeze(0).cpu().numpy()
            write_file(self.mask_path(file.stem), encode_mask(labels, mask_colors(self.classes, self.palette)))
        if self.pictures or self.show:
            image, size = read_reduced(file.path, self.color_type) if image is None else (image, None)
            picture = draw(image, sample, self.classes, self.palette, self.score_thr, legend, size)
        return annotations, picture

    def record(self, file: InputFile, written: Written) -> None:
        """Record an image as done; to be called in the order of the images."""
        if self.coco and file.file_name not in self.coco.done:
            self.coco.add(file.file_name, written.size, written.annotations)

    def number(self, files: Iterable[InputFile]) -> None:
        """Choose the ids of the images that will be recorded."""
        if self.coco:
            self.coco.use_numbers_of(file.file_name for file in files)

    def finish(self) -> list[str]:
        """Complete the files; return their paths."""
        results = []
        if self.coco:
            self.coco.finish()
            results.append(str(self.coco.path))
        elif (self.path / 'masks').is_dir():
            results += [str(self.path / 'masks'), str(self.path / 'classes.txt')]
        results += [str(self.path / name) for name in ('pictures', 'videos') if (self.path / name).is_dir()]
        return results


def open_folder(path: str | Path, settings: Mapping[str, object], resume: bool) -> Path:
    """Create the output folder, or check that an earlier run can be resumed there.

    `settings` are those on which the results depend: plain values by option name.

    Raises:
        UsageError: If the folder is not empty, has results with other settings, or cannot be written.
    """
    path, settings = Path(path), json.loads(json.dumps(settings))
    try:
        is_used = path.is_dir() and any(path.iterdir())
        if is_used and not resume:
            raise UsageError(f"--out '{path}' already exists: choose another one, or continue there with --resume")
        if is_used:
            _check_settings(path, settings)
        path.mkdir(parents=True, exist_ok=True)
        write_file(path / SETTINGS_FILE, (json.dumps(settings, indent=2) + '\n').encode())
    except OSError as error:
        raise UsageError(f"--out '{path}' cannot be written: {error.strerror}") from error
    return path


def _check_settings(path: Path, settings: Mapping[str, object]) -> None:
    try:
        old = json.loads((path / SETTINGS_FILE).read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"--resume: '{path}' was not written by this tool: choose another --out") from error
    key = next((key for key in settings if old.get(key) != settings[key]), None)
    if key:
        raise UsageError(
            f"--resume: '{path}' was made with {key} {old.get(key)}, not {settings[key]}: choose another --out"
        )


def write_file(path: Path, content: bytes) -> None:
    """Write a file that appears under its name only when it is complete; missing folders are created."""
    path.parent.mkdir(parents=True, exist_ok=True)
    tmp_path = path.with_name(f'{path.name}.part')
    tmp_path.write_bytes(content)
    os.replace(tmp_path, path)
