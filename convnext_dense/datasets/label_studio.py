"""Label Studio's own JSON, and its short form JSON_MIN: tasks, each an image with regions in percent of its sides.

Rectangles (also rotated ones), polygons, ellipses and brush masks become objects. Of several annotations of a task the
newest is used, of those marked as ground truth if there are any; canceled ones are not.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path

import numpy as np

from ..errors import UsageError
from .check_images import MAX_PIXELS
from .coco_masks import encode_mask
from .coco_values import as_dicts, only_dicts
from .files import DataError, has_marks, read_json
from .geometry import ellipse, rectangle
from .layouts import is_image
from .split_annotations import box_annotation, parse_numbers, parse_objects, parse_points, parse_size, shape_annotation

# Of a task with annotations, or of a region in the short form; and of a task without any, in either form.
IS_TASK = (
    has_marks(r'"(annotations|completions)"\s*:\s*\[[\s\S]*"result"\s*:|"original_width"\s*:'),
    has_marks(r'"(annotations|completions)"\s*:\s*\[\s*\]', r'"data"\s*:\s*\{'),
    has_marks(r'"annotator"\s*:', r'"annotation_id"\s*:'),
)
RECTANGLE, ELLIPSE = ('x', 'y', 'width', 'height'), ('x', 'y', 'radiusX', 'radiusY')
CHANNELS = 4  # channels of a brush mask: red, green, blue and alpha, which is the mask


def is_label_studio(start: str) -> bool:
    """Return whether a JSON file is Label Studio's own, by its start."""
    return any(is_task(start) for is_task in IS_TASK)


def parse_label_studio(file: Path, add: Callable) -> Iterator[tuple[str, tuple[int, int] | None, list[dict]]]:
    """Iterate over the images of a file, as `annotation_files.read_lists`."""
    content = read_json(file)
    if not isinstance(content, list):
        raise UsageError(f'{file} is not JSON of Label Studio: it holds no list of tasks')
    for task in as_dicts(content):
        results = task.get('annotations', task.get('completions'))
        if isinstance(results, list):
            name = _image_name(task.get('data'), results)
            regions = _choose_annotation(only_dicts(results), name, add)
            if regions is None:
                continue
        else:
            values = [value for values in task.values() for value in only_dicts(values) if 'original_width' in value]
            name, regions = _image_name(task, []), [value | dict(value=value) for value in values]  # the short form
        annotations = parse_objects(regions, name, add, _parse_region)
        size = next(filter(None, map(_size_of, reversed(regions))), None)
        yield name, size, [*chain(*annotations)]


def decode_brush(data: object, size: tuple[int, int]) -> np.ndarray | None:
    """Decode a brush mask, as the package rle-pack writes it.

    After 32 bits for the number of values, 5 for their width and four times 4 for the widths of run lengths, come runs:
    a bit that says whether one value is repeated, 2 bits for the width of the length, the length, and the value or
    values.

    Args:
        data: list of bytes.
        size: width and height of the image.

    Returns:
        The pixels whose alpha is not 0, (H, W); None if this is no such mask.
    """
    width, height = size
    num_values = width * height * CHANNELS
    try:
        bits = ''.join(f'{byte:08b}' for byte in bytes(data))
        if width * height > MAX_PIXELS or int(bits[:32], 2) != num_values:
            return None
        value_bits = int(bits[32:37], 2) + 1
        length_bits = [int(bits[at : at + 4], 2) + 1 for at in range(37, 53, 4)]
        values, start, at = np.zeros(num_values, np.uint8), 0, 53
        while start < num_values:
            is_run, n_bits = bits[at] == '1', length_bits[int(bits[at + 1 : at + 3], 2)]
            end = start + 1 + int(bits[at + 3 : at + 3 + n_bits], 2)
            at += 3 + n_bits
            stop = at + value_bits * (1 if is_run else end - start)
            run = [int(bits[i : i + value_bits], 2) > 0 for i in range(at, stop, value_bits)]
            values[start:end] = run[0] if is_run else run[: num_values - start]
            start, at = end, stop
    except (TypeError, ValueError, IndexError):  # these are no bytes, or too few
        return None
    return values.reshape(height, width, CHANNELS)[..., -1]


