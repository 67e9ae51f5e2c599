"""How data sets lie on a disk: which file or folder is what in each layout that is taken, and what the others are."""

import json
import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from fnmatch import fnmatch
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

from ..engine.datasets import IMAGE_SUFFIXES
from ..errors import UsageError
from .files import (
    BOMS,
    Match,
    PointerError,
    match,
    open_regular,
    path_in,
    read_start,
    read_text,
    shown,
    size_of,
    spelled,
    walk,
    why,
)

# COCO json, by where the files are in the folder (in small letters); 'all' is one file for all splits.
ANNOTATIONS = {
    'COCO': {
        'train': 'annotations/instances_train*.json',
        'val': 'annotations/instances_val*.json',
        'test': 'annotations/instances_test*.json',
    },
    'Roboflow': {
        'train': 'train/_annotations.coco.json',
        'val': 'val*/_annotations.coco.json',
        'test': 'test/_annotations.coco.json',
    },
    'CVAT': {'all': 'annotations/instances_default.json'},
    'Label Studio': {'all': 'result.json'},
    'a file a split': {'train': 'train*.json', 'val': 'val*.json', 'test': 'test*.json'},
    'annotations/': {
        'train': 'annotations/*train*.json',
        'val': 'annotations/*val*.json',
        'test': 'annotations/*test*.json',
    },
    'a folder a split': {'train': 'train*/*.json', 'val': 'val*/*.json', 'test': 'test*/*.json'},
    'one file': {'all': '*.json'},
    'one file in annotations/': {'all': 'annotations/*.json'},
}
# Names of folders of images, of label maps and of splits, in small letters.
IMAGES = ('images', 'image', 'imgs', 'img', 'img_dir', 'jpegimages', 'leftimg8bit')
LABELS = ('labels', 'label', 'annotations', 'masks', 'mask', 'ann_dir', 'gtfine', 'segmentationclass', 'gt')
SPLITS = {'train': ('train', 'training'), 'val': ('val', 'valid', 'validation'), 'test': ('test', 'testing')}
# What the name of a label map has more than its image's, before the ending, and the name of an image more than its own.
MASK_SUFFIXES = ('', '_gtFine_labelTrainIds', '_gtFine_labelIds', '_mask', '_label', '_labels', '_seg')
IMAGE_NAME_SUFFIXES = '_leftImg8bit'
PANOPTIC = '"segments_info"'  # a key of its annotations
FROM_PANOPTIC = 'take instances_*.json, or panopticapi to convert it (panoptic2detection_coco_format.py)'
CONVERT_HINT = 'convert them to COCO json (CVAT, FiftyOne and Roboflow do)'
MAX_DEPTH, MAX_FILES_SCANNED = 4, 20000  # how far a folder is looked into to find out what it is: levels, and files
A_FEW = 100  # files of an ending in a folder, of which the others will be the same
IMAGE_FOLDERS = (
    'has a folder a class, as for classification: boxes or label maps are needed; '
    'if one holds label maps, call it labels and the other one images'
)
# Folders of the label maps of one split, as CamVid has them for SegNet (trainannot) and others call them.
_SPLIT = '|'.join(chain(*SPLITS.values()))
_LABELS = 'annots?|annotations?|labels?|masks?|gt|seg|segmentations?'
LABELS_OF_SPLIT = re.compile(f'({_SPLIT})[ _-]?({_LABELS})|({_LABELS})[ _-]?({_SPLIT})')
KITTI = re.compile(r'[A-Za-z_]+( -?[0-9.]+){14,15} *')
PUT = 'put images into images/train and images/val, label maps into labels/train and labels/val (links do)'
COLUMNS = ('filename', 'file_name', 'image', 'xmin', 'bbox', '.jpg', '.png')  # in a CSV of labels
START = 4096  # bytes of a file by which its kind is told
MAX_JSON_BYTES = 8 * 2**30
BLANK = b' \t\r\n\0' + b''.join(BOMS)  # before the first character of a JSON file, in whatever encoding


