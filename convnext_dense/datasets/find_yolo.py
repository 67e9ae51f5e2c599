"""Layouts of YOLO data sets: where the images of each split are, and what the classes are called.

In this order: a data.yaml of Ultralytics, an obj.data of darknet, lists of image paths, or images with labels alone.
"""

import os
import re
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from ..errors import UsageError
from . import SPLITS
from .file_names import split_machine_prefix
from .files import MAX_YAML_BYTES, has_marks, read_ends, read_lines, read_text, read_yaml, to_one_line
from .layouts import SPLIT_DIR_NAMES, SPLIT_OF_NAME, FolderTree, are_of_masks, is_image, iter_files, split_of_folders

YAML_SUFFIXES = ('.yaml', '.yml')
NAMES_FILES = ('classes.txt', 'obj.names', 'classes.names', 'data.names', '_darknet.labels', 'names.txt')
# The first line of a label: a class, and numbers from 0 to 1.
is_yolo = has_marks(r'(?m)\A\s*\d+(\.0*)?([ \t]+(0?\.\d+|[01](\.0*)?|\d(\.\d+)?[eE]-\d+)){4,}\s*$')
YAML_SPLIT_MARK = r'(?m)^["\']?(train|val)["\']?\s*:'
NO_VALUE = ('', '~', 'null', 'none')  # how YAML says that a key has no value


class YoloSplit(NamedTuple):
    """Where the images of a split are, and the classes, which all splits share.

    Attributes:
        images (tuple[Path, ...]): folders, or text files of paths.
        names (dict[int, str] | None): name of each class by its index; None if nothing names them.
        files (tuple[Path, ...]): those that say so.
        missing (str): folder or list of the split that does not exist; empty if there is none.
        keypoints (bool): whether labels are of poses: a box, and keypoints after it.
        num_classes (int | None): `nc`, which may differ from the number of names.
        labels (tuple[Path, ...]): folders of the labels; empty to look for them where they usually are.
    """

    images: tuple[Path, ...]
    names: dict[int, str] | None
    files: tuple[Path, ...] = ()
    missing: str = ''
    keypoints: bool = False
    num_classes: int | None = None
    labels: tuple[Path, ...] = ()


def find_yolo(tree: FolderTree) -> tuple[str, dict[str, YoloSplit]] | None:
    """Find the images with YOLO labels of each split, as `BoxFormat.find`; the tree may be a data.yaml or obj.data.

    Raises:
        UsageError: the files of the data set contradict the disk, or there are several.
    """
    path = tree.root
    if path.is_file():
        is_yaml, is_darknet = path.suffix.lower() in YAML_SUFFIXES, _is_obj_data(path)
        splits = _read_yaml_splits(path) if is_yaml else _read_obj_data(path, tree) if is_darknet else {}
        if missing := _missing_train(splits):
            raise UsageError(f'{path}: {missing}')
        return (path.name, splits) if splits else None
    yamls = [file for file in iter_files(path, 1) if _is_data_yaml(file)]
    if len(yamls) > 1:
        names = ' and '.join(to_one_line(file.name) for file in yamls[:3])
        raise UsageError(f'{path}: {names} describe a data set: choose one with --data {yamls[0]}')
    splits = _read_yaml_splits(yamls[0]) if yamls else {}
    missing = _missing_train(splits)
    if splits and not missing:
        return yamls[0].name, splits
    darknet = next(filter(_is_obj_data, chain(iter_files(path, 1), iter_files(path / 'data', 1))), None)
    if darknet:
        return darknet.name, _read_obj_data(darknet, tree)
    has_labels = any(tree.folders_like('.txt', is_yolo))
    if not missing:
        return _find_images(tree, _named_classes(tree)) if has_labels else None
    if not has_labels:
        raise UsageError(f'{yamls[0]}: {missing}')
    common = next(iter(splits.values()))._asdict() | dict(missing='')  # the file still names the classes
    del common['images']
    return _find_images(tree, common, f' ({yamls[0].name}: {missing})')


