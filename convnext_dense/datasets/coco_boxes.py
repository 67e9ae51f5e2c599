"""Checks of COCO bounding boxes, (x, y, width, height) in pixels."""

from collections import Counter

from .coco_values import is_finite, is_number
from .diagnostics import MAX_EXAMPLES, Report
from .files import to_one_line

MAX_COORD_FACTOR = 10  # coordinates beyond this multiple of the longer side of an image are a mistake
BORDER_TOLERANCE = 1  # pixels beyond the border that rounding, or counting from 0 or 1, explains
# IoU of a box with that of its mask: above the first they are the same, below the second they are reported as
# different, below the third as unrelated.
SAME_IOU, DIFFERENT_IOU, UNRELATED_IOU = 0.9, 0.5, 0.1
EDGE_TOLERANCE = 2  # pixels by which the edges of a box and its mask may differ
AREA_TOLERANCE = 0.01  # relative
# What a mask or an area says of a box: whether it fits as (x, y, width, height), and as corners.
IS_CORNERS, IS_WIDTH_HEIGHT = (False, True), (True, False)
# If all are corners, at least so many boxes, and this fraction of all, reach out of their images.
MIN_REACHING_OUT, MIN_FRACTION_REACHING_OUT = 3, 0.2


def box_problem(box: object, width: int, height: int) -> str | None:
    """Return the code of what makes a box unusable in an image of a size, None if nothing does."""
    if not isinstance(box, list) or len(box) != 4 or not all(map(is_number, box)):
        return 'box-not-four-numbers'
    if not all(map(is_finite, box)):
        return 'box-not-finite'
    x, y, w, h = box
    if max(map(abs, box)) > MAX_COORD_FACTOR * max(width, height):
        return 'box-far-outside-image'
    if w <= 0 or h <= 0 or w * h <= 0:  # the product of very small numbers is 0
        return 'box-without-area'
    return 'box-outside-image' if x >= width or y >= height or x + w <= 0 or y + h <= 0 else None


def box_mask_difference(box: list[float], mask_box: list[float]) -> str | None:
    """Return the code of the difference between a box and that of its mask, None if there is none.

    A box that contains the mask may contain hidden parts of the object.
    """
    if max(abs(a - b) for a, b in zip(_corners(box), _corners(mask_box))) <= EDGE_TOLERANCE:
        return None
    iou = box_iou(box, mask_box)
    contains = _intersection(box, mask_box) >= SAME_IOU * mask_box[2] * mask_box[3]
    if iou < UNRELATED_IOU and not contains:
        return 'box-mask-unrelated'
    return 'box-mask-mismatch' if iou < DIFFERENT_IOU else None


class BoxVotes:
    """Evidence on whether the boxes of a file are fractions or corners, instead of x, y, width, height in pixels.

    Masks tell corners best, then areas, then the borders of images.

    Attributes:
        by_mask (Counter): number of boxes by how they fit their masks, as `IS_CORNERS`.
        by_area (Counter): number of boxes without masks by how they fit their areas.
        corners (list[str]): ids of the first boxes that are probably corners.
        fractions (list[str]): ids of the first boxes that are probably fractions of the sides of their images.
        num_boxes (int): all boxes.
        num_fractions (int): those that are probably fractions.
        num_valid_corners (int): those that are boxes within the image if they are corners.
        num_reaching_out (int): those that reach out of the image if they are not.
    """

    def __init__(self) -> None:
        self.by_mask, self.by_area, self.corners, self.fractions = Counter(), Counter(), [], []
        self.num_boxes = self.num_fractions = self.num_valid_corners = self.num_reaching_out = 0

    def add(self, annotation: dict, mask_box: list[float] | None, width: int, height: int) -> bool:
        """Count a box; return whether its mask, with the box `mask_box`, shows that it is corners."""
        x, y, right, bottom = box = annotation['bbox']
        as_corners, is_ordered = [x, y, right - x, bottom - y], right > x and bottom > y
        is_outside = max(x + right - width, y + bottom - height) > BORDER_TOLERANCE
        self.num_boxes += 1
        self.num_valid_corners += is_ordered and min(x, y, width - right, height - bottom) >= -BORDER_TOLERANCE
        self.num_reaching_out += is_outside
        area, fits = annotation.get('area'), None
        if mask_box:
            fits = (box_iou(box, mask_box) > SAME_IOU, is_ordered and box_iou(as_corners, mask_box) > SAME_IOU)
            self.by_mask[fits] += 1
        elif is_number(area) and is_finite(area) and area > 0:
            fits = (_is_area(area, right * bottom), is_ordered and _is_area(area, as_corners[2] * as_corners[3]))
            self.by_area[fits] += 1
        is_fraction = max(box) <= 1 and not all(float(value).is_integer() for value in box)
        self.num_fractions += is_fraction
        for applies, examples in ((fits == IS_CORNERS or is_outside, self.corners), (is_fraction, self.fractions)):
            if applies and len(examples) < MAX_EXAMPLES:
                examples.append(f'id {to_one_line(annotation.get("id"))}')
        return mask_box is not None and fits == IS_CORNERS

    @property
    def most_are_corners(self) -> bool:
        """Whether most boxes of the file that show how they are written are corners."""
        for votes in (self.by_mask, self.by_area):
            if 2 * votes[IS_CORNERS] > sum(votes.values()):
                return True
        if 2 * self.by_mask[IS_WIDTH_HEIGHT] > sum(self.by_mask.values()):
            return False
        min_reaching_out = max(MIN_REACHING_OUT, MIN_FRACTION_REACHING_OUT * self.num_boxes)
        return self.num_valid_corners == self.num_boxes and self.num_reaching_out >= min_reaching_out

    def report(self, split: str, report: Report) -> None:
        """Report a file of which most boxes are fractions or corners, the latter instead of its single boxes."""
        if 2 * self.num_fractions > self.num_boxes:
            code, examples = 'most-boxes-as-fractions', self.fractions
        elif self.most_are_corners:
            single = report.diagnostics.pop((split, 'box-as-corners'), None)
            code, examples = 'most-boxes-as-corners', single.examples if single else self.corners
        else:
            return
        for example in examples:
            report.add(split, code, example, count=0)
        report.diagnostics[split, code].count = self.num_boxes


def clip_box(box: list[float], width: int, height: int) -> list[float]:
    """Return the part of a box that lies in its image."""
    x1, y1, x2, y2 = (min(max(v, 0), limit) for v, limit in zip(_corners(box), (width, height, width, height)))
    return [x1, y1, x2 - x1, y2 - y1]


def box_iou(a: list[float], b: list[float]) -> float:
    """Return the intersection over union of two boxes."""
    intersection = _intersection(a, b)
    union = a[2] * a[3] + b[2] * b[3] - intersection
    return intersection / union if union > 0 else 0.0


def _intersection(a: list[float], b: list[float]) -> float:
    (left, top, right, bottom), (x1, y1, x2, y2) = _corners(a), _corners(b)
    return max(min(right, x2) - max(left, x1), 0) * max(min(bottom, y2) - max(top, y1), 0)


def _corners(box: list[float]) -> tuple[float, ...]:
    x, y, w, h = box
    return x, y, x + w, y + h


def _is_area(area: float, expected: float) -> bool:
    return abs(area - expected) <= max(AREA_TOLERANCE * expected, 1)