class SplitDirs(NamedTuple):
    """Where a split's images and label maps are; `names` are the stems of those that belong to it, None for all."""

    images: Path
    labels: Path
    names: list[str] | None = None


class Pairing(NamedTuple):
    """Images with their label maps, images without one (`bare`), label maps without an image (`lone`), what label maps
    have `more` in their names than images, images that share their name with another (`twice`), names that were found
    as another (`other`, such as 'X is Y') and names that several files may have (`ambiguous`)."""

    pairs: list[tuple[Path, Path]]
    bare: list[Path]
    lone: list[Path]
    more: str
    twice: Sequence[Path] = ()
    other: Sequence[str] = ()
    ambiguous: Sequence[str] = ()


def find_annotations(root: Path, given: Collection[str] = ()) -> tuple[str, dict[str, Path]] | None:
    """The layout of a folder with COCO json and its file of each split ('train', 'val', 'test' or 'all') that is not
    `given` otherwise; None where there is none. Splits that are named so go before one file of all.

    Raises:
        UsageError: several files could be a split's.
    """
    files = [path for path in _files(root, depth=2) if path.suffix.lower() == '.json' and path.name != 'shapes.json']
    other = None
    for layout, patterns in ANNOTATIONS.items():
        found = {}
        for split, pattern in patterns.items():
            if split in given or (given and split == 'all'):
                continue
            named = [file for file in files if _fits(file.relative_to(root), pattern)]
            fitting = [file for file in named if _could_be_coco(file, tells=pattern.split('/')[-1] != '*.json')]
            if len(fitting) > 1:
                names = ' and '.join(f.name for f in fitting[:2])
                raise UsageError(f'{root}: {names} could both be {split}: say which by --train-ann and --val-ann')
            found |= {split: fitting[0]} if fitting else {}
        if 'train' in found or ('all' in found and not other):
            return layout, found
        other = other or ((layout, found) if found else None)
    return other


def find_folders(root: Path) -> tuple[str, dict[str, SplitDirs]] | None:
    """The layout of a folder with label maps and the folders of each split; None where there is none."""
    lists, images, labels = root / 'ImageSets/Segmentation', _child(root, IMAGES), _labels(root)
    if images and labels and lists.is_dir():
        files = {split: lists / f'{split}.txt' for split in SPLITS}
        found = {split: SplitDirs(images, labels, _lines(file)) for split, file in files.items() if file.exists()}
        if found:
            return 'VOC', found
    tops = (root, images, labels)
    by_split = {split: tuple(_child(top, names) for top in tops) for split, names in SPLITS.items()}
    for layout, folders_of in {
        'images/SPLIT, labels/SPLIT': lambda split, images, labels: (images, labels),
        'SPLIT/images, SPLIT/labels': lambda split, images, labels: (_child(split, IMAGES), _labels(split)),
        'SPLIT, labels/SPLIT': lambda split, images, labels: (split, labels),
    }.items():
        pairs = {split: folders_of(*three) for split, three in by_split.items()}
        found = {split: SplitDirs(*folders) for split, folders in pairs.items() if all(folders)}
        if 'train' in found or 'val' in found:
            return layout, found
    roboflow = {split: SplitDirs(folder, folder) for split, names in SPLITS.items() if (folder := _child(root, names))}
    if 'train' in roboflow and any(path.stem.endswith('_mask') for path in list_images(roboflow['train'].images)):
        return 'Roboflow', roboflow
    if images and labels:
        return 'images, labels', {'all': SplitDirs(images, labels)}
    return None


