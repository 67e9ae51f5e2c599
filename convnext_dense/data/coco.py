"""COCO's dicts of any origin, checked and made plain: what training and evaluation then read has the same classes in
the same order in all splits, sound annotations alone, and images that can be read."""

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from ..errors import UsageError
from .images import Seen
from .layouts import read_json
from .report import Report

KEYS = ('images', 'annotations', 'categories')
SMALL = 32  # pixels: filter_cfg.min_size of the recipes
FAR = 10  # times the longer side of an image, beyond which coordinates are a mistake
SLACK = 1  # pixels that a box may reach out of its image unsaid: rounding, and whether pixels count from 0 or 1


def learnt(annotations: list[dict], images: Iterable[dict], split: str) -> list[dict]:
    """The annotations that mmdet learns from or evaluates by: no crowd, nothing under a pixel, and in training no image
    under 32 pixels."""
    least = SMALL if split == 'train' else 0
    large = {image['id'] for image in images if min(image['width'], image['height']) >= least}
    return [a for a in annotations if not a['iscrowd'] and min(a['bbox'][2:]) >= 1 and a['image_id'] in large]


def read_coco(path: Path, split: str = 'train') -> dict:
    """The content of a COCO json file; that of a test split may be without annotations.

    Raises:
        UsageError: it is not whole, or not COCO.
    """
    content = read_json(path)
    if split == 'test' and isinstance(content, dict):
        content.setdefault('annotations', [])
    if not isinstance(content, dict):
        raise UsageError(f'{path} is not COCO: it holds a list, COCO a dict of {", ".join(KEYS)}')
    missing = [key for key in KEYS if not isinstance(content.get(key), list)]
    if missing:
        there = ', '.join(map(str, list(content)[:5])) or 'nothing'
        raise UsageError(f'{path} is not COCO: no list of {" and ".join(missing)} (it has {there})')
    return {**content, 'images': [i if isinstance(i, dict) else {} for i in content['images']]}


def names_in(coco: dict) -> list[str]:
    """The file names of a file's images."""
    return [image['file_name'] for image in coco['images'] if isinstance(image.get('file_name'), str)]


def divide(coco: dict, held_out: set[str]) -> tuple[dict, dict]:
    """A file in two: without the images of these names, and these alone. What belongs to no image stays in the first,
    where it is reported."""
    ids = {_id(image.get('id')) for image in coco['images'] if image.get('file_name') in held_out}
    parts = []
    for second in (False, True):
        images = [image for image in coco['images'] if (image.get('file_name') in held_out) == second]
        annotations = [
            a for a in coco['annotations'] if (isinstance(a, dict) and _id(a.get('image_id')) in ids) == second
        ]
        parts.append({**coco, 'images': images, 'annotations': annotations})
    return tuple(parts)


def classes_of(coco: dict, split: str, report: Report) -> list[str]:
    """The names of the classes in the file's order. Names that are there twice are one class, and a name that only
    groups the others, as Roboflow writes it, is none."""
    used = Counter(_id(a.get('category_id')) for a in coco['annotations'] if isinstance(a, dict))
    categories, ids, names = coco['categories'], set(), []
    groups = {c.get('supercategory') for c in categories if isinstance(c, dict)}
    for category in categories:
        name, number = (category.get('name'), _id(category.get('id'))) if isinstance(category, dict) else (None, None)
        if name is None or number is None:
            report.add(split, 'category without id or name', category)
        elif number in ids:
            report.add(split, 'category id twice', f'{number} ({name})')
        elif not used[number] and name in groups and category.get('supercategory') in (None, '', 'none'):
            report.add(split, 'group of classes', name)
        elif str(name) in names:
            report.add(split, 'category name twice', name)
        else:
            names.append(str(name))
        ids.add(number)
    numbers = sorted(number for number in ids if isinstance(number, int))
    if names and numbers and numbers[-1] - numbers[0] >= len(numbers):
        report.add(split, 'gaps in category ids', f'{len(numbers)} ids up to {numbers[-1]}')
    return names


def match_categories(coco: dict, train: dict, classes: Sequence[str], split: str, report: Report) -> dict:
    """The index of its class for each category id of a file, by name; annotations of others are left out."""
    of_train = {_id(c.get('id')): str(c.get('name')) for c in train['categories'] if isinstance(c, dict)}
    ours = [c for c in coco['categories'] if isinstance(c, dict) and _id(c.get('id')) is not None]
    names = {str(c.get('name')) for c in ours}
    used = {_id(a.get('category_id')) for a in _dicts(coco['annotations'])}
    found = {}
    for category in ours:
        number, name = _id(category['id']), str(category.get('name'))
        there = of_train.get(number)
        if name in classes:
            found[number] = list(classes).index(name)
            if train is not coco and there != name and name in of_train.values():
                report.add(split, 'category with other id', name)
        elif train is not coco and there in classes and there not in names:
            report.add(split, 'category named otherwise', f'{number} is {name}, in train {there}')
        elif number in used:
            report.add(split, 'category without a class', name)
            found[number] = None
    return found


