"""COCO's dicts of any origin, checked and made plain: what training and evaluation then read has the same classes in
the same order in all splits, sound annotations alone, and images that can be read."""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from operator import mul
from pathlib import Path

from ..errors import UsageError
from .check_images import ImageInfo
from .diagnostics import MAX_EXAMPLES, Report
from .files import is_text, shown
from .image_sizes import Limit, too_thin
from .layouts import FROM_PANOPTIC, read_json

ANY = Limit()  # of sizes
KEYS = ('images', 'annotations', 'categories')
MIN_IMAGE_SIDE = 32  # pixels: filter_cfg.min_size of the recipes
MAX_COORD_FACTOR = 10  # times the longer side of an image, beyond which coordinates are a mistake
BORDER_TOLERANCE = (
    1  # pixels that a box may reach out of its image unsaid: rounding, and whether pixels count from 0 or 1
)
EXACT = 2**53  # beyond which pycocotools and mmdet, that count with floats, take one id for another
FLAGS = {'0': 0, 'false': 0, '1': 1, 'true': 1}  # iscrowd as text
WHOLE_NUMBER = re.compile(r'(0|-?[1-9][0-9]{0,19})(\.0+)?')
# How much a box has in common with that of its mask (intersection over union) where it is the same, is not, and has
# nothing to do with it; and the pixels of an edge that are rounding.
SAME, OTHER, APART, EDGE = 0.9, 0.5, 0.1, 2
# Times the box, and the mask, beyond which an area cannot be; and the pixels that are rounding.
AREA_OF_BOX, AREA_OF_MASK, AREA_SLACK = 1.5, 5, 4
ENDLESS = 10**7  # pixels of the outline of a polygon, of which pycocotools takes gigabytes
LONGEST_OUTLINE = 10**6  # pixels of polygons that are drawn to count those within, in about a second
CORNERS = (False, True)  # what fits as x, y, width, height, and what as corners
# How many boxes, at least and as a share of all, reach out of their images where they are corners.
LEAST_OUT, OUT = 3, 0.2
LONGEST_RUN = 30  # bits of a run before its last five


def trainable_annotations(annotations: list[dict], images: Iterable[dict], split: str) -> list[dict]:
    """The annotations that mmdet learns from or evaluates by: no crowd, nothing under a pixel, and in training no image
    under 32 pixels."""
    least = MIN_IMAGE_SIDE if split == 'train' else 0
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
    annotations = content.get('annotations')
    if isinstance(annotations, list) and any('segments_info' in a for a in _dicts(annotations)):
        raise UsageError(f'{path} is panoptic JSON (its annotations have segments_info): {FROM_PANOPTIC}')
    missing = [key for key in KEYS if not isinstance(content.get(key), list)]
    if missing:
        there = ', '.join(map(str, list(content)[:5])) or 'nothing'
        raise UsageError(f'{path} is not COCO: no list of {" and ".join(missing)} (it has {there})')
    return {**content, 'images': [i if isinstance(i, dict) else {} for i in content['images']]}


def image_names(coco: dict) -> list[str]:
    """The file names of a file's images."""
    return [image['file_name'] for image in coco['images'] if isinstance(image.get('file_name'), str)]


def split_coco(coco: dict, held_out: set[str]) -> tuple[dict, dict]:
    """A file in two: without the images of these names, and these alone. What belongs to no image stays in the first,
    where it is reported."""
    named = [isinstance(image.get('file_name'), str) and image['file_name'] in held_out for image in coco['images']]
    ids = {_id(image.get('id')) for image, is_out in zip(coco['images'], named) if is_out}
    parts = []
    for second in (False, True):
        images = [image for image, is_out in zip(coco['images'], named) if is_out == second]
        annotations = [
            a for a in coco['annotations'] if (isinstance(a, dict) and _id(a.get('image_id')) in ids) == second
        ]
        parts.append({**coco, 'images': images, 'annotations': annotations})
    return tuple(parts)


