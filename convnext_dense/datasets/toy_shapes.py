"""A data set that needs no download: textured shapes that hide one another, drawn with the same bytes everywhere.

    python -m convnext_dense.datasets.toy_shapes ROOT

writes train/ and val/ (RGB images), annotations/instances_{train,val}.json (COCO: boxes and polygons of what is
visible), labels/{train,val}/ (ADE20K: label maps) and shapes.json (what was asked for). Outline, texture and hue tell
the classes, so that minutes suffice to learn them; size and angle do not, and grounds are dull, with the same textures.

The bytes depend on the seed alone: RandomState's stream is frozen, and only `randint` and `random_sample` are asked
for; floats meet only + - * / floor and comparisons, which IEEE 754 settles to the last bit (no sin, no sums); the PNG
are not compressed, so that no version of zlib matters.
"""

import argparse
import json
import signal
import struct
import sys
import tempfile
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..errors import UsageError

# Corners in the unit circle; the disc has none and is all that lies within a radius of 0.8.
CORNERS = {
    'disc': (),
    'square': ((-0.68, -0.68), (0.68, -0.68), (0.68, 0.68), (-0.68, 0.68)),
    'triangle': ((0, -1), (0.866, 0.5), (-0.866, 0.5)),
    'cross': (
        (-0.3, -0.95),
        (0.3, -0.95),
        (0.3, -0.3),
        (0.95, -0.3),
        (0.95, 0.3),
        (0.3, 0.3),
        (0.3, 0.95),
        (-0.3, 0.95),
        (-0.3, 0.3),
        (-0.95, 0.3),
        (-0.95, -0.3),
        (-0.3, -0.3),
    ),
}
CLASSES = tuple(CORNERS)
TEXTURES = ('plain', 'stripes', 'checks', 'blotches')  # of the classes in order; a ground has any of them
LABELS = ('ground', *CLASSES)  # label maps hold 1 + the index of these, and 0 on the borders of shapes
PALETTE = [[90, 90, 90], [220, 60, 50], [140, 220, 60], [60, 200, 200], [150, 60, 220]]  # RGB of LABELS
SPLITS = ('train', 'val')

FORMAT = 1  # of the bytes: a change of what is drawn or written counts it up
ARG_RANGES = {'seed': (0, 2**32 - 1), 'train': (0, 999999), 'val': (0, 999999), 'size': (64, 1024)}
RADIUS = (15, 34)  # least and greatest circumradius in pixels of an image of 128 x 128
MAX_TILT = 0.13  # tangent of half the greatest angle by which a shape is turned: 15 degrees; textures turn freely
CONTRAST = 80  # least sum over R, G, B of the differences between the mean colours of a shape and the ground
HUES = ((190, 70, 70), (130, 190, 70), (70, 190, 190), (130, 70, 190))  # RGB of the classes, a quarter turn apart
SWING_OF_GROUND, SWING_OF_SHAPE = (0, 9), (24, 41)  # least and greatest contrast of textures in each of R, G, B
TRIES = 200  # places tried per image before it makes do with fewer shapes

# The sides of a pixel, clockwise: step to the pixel beyond, from the pixel to the side's first corner, along the side.
SIDES = (((0, -1), (0, 0), (1, 0)), ((1, 0), (1, 0), (0, 1)), ((0, 1), (1, 1), (-1, 0)), ((-1, 0), (0, 1), (0, -1)))


class Scene(NamedTuple):
    """An image and what is on it."""

    image: np.ndarray  # H x W x 3, RGB, uint8
    instances: np.ndarray  # H x W, uint8: 0 is ground, k the visible pixels of the k-th shape
    categories: list[int]  # index into CLASSES of each shape, from the lowest to the topmost
    areas: list[int]  # pixels of each shape when nothing hides any