def has_masks(coco: dict, split: str, report: Report) -> bool:
    """Whether most annotations of a file have a mask."""
    annotations = _dicts(coco['annotations'])
    n = sum(bool(a.get('segmentation')) for a in annotations)
    if 0 < n < len(annotations) / 2:
        report.add(split, 'masks of few', f'{n:,} of {len(annotations):,}', n)
    return n > 0 and n >= len(annotations) / 2


def check_images(coco: dict, images, seen: dict[str, Seen], turn: bool, split: str, report: Report) -> dict:
    """The usable images of a file by their id: dicts of id, file_name, width and height. `images` is a
    detection.Images."""
    found, names = {}, set()
    for image in coco['images']:
        number, name = _id(image.get('id')), image.get('file_name')
        if number is None or not isinstance(name, str) or not name:
            report.add(split, 'image without id or name', name or f'id {number}')
            continue
        place = images.find(name)
        facts = seen.get(place.path, Seen())
        given = tuple(image.get(key) for key in ('width', 'height'))
        sizes = (facts.width, facts.height)
        if facts.turned and not turn:
            sizes = sizes[::-1]
        problem, example = facts.problem, name
        if number in found:
            problem = 'image id twice'
        elif place.path is None:
            problem, example = place.kind, place.example
        elif place.path in names:
            problem = 'file name twice'
        elif not problem and all(map(_positive, given)) and given != sizes:
            problem, example = 'size contradicts the image', f'{name}: {_size(given)}, its image {_size(sizes)}'
        if problem:
            report.add(split, problem, example)
            continue
        if place.kind:
            report.add(split, place.kind, place.example)
        if not all(map(_positive, given)):
            report.add(split, 'no size given', name)
        if facts.turned and not turn:
            report.add(split, 'image turned by EXIF', name)
        if min(sizes) < SMALL:
            report.add(split, 'image under 32 pixels', f'{name} ({_size(sizes)})')
        names.add(place.path)
        found[number] = dict(id=number, file_name=place.path, width=sizes[0], height=sizes[1])
    return found


def check_annotations(
    coco: dict, images: dict, categories: dict, masks: bool, split: str, report: Report
) -> list[dict]:
    """The usable annotations of a file, numbered from 1: for pycocotools an annotation of id 0 is never found."""
    left_out = {_id(image.get('id')) for image in coco['images']} - set(images)
    known = {_id(c.get('id')) for c in _dicts(coco['categories'])}
    ids, same, found = set(), set(), []
    for i, annotation in enumerate(coco['annotations']):
        if not isinstance(annotation, dict):
            report.add(split, 'not an annotation', f'number {i}')
            continue
        name = f'id {annotation.get("id", f"none, number {i}")}'
        image = _id(annotation.get('image_id'))
        category = _id(annotation.get('category_id'))
        if image in left_out:
            continue
        if image not in images:
            report.add(split, 'annotation of no image', f'{name}: image {annotation.get("image_id")}')
        elif category not in known:
            report.add(split, 'unknown category', f'{name}: category {annotation.get("category_id")}')
        elif categories.get(category) is not None:
            made = _annotation(annotation, images[image], masks, lambda kind: report.add(split, kind, name))  # noqa: B023
            if made is None:
                continue
            key = (image, category, *made['bbox'], str(made.get('segmentation')))
            if key in same:
                report.add(split, 'annotation there twice', name)
                continue
            if _id(annotation.get('id')) in ids:
                report.add(split, 'annotation id twice', name)
            same.add(key)
            ids.add(_id(annotation.get('id')))
            found.append(dict(id=len(found) + 1, image_id=image, category_id=categories[category] + 1, **made))
    return found


def _annotation(annotation: dict, image: dict, masks: bool, say: Callable[[str], None]) -> dict | None:
    """The bbox, area, iscrowd and, with `masks`, segmentation of a usable annotation; None for others."""
    width, height = image['width'], image['height']
    crowd = int(bool(annotation.get('iscrowd') or annotation.get('ignore')))  # mmdet leaves out what is to be ignored
    mask = check_mask(annotation.get('segmentation'), width, height, say) if masks else None
    if masks and mask is None:
        if not annotation.get('segmentation'):
            say('no mask')
        return None
    box = annotation.get('bbox')
    if not box:
        if not mask:
            say('no box')
            return None
        say('box from the mask')
        box = _around(mask) if isinstance(mask, list) else _around_rle(mask)
    if not isinstance(box, list) or len(box) != 4 or not all(map(_number, box)):
        say('box is not four numbers')
        return None
    if not all(map(math.isfinite, box)):
        say('box of NaN or Inf')
        return None
    x, y, w, h = box
    if max(map(abs, box)) > FAR * max(width, height):
        say('box far outside')
        return None
    if w <= 0 or h <= 0:
        say('box without area')
        return None
    if x >= width or y >= height or x + w <= 0 or y + h <= 0:
        say('box outside the image')
        return None
    if min(w, h) < 1:
        say('box under a pixel')
    if min(x, y, width - x - w, height - y - h) < -SLACK:
        say('box partly outside')
    area = annotation.get('area')
    if not _number(area) or not math.isfinite(area) or area <= 0:
        say('no area given')
        area = _area(mask) if isinstance(mask, list) else w * h
    made = dict(bbox=box, area=area or w * h, iscrowd=crowd)
    if masks:
        if crowd:
            say('crowd with polygons' if isinstance(mask, list) else 'crowd')
        made['segmentation'] = mask
    return made