def class_names(coco: dict, split: str, report: Report) -> list[str]:
    """The names of the classes in the file's order. Names that are there twice are one class, and a name that only
    groups the others, as Roboflow writes it, is none."""
    used = Counter(_id(a.get('category_id')) for a in coco['annotations'] if isinstance(a, dict))
    categories, ids, names = coco['categories'], set(), {}
    groups = {c['supercategory'] for c in _dicts(categories) if isinstance(c.get('supercategory'), str)}
    for category in categories:
        name, number = (_name(category), _id(category.get('id'))) if isinstance(category, dict) else (None, None)
        if name is None or number is None:
            report.add(split, 'category-without-id-or-name', category)
        elif number in ids:
            report.add(split, 'duplicate-category-id', f'{number} ({name})')
        elif not used[number] and name in groups and category.get('supercategory') in (None, '', 'none'):
            report.add(split, 'supercategory-as-class', name)
        elif name in names:
            report.add(split, 'duplicate-category-name', name)
        else:
            names[name] = number
        ids.add(number)
        if isinstance(category, dict) and not isinstance(category.get('supercategory'), (str, type(None))):
            report.add(split, 'supercategory-not-text', name)
    numbers = sorted(number for number in ids if isinstance(number, int))
    if names and numbers and numbers[-1] - numbers[0] >= len(numbers):
        report.add(split, 'category-id-gaps', f'{len(numbers)} ids up to {numbers[-1]}')
    return list(names)


def match_categories(coco: dict, train: dict, classes: Sequence[str], split: str, report: Report) -> dict:
    """The index of its class for each category id of a file, by name; annotations of others are left out."""
    of_train = {_id(c.get('id')): _name(c) for c in _dicts(train['categories'])}
    names_of_train, index = set(of_train.values()), {name: i for i, name in enumerate(classes)}
    spellings = {name.strip().lower(): name for name in classes}
    ours = [c for c in _dicts(coco['categories']) if _id(c.get('id')) is not None]
    names = {_name(c) for c in ours}
    used = {_id(a.get('category_id')) for a in _dicts(coco['annotations'])}
    found = {}
    for category in ours:
        number, name = _id(category['id']), _name(category)
        there = of_train.get(number)
        _say_id(category['id'], f'category {name}: id', split, report)
        if name in index:
            found[number] = index[name]
            if train is not coco and there != name and name in names_of_train:
                report.add(split, 'category-id-mismatch', name)
        elif train is not coco and there in index and there not in names:
            report.add(split, 'category-name-mismatch', f'{number} is {name}, in train {there}')
        elif number in used:
            alike = spellings.get(str(name).strip().lower())
            example = f'{name}: a class is called {alike}' if alike else name
            report.add(split, 'category-without-class', example)
            found[number] = None
    return found


def has_masks(coco: dict, split: str, report: Report) -> bool:
    """Whether most annotations of a file have a mask."""
    annotations = _dicts(coco['annotations'])
    n = sum(isinstance(a.get('segmentation'), (list, dict)) and bool(a['segmentation']) for a in annotations)
    if 0 < n < len(annotations) / 2:
        report.add(split, 'few-masks', f'{n:,} of {len(annotations):,}', n)
    return n > 0 and n >= len(annotations) / 2


def validate_images(
    coco: dict, images, seen: dict[str, ImageInfo], turn: bool, split: str, report: Report, limit: Limit = ANY
) -> dict:
    """The usable images of a file by their id: dicts of id, file_name, width and height. `images` is a
    detection.Images."""
    found, names = {}, set()
    for image in coco['images']:
        number, name = _id(image.get('id')), image.get('file_name')
        if number is None or not isinstance(name, str) or not name:
            report.add(split, 'image-without-id-or-name', name or f'id {image.get("id")}')
            continue
        place = images.find(name)
        facts = seen.get(place.path, ImageInfo())
        sizes = (facts.width, facts.height)
        if facts.turned and not turn:
            sizes = sizes[::-1]
        given = tuple(image.get(key) for key in ('width', 'height'))
        problem, example = facts.problem, name
        if number in found:
            problem = 'duplicate-image-id'
        elif place.path is None:
            problem, example = place.kind, place.example
        elif place.path in names:
            problem = 'duplicate-file-name'
        elif not problem and all(map(_positive, given)) and given != sizes:
            problem, example = 'image-size-mismatch', f'{name}: {_size(given)}, its image {_size(sizes)}'
        elif not problem and (thin := too_thin(sizes, limit)):
            problem, example = thin[0], f'{name}: {thin[1]}'
        if problem:
            report.add(split, problem, example)
            continue
        for is_so, kind, example in (
            (place.kind, place.kind, place.example),
            (not all(map(_positive, given)), 'image-without-size', name),
            (facts.turned and not turn, 'exif-rotated-image', name),
            (min(sizes) < MIN_IMAGE_SIDE, 'image-below-32-pixels', f'{name} ({_size(sizes)})'),
        ):
            if is_so:
                report.add(split, kind, example)
        _say_id(image['id'], f'image {name}: id', split, report)
        names.add(place.path)
        found[number] = dict(id=number, file_name=place.path, width=sizes[0], height=sizes[1])
    return _numbered(found, split, report)