def _find_images(tree: FolderTree, common: Mapping, note: str = '') -> tuple[str, dict[str, YoloSplit]] | None:
    """Find the images of each split by lists or folders; `common` are the arguments that all `YoloSplit`s share."""
    files = [f for f in iter_files(tree.root, 1) if f.suffix.lower() == '.txt' and f.stem.lower() in SPLIT_OF_NAME]
    files = [file for file in files if is_image(Path(read_ends(file, 2**12).split('\n')[0].strip()))]
    lists = {split: tuple(f for f in files if f.stem.lower() in names) for split, names in SPLIT_DIR_NAMES.items()}
    if lists['train']:
        return f'lists of images{note}', {split: YoloSplit(paths, **common) for split, paths in lists.items() if paths}
    by_split = _folders_by_split(tree)
    if 'train' in by_split:
        return f'folders by split{note}', {split: YoloSplit(paths, **common) for split, paths in by_split.items()}
    if not any(is_image(Path(name)) for _, names in tree.folders for name in names):
        return None
    return f'images with labels{note}', {'all': YoloSplit((tree.root,), **common)}


def yolo_split(labels: FolderTree, images: Path) -> YoloSplit | None:
    """Return the split of a folder of labels and one of images; None if the first holds no labels."""
    folders = tuple(labels.folders_like('.txt', is_yolo))
    return YoloSplit((images,), labels=folders, **_named_classes(labels)) if folders else None


def _named_classes(tree: FolderTree) -> dict:
    """Return the names of the classes and the file that has them, as keyword arguments of `YoloSplit`."""
    file = _find_names_file(tree)
    return dict(names=_read_names(file), files=(file,) if file else ())


def _read_yaml_splits(file: Path) -> dict[str, YoloSplit]:
    """Read a data.yaml."""
    content = read_yaml(file)
    if not isinstance(content, dict) or not {'names', 'nc'} & content.keys():
        text = 'is no data set of YOLO, which needs names, train and val; docs/datasets.md has another data.yaml'
        raise UsageError(f'{file} {text}')
    # Paths are relative to `path`, which is relative to the file or to the folder above, or to the file.
    top, bases, splits = content.get('path'), [file.parent], {}
    if isinstance(top, str) and top and (at := _resolve(top, [file.parent, file.parent.parent])):
        bases.insert(0, at)
    names, num_classes = _names_of(content, file, bases), _to_int(content.get('nc'))
    common = dict(names=names, num_classes=num_classes, files=(file,), keypoints='kpt_shape' in content)
    for split in SPLITS:
        entries = content.get(split, content.get('valid') if split == 'val' else None)
        entries = entries if isinstance(entries, list) else [entries or '']
        entries = [entry for entry in entries if not (isinstance(entry, str) and entry.strip().lower() in NO_VALUE)]
        if not all(isinstance(entry, str) for entry in entries):
            raise UsageError(f'{file}: {split} is neither a path nor a list of paths')
        paths = [_resolve(entry, bases) for entry in entries]
        missing = next((entry for entry, path in zip(entries, paths) if path is None), '')
        existing_paths = tuple(path for path in paths if path)
        if entries:
            splits[split] = YoloSplit(existing_paths, missing=missing, **common)
    return splits or {'train': YoloSplit((), **common)}


def _missing_train(splits: Mapping[str, YoloSplit]) -> str:
    """Return what is wrong if the training images that a file names do not exist, else an empty text."""
    train = splits.get('train')
    if train is None or train.images:
        return ''
    if not train.missing:
        return 'it names no training images: add train and val'
    return f'its train is {to_one_line(train.missing, 200)}, which is not there: correct it'


def _names_of(content: Mapping, file: Path, bases: Sequence[Path]) -> dict[int, str] | None:
    """Return the name of each class of a data.yaml; its indices may have gaps."""
    names = content.get('names')
    if isinstance(names, str) and names:  # a file, as in darknet
        path = _resolve(names, bases)
        if path is None or not path.is_file():
            raise UsageError(f'{file}: its names are {to_one_line(names, 60)}, neither a list nor a file: correct it')
        return _read_names(path)
    if isinstance(names, list):
        names = dict(enumerate(names))
    if not names:
        return None
    indices = [_to_int(index) for index in names]
    if None in indices or len({*indices}) < len(names) or not all(isinstance(name, str) for name in names.values()):
        raise UsageError(f'{file}: names has to be a list of names, or a dict of indices and names: correct it')
    pairs = sorted(zip(indices, names.values()))
    return {index: name.strip() or f'class {index}' for index, name in pairs}