def check_mask(mask: object, width: int, height: int, say: Callable[[str], None]) -> list | dict | None:
    """The usable polygons of a mask, or its RLE; None where nothing of it can be used, which is said."""
    if isinstance(mask, dict):
        problem = _problem_of_rle(mask, width, height)
        if problem:
            say(problem)
        return None if problem else mask
    if not isinstance(mask, list) or not mask:
        return None
    if all(map(_number, mask)):
        say('polygon not in a list')
        mask = [mask]
    kept = []
    for polygon in mask:
        problem = _problem_of_polygon(polygon, width, height)
        if problem:
            say(problem)
        else:
            kept.append(polygon)
    return kept or None


def _problem_of_polygon(polygon: object, width: int, height: int) -> str | None:
    if not isinstance(polygon, list) or not all(_number(v) and math.isfinite(v) for v in polygon):
        return 'polygon of no numbers'
    if len(polygon) < 6:
        return 'polygon under three points'
    if len(polygon) % 2:
        return 'polygon of an odd count'
    x, y = polygon[::2], polygon[1::2]
    if max(map(abs, polygon)) > FAR * max(width, height):  # pycocotools would walk along each pixel of it, for ever
        return 'polygon far outside'
    outside = max(x) <= 0 or max(y) <= 0 or min(x) >= width or min(y) >= height
    return 'polygon outside the image' if outside else None


def _problem_of_rle(rle: dict, width: int, height: int) -> str | None:
    if list(rle.get('size') or []) != [height, width]:
        return 'RLE of another size'
    counts = rle.get('counts')
    try:
        runs = counts if isinstance(counts, list) else _runs(counts)
        whole = sum(runs) == width * height and min(runs, default=0) >= 0
    except (TypeError, IndexError, ValueError):
        whole = False
    return None if whole else 'RLE that does not add up'


def _runs(counts: str) -> list[int]:
    """The lengths of runs in COCO's compressed text: groups of five bits, from the lowest, each run from the third on
    less the one before the last. pycocotools does not look at where such a text ends."""
    runs, at = [], 0
    while at < len(counts):
        value, shift, more = 0, 0, True
        while more:
            bits = ord(counts[at]) - 48
            if not 0 <= bits < 64:
                raise ValueError(counts[at])
            value |= (bits & 31) << shift
            more, at, shift = bits & 32, at + 1, shift + 5
        if bits & 16:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
    return runs


def assembled(images: dict, annotations: list[dict], classes: Sequence[str], split: str, report: Report) -> dict:
    """What is written of a split: COCO's dict, with the classes as categories from 1 on."""
    annotated = {annotation['image_id'] for annotation in annotations}
    for number, image in images.items():
        if number not in annotated:
            report.add(split, 'image without annotations', image['file_name'])
    categories = [dict(id=i, name=name) for i, name in enumerate(classes, 1)]
    return dict(images=list(images.values()), annotations=annotations, categories=categories)


def say_classes(made: dict[str, dict], classes: Sequence[str], report: Report) -> None:
    """Report classes that no annotation has, or none of train."""
    used = {split: {a['category_id'] for a in coco['annotations']} for split, coco in made.items()}
    for i, name in enumerate(classes, 1):
        if not any(i in of for of in used.values()):
            report.add('all', 'class never annotated', name)
        elif 'train' in used and i not in used['train']:
            report.add(next(split for split in used if i in used[split]), 'class never trained', name)


def _around(polygons: list[list[float]]) -> list[float]:
    x, y = [v for p in polygons for v in p[::2]], [v for p in polygons for v in p[1::2]]
    return [min(x), min(y), max(x) - min(x), max(y) - min(y)]


def _around_rle(rle: dict) -> list[float]:
    from pycocotools import mask  # mmdet's; this module is imported without it

    return mask.toBbox(mask.frPyObjects(rle, *rle['size']) if isinstance(rle['counts'], list) else rle).tolist()


def _area(polygons: list[list[float]]) -> float:
    def of(p):
        points = list(zip(p[::2], p[1::2]))
        return abs(sum(x1 * y2 - x2 * y1 for (x1, y1), (x2, y2) in zip(points, points[1:] + points[:1]))) / 2

    return sum(map(of, polygons))


def _dicts(values: list) -> list[dict]:
    return [value for value in values if isinstance(value, dict)]


def _id(value: object) -> int | str | None:
    return value if isinstance(value, (int, str)) and not isinstance(value, bool) else None


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _positive(value: object) -> bool:
    return _number(value) and value > 0


def _size(size: Sequence) -> str:
    return ' x '.join(map(str, size))