def draw(rng: np.random.RandomState, size: int) -> Scene:
    """Draw 2 to 5 shapes on a ground of `size` x `size` pixels; each of them shows at least half of itself."""
    y, x = np.mgrid[:size, :size] + 0.5
    ground = _background_color(rng)
    image = _texture(rng, rng.randint(len(TEXTURES)), SWING_OF_GROUND, ground, x, y)
    instances = np.zeros((size, size), np.uint8)
    scene = Scene(image, instances, [], [])
    count = rng.randint(2, 6)
    for _ in range(TRIES):
        if len(scene.areas) == count:
            break
        category = rng.randint(len(CLASSES))
        mean = _foreground_color(rng, category)
        shape = _shape(rng, CLASSES[category], x, y)
        if np.abs(mean - ground).sum() < CONTRAST:
            continue
        if any(
            not _is_visible_enough((instances == k) & ~shape, scene.areas[k - 1])
            for k in np.unique(instances[shape])
            if k
        ):
            continue
        scene.categories.append(int(category))
        scene.areas.append(int(shape.sum()))
        image[shape] = _texture(rng, category, SWING_OF_SHAPE, mean, x, y)[shape]
        instances[shape] = len(scene.areas)
    return scene


def outline(mask: np.ndarray) -> list[list[tuple[int, int]]]:
    """The boundary of an H x W mask as closed loops of corners (x, y) of pixels, without corners on straight lines.

    Pixels that share a side are in one loop, pixels that share only a corner need not be. Seen on the screen, loops
    go clockwise, and those around holes the other way.
    """
    inside = np.pad(np.asarray(mask, bool), 1)
    sides = set()
    for turn, ((over, down), (right, below), _) in enumerate(SIDES):
        y, x = np.nonzero(inside & ~np.roll(inside, (-down, -over), (0, 1)))
        sides.update(zip((x - 1 + right).tolist(), (y - 1 + below).tolist(), [turn] * len(x)))
    loops = []
    while sides:
        side = min(sides)  # the top left corner of its loop
        loop, followed = [], set()
        while side not in followed:
            followed.add(side)
            x, y, turn = side
            x, y = x + SIDES[turn][2][0], y + SIDES[turn][2][1]
            # Where two pixels touch at a corner there are two ways on: the right turn stays with this pixel.
            side = next(s for t in (1, 0, 3) if (s := (x, y, (turn + t) % 4)) in sides)
            if side[2] != turn:
                loop.append((x, y))
        sides -= followed
        loops.append(loop)
    return loops


def annotations(scene: Scene) -> list[dict]:
    """What COCO says of each shape's visible pixels: category_id from 1, segmentation, area, bbox (x, y, w, h)."""
    found = []
    for k, category in enumerate(scene.categories, 1):
        visible = scene.instances == k
        loops = outline(visible)
        x, y = zip(*(corner for loop in loops for corner in loop))
        found.append(
            dict(
                category_id=category + 1,
                iscrowd=0,
                area=int(visible.sum()),
                bbox=[min(x), min(y), max(x) - min(x), max(y) - min(y)],
                segmentation=[[value for corner in loop for value in corner] for loop in loops],
            )
        )
    return found


def label_map(scene: Scene) -> np.ndarray:
    """H x W, uint8: 1 + index into LABELS; 0 where a shape's pixel is beside one of another label."""
    labels = np.array([1] + [2 + category for category in scene.categories], np.uint8)[scene.instances]
    padded = np.pad(labels, 1, mode='edge')
    beside = [np.roll(padded, step, (0, 1))[1:-1, 1:-1] for step, _, _ in SIDES]
    return labels * ((labels == 1) | np.all(labels == beside, 0))