def _numbered(images: dict, split: str, report: Report) -> dict:
    """Images with numbers of their own where some have ids that pycocotools and mmdet cannot take."""
    odd = [number for number in images if not isinstance(number, int) or abs(number) > EXACT]
    for number in odd:
        report.add(split, 'image-id-renumbered', number)
    if not odd:
        return images
    return {number: {**image, 'id': i} for i, (number, image) in enumerate(images.items(), 1)}


def validate_annotations(
    coco: dict, images: dict, categories: dict, masks: bool, split: str, report: Report
) -> list[dict]:
    """The usable annotations of a file, numbered from 1: for pycocotools an annotation of id 0 is never found."""
    left_out = {_id(image.get('id')) for image in coco['images']} - set(images)
    known = {_id(c.get('id')) for c in _dicts(coco['categories'])} - {None}
    ids, same, found, corners = set(), set(), [], Corners()
    for i, annotation in enumerate(coco['annotations']):
        if not isinstance(annotation, dict):
            report.add(split, 'not-an-annotation', f'number {i}')
            continue
        number, image, category = (_id(annotation.get(key)) for key in ('id', 'image_id', 'category_id'))

        def say(kind: str, more: str = '') -> None:
            report.add(split, kind, f'{_named(annotation, i)}{more}')  # noqa: B023

        if image in left_out and image is not None:
            continue
        if image not in images:
            say('orphan-annotation', f': image {shown(annotation.get("image_id"))}')
        elif category not in known:
            say('unknown-category', f': category {shown(annotation.get("category_id"))}')
        elif categories.get(category) is not None:
            made = _annotation(annotation, images[image], masks, corners, say)
            if made is None:
                continue
            key = (image, category, *made['bbox'], str(made.get('segmentation')))
            if key in same:
                say('duplicate-annotation')
                continue
            if number in ids and number is not None:
                say('duplicate-annotation-id')
            for name in ('id', 'image_id', 'category_id'):
                _say_id(annotation.get(name), f'{_named(annotation, i)}: {name}', split, report)
            same.add(key)
            ids.add(number)
            found.append(
                dict(id=len(found) + 1, image_id=images[image]['id'], category_id=categories[category] + 1, **made)
            )
    corners.judge(split, report)
    return found


def _annotation(annotation: dict, image: dict, masks: bool, corners: 'Corners', say: Callable) -> dict | None:
    """The bbox, area, iscrowd and, with `masks`, segmentation of a usable annotation; None for others."""
    width, height = image['width'], image['height']
    crowd = _crowd(annotation, say)
    mask = annotation.get('segmentation')
    if not masks and mask and not isinstance(mask, (list, dict)):
        say('mask-ignored', f': {shown(mask, 20)}')
    mask = validate_mask(mask, width, height, say) if masks else None
    if crowd is None or (masks and mask is None):
        return None
    around = _around(mask) if mask else None
    box = annotation.get('bbox') or around
    if not annotation.get('bbox'):
        say('box-from-mask' if around else 'missing-box')
    problem = box and _problem_of_box(box, width, height)
    if problem:
        say(problem)
    if problem or not box:
        return None
    x, y, w, h = box
    if not crowd and box is not around:
        if corners.see(annotation, around, width, height):
            say('box-as-corners')
            return None
        problem = around and _difference(_clipped(box, width, height), _clipped(around, width, height))
        if problem:
            say(problem)
        if problem == 'box-mask-unrelated':
            return None
    if min(w, h) < 1:
        say('box-below-one-pixel')
    if min(x, y, width - x - w, height - y - h) < -BORDER_TOLERANCE:
        say('box-partly-outside-image')
    made = dict(bbox=box, area=_area(annotation.get('area'), mask, box, image, crowd, say), iscrowd=crowd)
    if crowd:
        say('crowd-with-polygons' if isinstance(mask, list) else 'crowd')
    if masks:
        made['segmentation'] = mask
    return made


def _crowd(annotation: dict, say: Callable) -> int | None:
    """Whether an annotation is a crowd or to be ignored, which mmdet leaves out as well; None where that is unclear."""
    flags = []
    for key in ('iscrowd', 'ignore'):
        value = annotation.get(key)
        if isinstance(value, str) and value.strip().lower() in FLAGS:
            say('iscrowd-as-text', f": {key} '{value}'")
            value = FLAGS[value.strip().lower()]
        if value is not None and not (isinstance(value, (int, float)) and value in (0, 1)):
            say('iscrowd-invalid', f': {key} {shown(value, 20)}')
            return None
        flags.append(bool(value))
    return int(any(flags))