def _image_name(data: object, results: Sequence) -> str:
    """Return the image among the data of a task: that to which regions belong, or the first."""
    texts = {k: v for k, v in data.items() if isinstance(v, str)} if isinstance(data, dict) else {}
    images = {k: v for k, v in texts.items() if is_image(Path(v.split('?')[0])) or is_image(Path(v))}
    regions = (region for result in only_dicts(results) for region in only_dicts(result.get('result')))
    targets = (region['to_name'] for region in regions if isinstance(region.get('to_name'), str))
    target = next((name for name in targets if name in images), next(iter(images), None))
    return images[target] if target else ''


def _choose_annotation(results: Sequence[dict], name: str, add: Callable) -> list[dict] | None:
    """Return the regions of the annotation of a task that counts; None if there is none."""
    usable = [result for result in results if not result.get('was_cancelled') and not result.get('skipped')]
    if not usable:
        add('task-without-annotation', name)
        return None
    if len(usable) > 1:
        add('several-annotations', f'{name}: {len(usable)}')

    def rank(result: dict) -> tuple[bool, str]:
        return bool(result.get('ground_truth')), str(result.get('updated_at') or result.get('created_at') or '')

    regions: dict[object, dict] = {}  # shape and labels may be two entries with one id
    for number, region in enumerate(only_dicts(max(usable, key=rank).get('result'))):
        value = region.get('value')
        key = region.get('id') if isinstance(region.get('id'), str) else number
        merged = regions.setdefault(key, dict(region, value={}))
        merged['value'] |= value if isinstance(value, dict) else {}
    return list(regions.values())


def _size_of(region: dict) -> tuple[int, int] | None:
    """Return the size (width, height) of the image of a region."""
    return parse_size(region.get('original_width'), region.get('original_height'))


def _parse_region(number: int, region: dict) -> list[dict]:
    """Return the annotations of a region, one per label; none for choices, texts and relations."""
    value, size = region['value'], _size_of(region)
    if not any(key in value for key in ('x', 'points', 'rle', 'vertices')):
        return []
    if size is None:
        raise DataError('label-not-numbers')
    if region.get('image_rotation'):
        raise DataError('region-of-rotated-image')
    lists = (names for key, names in value.items() if key.endswith('labels') and isinstance(names, list))
    names = [name.strip() for names in lists for name in names if isinstance(name, str) and name.strip()]
    if not names:
        raise DataError('label-without-name')
    box, mask = _parse_shape(value, size)
    return [box_annotation(number, n, box) if box else shape_annotation(number, n, mask, size) for n in names]


def _parse_shape(value: dict, size: tuple[int, int]) -> tuple[list[float] | None, list | dict | None]:
    """Return the box of a region if it is one, else its polygons or RLE."""
    scales = (size[0] / 100, size[1] / 100)
    if 'rle' in value:
        pixels = decode_brush(value['rle'], size)
        if pixels is None:
            raise DataError('mask-format-unknown')
        return None, encode_mask(pixels)
    if 'points' in value:
        return None, [[v * scales[i % 2] for i, v in enumerate(parse_points(value['points']))]]
    keys = ELLIPSE if 'radiusX' in value else RECTANGLE
    if not all(key in value for key in keys):
        raise DataError('shape-without-area')
    *numbers, degrees = parse_numbers([*(value[key] for key in keys), value.get('rotation') or 0])
    numbers = [v * scale for v, scale in zip(numbers, scales * 2)]
    if keys == ELLIPSE:
        return None, [ellipse(*numbers, degrees)]
    return (None, [rectangle(*numbers, degrees)]) if degrees % 360 else (numbers, None)