def pair_files(folders: SplitDirs, more: str | None = None) -> Pairing:
    """The images of a split with their label maps, by name; `more` is what those of train have, if that is known."""
    images, twice, listed = {}, [], Match()
    for path in list_images(folders.images):
        stem = _stem(path, folders.images).removesuffix(IMAGE_NAME_SUFFIXES)
        twice += [path] if images.setdefault(stem, path) is not path else []
    maps = {_stem(path, folders.labels): path for path in list_images(folders.labels)}
    if folders.images == folders.labels:
        images = {stem: path for stem, path in images.items() if not stem.endswith('_mask')}
        maps = {stem: path for stem, path in maps.items() if stem.endswith('_mask')}
    if more is None:
        stems, there = [spelled(stem) for stem in images], {spelled(stem) for stem in maps}
        more = max(MASK_SUFFIXES, key=lambda more: sum(stem + more.lower() in there for stem in stems))
    if folders.names is not None:
        names = [_listed(line, folders.images, images) for line in folders.names]
        listed = match(names, images)
        images = {name: images.get(listed.found.get(name), folders.images / f'{name}.jpg') for name in names}
    images = {stem: path for stem, path in sorted(images.items()) if stem not in listed.ambiguous}
    labels = match([stem + more for stem in images], maps)
    pairs, bare = [], []
    for stem, path in images.items():
        if stem + more in labels.found:
            pairs.append((path, maps[labels.found[stem + more]]))
        elif stem + more not in labels.ambiguous:
            bare.append(path)
    own = {*labels.found.values(), *chain(*labels.ambiguous.values())}
    lone = [path for stem, path in sorted(maps.items()) if stem not in own and stem.endswith(more)]
    other = [f'{name} is {there}' for found in (listed, labels) for name, there in found.found.items() if name != there]
    several = [
        f'{name} may be {" or ".join(there[:2])}'
        for found in (listed, labels)
        for name, there in found.ambiguous.items()
    ]
    return Pairing(pairs, bare, [] if folders.names is not None else lone, more, twice, other, several)


def list_images(folder: Path) -> list[Path]:
    """All image files in and below a folder, by their endings."""
    return sorted(p for p in _files(folder, None) if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith('.'))


def describe_unsupported(root: Path) -> str:
    """What a folder holds that is no layout of ours, and the way out, in words."""
    if not root.exists():
        return 'is not there'
    if not root.is_dir():
        return _what_file(root)
    files = list(islice(_sample(root), MAX_FILES_SCANNED))
    endings = {path.suffix.lower() for path in files}
    if not files:
        return 'is an empty folder'
    for below in sorted(path for path in root.iterdir() if path.is_dir()):
        if find_annotations(below) or find_folders(below):
            return f'holds a data set in its folder {shown(below.name)}: give {below}'
    for find, what in (
        (lambda: _pointer(files), 'holds pointers of Git LFS, such as {}: run git lfs pull where they are from'),
        (lambda: _yolo(files), f'looks like YOLO labels ({{}}): {CONVERT_HINT}'),
        (lambda: _labels_of_split(root, files), f'holds label maps in {{}}, as SegNet lays out CamVid: {PUT}'),
        (lambda: _holds(files, '.xml', '<annotation'), f'looks like Pascal VOC boxes in XML: {CONVERT_HINT}'),
        (lambda: _holds(files, '.json', '"shapes"'), 'looks like LabelMe, a file an image: run its labelme2coco.py'),
        (lambda: _holds(files, '.json', '"result":'), "looks like Label Studio's own JSON: export it as COCO instead"),
        (lambda: _holds(files, '.json', '"regions"'), f"looks like the VGG annotator's JSON: {CONVERT_HINT}"),
        (lambda: _holds(files, '.json', '"caption"'), 'holds captions ({}): boxes are in instances_*.json'),
        (lambda: _holds(files, '.json', '"keypoints"'), 'holds keypoints ({}): boxes are in instances_*.json'),
        (lambda: _holds(files, '.json', PANOPTIC), f'holds panoptic JSON ({{}}): {FROM_PANOPTIC}'),
        (lambda: _named(files, 'createml'), f'looks like CreateML labels: {CONVERT_HINT}'),
        (lambda: _named(files, 'tfrecord'), f'looks like TFRecords: {CONVERT_HINT}'),
        (lambda: _kitti(files), f'looks like KITTI boxes ({{}}): {CONVERT_HINT}'),
        (lambda: _named(files, 'labeltxt/'), f'looks like the rotated boxes of DOTA ({{}}): {CONVERT_HINT}'),
        (lambda: _named(files, 'gt/gt.txt'), f'looks like the tracks of MOT ({{}}): {CONVERT_HINT}'),
        (lambda: any(_holds(files, '.csv', text) for text in COLUMNS), f'looks like labels in CSV: {CONVERT_HINT}'),
        (lambda: _masks_beside(files), f'holds label maps beside the images ({{}}): {PUT}'),
        (lambda: _is_image_folder(root), IMAGE_FOLDERS),
        (lambda: endings <= {'.zip', '.tar', '.gz', '.tgz', '.rar', '.7z'}, 'holds archives: unpack them there'),
        (lambda: endings & {'.npy', '.npz', '.mat'}, 'holds labels of NumPy or MATLAB: write them as index PNGs'),
        (lambda: endings & set(IMAGE_SUFFIXES), 'holds images without annotations'),
    ):  # fmt: skip
        found = find()
        if found:
            return what.format(shown(found.relative_to(root)) if isinstance(found, Path) else '')
    return f'holds no data set that is known (its files end with {shown(", ".join(sorted(endings)[:4]))})'