def _problem_of_box(box: object, width: int, height: int) -> str | None:
    if not isinstance(box, list) or len(box) != 4 or not all(map(_number, box)):
        return 'box-not-four-numbers'
    if not all(map(_finite, box)):
        return 'box-not-finite'
    x, y, w, h = box
    if max(map(abs, box)) > MAX_COORD_FACTOR * max(width, height):
        return 'box-far-outside-image'
    if w <= 0 or h <= 0 or w * h <= 0:  # of very small numbers the product is 0
        return 'box-without-area'
    return 'box-outside-image' if x >= width or y >= height or x + w <= 0 or y + h <= 0 else None


class Corners:
    """Whether the boxes of a file are written as x1, y1, x2, y2 in the place of x, y, width, height: what speaks for it
    and against it, by masks, by areas and by the borders of images."""

    def __init__(self) -> None:
        self.by_mask, self.by_area, self.examples = Counter(), Counter(), []
        self.seen = self.sound = self.reach_out = 0

    def see(self, annotation: dict, around: list[float] | None, width: int, height: int) -> bool:
        """Count a box, and `around`, that of its mask; whether the mask says that it is written as corners."""
        x, y, right, bottom = box = annotation['bbox']
        other, could_be = [x, y, right - x, bottom - y], right > x and bottom > y
        reaches_out = max(x + right - width, y + bottom - height) > BORDER_TOLERANCE
        self.seen += 1
        self.sound += could_be and min(x, y, width - right, height - bottom) >= -BORDER_TOLERANCE
        self.reach_out += reaches_out
        area, fits = annotation.get('area'), None
        if around:
            fits = (_in_common(box, around) > SAME, could_be and _in_common(other, around) > SAME)
            self.by_mask[fits] += 1
        elif _number(area) and _finite(area) and area > 0:
            fits = (_near(area, right * bottom), could_be and _near(area, other[2] * other[3]))
            self.by_area[fits] += 1
        if (fits == CORNERS or reaches_out) and len(self.examples) < MAX_EXAMPLES:
            self.examples.append(f'id {shown(annotation.get("id"))}')
        return around is not None and fits == CORNERS

    @property
    def most(self) -> bool:
        """Whether the file's boxes are written as corners, most of those that show it."""
        for votes in (self.by_mask, self.by_area):
            if 2 * votes[CORNERS] > sum(votes.values()):
                return True
        if 2 * self.by_mask[True, False] > sum(self.by_mask.values()):
            return False
        return self.sound == self.seen and self.reach_out >= max(LEAST_OUT, OUT * self.seen)

    def judge(self, split: str, report: Report) -> None:
        """Report the boxes of a file of which most are written so, in the place of single ones."""
        if self.most:
            single = report.diagnostics.pop((split, 'box-as-corners'), None)
            for example in single.examples if single else self.examples:
                report.add(split, 'most-boxes-as-corners', example, count=0)
            report.diagnostics[split, 'most-boxes-as-corners'].count = self.seen


def _difference(box: list[float], around: list[float]) -> str | None:
    """What is wrong with a box beside that of its mask. One that holds the mask may hold hidden parts of the object."""
    if max(abs(a - b) for a, b in zip(_edges(box), _edges(around))) <= EDGE:
        return None
    common = _in_common(box, around)
    holds = _overlap(box, around) >= SAME * around[2] * around[3]
    return 'box-mask-unrelated' if common < APART and not holds else 'box-mask-mismatch' if common < OTHER else None


def _area(area: object, mask: list | dict | None, box: list[float], image: dict, crowd: int, say: Callable) -> float:
    """The area of an annotation, where none is given or one that cannot be that of the mask, or of the box."""
    w, h = box[2:]
    size = image['height'], image['width']
    if not _number(area) or not _finite(area) or area <= 0:
        say('missing-area')
    elif not _cannot_be(area, mask, box, size, crowd):
        return area
    else:
        say('implausible-area', f': {shown(area, 20)}')
    return (_mask_area(mask, size) if mask else 0) or w * h


