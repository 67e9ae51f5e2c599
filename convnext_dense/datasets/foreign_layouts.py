"""Folders that are no supported data set: what they hold instead, and how to convert it."""

import os
import re
from collections import Counter
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path

from ..engine.datasets import IMAGE_SUFFIXES
from ..errors import UsageError
from .box_formats import find_boxes
from .files import MAX_JSON_BYTES, UnusableFileError, open_regular, read_ends, to_one_line, walk
from .layouts import IMAGE_DIR_NAMES, MASK_DIR_NAMES, MAX_DEPTH, SPLIT_DIR_NAMES, find_dir, find_folders, is_image

LFS_HINT = 'Git LFS pointers, such as {}: run git lfs pull where they are from'
CONVERT_HINT = 'convert them to COCO json (with CVAT, FiftyOne or Roboflow)'
CLASSIFICATION_HINT = (
    'has one folder per class, as for classification: boxes or segmentation masks are needed; '
    'if one of them holds segmentation masks, give it by --train-masks and the other one by --train-images'
)
UNFINISHED = r'\.(part|partial|crdownload|download|aria2|filepart|opdownload)$'  # of downloads
ARCHIVE_SUFFIXES = ('.zip', '.tar', '.gz', '.tgz', '.rar', '.7z')
DIR_NAMES = {*IMAGE_DIR_NAMES, *MASK_DIR_NAMES, *chain(*SPLIT_DIR_NAMES.values())}
MAX_FILES_SCANNED = 20000
MAX_FILES_PER_SUFFIX = 100  # files of one suffix that are read in a folder; the others are assumed to be alike
# First line of KITTI's labels.
KITTI_LINE = r'\A[A-Za-z_]+( -?[0-9.]+){14,15}\s*$'
CSV_MARKS = r'filename|file_name|image|xmin|bbox|\.jpg|\.png'  # in a CSV of labels


def describe_unsupported(root: Path) -> str:
    """Return what a folder without a supported layout holds and how to fix it, as the rest of a sentence."""
    if not root.exists():
        return 'does not exist'
    if not root.is_dir():
        return _describe_file(root)
    files = list(islice(_sample_files(root), MAX_FILES_SCANNED))
    suffixes = {path.suffix.lower() for path in files}
    if not files:
        return 'is an empty folder'
    for folder in sorted(path for path in root.iterdir() if path.is_dir()):
        if _is_dataset(folder):
            return f'holds a data set in its folder {to_one_line(folder.name)}: give {folder}'
    folder = Path(os.path.abspath(root))
    while folder.name.lower() in DIR_NAMES:  # it may be a part of a data set
        folder = folder.parent
        if _is_dataset(folder):
            return f'is a part of a data set: give {folder if root.is_absolute() else os.path.relpath(folder)}'

    def has_text(suffix: str, pattern: str, limit: int | None = 5):
        paths = [path for path in files if path.suffix.lower() == suffix][:limit]
        return lambda: next((path for path in paths if re.search(pattern, read_ends(path, 2**16), re.MULTILINE)), None)

    def has_name(pattern: str):
        return lambda: next((path for path in files if re.search(pattern, path.as_posix().lower())), None)

    for find, description in (
        (lambda: next(filter(_is_lfs_pointer, files), None), f'holds {LFS_HINT}'),
        (has_name(UNFINISHED), 'holds an unfinished download ({}): finish it, and unpack it if it is an archive'),
        (has_text('.json', '"shapes"'), 'looks like LabelMe, one file per image: run its labelme2coco.py'),
        (has_text('.json', '"vid_list"'), 'looks like a project of VIA 3 ({}): export it as COCO'),
        (has_text('.json', '"caption"'), 'holds captions ({}): boxes are in instances_*.json'),
        (has_text('.json', '"keypoints"'), 'holds keypoints ({}): boxes are in instances_*.json'),
        (has_name('tfrecord'), f'looks like TFRecords: {CONVERT_HINT}'),
        (has_text('.txt', KITTI_LINE, limit=None), f'looks like KITTI boxes ({{}}): {CONVERT_HINT}'),
        (has_name('labeltxt/'), f'looks like the rotated boxes of DOTA ({{}}): {CONVERT_HINT}'),
        (has_name(r'gt/gt\.txt'), f'looks like the tracks of MOT ({{}}): {CONVERT_HINT}'),
        (has_text('.csv', CSV_MARKS), f'looks like labels in CSV: {CONVERT_HINT}'),
        (lambda: _is_classification_folder(root), CLASSIFICATION_HINT),
        (lambda: suffixes <= set(ARCHIVE_SUFFIXES), 'holds archives: unpack them there'),
        (lambda: suffixes & {'.npy', '.npz', '.mat'}, 'holds labels of NumPy or MATLAB: write them as index PNGs'),
        (lambda: suffixes & set(IMAGE_SUFFIXES), 'holds images without annotations'),
    ):  # fmt: skip
        result = find()
        if result:
            return description.format(to_one_line(result.relative_to(root)) if isinstance(result, Path) else '')
    return f'holds no known data set (its files end with {to_one_line(", ".join(sorted(suffixes)[:4]))})'


def _is_dataset(folder: Path) -> bool:
    try:
        return bool(find_boxes(folder) or find_folders(folder))
    except UsageError:  # the error asks the user to choose
        return True


def _describe_file(path: Path) -> str:
    suffix = path.suffix.lower()
    for applies, description in (
        (not path.is_file(), 'is neither a folder nor a file: give the folder of a data set'),
        (re.search(UNFINISHED, path.name.lower()), 'is an unfinished download: finish it'),
        (suffix in ARCHIVE_SUFFIXES, 'is an archive: unpack it and give its folder'),
        (suffix == '.json', 'is a file: give its folder, or --train-ann and --val-ann'),
        (suffix in ('.yaml', '.yml'), 'is no data.yaml of YOLO: give the folder of a data set'),
    ):
        if applies:
            return description
    return 'is a file: give the folder of a data set'


def _sample_files(root: Path) -> Iterator[Path]:
    """Iterate over the files in and below a folder, in each at most `MAX_FILES_PER_SUFFIX` of a suffix."""
    for folder, names in walk(root, MAX_DEPTH, hidden=False):
        counts = Counter()
        for name in names:
            suffix = Path(name).suffix.lower()
            counts[suffix] += 1
            if counts[suffix] <= MAX_FILES_PER_SUFFIX:
                yield Path(folder, name)


def _is_lfs_pointer(path: Path) -> bool:
    try:
        open_regular(path, MAX_JSON_BYTES).close()
    except OSError as error:
        return isinstance(error, UnusableFileError) and error.code == 'git-lfs-pointer'
    return False


def _is_classification_folder(root: Path) -> bool:
    train = find_dir(root, SPLIT_DIR_NAMES['train']) or root
    classes = [folder for folder in train.iterdir() if folder.is_dir()]
    if len(classes) < 2 or DIR_NAMES & {folder.name.lower() for folder in classes}:
        return False
    return all(any(map(is_image, folder.iterdir())) for folder in classes)
