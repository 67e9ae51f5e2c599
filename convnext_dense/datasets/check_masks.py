"""Label maps, checked: which values are which classes, and which pairs of an image and a label map are usable."""

import csv
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..errors import UsageError
from .check_images import ImageInfo, MaskInfo
from .diagnostics import Report
from .files import is_text, read_text, shown, why
from .image_sizes import Limit, too_thin
from .toy_shapes import LABELS, PALETTE

BACKGROUND_NAMES = ('background', 'unlabeled', 'unlabelled', 'void', 'ignore')
IGNORE_INDEX = 255  # in what mmseg reads
MANY = 10  # labels that a report counts up
LONGEST = 300  # characters of a line of a classes file
NUMBER = re.compile(r'-?\d{1,20}(\.\d{1,20})?')
NUMBERED = re.compile(r'(-?\d{1,20}) ?[:, ] ?(\D.*)')  # a line of a label and a name
COLOR_RE = re.compile(r'[:, ] ?(\d+)[, ]+(\d+)[, ]+(\d+)(:.*)?$')  # at the end of a line; CVAT writes more behind it
# The classes of known data sets: mmseg's names of them, from which their names and colours are taken.
KNOWN = {'ade20k': 'ADE20KDataset', 'cityscapes': 'CityscapesDataset', 'voc': 'PascalVOCDataset'}
# Cityscapes' labelIds that are evaluated, in the order of their classes.
CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)


class LabelSpec(NamedTuple):
    """Names and colours (RGB) of classes; `values` are the labels of those in order, None where they are 0, 1, ..., or
    1, 2, ... with 0 ignored; `ignored` are the labels that are no class."""

    names: list[str] | None
    palette: list[list[int]] | None = None
    ignored: frozenset[int] = frozenset({IGNORE_INDEX})
    values: Sequence[int] | None = None

    @property
    def labels(self) -> Sequence[int]:
        """The label of each class."""
        first = 1 if 0 in self.ignored else 0
        return range(first, first + len(self.names)) if self.values is None else self.values

    @property
    def label_of(self) -> dict[int, int]:
        """The class of each label, IGNORED included."""
        others = dict.fromkeys((*self.ignored, *range(max(self.values or [0]) + 1 if self.values else 0)), IGNORE_INDEX)
        return {**others, **{v: i for i, v in enumerate(self.labels) if v not in self.ignored}}

    @property
    def settings(self) -> dict:
        """What a data set of mmseg is told: whether 0 is ignored and the rest moves down, and what else changes."""
        reduced = self.values is None and 0 in self.ignored
        changed = {
            v: c for v, c in self.label_of.items() if c != ((v or 256) - 1 if reduced else v) and v != IGNORE_INDEX
        }
        # Ours is looked up after mmseg moved the labels down.
        label_map = [[v - reduced, c] for v, c in changed.items() if not (reduced and v == 0)]
        return dict(reduce_zero_label=reduced, label_map=label_map or None)


def infer_label_spec(root: Path, layout: str, more: str, asked: str | None, ignore: Sequence[int] | None) -> LabelSpec:
    """The classes of a folder: as asked for by a file or a known name, or by what the folder is.

    Raises:
        UsageError: a classes file that cannot be read.
    """
    odd = next((label for label in ignore or () if not 0 <= label <= IGNORE_INDEX), None)
    if odd is not None:
        raise UsageError(f'--ignore {shown(odd, 20)}: labels are 0 to {IGNORE_INDEX}')
    file = next((f for f in class_files(root, None) if f.exists()), None)
    known = asked if asked in KNOWN else None if asked or file else _known(root, layout, more)
    if known:
        names, palette = _of_mmseg(known)
    elif asked:
        names, palette = read_classes(Path(asked))
    elif (root / 'shapes.json').exists():
        names, palette = list(LABELS), PALETTE
    else:
        names, palette = read_classes(file) if file else (None, None)
    zero = known == 'ade20k' or ((root / 'shapes.json').exists() and not asked)
    ignored = frozenset({IGNORE_INDEX, *(ignore or []), *([0] if zero else [])})
    is_named = names and len(names) > 1 and names[0].strip('_').lower() in BACKGROUND_NAMES
    if not zero and 0 in ignored and is_named:  # and yet ignored
        names, palette = names[1:], palette and palette[1:]
    ids = known == 'cityscapes' and more.endswith('labelIds')
    return LabelSpec(names, palette, ignored, CITYSCAPES_IDS if ids else None)


def class_files(root: Path, asked: str | None) -> list[Path]:
    """Where names of classes may be."""
    names = ('classes.txt', 'classes.json', 'class_names.txt', 'labelmap.txt', 'labels.txt', 'train/_classes.csv')
    return [Path(asked)] if asked else [root / name for name in names]