def _cannot_be(area: float, mask: list | dict | None, box: list[float], size: tuple[int, int], crowd: int) -> bool:
    """Whether an area is larger than the box can hold, or neither that of a mask's polygons nor that of its pixels,
    which differ where it is thin; of a crowd, which may be more than its box, whether it is larger than the image."""
    w, h = size if crowd else box[2:]
    if area > max(AREA_OF_BOX * w * h, w * h + w + h + 1):
        return True
    if crowd or not mask:
        return False
    areas = (area_of(mask, size) for area_of in (_mask_area, _pixels))  # pixels are counted only where they are needed
    return not any(of / AREA_OF_MASK - AREA_SLACK <= area <= of * AREA_OF_MASK + AREA_SLACK for of in areas)


def validate_mask(mask: object, width: int, height: int, say: Callable) -> list | dict | None:
    """The usable polygons of a mask, or its RLE; None where nothing of it can be used, which is said."""
    if not mask:
        say('missing-mask')
        return None
    if isinstance(mask, dict):
        problem = _problem_of_rle(mask, width, height)
        if problem:
            say(problem, f': {shown(mask.get("size"), 40)}' if problem == 'rle-size-mismatch' else '')
        return None if problem else dict(size=[height, width], counts=mask['counts'])
    if not isinstance(mask, list):
        say('mask-format-unknown', f': {shown(mask, 20)}')
        return None
    if all(map(_number, mask)):
        say('polygon-not-nested')
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
    if not isinstance(polygon, list) or not {*map(type, polygon)} <= {int, float}:
        return 'polygon-not-numeric'
    most = MAX_COORD_FACTOR * max(width, height)
    near = all(-most <= v <= most for v in polygon)
    if not near and not all(map(_finite, polygon)):
        return 'polygon-not-numeric'
    if len(polygon) < 6:
        return 'polygon-under-3-points'
    if len(polygon) % 2:
        return 'polygon-odd-length'
    if not near:  # pycocotools would walk along each pixel of it, for ever
        return 'polygon-far-outside-image'
    if len(polygon) * most > ENDLESS and _outline(polygon) > ENDLESS:  # most cannot be, and are not measured
        return 'polygon-outline-too-long'
    x, y = polygon[::2], polygon[1::2]
    outside = max(x) <= 0 or max(y) <= 0 or min(x) >= width or min(y) >= height
    return 'polygon-outside-image' if outside else None


def _problem_of_rle(rle: dict, width: int, height: int) -> str | None:
    size, counts = rle.get('size'), rle.get('counts')
    if not isinstance(size, list) or not all(map(_number, size)) or size != [height, width]:
        return 'rle-size-mismatch'
    try:
        runs = _decode_rle_runs(counts) if isinstance(counts, str) else counts
        whole = isinstance(runs, list) and {*map(type, runs)} <= {int}
        whole = whole and sum(runs) == width * height and min(runs, default=0) >= 0
    except (IndexError, ValueError):
        whole = False
    return None if whole else 'rle-length-mismatch'


def _decode_rle_runs(counts: str) -> list[int]:
    """The lengths of runs in COCO's compressed text: groups of five bits, from the lowest, each run from the third on
    less the one before the last. pycocotools does not look at where such a text ends."""
    runs, at = [], 0
    while at < len(counts):
        value, shift, more = 0, 0, True
        while more:
            bits = ord(counts[at]) - 48
            if not 0 <= bits < 64 or shift > LONGEST_RUN:
                raise ValueError(counts[at])
            value |= (bits & 31) << shift
            more, at, shift = bits & 32, at + 1, shift + 5
        if bits & 16:
            value -= 1 << shift
        runs.append(value + (runs[-2] if len(runs) > 2 else 0))
    return runs


def build_coco(images: dict, annotations: list[dict], classes: Sequence[str], split: str, report: Report) -> dict:
    """What is written of a split: COCO's dict, with the classes as categories from 1 on."""
    annotated = {annotation['image_id'] for annotation in annotations}
    for image in images.values():
        if image['id'] not in annotated:
            report.add(split, 'image-without-annotations', image['file_name'])
    categories = [dict(id=i, name=name) for i, name in enumerate(classes, 1)]
    return dict(images=list(images.values()), annotations=annotations, categories=categories)


def report_class_usage(made: dict[str, dict], classes: Sequence[str], report: Report) -> None:
    """Report classes that no annotation has, or none of train."""
    used = {split: {a['category_id'] for a in coco['annotations']} for split, coco in made.items()}
    for i, name in enumerate(classes, 1):
        if not any(i in of for of in used.values()):
            report.add('all', 'class-never-annotated', name)
        elif 'train' in used and i not in used['train']:
            report.add(next(split for split in used if i in used[split]), 'class-not-in-train', name)


