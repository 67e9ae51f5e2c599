"""Files that name the classes of segmentation masks, and their colors: text, JSON, CSV."""

import csv
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from ..errors import UsageError
from .files import folders_in, is_text, parse_error, read_text, to_one_line

MAX_CLASSES = 255  # that 8-bit masks can hold, as 255 is ignored
MAX_LINE_LENGTH = 300  # characters of a line of a classes file
KNOWN_DATASETS = ('ade20k', 'cityscapes', 'voc')  # data sets whose classes mmseg knows
CLASS_FILES = ('classes.txt', 'classes.json', 'class_names.txt', 'labelmap.txt', 'labels.txt', 'train/_classes.csv')
CLASS_FILES += ('class_dict.csv', 'class_dict_seg.csv', 'label_colors.txt', 'palette.json', 'palette.txt')
NUMBER_RE = re.compile(r'-?\d{1,20}(\.\d{1,20})?')
NUMBERED_LINE_RE = re.compile(r'(-?\d{1,20}) ?[:, ] ?(\D.*)')  # a label and a name in a line
# A color at the end of a line; CVAT writes more after it.
COLOR_RE = re.compile(r'[:, ] ?(\d+)[, ]+(\d+)[, ]+(\d+)(:.*)?$')
# A color and a name, as in CamVid's label_colors.txt; or a color alone.
COLOR_FIRST_RE = re.compile(r'(\d{1,3})[, ]+(\d{1,3})[, ]+(\d{1,3})(?:[:, ]+(\D.*))?')


def class_files(root: Path, file: str | Sequence[str] | None) -> list[Path]:
    """Return the files that may name the classes: `file`, or those known in the root; none for names."""
    return [Path(file)] if isinstance(file, str) else [] if file else [root / name for name in CLASS_FILES]


def find_color_table(root: Path, given_file: str | None) -> tuple[Path, list[str], list[list[int]]] | None:
    """Return the file that gives each class a color, the names and the colors; None if there is none.

    Args:
        root: folder of the data set, in which and in whose folders the known files are looked for.
        given_file: the file that may be it; None to look for one.

    Raises:
        UsageError: a file cannot be read, or two classes have the same color.
    """
    folders = [root] if given_file else [root, *folders_in(root)]
    for file in (file for folder in folders for file in class_files(folder, given_file) if file.exists()):
        names, colors = read_classes(file)
        if colors:
            duplicate = _first_duplicate(map(tuple, colors))
            if duplicate is not None:
                name, other_name, *_ = (name for name, color in zip(names, colors) if tuple(color) == duplicate)
                raise UsageError(f'{file}: {name} and {other_name} have the same color: give each class one of its own')
            return file, names, colors
    return None


def read_classes(path: Path) -> tuple[list[str], list[list[int]] | None]:
    """Read the names and colors of classes.

    Args:
        path: a text file with one name per line, which `: r,g,b` or ` r g b` may follow, or `r g b` begin; JSON, a list
            of names or a dict of names and labels or colors; CSV of names and colors; or Roboflow's _classes.csv.

    Returns:
        The names, and the RGB colors if each class has one.

    Raises:
        UsageError: the file does not exist, is none of these, or has a name twice.
    """
    try:
        text = read_text(path, errors='replace')
    except FileNotFoundError as error:
        keys = ', '.join(KNOWN_DATASETS)
        raise UsageError(f"no classes file '{path}': give a file with one name per line, or one of {keys}") from error
    except OSError as error:
        raise UsageError(f'{path}: {error.strerror}: give a file with one name per line') from error
    try:
        entries = PARSERS.get(path.suffix, _parse_lines)(text)
        if len(entries) <= MAX_CLASSES:
            names, colors = [_parse_name(name) for name, _ in entries], [_parse_color(color) for _, color in entries]
    except (ValueError, LookupError, ArithmeticError, RecursionError, csv.Error) as error:
        raise UsageError(f'{path} is not a list of classes ({parse_error(error)}): give one name per line') from error
    if len(entries) > MAX_CLASSES:
        raise UsageError(f'{path} names {len(entries):,} classes: 8-bit masks hold {MAX_CLASSES} at most')
    duplicate = _first_duplicate(names)
    if not names or duplicate is not None:
        raise UsageError(f'{path} ' + ('names no class' if not names else f"names '{to_one_line(duplicate)}' twice"))
    return names, colors if all(colors) else None


def _parse_json(text: str) -> list[tuple[object, object]]:
    content = json.loads(text, object_pairs_hook=_reject_duplicate_keys)
    if isinstance(content, dict):
        content = content.get('classes', content)
    if isinstance(content, dict):
        for pairs in ([(label, name) for name, label in content.items()], content.items()):
            if pairs and all(_is_label(label) for label, _ in pairs):
                return _sort_by_label(pairs)
        return list(content.items())
    if not isinstance(content, list):
        raise ValueError('it holds neither a list of names nor a dict')
    invalid = next((entry for entry in content if not isinstance(entry, (str, dict))), None)
    if invalid is not None or None in content:
        raise ValueError(f'{to_one_line(invalid)} is not a name')
    entries = [entry if isinstance(entry, dict) else dict(name=entry) for entry in content]
    pairs = [(entry.get('name'), entry.get('color', entry.get('colour'))) for entry in entries]
    numbered = [(entry['id'], pair) for entry, pair in zip(entries, pairs) if isinstance(entry.get('id'), (int, float))]
    return [pair for pair, _ in _sort_by_label(numbered)] if numbered and len(numbered) == len(pairs) else pairs