def read_classes(path: Path) -> tuple[list[str], list[list[int]] | None]:
    """The names and, where they are given, the colours (RGB) of classes in a file: a name a line, also followed by
    `: r,g,b` or ` r g b`; JSON, a list of names or a dict of names and labels or colours; or Roboflow's _classes.csv.

    Raises:
        UsageError: the file is not there, is none of these, or has a name twice.
    """
    try:
        text = read_text(path, errors='replace')
    except FileNotFoundError as error:
        known = ', '.join(KNOWN)
        raise UsageError(f"no classes file '{path}': give a file of a name a line, or one of {known}") from error
    except OSError as error:
        raise UsageError(f'{path}: {error.strerror}: give a file of a name a line') from error
    try:
        found = READERS.get(path.suffix, _parse_lines)(text)
        if len(found) <= IGNORE_INDEX:
            names, colours = [_name(name) for name, _ in found], [_parse_color(colour) for _, colour in found]
    except (ValueError, LookupError, ArithmeticError, RecursionError, csv.Error) as error:
        raise UsageError(f'{path} is no list of classes ({why(error)}): give a name a line') from error
    if len(found) > IGNORE_INDEX:
        raise UsageError(f'{path} names {len(found):,} classes: label maps of 8 bits hold {IGNORE_INDEX} at most')
    twice = next((name for name, n in Counter(names).items() if n > 1), None)
    if not names or twice is not None:
        raise UsageError(f'{path} ' + ('names no class' if not names else f"names '{shown(twice)}' twice"))
    return names, colours if all(colours) else None


def infer_class_count(maps: dict[Path, MaskInfo], classes: LabelSpec, root: Path) -> LabelSpec:
    """Classes named by their number, as many as there are labels, for label maps with a palette and no names.

    Raises:
        UsageError: the label maps have no palette, so that nothing says what their values are.
    """
    readable = [m for m in maps.values() if m.counts is not None]
    if not all(m.palette for m in readable):
        raise UsageError(f'{root} does not name its classes: give --classes FILE, a name a line in the order of labels')
    counts = np.sum([m.counts for m in readable], axis=0) if readable else np.zeros(256, int)
    values = [value for value in np.flatnonzero(counts).tolist() if value not in classes.ignored]
    first = 1 if 0 in classes.ignored else 0
    return classes._replace(names=[f'class {i}' for i in range(first, max(values, default=first) + 1)])


def validate_labels(maps: dict[str, MaskInfo], classes: LabelSpec, report: Report) -> None:
    """Report labels that have no name, and a set of classes of which nothing can be learnt, with what to do about it by
    the pixels of all label maps."""
    readable = {path: labels for path, labels in maps.items() if labels.counts is not None}
    counts = sum((labels.counts for labels in readable.values()), np.zeros(256, int))
    used, label_of = np.flatnonzero(counts).tolist(), classes.label_of
    nameless = [label for label in used if label not in label_of]
    if used and len(classes.names) == 1:
        report.add('all', 'single-class', _of_one_class(classes, counts))
    elif IGNORE_INDEX in used and set(used) <= {0, IGNORE_INDEX}:
        report.add('all', 'mask-values-0-and-255', f'the pixels are {_shares(counts, used)}')
    elif nameless:
        those = [Path(path).name for path, labels in readable.items() if labels.counts[nameless].any()]
        where = f'in {those[0]}' if len(those) == 1 else f'in {len(those):,} label maps, such as {those[0]}'
        report.add('all', 'label-out-of-range', _of_nameless(nameless, classes, counts, where))


def _of_one_class(classes: LabelSpec, counts: np.ndarray) -> str:
    """What to do about a set of one class, as the pixels show it."""
    used = np.flatnonzero(counts).tolist()
    labels = [label for label in used if label != IGNORE_INDEX]
    other = 'the classes' if classes.names[0].lower() in BACKGROUND_NAMES else 'the background'
    if len(used) == 1:
        way = f'all pixels are {used[0]}: label maps are needed that show at least two classes'
    elif len(labels) > MANY:
        way = 'name a class for each label, if these are label maps'
    elif labels == list(range(len(labels))) and len(labels) > 1:
        way = f'name {other}, too: {len(labels)} names, for labels {_listed(labels)}'
    elif len(labels) > 1:
        way = f'name {other}, too, and write the labels {_listed(labels)} as 0 to {len(labels) - 1}'
    else:
        those = f'{labels[0]} and 255, which is ignored, as 0 and 1'
        those = f'255, which is ignored, as {1 - labels[0]}' if labels[0] < 2 else those
        way = f'name {other}, too: two names, for labels 0 and 1, and write {those}'
    way += ', without --ignore 0' if 0 in classes.ignored and 0 in labels and len(used) > 1 else ''
    return f'{classes.names[0]} alone, where the pixels are {_shares(counts, used)}: {way}'


