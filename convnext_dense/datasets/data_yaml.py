"""A data.yaml that says where everything of a data set is, in place of flags.

    path: ../photos            # folder to which the paths below are relative (default: that of this file)
    train:
      images: all/train
      annotations: train.json  # or a folder of labels; or instead masks: a folder of segmentation masks
    val:
      images: all/val
      annotations: val.json
    classes: [car, truck=vehicle]

Other keys are as the flags `--format`, `--class-attribute`, `--ignore`, `--val-fraction`, `--channels`,
`--mask-threshold` and `--ignore-other-colors`. Unlike in a data.yaml of YOLO, `train` and `val` are mappings.
"""

import difflib
import os
from collections.abc import Mapping
from pathlib import Path

from ..errors import UsageError
from .box_formats import FORMAT_KEYS
from .channels import parse_channels
from .files import read_yaml, to_one_line
from .request import DatasetRequest

SPLITS = ('train', 'val')
# What a split has, and the flags in whose place it stands.
PLACES = {'images': 'image_dirs', 'annotations': 'ann_files', 'masks': 'mask_dirs'}
OPTIONS = ('classes', 'format', 'class_attribute', 'ignore', 'val_fraction')
OPTIONS += ('channels', 'mask_threshold', 'ignore_other_colors')
SWITCHES = {'true': True, 'yes': True, 'false': False, 'no': False, '': False}  # every value is read as text
YOLO_KEYS = ('names', 'nc')
FILE_NAMES = ('data.yaml', 'data.yml')
SUFFIXES = ('.yaml', '.yml')


def read_data_yaml(path: Path) -> DatasetRequest | None:
    """Read a data.yaml of this package.

    Args:
        path: the file, or a folder that may hold one.

    Returns:
        The data set; None if there is no such file, or it is one of YOLO.

    Raises:
        UsageError: a key or a path is missing, unknown or of the wrong kind.
    """
    candidates = [path / name for name in FILE_NAMES] if path.is_dir() else [path]
    file = next((each for each in candidates if each.suffix.lower() in SUFFIXES and each.is_file()), None)
    content = read_yaml(file) if file else None
    if not isinstance(content, dict) or not any(isinstance(content.get(split), dict) for split in SPLITS):
        return None
    yolo_key = next((key for key in YOLO_KEYS if key in content), None)
    if yolo_key:
        raise UsageError(
            f'{file}: {yolo_key} is of a data.yaml of YOLO, whose train and val are paths; here they are mappings of '
            f'images and annotations, and classes is the list of names'
        )
    options = {key.replace('-', '_'): value for key, value in content.items()}
    _check_keys(options, ('path', *SPLITS, *OPTIONS), str(file))
    root = Path(os.path.normpath(file.parent / os.path.expanduser(_text(options.get('path', '.'), file, 'path'))))
    places: dict[str, dict[str, str]] = {name: {} for name in PLACES.values()}
    for split in SPLITS:
        if split in options:
            for key, value in _split_paths(options[split], root, f'{file}: {split}').items():
                places[PLACES[key]][split] = value
    if not places['ann_files'].keys().isdisjoint(places['mask_dirs']) or (places['ann_files'] and places['mask_dirs']):
        raise UsageError(f'{file}: annotations and masks are for different tasks: give one of them')
    request = DatasetRequest(str(root), **places, data_yaml=str(file))
    return _with_options(request, options, file)


def _split_paths(value: object, root: Path, where: str) -> dict[str, str]:
    """Return the paths of a split."""
    if not isinstance(value, dict):
        raise UsageError(f'{where} has to be a mapping of images and annotations (or masks)')
    _check_keys(value, tuple(PLACES), where)
    paths = {}
    for key, text in value.items():
        paths[key] = os.path.normpath(root / os.path.expanduser(_text(text, where, key)))
        exists = os.path.exists(paths[key]) if key == 'annotations' else os.path.isdir(paths[key])
        if not exists:
            kind = 'does not exist' if key == 'annotations' else 'is no folder'
            raise UsageError(f"{where}: {key} '{to_one_line(paths[key])}' {kind}")
    if not {'annotations', 'masks'} & paths.keys():
        raise UsageError(f'{where} needs annotations (a file, or a folder of labels) or masks')
    if 'masks' in paths and 'images' not in paths:
        raise UsageError(f'{where} needs images')
    return paths


def _with_options(request: DatasetRequest, options: Mapping, file: Path) -> DatasetRequest:
    """Set the options of a request as those of the command line are."""
    classes, format, switch = (options.get(key) for key in ('classes', 'format', 'ignore_other_colors'))
    is_list = isinstance(classes, list) and all(isinstance(name, str) for name in classes)
    if classes is not None and not (classes and (is_list or isinstance(classes, str))):
        raise UsageError(f'{file}: classes has to be a list of names, such as [car, truck=vehicle], or a file of them')
    if format is not None and format not in FORMAT_KEYS:
        raise UsageError(f"{file}: format '{to_one_line(format, 40)}' is unknown: give one of {', '.join(FORMAT_KEYS)}")
    if switch is not None and not (isinstance(switch, str) and switch.lower() in SWITCHES):
        raise UsageError(f'{file}: ignore_other_colors has to be true or false')
    if isinstance(classes, str):
        near = request.root / classes
        classes = str(near) if near.is_file() else classes
    try:
        ignore = options.get('ignore')
        ignore = (
            None if ignore is None else [int(value) for value in (ignore if isinstance(ignore, list) else [ignore])]
        )
        fraction = None if options.get('val_fraction') is None else float(options['val_fraction'])
        threshold = None if options.get('mask_threshold') is None else int(options['mask_threshold'])
    except (TypeError, ValueError) as error:
        text = 'ignore is a list of integers, val_fraction and mask_threshold are numbers: correct it'
        raise UsageError(f'{file}: {text}') from error
    channels = options.get('channels')
    channels = ','.join(map(str, channels)) if isinstance(channels, list) else channels
    try:
        request.channels = parse_channels(None if channels is None else str(channels))
    except UsageError as error:
        raise UsageError(f'{file}: {error}') from error
    request.mask_threshold, request.ignore_other_colors = threshold, SWITCHES[(switch or '').lower()]
    request.classes, request.ignore_labels, request.val_fraction = classes, ignore, fraction
    request.format, request.class_attribute = format, options.get('class_attribute')
    return request


def _text(value: object, where: object, key: str) -> str:
    if not isinstance(value, str) or not value:
        raise UsageError(f'{where}: {key} has to be a path')
    return value


def _check_keys(content: Mapping, known: tuple[str, ...], where: str) -> None:
    unknown = next((key for key in content if key not in known), None)
    if unknown is not None:
        near = difflib.get_close_matches(unknown, known, 1)
        hint = f'did you mean {near[0]}?' if near else f'the keys are {", ".join(known)}'
        raise UsageError(f"{where}: unknown key '{to_one_line(unknown, 40)}': {hint}")
