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

from ..config.tree import as_list
from ..errors import UsageError
from .box_formats import FORMAT_KEYS
from .channels import parse_channels
from .files import read_yaml, to_one_line
from .request import DatasetRequest

SPLITS = ('train', 'val')
# Keys of a split, and the fields of `DatasetRequest` that they set.
PLACES = {'images': 'image_dirs', 'annotations': 'ann_files', 'masks': 'mask_dirs'}
SWITCHES = {'true': True, 'yes': True, 'false': False, 'no': False, '': False}  # every value is read as text
YOLO_KEYS = ('names', 'nc')
FILE_NAMES = ('data.yaml', 'data.yml')
SUFFIXES = ('.yaml', '.yml')


def _parse_names(value: object) -> list[str] | str:
    if not value or not all(isinstance(name, str) and name for name in as_list(value)):
        raise ValueError(value)
    return value


# Parser of the value of each key, which raises ValueError or the like, and what the value has to be.
OPTIONS = {
    'classes': (_parse_names, 'has to be a list of names, such as [car, truck=vehicle], or a file of them'),
    'format': ({key: key for key in FORMAT_KEYS}.__getitem__, f'is unknown: give one of {", ".join(FORMAT_KEYS)}'),
    'class_attribute': (str, 'has to be a name'),
    'ignore': (lambda value: [int(number) for number in as_list(value)], 'is a list of integers: correct it'),
    'val_fraction': (float, 'is a number: correct it'),
    'channels': (lambda value: parse_channels(','.join(map(str, as_list(value)))), 'is a list of numbers: correct it'),
    'mask_threshold': (int, 'is a number: correct it'),
    'ignore_other_colors': (lambda text: SWITCHES[text.lower()], 'has to be true or false'),
}


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
    file = next((path for path in candidates if path.suffix.lower() in SUFFIXES and path.is_file()), None)
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
    if places['ann_files'] and places['mask_dirs']:
        raise UsageError(f'{file}: annotations and masks are for different tasks: give one of them')
    return DatasetRequest(str(root), **places, data_yaml=str(file), **_parse_options(options, root, file))


def _split_paths(value: object, root: Path, place: str) -> dict[str, str]:
    """Return the paths of a split."""
    if not isinstance(value, dict):
        raise UsageError(f'{place} has to be a mapping of images and annotations (or masks)')
    _check_keys(value, tuple(PLACES), place)
    paths = {}
    for key, text in value.items():
        paths[key] = os.path.normpath(root / os.path.expanduser(_text(text, place, key)))
        exists = os.path.exists(paths[key]) if key == 'annotations' else os.path.isdir(paths[key])
        if not exists:
            kind = 'does not exist' if key == 'annotations' else 'is no folder'
            raise UsageError(f"{place}: {key} '{to_one_line(paths[key])}' {kind}")
    if not {'annotations', 'masks'} & paths.keys():
        raise UsageError(f'{place} needs annotations (a file, or a folder of labels) or masks')
    if 'masks' in paths and 'images' not in paths:
        raise UsageError(f'{place} needs images')
    return paths


def _parse_options(options: Mapping, root: Path, file: Path) -> dict:
    """Return the fields of `DatasetRequest` that options set.

    Raises:
        UsageError: the value of one is of the wrong kind.
    """
    fields = {}
    for key, (parse, requirement) in OPTIONS.items():
        if key not in options:
            continue
        try:
            fields['ignore_labels' if key == 'ignore' else key] = parse(options[key])
        except UsageError as error:
            raise UsageError(f'{file}: {error}') from error
        except (TypeError, ValueError, LookupError, AttributeError) as error:
            raise UsageError(f'{file}: {key} {requirement}') from error
    if isinstance(fields.get('classes'), str) and (root / fields['classes']).is_file():
        fields['classes'] = str(root / fields['classes'])
    return fields


def _text(value: object, place: object, key: str) -> str:
    if not isinstance(value, str) or not value:
        raise UsageError(f'{place}: {key} has to be a path')
    return value


def _check_keys(content: Mapping, known_keys: tuple[str, ...], place: str) -> None:
    unknown = next((key for key in content if key not in known_keys), None)
    if unknown is not None:
        close_keys = difflib.get_close_matches(unknown, known_keys, 1)
        hint = f'did you mean {close_keys[0]}?' if close_keys else f'the keys are {", ".join(known_keys)}'
        raise UsageError(f"{place}: unknown key '{to_one_line(unknown, 40)}': {hint}")