def _first_duplicate(values: Iterable[str]) -> str | None:
    return next((value for value, n in Counter(values).items() if n > 1), None)


def _reject_duplicate_keys(pairs: list[tuple[str, object]]) -> dict:
    """Make a dict of JSON; of a duplicate key the first value would be lost."""
    duplicate = _first_duplicate(key for key, _ in pairs)
    if duplicate is not None:
        raise ValueError(f"the key '{to_one_line(duplicate)}' occurs twice")
    return dict(pairs)


def _is_label(value: object) -> bool:
    """Return whether a value could be a label: a number, or one as text; `_sort_by_label` rejects non-integers."""
    return isinstance(value, (bool, int, float)) or (isinstance(value, str) and NUMBER_RE.fullmatch(value) is not None)


def _sort_by_label(pairs: Iterable[tuple[object, object]]) -> list[tuple[object, None]]:
    """Sort values by their labels, which have to be 0, 1, 2, ..."""
    pairs = list(pairs)
    by_label = {}
    for label, value in pairs:
        number = -1.0 if isinstance(label, bool) else float(label)
        if not (0 <= number < len(pairs) and number.is_integer()):
            raise ValueError(f'label {to_one_line(label)} of {len(pairs)}: labels are 0, 1, 2, ...')
        if int(number) in by_label:
            raise ValueError(f'label {to_one_line(label)} occurs twice')
        by_label[int(number)] = value
    return [(by_label[label], None) for label in range(len(pairs))]


def _parse_csv(text: str) -> list[tuple[object, object]]:
    lines = [row for row in csv.reader(text.splitlines()) if row]
    if lines and len(lines[-1]) >= 4 and all(value.strip().isdecimal() for value in lines[-1][-3:]):
        lines = lines if lines[0][-1].strip().isdecimal() else lines[1:]  # a header, such as name,r,g,b
        return [(row[-4], [value.strip() for value in row[-3:]]) for row in lines if len(row) >= 4]
    rows = lines[1:]
    if any(len(row) < 2 or not NUMBER_RE.fullmatch(row[0].strip()) for row in rows):
        raise ValueError('its lines are not a value and a name')
    return _sort_by_label([(row[0].strip(), row[1]) for row in rows])


def _parse_lines(text: str) -> list[tuple[object, object]]:
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith('#')]
    if any(len(line) > MAX_LINE_LENGTH for line in lines):
        raise ValueError(f'a line of more than {MAX_LINE_LENGTH} characters')
    lines = [' '.join(line.split()) for line in lines]  # the patterns take quadratic time on runs of spaces
    color_matches = [COLOR_FIRST_RE.fullmatch(line) for line in lines]
    if lines and all(color_matches):
        return [(m[4] or f'class {i}', m.groups()[:3]) for i, m in enumerate(color_matches)]
    number_matches = [NUMBERED_LINE_RE.fullmatch(line) for line in lines]
    if lines and all(number_matches):
        return _sort_by_label([(m[1], m[2]) for m in number_matches])
    colors = [COLOR_RE.search(line, 1) for line in lines]
    return [
        (line[: m.start()].rstrip(), m.groups()[:3]) if m else (line.rstrip(':') or line, None)
        for line, m in zip(lines, colors)
    ]


PARSERS = {'.json': _parse_json, '.csv': _parse_csv}


def _parse_name(value: object) -> str:
    """Return a class name that can be printed and written to a file, or raise ValueError."""
    name = str(value).strip() if isinstance(value, (str, int, float)) and not isinstance(value, bool) else ''
    if not name or len(name) > MAX_LINE_LENGTH or not is_text(name):
        raise ValueError(f"'{to_one_line(value)}' is not a name")
    if '\ufffd' in name:
        raise ValueError(f"'{to_one_line(name)}' is not UTF-8")
    return name


def _parse_color(value: object) -> list[int] | None:
    """Return an RGB color, or None where there is none or one in words."""
    if isinstance(value, str) and re.fullmatch('#[0-9a-fA-F]{6}', value):
        return list(bytes.fromhex(value[1:]))
    if isinstance(value, (int, float)):
        raise ValueError(f'{to_one_line(value)} is not a color')
    if not isinstance(value, (list, tuple)) or len(value) != 3:
        return None
    if not all(isinstance(v, (int, str)) and not isinstance(v, bool) and 0 <= int(v) <= 255 for v in value):
        raise ValueError(f'{to_one_line(value)} is not a color: give three numbers up to 255')
    return [int(v) for v in value]
