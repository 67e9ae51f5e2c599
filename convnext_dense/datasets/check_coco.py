"""Checks of COCO json: categories, images and annotations.

What is left has the same classes in the same order in all splits, only valid annotations, and readable images. `add`
reports a problem of the split that is checked: `add(code, example)`, as `Report.add`.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial

from .check_images import ImageInfo
from .coco_boxes import BORDER_TOLERANCE, BoxVotes, box_mask_difference, box_problem, clip_box
from .coco_masks import is_implausible_area, mask_area, mask_to_box, validate_mask
from .coco_values import as_dict, category_name, is_finite, is_number, is_positive, only_dicts, parse_id
from .diagnostics import Report
from .files import to_one_line
from .image_sizes import ResizeLimit, too_thin

NO_GROUP = (None, '', 'none')  # supercategories that stand for none
ID_KEYS = ('id', 'image_id', 'category_id')  # keys of an annotation that hold ids
MIN_IMAGE_SIDE = 32  # pixels: filter_cfg.min_size of the recipes
MAX_EXACT_ID = 2**53  # pycocotools and mmdet convert ids to float64, in which larger ones collide
CROWD_FLAGS = {'0': 0, 'false': 0, '1': 1, 'true': 1}  # values of iscrowd that are written as text


def count_trainable(annotations: list[dict], images: Iterable[dict], split: str) -> int:
    """Count the annotations that mmdet trains on or evaluates with.

    These are no crowds and have boxes of a pixel or more; in training, small images are left out as well.
    """
    min_side = MIN_IMAGE_SIDE if split == 'train' else 0
    large = {image['id'] for image in images if min(image['width'], image['height']) >= min_side}
    return sum(not a['iscrowd'] and min(a['bbox'][2:]) >= 1 and a['image_id'] in large for a in annotations)


def image_names(coco: dict) -> list[str]:
    """Return the file names of the images of a COCO dict."""
    return [image['file_name'] for image in coco['images'] if isinstance(image.get('file_name'), str)]


def split_coco(coco: dict, val_names: set[str]) -> tuple[dict, dict]:
    """Split a COCO dict into train and val; annotations of no image stay in train, where they are reported."""
    train, val = (coco | dict(images=[], annotations=[]) for _ in range(2))
    for image in coco['images']:
        is_val = isinstance(image.get('file_name'), str) and image['file_name'] in val_names
        (val if is_val else train)['images'].append(image)
    val_ids = {parse_id(image.get('id')) for image in val['images']}
    for annotation in coco['annotations']:
        is_val = isinstance(annotation, dict) and parse_id(annotation.get('image_id')) in val_ids
        (val if is_val else train)['annotations'].append(annotation)
    return train, val


def class_names(coco: dict, add: Callable) -> list[str]:
    """Return the names of the classes of a COCO dict, in the order of its categories.

    Categories of one name are one class. A category that has no annotations and is the supercategory of others, as
    Roboflow writes it, is none.
    """
    num_annotations = Counter(parse_id(a.get('category_id')) for a in coco['annotations'] if isinstance(a, dict))
    categories, ids, id_by_name = coco['categories'], set(), {}
    supercategories = {c['supercategory'] for c in only_dicts(categories) if isinstance(c.get('supercategory'), str)}
    for category in categories:
        fields = as_dict(category)
        name, category_id, group = category_name(fields), parse_id(fields.get('id')), fields.get('supercategory')
        if name is None or category_id is None:
            add('category-without-id-or-name', category)
        elif category_id in ids:
            add('duplicate-category-id', f'{category_id} ({name})')
        elif name in supercategories and not num_annotations[category_id] and group in NO_GROUP:
            add('supercategory-as-class', name)
        elif name in id_by_name:
            add('duplicate-category-name', name)
        else:
            id_by_name[name] = category_id
        ids.add(category_id)
        if not isinstance(group, (str, type(None))):
            add('supercategory-not-text', name)
    numbers = sorted(number for number in ids if isinstance(number, int))
    if id_by_name and numbers and numbers[-1] - numbers[0] >= len(numbers):
        add('category-id-gaps', f'{len(numbers)} ids up to {numbers[-1]}')
    return list(id_by_name)


def match_categories(coco: dict, train: dict, classes: Sequence[str], add: Callable) -> dict:
    """Match the categories of a split with the classes, by name.

    Returns:
        The class index, or None for a category without a class, by category id.
    """
    train_names = {parse_id(c.get('id')): category_name(c) for c in only_dicts(train['categories'])}
    known_in_train, class_index = set(train_names.values()), {name: i for i, name in enumerate(classes)}
    similar_classes = {name.strip().lower(): name for name in classes}
    categories = [c for c in only_dicts(coco['categories']) if parse_id(c.get('id')) is not None]
    names = {category_name(c) for c in categories}
    used_ids = {parse_id(a.get('category_id')) for a in only_dicts(coco['annotations'])}
    index_by_id = {}
    for category in categories:
        category_id, name = parse_id(category['id']), category_name(category)
        train_name = train_names.get(category_id)
        _report_id_type(category['id'], f'category {name}: id', add)
        if name in class_index:
            index_by_id[category_id] = class_index[name]
            if train is not coco and train_name != name and name in known_in_train:
                add('category-id-mismatch', name)
        elif train is not coco and train_name in class_index and train_name not in names:
            add('category-name-mismatch', f'{category_id} is {name}, in train {train_name}')
        elif category_id in used_ids:
            similar = similar_classes.get(str(name).strip().lower())
            add('category-without-class', f'{name}: a class is called {similar}' if similar else name)
            index_by_id[category_id] = None
    return index_by_id


def most_have_masks(coco: dict, add: Callable) -> bool:
    """Return whether most annotations of a COCO dict have a mask."""
    annotations = only_dicts(coco['annotations'])
    n = sum(isinstance(a.get('segmentation'), (list, dict)) and bool(a['segmentation']) for a in annotations)
    if 0 < n < len(annotations) / 2:
        add('few-masks', f'{n:,} of {len(annotations):,}', n)
    return n > 0 and n >= len(annotations) / 2


def validate_images(
    coco: dict, locations: Mapping, infos: Mapping, apply_exif: bool, limit: ResizeLimit, add: Callable
) -> dict:
    """Check the images of a split, whose `locations` are by name and `infos` by path.

    Returns:
        The usable images by id: dicts of id, file_name, width and height.
    """
    usable, paths = {}, set()
    for image in coco['images']:
        image_id, name = parse_id(image.get('id')), image.get('file_name')
        if image_id is None or not isinstance(name, str) or not name:
            add('image-without-id-or-name', name or f'id {image.get("id")}')
            continue
        location = locations[name]
        info = infos.get(location.path, ImageInfo())
        size = info.oriented_size(apply_exif)
        annotated_size = (image.get('width'), image.get('height'))
        has_size = all(map(is_positive, annotated_size))
        problem, example = info.problem, info.describe(name)
        if image_id in usable:
            problem = 'duplicate-image-id'
        elif location.path is None:
            problem, example = location.code, location.example
        elif location.path in paths:
            problem = 'duplicate-file-name'
        elif not problem and has_size and annotated_size != size:
            sizes = ', its image '.join(f'{w} x {h}' for w, h in (annotated_size, size))
            problem, example = 'image-size-mismatch', f'{name}: {sizes}'
        elif not problem and (thin := too_thin(size, limit)):
            problem, example = thin[0], f'{name}: {thin[1]}'
        if problem:
            add(problem, example)
            continue
        for applies, code, example in (
            (location.code, location.code, location.example),
            (not has_size, 'image-without-size', name),
            (info.exif_swapped and not apply_exif, 'exif-rotated-image', name),
            (min(size) < MIN_IMAGE_SIDE, 'image-below-32-pixels', f'{name} ({size[0]} x {size[1]})'),
        ):
            if applies:
                add(code, example)
        _report_id_type(image['id'], f'image {name}: id', add)
        paths.add(location.path)
        usable[image_id] = dict(id=image_id, file_name=location.path, width=size[0], height=size[1])
    unsupported = [i for i in usable if not isinstance(i, int) or abs(i) > MAX_EXACT_ID]
    for image_id in unsupported:
        add('image-id-renumbered', image_id)
    for number, image in enumerate(usable.values() if unsupported else (), 1):
        image['id'] = number
    return usable


def validate_annotations(
    coco: dict, images: dict, class_indices: dict, use_masks: bool, split: str, report: Report
) -> list[dict]:
    """Check the annotations of a split, with the results of `validate_images` and `match_categories`.

    Returns:
        The usable annotations, with ids from 1 (pycocotools does not match an annotation of id 0).
    """
    dropped_images = {parse_id(image.get('id')) for image in coco['images']} - set(images)
    category_ids = {parse_id(c.get('id')) for c in only_dicts(coco['categories'])} - {None}
    ids, keys, usable, votes, add = set(), set(), [], BoxVotes(), partial(report.add, split)
    for i, annotation in enumerate(coco['annotations']):
        if not isinstance(annotation, dict):
            add('not-an-annotation', f'number {i}')
            continue
        annotation_id, image_id, category_id = (parse_id(annotation.get(key)) for key in ID_KEYS)
        label = f'id {to_one_line(annotation.get("id", f"none, number {i}"))}'

        def add_here(code: str, detail: str = '', label: str = label) -> None:
            add(code, f'{label}{detail}')

        if image_id in dropped_images and image_id is not None:
            continue
        if image_id not in images:
            add_here('orphan-annotation', f': image {to_one_line(annotation.get("image_id"))}')
        elif category_id not in category_ids:
            add_here('unknown-category', f': category {to_one_line(annotation.get("category_id"))}')
        elif class_indices.get(category_id) is not None:
            fields = _validate_annotation(annotation, images[image_id], use_masks, votes, add_here)
            if fields is None:
                continue
            key = (image_id, category_id, *fields['bbox'], str(fields.get('segmentation')))
            if key in keys:
                add_here('duplicate-annotation')
                continue
            if annotation_id in ids and annotation_id is not None:
                add_here('duplicate-annotation-id')
            for name in ID_KEYS:
                _report_id_type(annotation.get(name), f'{label}: {name}', add)
            keys.add(key)
            ids.add(annotation_id)
            new_ids = (len(usable) + 1, images[image_id]['id'], class_indices[category_id] + 1)
            usable.append(dict(zip(ID_KEYS, new_ids)) | fields)
    votes.report(split, report)
    return usable


def _validate_annotation(annotation: dict, image: dict, use_masks: bool, votes: BoxVotes, add: Callable) -> dict | None:
    """Return bbox, area, iscrowd and (if masks are used) segmentation of a usable annotation, else None."""
    width, height = image['width'], image['height']
    iscrowd, mask = _parse_iscrowd(annotation, add), annotation.get('segmentation')
    if not use_masks and mask and not isinstance(mask, (list, dict)):
        add('mask-ignored', f': {to_one_line(mask, 20)}')
    mask = validate_mask(mask, width, height, add) if use_masks else None
    if iscrowd is None or (use_masks and mask is None):
        return None
    box = _validate_box(annotation, mask, width, height, bool(iscrowd), votes, add)
    if box is None:
        return None
    area = _validate_area(annotation.get('area'), mask, box, (height, width), iscrowd, add)
    is_difficult = iscrowd and annotation.get('difficult') == 1
    if iscrowd:
        add('difficult' if is_difficult else 'crowd-with-polygons' if isinstance(mask, list) else 'crowd')
    fields = dict(bbox=box, area=area, iscrowd=iscrowd) | (dict(difficult=1) if is_difficult else {})
    return fields | (dict(segmentation=mask) if use_masks else {})


def _validate_box(
    annotation: dict, mask: object, width: int, height: int, iscrowd: bool, votes: BoxVotes, add: Callable
) -> list[float] | None:
    """Return the box of an annotation, or that of its mask; None if it is unusable."""
    mask_box = mask_to_box(mask) if mask else None
    box = annotation.get('bbox') or mask_box
    if not annotation.get('bbox'):
        add('box-from-mask' if mask_box else 'missing-box')
    problem = box and box_problem(box, width, height)
    if problem:
        add(problem)
    if problem or not box:
        return None
    if not iscrowd and box is not mask_box:
        if votes.add(annotation, mask_box, width, height):
            add('box-as-corners')
            return None
        difference = mask_box and box_mask_difference(clip_box(box, width, height), clip_box(mask_box, width, height))
        if difference:
            add(difference)
        if difference == 'box-mask-unrelated':
            return None
    if min(box[2:]) < 1:
        add('box-below-one-pixel')
    x, y, w, h = box
    if min(x, y, width - x - w, height - y - h) < -BORDER_TOLERANCE:
        add('box-partly-outside-image')
    return box


def _parse_iscrowd(annotation: dict, add: Callable) -> int | None:
    """Return 1 for a crowd or an annotation to ignore, which mmdet drops as well, else 0; None if it is unclear."""
    flags = []
    for key in ('iscrowd', 'ignore'):
        value = annotation.get(key)
        if isinstance(value, str) and value.strip().lower() in CROWD_FLAGS:
            add('iscrowd-as-text', f": {key} '{value}'")
            value = CROWD_FLAGS[value.strip().lower()]
        if value is not None and not (isinstance(value, (int, float)) and value in (0, 1)):
            add('iscrowd-invalid', f': {key} {to_one_line(value, 20)}')
            return None
        flags.append(bool(value))
    return int(any(flags))


def _validate_area(
    area: object, mask: object, box: list[float], size: tuple[int, int], iscrowd: int, add: Callable
) -> float:
    """Return the area of an annotation in an image of a size (height, width), or that of its mask or box."""
    if not is_number(area) or not is_finite(area) or area <= 0:
        add('missing-area')
    elif not is_implausible_area(area, mask, box, size, iscrowd):
        return area
    else:
        add('implausible-area', f': {to_one_line(area, 20)}')
    return (mask_area(mask, size) if mask else 0) or box[2] * box[3]


def build_coco(images: dict, annotations: list[dict], classes: Sequence[str], add: Callable) -> dict:
    """Return the COCO dict of the usable part of a split, with the classes as categories from 1 on."""
    annotated = {annotation['image_id'] for annotation in annotations}
    for image in images.values():
        if image['id'] not in annotated:
            add('image-without-annotations', image['file_name'])
    categories = [dict(id=i, name=name) for i, name in enumerate(classes, 1)]
    return dict(images=list(images.values()), annotations=annotations, categories=categories)


def _report_id_type(value: object, label: str, add: Callable) -> None:
    """Report an integer that is written as another type."""
    if not isinstance(value, int) and isinstance(parse_id(value), int):
        add('id-not-integer', f'{label} {value!r}')