def _of_nameless(nameless: list[int], classes: LabelSpec, counts: np.ndarray, where: str) -> str:
    """What labels have no name, and what to do about it as the pixels show it."""
    n, label_of, ignored = len(classes.names), classes.label_of, classes.ignored - {IGNORE_INDEX}
    known = [label for label in np.flatnonzero(counts).tolist() if label_of.get(label, IGNORE_INDEX) != IGNORE_INDEX]
    is_next = nameless == [n]
    zero, those = (' '.join(map(str, sorted({*ignored, *more}))) for more in ([0], nameless))
    if is_next and not counts[0] and known:
        way = f'0 is not used: --ignore {zero}'
    elif len(known) < 2:
        way = f'write labels as the numbers of their classes, {classes.labels[0]} to {classes.labels[-1]}'
    elif len(nameless) > MANY:
        way = 'name their classes in --classes FILE, if these are label maps'
    else:
        way = f'name {"its class" if len(nameless) == 1 else "their classes"} in --classes FILE, or --ignore {those}'
        way += f', or, if 0 is no class, --ignore {zero}' if is_next else ''
    if len(nameless) > 1:
        shares = f'{_shares(counts, nameless)} of the pixels, {where}'
        return f'{len(nameless)} labels are used and have no names ({shares}): {way}'
    shares = f'{_share(counts, nameless[0])} of the pixels, {where}'
    shares += f'; label 0 has {_share(counts, 0)}' if counts[0] and 0 not in ignored else ''
    return f'label {nameless[0]} is used and has no name ({shares}): {way}'


def _listed(labels: list[int]) -> str:
    return f'{", ".join(map(str, labels[:-1]))} and {labels[-1]}'


def _share(counts: np.ndarray, label: int) -> str:
    share = 100 * counts[label] / counts.sum()
    return f'{share:.1f} %' if share >= 0.05 else 'under 0.1 %'


def _shares(counts: np.ndarray, labels: list[int]) -> str:
    return ', '.join(f'{label}: {_share(counts, label)}' for label in labels[:MANY]) + ', ...' * (len(labels) > MANY)


def validate_pairs(
    pairs: list[tuple[Path, Path]],
    seen: dict[str, ImageInfo],
    maps: dict[str, MaskInfo],
    classes: LabelSpec,
    turn: bool,
    split: str,
    report: Report,
    limit: Limit,
) -> tuple[list[tuple[Path, Path]], np.ndarray]:
    """The usable pairs of a split, and the pixels of each class in them."""
    label_of, kept, total = classes.label_of, [], np.zeros(len(classes.names), int)
    for image, labels in pairs:
        facts, found = seen[str(image)], maps[str(labels)]
        size = (facts.width, facts.height)
        if facts.turned and not turn:
            size = size[::-1]
        problem, name = facts.problem, image.name
        if not problem and found.problem:
            problem, name = found.problem, labels.name
        if not problem and size != (found.width, found.height):
            problem = 'mask-size-mismatch'
            name = f'{labels.name}: {found.width} x {found.height}, its image {size[0]} x {size[1]}'
        thin = None if problem else too_thin(size, limit)
        if thin:
            problem, name = thin[0], f'{image.name}: {thin[1]}'
        if problem:
            report.add(split, problem, name)
            continue
        if facts.turned and not turn:
            report.add(split, 'exif-rotated-image', name)
        pixels = np.zeros(len(classes.names), int)
        for value, label in label_of.items():
            if label != IGNORE_INDEX:
                pixels[label] += found.counts[value]
        if not pixels.any() and all(value in label_of for value in np.flatnonzero(found.counts).tolist()):
            report.add(split, 'mask-all-ignored', labels.name)
            continue
        total += pixels
        kept.append((image, labels))
    return kept, total


def _known(root: Path, layout: str, more: str) -> str | None:
    if (root / 'objectInfo150.txt').exists():
        return 'ade20k'
    if more.startswith('_gtFine'):
        return 'cityscapes'
    return 'voc' if layout == 'VOC' and re.fullmatch(r'VOC20\d\d', root.resolve().name) else None


def _of_mmseg(known: str) -> tuple[list[str], list[list[int]]]:
    from mmseg.registry import DATASETS  # mmseg alone knows them, and this module is imported without it
    from mmseg.utils import register_all_modules

    register_all_modules(init_default_scope=False)
    meta = DATASETS.get(KNOWN[known]).METAINFO
    return list(meta['classes']), [list(colour) for colour in meta['palette']]


