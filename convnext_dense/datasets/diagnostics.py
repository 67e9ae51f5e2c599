"""Problems that the checks of a data set find: their codes, what is done about each, and the report of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from ..errors import UsageError, count
from .check_images import MAX_BYTES, MAX_PIXELS, ImageInfo
from .files import format_bytes, to_one_line
from .image_sizes import STRIDE

# Actions for a problem. The first two mean that data are lost, which --strict does not accept.
ERROR, DROPPED, FIXED, INFO = ACTIONS = ('error', 'dropped', 'fixed', 'info')
PROBLEM_ACTIONS = (ERROR, DROPPED)
MAX_EXAMPLES = 3  # kept for each problem and split
MAX_CAUSES = 3  # named if nothing is left of a split


class Rule(NamedTuple):
    """What is done about a kind of problem: one of `ACTIONS`, and a note as in `NOTES`."""

    action: str
    note: str = ''


TOO_LARGE = f'over {MAX_PIXELS:,} pixels, which Pillow does not open; cut it into tiles'
# Codes of what is dropped that need no explanation.
SELF_EXPLANATORY_CODES = (
    'missing-image empty-file not-an-image truncated-image image-without-id-or-name name-outside-root '
    'orphan-annotation unknown-category not-an-annotation missing-box box-not-four-numbers '
    'box-not-finite box-without-area box-outside-image box-far-outside-image polygon-under-3-points '
    'polygon-not-numeric polygon-outside-image polygon-far-outside-image rle-size-mismatch rle-length-mismatch '
    'unreadable-mask mask-size-mismatch mask-all-ignored unreadable-label label-not-numbers'
)
# By action and code: what exactly is done, or how to fix it; empty where code and action say it. Codes are stable: they
# stand in reports, in the JSON of tools/check_data.py and in stored caches.
NOTES = {
    ERROR: {
        **dict.fromkeys(('nothing-to-train-on', 'nothing-to-evaluate'), 'no usable annotation is left'),
        'ambiguous-name': 'write names with their folders as they are here, or give --train-images, --val-images',
        'duplicate-category-id': 'give each category an id of its own',
        'category-without-id-or-name': 'give each category a name and an id that is not true or false',
        'category-name-mismatch': 'the same id has another name in train; give it the same name, or another id',
        'most-boxes-as-corners': 'most are x1, y1, x2, y2; write x, y, width, height',
        'most-boxes-as-fractions': 'most are from 0 to 1, as fractions of the sides of the image; write pixels',
        'mask-values-0-and-255': '255 is ignored, so there is nothing to learn; write 255 as 1 if it is a class',
        'single-class': 'the loss of a single class is always 0',
        'mask-lossy-format': 'JPEG and the like change label values; write PNGs from the original masks, or '
        'give --mask-threshold 128 if they are black and white',
        'mask-in-color': 'no table says which color is which class; give --classes FILE with lines NAME R G B',
        'mask-not-gray': 'it has colors, which --mask-threshold cannot tell apart: leave it out; for masks in color '
        'give --classes FILE with lines NAME R G B',
        'mask-not-8-bit': 'values beyond 0 to 255 are no classes; if they number objects, use a detection recipe',
        'color-not-in-table': 'no class has this color; add it to the table, or give --ignore-other-colors',
        'mask-soft-edges': '',
        'label-out-of-range': '',
    },
    DROPPED: {
        **dict.fromkeys(SELF_EXPLANATORY_CODES.split(), ''),
        'image-size-mismatch': 'its annotations are of an image of another size; give the images that were annotated, '
        'or write sizes and coordinates of these',
        'not-a-regular-file': 'a folder, a device or a pipe has its name',
        'file-too-large': f'over {format_bytes(MAX_BYTES)}',
        'git-lfs-pointer': 'its content was not fetched; run git lfs pull in the repository it is from',
        **dict.fromkeys(('image-too-large', 'mask-too-large'), TOO_LARGE),
        'channel-count-mismatch': 'other images, or those of the training, have another number of channels',
        'value-type-mismatch': 'other images, or those of the training, have values of another type, such as 16 bits',
        'unreadable-image': 'OpenCV, which reads images in training, cannot decode it',
        'image-resized-to-zero': "the recipe's resize leaves less than one pixel of a side; cut it into tiles",
        'image-below-stride': f"the recipe's resize leaves a side under {STRIDE} pixels, the stride; cut it into tiles",
        'duplicate-image-id': 'the later one is dropped, annotations stay with the first',
        'duplicate-file-name': 'the later one is dropped, with its annotations',
        'category-without-class': 'no class of train or of the checkpoint has this name; its annotations are dropped',
        'duplicate-annotation': 'the later one is dropped',
        'box-as-corners': 'its mask shows that it is x1, y1, x2, y2; write x, y, width, height',
        'box-mask-unrelated': 'box and mask (almost) do not overlap',
        'missing-mask': 'most other annotations have a mask',
        'mask-format-unknown': 'neither a list of polygons nor an RLE',
        **dict.fromkeys(('polygon-odd-length', 'label-odd-polygon'), 'x and y do not pair up'),
        'polygon-outline-too-long': 'its outline is over ten million pixels long',
        'iscrowd-invalid': 'neither 0 nor 1',
        'unmatched-image': 'no segmentation mask has its name',
        'duplicate-stem': 'a segmentation mask belongs to one image; the later one is dropped',
        **dict.fromkeys(('unmatched-mask', 'unmatched-label'), 'no image has its name'),
        'missing-label': 'no annotation file has its name; one without objects makes an image a negative',
        'task-without-annotation': 'not annotated, skipped or canceled; an image without objects needs an empty one',
        'region-of-rotated-image': 'the image was rotated in Label Studio, and its coordinates are of that view',
        'segment-without-pixels': 'no pixel of its PNG has its id',
        'ignored-region': 'LabelMe marks it to be ignored, which boxes cannot say',
        'shape-without-area': 'a point or a line has neither a box nor a mask',
        'label-without-name': 'an object needs the name of its class',
        'missing-split': 'the file of the data set names a place that does not exist',
        'class-index-out-of-range': 'no class has this index; they count from 0',
        'coordinates-beyond-one': 'YOLO has fractions of the sides of the image; divide pixels by them',
        'label-too-short': 'a line is a class and four numbers, or the points of a polygon',
        'mask-without-object': 'the mask of an object is empty',
        'mask-single-row': 'mmseg cannot read a segmentation mask of a single row or column',
    },
    FIXED: {
        'name-case-mismatch': 'the name on the disk is used',
        'exif-rotated-image': 'its annotations are of the image as stored; it is read without EXIF rotation',
        'name-spelling-mismatch': 'the name on the disk is used, which differs in Unicode normalization or escapes',
        'name-matched-by-suffix': 'no such folder exists here; the one file whose path ends alike is used',
        'image-without-size': 'taken from the image file',
        'duplicate-category-name': 'merged into one class',
        'category-id-mismatch': 'matched with train by its name',
        'id-not-integer': 'converted to the integer that it stands for',
        'image-id-renumbered': 'all images are; pycocotools and mmdet need integers up to 2**53',
        'supercategory-as-class': 'not a class: it has no annotation, and others name it as supercategory',
        'duplicate-annotation-id': 'renumbered',
        'box-from-mask': 'no box is given; computed from the mask',
        **dict.fromkeys(('missing-area', 'implausible-area'), 'computed from the mask or the box'),
        'polygon-not-nested': 'wrapped in a list',
        'label-with-commas': 'read as spaces, or as decimal points where nothing else is one',
        'label-sixth-number': 'taken for a confidence or a track, and not read',
        'class-names-missing': 'no data.yaml, classes.txt or obj.names names the classes, so they are numbered',
        'several-annotations': 'only the newest of a task is used, of those marked as ground truth if there are any',
        'class-attribute-missing': 'no attribute is the class, so all are object; --classes object=NAME renames it',
        'mask-of-segments': 'values are ids of segments, whose categories are the classes; other pixels are ignored',
        'mask-color-coded': 'colors are classes as the table has them',
        'mask-gray-as-color': 'its three channels are equal, and one is used',
        'mask-instance-ids': 'class * 1000 + number, as in Cityscapes; the class is used',
        'mask-array': 'read as an array of labels',
        'instances-of-one-class': 'no file names the class of the instances; a line of classes.txt does',
        'mask-thresholded': 'gray values become labels 0 and 1, as --mask-threshold says',
        'mask-0-and-255': '255 is the second class, not ignored; without names they are background and foreground',
        'iscrowd-as-text': "'0' and 'false' are read as 0, '1' and 'true' as 1",
    },
    INFO: {
        'constant-channel': 'all of its values are equal, so that nothing can be learned from it',
        'channels-read-as-rgb': 'kept: read as RGB of 8 bits, as the first image is',
        'fourth-channel': 'the fourth channel of these TIFF is called opacity and left out; --channels 1,2,3,4 uses it',
        'duplicate-image': 'kept: the same bytes under two names',
        'train-image-in-val': 'kept: the same bytes in both, so metrics on val are too good',
        'image-without-annotations': 'kept: the recipes train without them, and evaluate with them',
        'image-below-32-pixels': 'kept: the recipes train without them (filter_cfg.min_size)',
        'class-never-annotated': 'kept as a class',
        'class-not-in-train': 'kept: annotated here, never in train',
        'supercategory-not-text': 'ignored; supercategories are not used in training',
        'category-id-gaps': 'class indices are assigned without gaps',
        'box-below-one-pixel': 'kept: mmdet trains without them',
        'box-partly-outside-image': 'kept: clipped in training, used as it is in the evaluation',
        'box-mask-mismatch': 'kept: the mask has another size or position',
        'few-masks': 'most annotations have no mask; all are used as boxes',
        'class-count-mismatch': 'the names are used',
        'images-outside-folder': 'the data.yaml says so',
        'keypoints-ignored': 'only the boxes before them are used',
        'boxes-and-polygons': 'lines of five numbers are boxes, longer ones polygons',
        'mask-ignored': 'neither a list of polygons nor an RLE; only boxes are used',
        'difficult': 'kept: not trained on, ignored in the evaluation, as in mmdet',
        'pixels-from-one': 'as in Pascal VOC; boxes begin a pixel further left and up, so that 1 to 640 are all of 640',
        'class-not-selected': 'left out, as --classes does not name it',
        'other-format': 'the folder holds these labels as well, which are not used',
        'crowd': 'kept: not trained on, ignored in the evaluation (CVAT exports brush masks as crowds)',
        'crowd-with-polygons': 'kept: not trained on, ignored in the evaluation',
        'single-class-in-train': 'kept: the model can only learn to predict this class everywhere',
    },
}
RULES = {code: Rule(action, note) for action, notes in NOTES.items() for code, note in notes.items()}
# Annotations and images that are kept, but not trained on.
UNTRAINABLE_CODES = ('difficult', 'crowd', 'crowd-with-polygons', 'box-below-one-pixel', 'image-below-32-pixels')


@dataclass
class Diagnostic:
    """A problem, by its code, in a split or in 'all': how many files, images or annotations have it, and examples."""

    split: str
    code: str
    count: int = 0
    examples: list[str] = field(default_factory=list)

    @property
    def action(self) -> str:
        """What is done about it, one of `ACTIONS`."""
        return RULES[self.code].action

    def describe(self) -> str:
        """Return split, code, count, examples and note in one line."""
        note = RULES[self.code].note
        ellipsis = ', ...' if self.count > len(self.examples) else ''
        text = f'{self.split}: {self.code}, {self.count:,} ({", ".join(self.examples)}{ellipsis})'
        return f'{text}: {note}' if note else text

    def __str__(self) -> str:
        return f'{self.action:<7}  {self.describe()}'


@dataclass
class Report:
    """The result of the checks of a data set: lines on what it holds, and each `Diagnostic` by split and code."""

    facts: list[str] = field(default_factory=list)
    diagnostics: dict[tuple[str, str], Diagnostic] = field(default_factory=dict)

    def add(self, split: str, code: str, example: object, count: int = 1) -> None:
        """Count a problem of a split, and keep the example while there are fewer than `MAX_EXAMPLES`."""
        diagnostic = self.diagnostics.setdefault((split, code), Diagnostic(split, code))
        diagnostic.count += count
        if len(diagnostic.examples) < MAX_EXAMPLES:
            diagnostic.examples.append(to_one_line(example))

    def add_if_empty(self, split: str, num_usable: int, folder: Path) -> None:
        """Report a split of which nothing is left, with the most frequent causes."""
        if num_usable:
            return
        diagnostics = [d for d in self.by_action() if d.split in (split, 'all')]
        causes = [d for d in diagnostics if d.action in PROBLEM_ACTIONS or d.code in UNTRAINABLE_CODES]
        causes = causes or [d for d in diagnostics if d.code == 'image-without-annotations']
        causes.sort(key=lambda diagnostic: diagnostic.count, reverse=True)
        examples = [', '.join(to_one_line(example, 60) for example in cause.examples[:2]) for cause in causes]
        texts = [f'{cause.code}, {cause.count:,} ({text})' for cause, text in zip(causes, examples)]
        summary = '; '.join(texts[:MAX_CAUSES]) or 'no images'
        if len(causes) == 1 and causes[0].action == DROPPED and (note := RULES[causes[0].code].note):
            summary += f': {note}'
        self.add(split, 'nothing-to-train-on' if split == 'train' else 'nothing-to-evaluate', f'{folder}: {summary}')

    def add_duplicates(self, names: Mapping[str, Sequence[str]], infos: Mapping[str, ImageInfo]) -> None:
        """Report images with the same bytes, within a split or in train and another one; `names` are by split."""
        first_by_digest: dict[str, tuple[str, str]] = {}
        for split, names_of_split in names.items():
            for name in names_of_split:
                first_image = first_by_digest.setdefault(infos[name].digest, (split, name))
                if first_image != (split, name):
                    code = 'duplicate-image' if first_image[0] == split else 'train-image-in-val'
                    self.add(split, code, f'{name} is {first_image[1]}')

    def add_unused_classes(self, used_indices: Mapping[str, set[int]], classes: Sequence[str]) -> None:
        """Report classes that do not occur (`used_indices` by split), in all splits or in train."""
        for i, name in enumerate(classes):
            splits = [split for split, indices in used_indices.items() if i in indices]
            if not splits:
                self.add('all', 'class-never-annotated', name)
            elif 'train' in used_indices and 'train' not in splits:
                self.add(splits[0], 'class-not-in-train', name)

    def by_action(self, *actions: str) -> list[Diagnostic]:
        """Return the diagnostics with these actions (default: all), the most serious first."""
        diagnostics = [d for d in self.diagnostics.values() if d.action in (actions or ACTIONS)]
        return sorted(diagnostics, key=lambda diagnostic: ACTIONS.index(diagnostic.action))

    @property
    def problems(self) -> list[Diagnostic]:
        """Return what cannot be used and what is dropped."""
        return self.by_action(*PROBLEM_ACTIONS)

    def lines(self) -> list[str]:
        """Return the report as lines of text."""
        return [*map(to_one_line, self.facts), *map(str, self.by_action() or ['no problems found'])]

    def as_data(self) -> dict:
        """Return the report as plain data, for JSON."""
        keys = ('split', 'code', 'action', 'count', 'examples')
        return dict(facts=self.facts, diagnostics=[{key: getattr(d, key) for key in keys} for d in self.by_action()])

    @classmethod
    def from_data(cls, data: dict) -> 'Report':
        """Make a report from the result of `as_data`."""
        diagnostics = [Diagnostic(d['split'], d['code'], d['count'], d['examples']) for d in data['diagnostics']]
        return cls(data['facts'], {(d.split, d.code): d for d in diagnostics})

    def raise_if_errors(self, strict: bool = False) -> None:
        """Raise if the data cannot be used, or with `strict` if something is dropped.

        Raises:
            UsageError: with the first such diagnostic, and how many others there are.
        """
        errors = self.by_action(ERROR) or (self.problems if strict else [])
        if not errors:
            return
        num_others = len(self.diagnostics) - 1
        hint = f' (tools/check_data.py lists {count(num_others, "more finding")})' if num_others else ''
        raise UsageError(f'data set: {errors[0] if strict else errors[0].describe()}{hint}')