def _around(mask: list | dict) -> list[float]:
    """The box of a mask."""
    if isinstance(mask, dict):
        return _coco_mask().toBbox(_compressed(mask)).tolist()
    x, y = [v for p in mask for v in p[::2]], [v for p in mask for v in p[1::2]]
    return [min(x), min(y), max(x) - min(x), max(y) - min(y)]


def _mask_area(mask: list | dict, size: tuple[int, int]) -> float:
    """The area of a mask; of polygons as they are given."""
    return sum(map(_area_of_polygon, mask)) if isinstance(mask, list) else _pixels(mask, size)


def _area_of_polygon(polygon: list[float]) -> float:
    x, y = polygon[::2], polygon[1::2]
    return abs(sum(map(mul, x, y[1:] + y[:1])) - sum(map(mul, y, x[1:] + x[:1]))) / 2


def _outline(polygon: list[float]) -> float:
    """The pixels that pycocotools walks along a polygon."""
    x, y = polygon[::2], polygon[1::2]
    return sum(max(abs(a - b), abs(c - d)) for a, b, c, d in zip(x, x[1:] + x[:1], y, y[1:] + y[:1]))


def _pixels(mask: list | dict, size: tuple[int, int]) -> float:
    """The pixels of a mask; the area of polygons with an outline that takes too long to draw."""
    if isinstance(mask, list) and sum(map(_outline, mask)) > LONGEST_OUTLINE:
        return sum(map(_area_of_polygon, mask))
    if isinstance(mask, list):
        return int(_coco_mask().area(_coco_mask().merge(_coco_mask().frPyObjects(mask, *size))))
    return int(_coco_mask().area(_compressed(mask)))


def _compressed(rle: dict) -> dict:
    return _coco_mask().frPyObjects(rle, *rle['size']) if isinstance(rle['counts'], list) else rle


def _coco_mask():
    from pycocotools import mask  # mmdet's; this module is imported without it

    return mask


def _edges(box: list[float]) -> tuple[float, ...]:
    x, y, w, h = box
    return x, y, x + w, y + h


def _clipped(box: list[float], width: int, height: int) -> list[float]:
    """What is in its image of a box."""
    x1, y1, x2, y2 = (min(max(v, 0), most) for v, most in zip(_edges(box), (width, height, width, height)))
    return [x1, y1, x2 - x1, y2 - y1]


def _overlap(first: list[float], second: list[float]) -> float:
    (left, top, right, bottom), (x1, y1, x2, y2) = _edges(first), _edges(second)
    return max(min(right, x2) - max(left, x1), 0) * max(min(bottom, y2) - max(top, y1), 0)


def _in_common(first: list[float], second: list[float]) -> float:
    """The intersection of two boxes over their union."""
    both = _overlap(first, second)
    union = first[2] * first[3] + second[2] * second[3] - both
    return both / union if union > 0 else 0.0


def _near(area: float, other: float) -> bool:
    return abs(area - other) <= max(0.01 * other, 1)


def _dicts(values: list) -> list[dict]:
    return [value for value in values if isinstance(value, dict)]


def _named(annotation: dict, i: int) -> str:
    """How the report names an annotation."""
    return f'id {shown(annotation.get("id", f"none, number {i}"))}'


def _name(category: dict) -> str | None:
    """The name of a category, None where it is none."""
    name = category.get('name')
    name = str(name) if _number(name) else name
    return name if isinstance(name, str) and name.strip() and is_text(name) else None


def _id(value: object) -> int | str | None:
    """An id as it is compared with others: 1.0 and '1' are 1; None for what is no id."""
    if isinstance(value, float):
        return int(value) if value.is_integer() else None
    if isinstance(value, str):
        number = WHOLE_NUMBER.fullmatch(value)
        return int(number[1]) if number else value
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _say_id(value: object, name: str, split: str, report: Report) -> None:
    """Report a number that is written as another type."""
    if not isinstance(value, int) and isinstance(_id(value), int):
        report.add(split, 'id-not-integer', f'{name} {value!r}')


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _finite(value: float) -> bool:
    return isinstance(value, int) or math.isfinite(value)  # whole numbers may be too large for a float


def _positive(value: object) -> bool:
    return _number(value) and value > 0


def _size(size: Sequence) -> str:
    return ' x '.join(map(str, size))
