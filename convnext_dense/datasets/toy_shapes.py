"""Toy data set of textured, overlapping shapes; it needs no download and has the same pixels on every machine.

    python -m convnext_dense.datasets.toy_shapes ROOT

writes train/ and val/ (RGB images), annotations/instances_{train,val}.json (COCO: boxes and polygons of the visible
parts), labels/{train,val}/ (segmentation masks as in ADE20K) and shapes.json (the arguments). Outline, texture and
color identify the classes, so that minutes suffice to learn them; size and angle do not, and backgrounds are dull, with
the same textures.

Pixels and annotations depend only on the seed: the stream of `RandomState` is frozen, and only `randint` and
`random_sample` are used; floats are only added, subtracted, multiplied, divided, floored and compared, which IEEE 754
defines to the last bit (no sin, no sums).
"""

import argparse
import json
import signal
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from ..errors import UsageError

# Corners in the unit circle; the disc has none, it is everything within a radius of 0.8.
SHAPE_CORNERS = {
    'disc': (),
    'square': ((-0.68, -0.68), (0.68, -0.68), (0.68, 0.68), (-0.68, 0.68)),
    'triangle': ((0, -1), (0.866, 0.5), (-0.866, 0.5)),
    'cross': (
        (-0.3, -0.95), (0.3, -0.95), (0.3, -0.3), (0.95, -0.3), (0.95, 0.3), (0.3, 0.3),
        (0.3, 0.95), (-0.3, 0.95), (-0.3, 0.3), (-0.95, 0.3), (-0.95, -0.3), (-0.3, -0.3),
    ),
}  # fmt: skip
CLASSES = tuple(SHAPE_CORNERS)
TEXTURES = ('plain', 'stripes', 'checks', 'blotches')  # of the classes in order; a background has any of them
LABEL_NAMES = ('ground', *CLASSES)  # masks hold 1 + the index of these, and 0 on the borders of shapes
PALETTE = [[90, 90, 90], [220, 60, 50], [140, 220, 60], [60, 200, 200], [150, 60, 220]]  # RGB of LABEL_NAMES
TOY_SPLITS = ('train', 'val')

FORMAT_VERSION = 1  # increase it when pixels or annotations change
ARG_RANGES = {'seed': (0, 2**32 - 1), 'train': (0, 999999), 'val': (0, 999999), 'size': (64, 1024)}
RADIUS_RANGE = (15, 34)  # of the circumradius, in pixels of an image of 128 x 128
MAX_TILT = 0.13  # tangent of half the largest rotation of a shape: 15 degrees; textures are rotated freely
MIN_COLOR_DISTANCE = 80  # L1, between the mean RGB colors of a shape and the background
# RGB of the classes, whose hues are a quarter turn apart.
CLASS_COLORS = ((190, 70, 70), (130, 190, 70), (70, 190, 190), (130, 70, 190))
BACKGROUND_CONTRAST, SHAPE_CONTRAST = (0, 9), (24, 41)  # of textures, in each of R, G, B; from, and below
MAX_PLACEMENTS = 200  # attempts per image, which may end with fewer shapes

# The sides of a pixel, clockwise: step to the neighbor, from the pixel to the side's first corner, along the side.
PIXEL_SIDES = (
    ((0, -1), (0, 0), (1, 0)),
    ((1, 0), (1, 0), (0, 1)),
    ((0, 1), (1, 1), (-1, 0)),
    ((-1, 0), (0, 1), (0, -1)),
)


class Scene(NamedTuple):
    """An image and its shapes.

    Attributes:
        image (np.ndarray): (H, W, 3), RGB, uint8.
        instances (np.ndarray): (H, W), uint8: 0 is background, k the visible pixels of the k-th shape.
        categories (list[int]): index into `CLASSES` of each shape, from the lowest to the topmost.
        areas (list[int]): pixels of each shape, hidden ones included.
    """

    image: np.ndarray
    instances: np.ndarray
    categories: list[int]
    areas: list[int]