def _parse_json(text: str) -> list[tuple[object, object]]:
    content = json.loads(text, object_pairs_hook=_without_twins)
    if isinstance(content, dict):
        content = content.get('classes', content)
    if isinstance(content, dict):
        for pairs in ([(label, name) for name, label in content.items()], content.items()):
            if pairs and all(_is_label(label) for label, _ in pairs):
                return _in_order(pairs)
        return list(content.items())
    if not isinstance(content, list):
        raise ValueError('it holds neither a list of names nor a dict')
    odd = next((entry for entry in content if not isinstance(entry, (str, dict))), None)
    if odd is not None or None in content:
        raise ValueError(f'{shown(odd)} is no name')
    entries = [entry if isinstance(entry, dict) else dict(name=entry) for entry in content]
    found = [(entry.get('name'), entry.get('color', entry.get('colour'))) for entry in entries]
    numbered = [(entry['id'], pair) for entry, pair in zip(entries, found) if isinstance(entry.get('id'), (int, float))]
    return [pair for pair, _ in _in_order(numbered)] if numbered and len(numbered) == len(found) else found


def _without_twins(pairs: list[tuple[str, object]]) -> dict:
    """A dict of JSON, where a key that is there twice is said: the first would be lost."""
    twice = next((key for key, n in Counter(key for key, _ in pairs).items() if n > 1), None)
    if twice is not None:
        raise ValueError(f"'{shown(twice)}' is there twice")
    return dict(pairs)


def _is_label(value: object) -> bool:
    """Whether a value could be a label: a number, or one as text. What is no whole number is said later."""
    return isinstance(value, (bool, int, float)) or (isinstance(value, str) and NUMBER.fullmatch(value) is not None)


def _in_order(pairs: Iterable[tuple[object, object]]) -> list[tuple[object, None]]:
    """What belongs to the labels 0, 1, 2, ..., in their order."""
    pairs = list(pairs)
    by_label = {}
    for label, value in pairs:
        number = -1.0 if isinstance(label, bool) else float(label)
        if not (0 <= number < len(pairs) and number.is_integer()):
            raise ValueError(f'label {shown(label)} of {len(pairs)}: labels are 0, 1, 2, ...')
        if int(number) in by_label:
            raise ValueError(f'label {shown(label)} is there twice')
        by_label[int(number)] = value
    return [(by_label[label], None) for label in range(len(pairs))]


def _parse_csv(text: str) -> list[tuple[object, object]]:
    rows = [row for row in list(csv.reader(text.splitlines()))[1:] if row]
    if any(len(row) < 2 or not NUMBER.fullmatch(row[0].strip()) for row in rows):
        raise ValueError('its lines are not a value and a name')
    return _in_order([(row[0].strip(), row[1]) for row in rows])


def _parse_lines(text: str) -> list[tuple[object, object]]:
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith('#')]
    if any(len(line) > LONGEST for line in lines):
        raise ValueError(f'a line of more than {LONGEST} characters')
    lines = [' '.join(line.split()) for line in lines]  # patterns would look at each of many spaces from each of them
    numbered = [NUMBERED.fullmatch(line) for line in lines]
    if lines and all(numbered):
        return _in_order([(m[1], m[2]) for m in numbered])
    colours = [COLOR_RE.search(line, 1) for line in lines]
    return [
        (line[: m.start()].rstrip(), m.groups()[:3]) if m else (line.rstrip(':') or line, None)
        for line, m in zip(lines, colours)
    ]


READERS = {'.json': _parse_json, '.csv': _parse_csv}


def _name(value: object) -> str:
    """A name of a class that texts and files can hold."""
    name = str(value).strip() if isinstance(value, (str, int, float)) and not isinstance(value, bool) else ''
    if not name or len(name) > LONGEST or not is_text(name):
        raise ValueError(f"'{shown(value)}' is no name")
    if '\ufffd' in name:
        raise ValueError(f"'{shown(name)}' is not UTF-8")
    return name


def _parse_color(value: object) -> list[int] | None:
    """A colour; None where there is none, or in words."""
    if isinstance(value, str) and re.fullmatch('#[0-9a-fA-F]{6}', value):
        return list(bytes.fromhex(value[1:]))
    if isinstance(value, (int, float)):
        raise ValueError(f'{shown(value)} is no color')
    if not isinstance(value, (list, tuple)) or len(value) != 3:
        return None
    if not all(isinstance(v, (int, str)) and not isinstance(v, bool) and 0 <= int(v) <= 255 for v in value):
        raise ValueError(f'{shown(value)} is no color: three numbers up to 255')
    return [int(v) for v in value]