def _resolve(entry: str, bases: Sequence[Path]) -> Path | None:
    """Return the existing file or folder that a path means, which may have been written for another place.

    Roboflow writes `../train/images` for `train/images` next to the file; absolute paths may be of another machine. So
    what is missing is looked for by ever shorter ends of the path.
    """
    text = os.path.expanduser(entry.replace('\\', '/'))
    for base in bases:
        path = Path(os.path.normpath(base / text))
        if os.path.exists(path):
            return path
    parts = [part for part in split_machine_prefix(text)[0].split('/') if part not in ('..', '.')]
    # Without the name of its split, a path may mean the images of another one.
    last_start = max((i for i, part in enumerate(parts) if part.lower() in SPLIT_OF_NAME), default=len(parts) - 1)
    for start in range(last_start + 1):
        for base in bases:
            path = base.joinpath(*parts[start:])
            if os.path.exists(path):
                return path
    return None


def _is_data_yaml(file: Path) -> bool:
    has_keys = has_marks(r'(?m)^["\']?(names|nc)["\']?\s*:', '' if file.stem.lower() == 'data' else YAML_SPLIT_MARK)
    return file.suffix.lower() in YAML_SUFFIXES and has_keys(read_ends(file, MAX_YAML_BYTES))


def _is_obj_data(file: Path) -> bool:
    return file.suffix.lower() == '.data' and has_marks(r'(?m)^\s*train\s*=')(read_ends(file, 2**16))


def _read_obj_data(file: Path, tree: FolderTree) -> dict[str, YoloSplit]:
    """Read a file of darknet, whose paths are relative to where darknet was started."""
    root = tree.root if tree.root.is_dir() else file.parent
    pairs = (line.split('=', 1) for line in read_lines(file) if '=' in line)
    settings = {key.strip(): value.strip() for key, value in pairs}
    bases, splits = [file.parent, root], {}
    names_file = _resolve(settings.get('names', ''), bases) if settings.get('names') else None
    names_file = names_file if names_file and names_file.is_file() else _find_names_file(tree)
    common = dict(names=_read_names(names_file), files=tuple(filter(None, (file, names_file))))
    for split, key in (('train', 'train'), ('val', 'valid'), ('test', 'test')):
        entry = settings.get(key, settings.get(split))
        path = _resolve(entry, bases) if entry else None
        if entry:
            splits[split] = YoloSplit((path,) if path else (), missing='' if path else entry, **common)
    if _missing_train(splits):
        raise UsageError(f'{file}: {_missing_train(splits)}')
    train = splits['train'].images if 'train' in splits else None  # often named for all splits
    return {split: source for split, source in splits.items() if split == 'train' or source.images != train}


def _find_names_file(tree: FolderTree) -> Path | None:
    files = (folder / name for folder, names in tree.folders for name in NAMES_FILES if name in names)
    return next(files, None)


def _read_names(file: Path | None) -> dict[int, str] | None:
    """Read one name per line; empty lines at the end are none."""
    if file is None:
        return None
    try:
        lines = read_text(file, errors='replace').rstrip().split('\n')
    except OSError as error:
        raise UsageError(f'{file}: {error.strerror}') from error
    return {index: line.strip() or f'class {index}' for index, line in enumerate(lines)} if lines != [''] else None


def _folders_by_split(tree: FolderTree) -> dict[str, tuple[Path, ...]]:
    """Return the topmost folders of images that are named after each split, all as deep as the first."""
    by_split: dict[str, list[Path]] = {}
    for folder, files in tree.folders:
        parts = folder.relative_to(tree.root).parts
        split_match = split_of_folders(parts)
        if split_match is None or not any(is_image(Path(file)) for file in files) or are_of_masks(parts):
            continue
        top = tree.root.joinpath(*parts[: split_match[1] + 1])
        folders = by_split.setdefault(split_match[0], [])
        if top not in folders:
            folders.append(top)
    depth = min((len(top.parts) for folders in by_split.values() for top in folders), default=0)
    by_split = {split: tuple(top for top in by_split.get(split, ()) if len(top.parts) == depth) for split in SPLITS}
    return {split: folders for split, folders in by_split.items() if folders}


def _to_int(value: object) -> int | None:
    return int(value) if re.fullmatch(r'\d{1,9}', str(value)) else None