def draw(rng: np.random.RandomState, size: int) -> Scene:
    """Draw 2 to 5 shapes on a background of `size` x `size` pixels; at least half of each is visible."""
    y, x = np.mgrid[:size, :size] + 0.5
    background = rng.randint(80, 176) + rng.randint(-12, 13, 3)  # mean RGB; textures vary it without over- or underflow
    image = _texture(rng, rng.randint(len(TEXTURES)), BACKGROUND_CONTRAST, background, x, y)
    instances = np.zeros((size, size), np.uint8)
    scene = Scene(image, instances, [], [])
    count = rng.randint(2, 6)
    for _ in range(MAX_PLACEMENTS):
        if len(scene.areas) == count:
            break
        category = rng.randint(len(CLASSES))
        color = np.array(CLASS_COLORS[category]) + rng.randint(-16, 17, 3)
        shape = _shape(rng, CLASSES[category], x, y)
        if np.abs(color - background).sum() < MIN_COLOR_DISTANCE:
            continue
        hidden_shapes = np.setdiff1d(instances[shape], 0)
        if not all(_is_visible_enough((instances == k) & ~shape, scene.areas[k - 1]) for k in hidden_shapes):
            continue
        scene.categories.append(int(category))
        scene.areas.append(int(shape.sum()))
        image[shape] = _texture(rng, category, SHAPE_CONTRAST, color, x, y)[shape]
        instances[shape] = len(scene.areas)
    return scene


def outline(mask: np.ndarray) -> list[list[tuple[int, int]]]:
    """Trace the boundary of a mask.

    Pixels that share a side are in one loop, pixels that share only a corner need not be. On the screen, loops go
    clockwise, and those around holes counterclockwise.

    Args:
        mask: (H, W).

    Returns:
        Closed loops of corners (x, y) of pixels, without corners on straight lines.
    """
    inside = np.pad(np.asarray(mask, bool), 1)
    sides = set()
    for turn, ((over, down), (right, below), _) in enumerate(PIXEL_SIDES):
        y, x = np.nonzero(inside & ~np.roll(inside, (-down, -over), (0, 1)))
        sides.update(zip((x - 1 + right).tolist(), (y - 1 + below).tolist(), [turn] * len(x)))
    loops = []
    while sides:
        side = min(sides)  # the top left corner of its loop
        loop, visited = [], set()
        while side not in visited:
            visited.add(side)
            x, y, turn = side
            x, y = x + PIXEL_SIDES[turn][2][0], y + PIXEL_SIDES[turn][2][1]
            # If two pixels touch at a corner there are two ways to go: the right turn stays with this pixel.
            side = next(s for t in (1, 0, 3) if (s := (x, y, (turn + t) % 4)) in sides)
            if side[2] != turn:
                loop.append((x, y))
        sides -= visited
        loops.append(loop)
    return loops


def coco_annotations(scene: Scene) -> list[dict]:
    """Return category_id (from 1), segmentation, area and bbox of the visible part of each shape, as in COCO."""
    annotations = []
    for k, category in enumerate(scene.categories, 1):
        visible = scene.instances == k
        polygons = [[value for corner in loop for value in corner] for loop in outline(visible)]
        common = dict(category_id=category + 1, iscrowd=0, area=int(visible.sum()))
        annotations.append(common | dict(bbox=list(cv2.boundingRect(visible.astype(np.uint8))), segmentation=polygons))
    return annotations


def segmentation_mask(scene: Scene) -> np.ndarray:
    """Return 1 + the index into `LABEL_NAMES`, or 0 on borders of shapes, of each pixel: (H, W), uint8."""
    labels = np.array([1] + [2 + category for category in scene.categories], np.uint8)[scene.instances]
    padded = np.pad(labels, 1, mode='edge')
    neighbors = [np.roll(padded, step, (0, 1))[1:-1, 1:-1] for step, _, _ in PIXEL_SIDES]
    return labels * ((labels == 1) | np.all(labels == neighbors, 0))