def png(pixels: np.ndarray) -> bytes:
    """The PNG file of H x W (grey) or H x W x 3 (RGB) uint8 pixels, not compressed."""
    height, width = pixels.shape[:2]
    rows = b''.join(b'\0' + row.tobytes() for row in pixels)
    blocks = [rows[i : i + 65535] for i in range(0, len(rows), 65535)]
    data = b''.join(
        struct.pack('<BHH', i == len(blocks) - 1, len(block), 65535 - len(block)) + block
        for i, block in enumerate(blocks)
    )
    chunks = (
        b'IHDR' + struct.pack('>IIBBBBB', width, height, 8, 2 if pixels.ndim == 3 else 0, 0, 0, 0),
        b'IDAT' + b'\x78\x01' + data + struct.pack('>I', zlib.adler32(rows)),
        b'IEND',
    )
    return b'\x89PNG\r\n\x1a\n' + b''.join(
        struct.pack('>I', len(chunk) - 4) + chunk + struct.pack('>I', zlib.crc32(chunk)) for chunk in chunks
    )


def write(root: str | Path, seed: int = 0, train: int = 400, val: int = 100, size: int = 128) -> bool:
    """Draw the data set into the new folder `root`, whole or not at all; False if that very data set is there already.

    Args:
        train: number of training images. More of them leave the earlier ones as they are.
        val: number of validation images, likewise.
        size: side of the images in pixels.

    Raises:
        UsageError: a number out of range, something else at `root`, or a place that cannot be written.
    """
    root, request = Path(root), dict(seed=seed, train=train, val=val, size=size)
    for name, (low, high) in ARG_RANGES.items():
        if not isinstance(request[name], int) or not low <= request[name] <= high:
            raise UsageError(f'{name}={request[name]!r}: give a whole number from {low} to {high}')
    try:
        if root.exists():
            if _request_at(root) == dict(format=FORMAT, **request):
                return False
            raise UsageError(
                f'{root} holds something else than these shapes ({_format_request(request)}): '
                f'remove it or give another folder'
            )
        root.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f'.{root.name}-', dir=root.parent) as temporary:
            whole = Path(temporary, 'shapes')
            for split in SPLITS:
                _write_split(whole, split, seed, request[split], size)
            _write_json(whole / 'shapes.json', dict(format=FORMAT, **request))
            whole.rename(root)
    except OSError as error:
        raise UsageError(f'{root} cannot be written ({error.strerror}): give another folder') from error
    return True


def _write_split(root: Path, split: str, seed: int, count: int, size: int) -> None:
    images, labels, instances = root / split, root / 'labels' / split, root / f'annotations/instances_{split}.json'
    for folder in (images, labels, instances.parent):
        folder.mkdir(parents=True, exist_ok=True)
    coco = dict(images=[], annotations=[], categories=[dict(id=i, name=name) for i, name in enumerate(CLASSES, 1)])
    for index in range(1, count + 1):
        scene = draw(np.random.RandomState([seed, SPLITS.index(split), index]), size)
        name = f'{index:06d}.png'
        (images / name).write_bytes(png(scene.image))
        (labels / name).write_bytes(png(label_map(scene)))
        coco['images'].append(dict(id=index, file_name=name, width=size, height=size))
        coco['annotations'] += [
            dict(id=i, image_id=index, **annotation)
            for i, annotation in enumerate(annotations(scene), len(coco['annotations']) + 1)
        ]
    _write_json(instances, coco)


def _write_json(path: Path, content: dict) -> None:
    path.write_bytes(json.dumps(content, separators=(',', ':')).encode() + b'\n')


def _request_at(root: Path) -> dict | None:
    try:
        return json.loads((root / 'shapes.json').read_bytes())
    except (OSError, ValueError):
        return None


def _format_request(request: dict) -> str:
    return ', '.join(f'{name} {value}' for name, value in request.items())


def _background_color(rng: np.random.RandomState) -> np.ndarray:
    """A mean colour of a ground; like _vivid's it leaves room for what _texture adds and takes."""
    return rng.randint(80, 176) + rng.randint(-12, 13, 3)


def _foreground_color(rng: np.random.RandomState, category: int) -> np.ndarray:
    """A mean colour of a shape, near the hue of its class."""
    return np.array(HUES[category]) + rng.randint(-16, 17, 3)