def _what_file(path: Path) -> str:
    if not path.is_file():
        return 'is neither a folder nor a file: give the folder of a data set'
    if path.suffix.lower() in ('.zip', '.tar', '.gz', '.tgz', '.rar', '.7z'):
        return 'is an archive: unpack it and give its folder'
    if path.suffix.lower() == '.json':
        return 'is a file: give its folder, or --train-ann and --val-ann'
    if path.suffix.lower() in ('.yaml', '.yml'):
        return f'is a file as YOLO has it: its labels are no COCO json, {CONVERT_HINT}'
    return 'is a file: give the folder of a data set'


def _sample(root: Path) -> Iterator[Path]:
    """The files in and below a folder, of many with the same ending in one folder the first."""
    for folder, names in walk(root, MAX_DEPTH, hidden=False):
        seen = Counter()
        for name in names:
            ending = Path(name).suffix.lower()
            seen[ending] += 1
            if seen[ending] <= A_FEW:
                yield Path(folder, name)


def _pointer(files: list[Path]) -> Path | None:
    def is_pointer(path: Path) -> bool:
        try:
            open_regular(path, MAX_JSON_BYTES).close()
        except PointerError:
            return True
        except OSError:
            return False
        return False

    return next(filter(is_pointer, files), None)


def _yolo(files: list[Path]) -> Path | None:
    def is_yolo(path: Path) -> bool:
        fields = read_start(path, START).lstrip().split('\n')[0].split()
        try:
            return len(fields) >= 5 and fields[0].isdigit() and all(0 <= float(v) <= 1 for v in fields[1:])
        except ValueError:
            return False

    names = ('data.yaml', 'data.yml', 'obj.names')
    found = (path for path in files if path.suffix.lower() == '.txt' and is_yolo(path))
    return next(found, None) or next((path for path in files if path.name.lower() in names), None)


def _kitti(files: list[Path]) -> Path | None:
    texts = (path for path in files if path.suffix.lower() == '.txt')
    return next((path for path in texts if KITTI.fullmatch(read_start(path, START).split('\n')[0].strip())), None)


def _labels_of_split(root: Path, files: list[Path]) -> Path | None:
    """A folder of images whose name says that they are the label maps of a split."""
    folders = {path.parent: None for path in files if path.suffix.lower() in IMAGE_SUFFIXES and path.parent != root}
    found = [folder for folder in folders if LABELS_OF_SPLIT.fullmatch(folder.name.lower())]
    return min(found, key=lambda folder: 'train' not in folder.name.lower(), default=None)


def _masks_beside(files: list[Path]) -> Path | None:
    """An image that is called as another one in its folder, with _mask or the like behind."""
    images = [path for path in files if path.suffix.lower() in IMAGE_SUFFIXES]
    stems = {(path.parent, path.stem.lower() + more) for path in images for more in MASK_SUFFIXES if more}
    return next((path for path in images if (path.parent, path.stem.lower()) in stems), None)


def _named(files: list[Path], text: str) -> Path | None:
    return next((path for path in files if text in path.as_posix().lower()), None)