def write(root: str | Path, seed: int = 0, train: int = 400, val: int = 100, size: int = 128) -> bool:
    """Draw the data set into a new folder, completely or not at all.

    Args:
        root: the folder.
        seed: seed of the images.
        train: number of images to train on. With more of them, the first ones stay the same.
        val: number of images to evaluate on; likewise.
        size: side of the images in pixels.

    Returns:
        Whether it was drawn; False if it exists already with these arguments.

    Raises:
        UsageError: a number is out of range, `root` holds something else, or it cannot be written.
    """
    root, request = Path(root), dict(seed=seed, train=train, val=val, size=size)
    for name, (low, high) in ARG_RANGES.items():
        if not isinstance(request[name], int) or not low <= request[name] <= high:
            raise UsageError(f'{name}={request[name]!r}: give a whole number from {low} to {high}')
    try:
        if root.exists():
            if _read_json(root / 'shapes.json') == dict(format=FORMAT_VERSION, **request):
                return False
            text = f'is not this data set ({_format_request(request)}): remove it or choose another folder'
            raise UsageError(f'{root} exists already and {text}')
        root.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f'.{root.name}-', dir=root.parent) as temporary:
            complete = Path(temporary, 'shapes')
            for split in TOY_SPLITS:
                _write_split(complete, split, seed, request[split], size)
            _write_json(complete / 'shapes.json', dict(format=FORMAT_VERSION, **request))
            complete.rename(root)
    except OSError as error:
        raise UsageError(f'{root} cannot be written ({error.strerror}): choose another folder') from error
    return True


def write_unlabeled(folder: str | Path, count: int, seed: int = 0, size: int = 128) -> None:
    """Draw images without labels, none of which is in the data set of the same seed.

    Args:
        folder: where the images are written; it may exist, but not with files of their names.
        count: number of images.
        seed: seed of the images.
        size: side of the images in pixels.

    Raises:
        UsageError: the folder cannot be written, or an image is there.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        for index in range(1, count + 1):
            scene = draw(np.random.RandomState([seed, len(TOY_SPLITS), index]), size)
            with open(Path(folder, f'{index:06d}.png'), 'xb') as file:
                file.write(_encode_png(scene.image[..., ::-1]))
    except OSError as error:
        raise UsageError(f'{folder} cannot be written ({error.strerror}): choose another folder') from error


def _write_split(root: Path, split: str, seed: int, count: int, size: int) -> None:
    images, labels, instances = root / split, root / 'labels' / split, root / f'annotations/instances_{split}.json'
    for folder in (images, labels, instances.parent):
        folder.mkdir(parents=True, exist_ok=True)
    coco = dict(images=[], annotations=[], categories=[dict(id=i, name=name) for i, name in enumerate(CLASSES, 1)])
    for index in range(1, count + 1):
        scene = draw(np.random.RandomState([seed, TOY_SPLITS.index(split), index]), size)
        name = f'{index:06d}.png'
        (images / name).write_bytes(_encode_png(scene.image[..., ::-1]))
        (labels / name).write_bytes(_encode_png(segmentation_mask(scene)))
        coco['images'].append(dict(id=index, file_name=name, width=size, height=size))
        for annotation in coco_annotations(scene):
            coco['annotations'].append(dict(id=len(coco['annotations']) + 1, image_id=index, **annotation))
    _write_json(instances, coco)


def _encode_png(pixels: np.ndarray) -> bytes:
    return cv2.imencode('.png', pixels)[1].tobytes()


def _write_json(path: Path, content: dict) -> None:
    path.write_bytes(json.dumps(content, separators=(',', ':')).encode() + b'\n')


def _format_request(request: dict) -> str:
    return ', '.join(f'{name} {value}' for name, value in request.items())


def _read_json(path: Path) -> object:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None


def _texture(
    rng: np.random.RandomState, texture: int, contrast_range: tuple, mean: np.ndarray, x: np.ndarray, y: np.ndarray
) -> np.ndarray:
    """Return one of `TEXTURES` in two colors around the mean, with gray noise: (H, W, 3), uint8."""
    period, contrast, amplitude = 3 + rng.randint(6), rng.randint(*contrast_range, 3), rng.randint(2, 9)
    across, along = (1 - 2 * (np.floor(rotated / period).astype(int) & 1) for rotated in _rotate(rng, x, y, 1))
    blotches = 1 - 2 * rng.randint(0, 2, x.shape).repeat(3, 0).repeat(3, 1)[: len(x), : len(x)]
    pattern = dict(plain=0 * across, stripes=across, checks=across * along, blotches=blotches)[TEXTURES[texture]]
    noise = rng.randint(-amplitude, amplitude + 1, x.shape)
    return (mean + pattern[..., None] * contrast + noise[..., None]).astype(np.uint8)


def _rotate(rng: np.random.RandomState, x: np.ndarray, y: np.ndarray, max_tan: float) -> tuple[np.ndarray, np.ndarray]:
    """Rotate x and y by a random angle; the tangent of its half is at most `max_tan`."""
    t = max_tan * (2 * rng.random_sample() - 1)
    cos, sin = (1 - t * t) / (1 + t * t), 2 * t / (1 + t * t)
    return cos * x + sin * y, cos * y - sin * x


def _shape(rng: np.random.RandomState, name: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the pixels of a shape of random position, angle, size and aspect within the image: (H, W), bool."""
    size = len(x)
    radius = size * (RADIUS_RANGE[0] + (RADIUS_RANGE[1] - RADIUS_RANGE[0]) * rng.random_sample()) / 128
    aspect = 0.75 + 0.25 * rng.random_sample()
    left, top = (radius + (size - 2 * radius) * rng.random_sample() for _ in 'xy')
    u, v = _rotate(rng, (x - left) / radius, (y - top) / radius, MAX_TILT)
    v = v / aspect
    if name == 'disc':
        return u * u + v * v < 0.64
    corners, inside = SHAPE_CORNERS[name], np.zeros(x.shape, bool)
    for (u1, v1), (u2, v2) in zip(corners, corners[1:] + corners[:1]):
        # Even-odd rule: does a ray to the right of the pixel's center cross the edge?
        crosses = (v1 > v) != (v2 > v)
        inside ^= crosses & (((u - u1) * (v2 - v1) < (v - v1) * (u2 - u1)) == (v1 < v2))
    return inside