def _texture(
    rng: np.random.RandomState, kind: int, swing: tuple[int, int], mean: np.ndarray, x: np.ndarray, y: np.ndarray
) -> np.ndarray:
    """One of TEXTURES in two colours at most `swing` from the mean, and grey noise: H x W x 3, uint8."""
    period, swing, grain = 3 + rng.randint(6), rng.randint(*swing, 3), rng.randint(2, 9)
    across, along = (1 - 2 * (np.floor(turned / period).astype(int) & 1) for turned in _rotate(rng, x, y, 1))
    blotches = 1 - 2 * rng.randint(0, 2, x.shape).repeat(3, 0).repeat(3, 1)[: len(x), : len(x)]
    pattern = dict(plain=0 * across, stripes=across, checks=across * along, blotches=blotches)[TEXTURES[kind]]
    noise = rng.randint(-grain, grain + 1, x.shape)
    return (mean + pattern[..., None] * swing + noise[..., None]).astype(np.uint8)


def _rotate(rng: np.random.RandomState, x: np.ndarray, y: np.ndarray, most: float) -> tuple[np.ndarray, np.ndarray]:
    """x and y turned around the origin by a random angle, the tangent of whose half is at most `most`."""
    t = most * (2 * rng.random_sample() - 1)
    cos, sin = (1 - t * t) / (1 + t * t), 2 * t / (1 + t * t)
    return cos * x + sin * y, cos * y - sin * x


def _shape(rng: np.random.RandomState, name: str, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The pixels of a shape at a random place, angle, size and aspect, whole inside the image: H x W, bool."""
    size = len(x)
    radius = size * (RADIUS[0] + (RADIUS[1] - RADIUS[0]) * rng.random_sample()) / 128
    aspect = 0.75 + 0.25 * rng.random_sample()
    left, top = (radius + (size - 2 * radius) * rng.random_sample() for _ in 'xy')
    u, v = _rotate(rng, (x - left) / radius, (y - top) / radius, MAX_TILT)
    v = v / aspect
    if name == 'disc':
        return u * u + v * v < 0.64
    corners, inside = CORNERS[name], np.zeros(x.shape, bool)
    for (u1, v1), (u2, v2) in zip(corners, corners[1:] + corners[:1]):
        # Even-odd: a ray to the right of a pixel's centre crosses the edge.
        crosses = (v1 > v) != (v2 > v)
        inside ^= crosses & (((u - u1) * (v2 - v1) < (v - v1) * (u2 - u1)) == (v1 < v2))
    return inside


def _is_visible_enough(visible: np.ndarray, area: int) -> bool:
    """Whether half of a shape of `area` pixels is visible or more, and without holes, which polygons cannot say."""
    return 2 * visible.sum() >= area and all(_turns_clockwise(loop) for loop in outline(visible))


def _turns_clockwise(loop: list[tuple[int, int]]) -> bool:
    return sum(x1 * y2 - x2 * y1 for (x1, y1), (x2, y2) in zip(loop, loop[1:] + loop[:1])) > 0


def main() -> int:
    parser = argparse.ArgumentParser(
        prog='python -m convnext_dense.datasets.toy_shapes',
        allow_abbrev=False,
        description='Draw the data set of shapes into a new folder.',
    )
    parser.add_argument('root', help='the folder')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--train', type=int, default=400, help='images to train on (default: 400)')
    parser.add_argument('--val', type=int, default=100, help='images to evaluate on (default: 100)')
    parser.add_argument('--size', type=int, default=128, help='side of the images in pixels (default: 128)')
    request = vars(parser.parse_args())
    root = request.pop('root')
    try:
        done = 'drew the shapes into' if write(root, **request) else 'the shapes are already in'
    except UsageError as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    print(f'{done} {root} ({_format_request(request)})')
    return 0


if __name__ == '__main__':
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: sys.exit(128 + number))  # by way of removing what is half drawn
    sys.exit(main())