def _holds(files: list[Path], ending: str, text: str) -> Path | None:
    of = [path for path in files if path.suffix.lower() == ending][:5]
    return next((path for path in of if text in read_start(path, 2**16)), None)


def _is_image_folder(root: Path) -> bool:
    train = _child(root, SPLITS['train']) or root
    classes = [folder for folder in train.iterdir() if folder.is_dir()]
    names = {folder.name.lower() for folder in classes}
    return (
        len(classes) > 1 and not names & {*IMAGES, *LABELS, *sum(SPLITS.values(), ())} and all(map(_has_image, classes))
    )


def _has_image(folder: Path) -> bool:
    return any(path.suffix.lower() in IMAGE_SUFFIXES for path in folder.iterdir())


def _fits(path: Path, pattern: str) -> bool:
    parts, patterns = path.as_posix().lower().split('/'), pattern.split('/')
    return len(parts) == len(patterns) and all(map(fnmatch, parts, patterns))


def _could_be_coco(path: Path, tells: bool) -> bool:
    """Whether a file is COCO's by its beginning. Where its name tells so, it may be broken: another format is told from
    that by its keys."""
    start = read_start(path, 2**16)
    if re.search(r'"(shapes|regions|caption|keypoints)"\s*:', start) and '"bbox"' not in start:
        return False
    keys = re.search(r'"(images|annotations|categories)"\s*:', start)
    return tells or (keys is not None and start.lstrip().startswith('{'))


def _holds_maps(folder: Path) -> bool:
    return any(path.suffix.lower() in IMAGE_SUFFIXES for path in _files(folder))


def _lines(path: Path) -> list[str]:
    try:
        lines = [line.strip() for line in read_text(path).split('\n')]
    except OSError as error:
        raise UsageError(f'{path}: {error.strerror}') from error
    return list(filter(None, lines))


def _listed(line: str, folder: Path, images: Collection[str]) -> str:
    """The name of an image in a line of a list, as names in a folder of images are: without the path to it, an ending
    of images, and what else is in the line."""

    def name_in(text: str) -> str:
        path = path_in(text)[0]
        at = f'/{path.lower()}'.rfind(f'/{folder.name.lower()}/')
        path = path[at + len(folder.name) + 1 :] if at >= 0 else path
        return path[: path.rfind('.')] if path.lower().endswith(IMAGE_SUFFIXES) else path

    name = name_in(line)
    return name if name in images else name_in(line.split()[0])


def _stem(path: Path, folder: Path) -> str:
    return path.relative_to(folder).with_suffix('').as_posix()


def _child(folder: Path | None, names: tuple[str, ...]) -> Path | None:
    """The first of the folders of these names in a folder, in whatever case."""
    if folder is None:
        return None
    there = {child.name.lower(): child for child in sorted(folder.iterdir()) if child.is_dir()}
    return next((there[name] for name in names if name in there), None)


def _labels(folder: Path | None) -> Path | None:
    """The folder of label maps in a folder; others may have such names too."""
    found = (_child(folder, (name,)) for name in LABELS)
    return next((child for child in found if child and _holds_maps(child)), None)


def _files(root: Path, depth: int | None = MAX_DEPTH) -> Iterator[Path]:
    """The files in and below a folder, those further up first."""
    yield from (Path(folder, name) for folder, names in walk(root, depth, hidden=False) for name in names)


def read_json(path: Path) -> object:
    """What a JSON file holds.

    Raises:
        UsageError: it is not there, not whole, or does not hold a list or dict.
    """
    try:
        with open_regular(path, MAX_JSON_BYTES) as file:
            start, size = file.read(START), size_of(file)
            file.seek(0)
            first = start.lstrip(BLANK)[:1]
            content = file.read(size) if first in (b'{', b'[') or size <= START else None
    except OSError as error:
        raise UsageError(f'{path}: {error.strerror}') from error
    if content is None:
        raise UsageError(
            f'{path} is not JSON of a data set: it begins with {shown(start[:20])}, such JSON with {{ or ['
        )
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UsageError(f'{path} is not a whole JSON file ({why(error)}): download or write it again') from error