def _is_visible_enough(visible: np.ndarray, area: int) -> bool:
    """Return whether at least half of a shape of `area` pixels is visible, without holes: polygons have none."""
    loops = (np.array(loop, np.float32) for loop in outline(visible))
    return 2 * visible.sum() >= area and all(cv2.contourArea(loop, oriented=True) > 0 for loop in loops)


def main() -> int:
    """Run as a command; return the exit status."""
    name, text = 'python -m convnext_dense.datasets.toy_shapes', 'Draw the toy data set into a new folder.'
    parser = argparse.ArgumentParser(prog=name, allow_abbrev=False, description=text)
    parser.add_argument('root', help='the folder')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--train', type=int, default=400, help='images to train on (default: 400)')
    parser.add_argument('--val', type=int, default=100, help='images to evaluate on (default: 100)')
    parser.add_argument('--size', type=int, default=128, help='side of the images in pixels (default: 128)')
    text = 'instead draw N images without labels, which are in no split'
    parser.add_argument('--unlabeled', type=int, metavar='N', help=text)
    request = vars(parser.parse_args())
    root, n_unlabeled = request.pop('root'), request.pop('unlabeled')
    try:
        if n_unlabeled is not None:
            write_unlabeled(root, n_unlabeled, request['seed'], request['size'])
            print(f'drew {n_unlabeled} images without labels into {root}')
        else:
            message = 'drew the toy data set into' if write(root, **request) else 'the toy data set is already in'
            print(f'{message} {root} ({_format_request(request)})')
    except UsageError as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    return 0


if __name__ == '__main__':
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: sys.exit(128 + number))  # so that what is half drawn is removed
    sys.exit(main())
