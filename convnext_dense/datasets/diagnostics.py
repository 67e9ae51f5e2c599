"""What a check of data finds: kinds of problems, what is done about each, and the text that says so."""

from dataclasses import dataclass, field
from typing import NamedTuple

from ..errors import UsageError
from .check_images import MAX_BYTES, MAX_PIXELS
from .files import in_bytes, shown
from .image_sizes import STRIDE

# What is done about a kind of problem. The first two are errors, which --strict refuses.
ERROR, DROPPED, FIXED, INFO = 'refused', 'left out', 'mended', 'noted'
EXAMPLES = 3


class Rule(NamedTuple):
    done: str
    then: str = ''  # what is done, or the way out, where the word is not enough


TOO_LARGE = f'left out: over {MAX_PIXELS:,} pixels, which Pillow refuses: cut it into tiles'
RULES = {
    # images, of both tasks
    'missing image': Rule(DROPPED),
    'not a regular file': Rule(DROPPED, 'left out: a folder, a device or a pipe has its name'),
    'file too large': Rule(DROPPED, f'left out: over {in_bytes(MAX_BYTES)}'),
    'pointer of Git LFS': Rule(DROPPED, 'left out: its content was not fetched: run git lfs pull where it is from'),
    'image too large': Rule(DROPPED, TOO_LARGE),
    'empty file': Rule(DROPPED),
    'not an image': Rule(DROPPED),
    'image cut short': Rule(DROPPED),
    'unreadable image': Rule(DROPPED, 'left out: OpenCV, which reads in training, cannot'),
    'image resized to nothing': Rule(
        DROPPED, 'left out: in the size that the recipe gives it a side is less than a pixel: cut it into tiles'
    ),
    'image under the stride': Rule(
        DROPPED,
        f'left out: in the size that the recipe gives it a side is under {STRIDE} pixels, of which the backbone leaves '
        'nothing: cut it into tiles',
    ),
    'name in other case': Rule(FIXED, 'the name on the disk is taken'),
    'image turned by EXIF': Rule(FIXED, 'its annotation is of the image as stored: read without turning'),
    'the same image twice': Rule(INFO, 'kept: the same bytes under two names'),
    'image of train in val': Rule(INFO, 'kept: the same bytes in both, so figures on val are too good'),
    'nothing to train on': Rule(ERROR, 'no usable annotation is left'),
    'nothing to evaluate': Rule(ERROR, 'no usable annotation is left'),
    # COCO's images
    'image without id or name': Rule(DROPPED),
    'image id twice': Rule(DROPPED, 'the later one is left out, the annotations stay with the first'),
    'file name twice': Rule(DROPPED, 'the later one is left out, with its annotations'),
    'name leads out of the folder': Rule(DROPPED),
    'name written otherwise': Rule(FIXED, 'the name on the disk is taken, which differs in Unicode form or escapes'),
    'name found by its ending': Rule(FIXED, 'no such folder is here: the one file is taken that ends like the name'),
    'ambiguous name': Rule(
        ERROR, 'write names with their folders as they are here, or give --train-images, --val-images'
    ),
    'size contradicts the image': Rule(DROPPED),
    'no size given': Rule(FIXED, "the image's own is taken"),
    'image without annotations': Rule(INFO, 'kept: the recipes train without them, and evaluate with them'),
    'image under 32 pixels': Rule(INFO, 'kept: the recipes train without them (filter_cfg.min_size)'),
    # COCO's categories
    'category id twice': Rule(ERROR, 'give each category an id of its own'),
    'category without id or name': Rule(ERROR, 'give each a name and an id: true and false are none'),
    'category name twice': Rule(FIXED, 'taken as one class'),
    'category named otherwise': Rule(
        ERROR, 'the same id has two names in train and here: name it alike, or number it anew'
    ),
    'category without a class': Rule(DROPPED, "none of train's, or of the checkpoint's: its annotations are left out"),
    'category with other id': Rule(FIXED, 'matched with train by its name'),
    'class never annotated': Rule(INFO, 'kept as a class'),
    'class never trained': Rule(INFO, 'kept: annotated here, never in train'),
    'id as text or float': Rule(FIXED, 'taken as the number that it is'),
    'image id numbered anew': Rule(FIXED, 'all images are: pycocotools and mmdet want whole numbers up to 2**53'),
    'supercategory that is no text': Rule(INFO, 'left aside: nothing is learnt of it'),
    'gaps in category ids': Rule(INFO, 'classes are counted without them'),
    'group of classes': Rule(FIXED, 'no class: nothing is annotated with it, the others name it as their group'),
    # COCO's annotations
    'annotation of no image': Rule(DROPPED),
    'unknown category': Rule(DROPPED),
    'not an annotation': Rule(DROPPED),
    'annotation there twice': Rule(DROPPED, 'the later one is left out'),
    'annotation id twice': Rule(FIXED, 'numbered anew'),
    'no box': Rule(DROPPED),
    'box from the mask': Rule(FIXED, 'there is no box: taken from the mask'),
    'box is not four numbers': Rule(DROPPED),
    'box of NaN or Inf': Rule(DROPPED),
    'box without area': Rule(DROPPED),
    'box under a pixel': Rule(INFO, 'kept: mmdet trains without them'),
    'box outside the image': Rule(DROPPED),
    'box far outside': Rule(DROPPED),
    'box partly outside': Rule(INFO, 'kept: training cuts it at the border, the evaluation takes it as it is'),
    'box written as corners': Rule(DROPPED, 'left out: its mask says x1, y1, x2, y2: write x, y, width, height'),
    'boxes written as corners': Rule(ERROR, 'most are x1, y1, x2, y2: write x, y, width, height'),
    'box apart from its mask': Rule(DROPPED, 'left out: it has nothing to do with its mask'),
    'box unlike its mask': Rule(INFO, 'kept: the mask is of another size or elsewhere'),
    'area that cannot be': Rule(FIXED, 'taken from the mask or the box'),
    'no area given': Rule(FIXED, 'taken from the mask or the box'),
    'no mask': Rule(DROPPED, 'left out: most others have one'),
    'masks of few': Rule(INFO, 'most annotations have no mask: all are taken as boxes'),
    'mask left aside': Rule(INFO, 'it is none: a mask is a list of polygons, or an RLE; boxes alone are taken'),
    'mask of no known form': Rule(DROPPED, 'left out: a mask is a list of polygons, or an RLE'),
    'polygon under three points': Rule(DROPPED),
    'polygon of an odd count': Rule(DROPPED, 'left out: x and y do not pair up'),
    'polygon of no numbers': Rule(DROPPED),
    'polygon outside the image': Rule(DROPPED),
    'polygon far outside': Rule(DROPPED),
    'polygon without an end': Rule(DROPPED, 'left out: its outline is over ten million pixels long'),
    'polygon not in a list': Rule(FIXED, 'put into one'),
    'RLE of another size': Rule(DROPPED),
    'RLE that does not add up': Rule(DROPPED),
    'iscrowd as text': Rule(FIXED, "'0' and 'false' are no crowd, '1' and 'true' are one"),
    'iscrowd is neither 0 nor 1': Rule(DROPPED),
    'crowd': Rule(INFO, 'kept: not trained on, ignored in the evaluation (CVAT marks what was painted so)'),
    'crowd with polygons': Rule(INFO, 'kept: not trained on, ignored in the evaluation'),
    # label maps
    'image without label map': Rule(DROPPED),
    'two images of one name': Rule(DROPPED, 'the later one is left out: a label map belongs to one image'),
    'masks of 0 and 255': Rule(ERROR, '255 is ignored, so that nothing is learnt: where it is a class, write it as 1'),
    'a single class': Rule(ERROR, 'of one class nothing is learnt: the loss is always 0'),
    'one class in all of train': Rule(INFO, 'kept: nothing is learnt but that all is of this class'),
    'label map without image': Rule(DROPPED),
    'unreadable label map': Rule(DROPPED),
    'label map too large': Rule(DROPPED, TOO_LARGE),
    'label map of one row': Rule(DROPPED, 'left out: mmseg cannot read one of a single row or column'),
    'label map in a lossy file': Rule(ERROR, 'JPEG and the like smear labels: write PNGs, from the original ones'),
    'label map of another size': Rule(DROPPED),
    'label map of ignored pixels': Rule(DROPPED),
    'label map in colours': Rule(ERROR, 'write index PNGs: one channel, in which a pixel is the number of its class'),
    'labels beyond 255': Rule(ERROR, 'write 8-bit PNGs: in 16 bits mmseg would cut labels off'),
    'label out of range': Rule(ERROR),
}
ERROR_RULES = (ERROR, DROPPED)
UNTRAINABLE_RULES = (
    'crowd',
    'crowd with polygons',
    'box under a pixel',
    'image under 32 pixels',
)  # kept, and not trained on


@dataclass
class Diagnostic:
    """A kind of problem in a split: how often, and the first few by name."""

    split: str
    kind: str
    count: int = 0
    examples: list[str] = field(default_factory=list)

    @property
    def done(self) -> str:
        return RULES[self.kind].done

    def in_short(self) -> str:
        """As a part of one line."""
        return f'{self.kind}, {self.count:,} ({", ".join(shown(example, 60) for example in self.examples[:2])})'

    def __str__(self) -> str:
        then = RULES[self.kind].then
        more = ', ...' if self.count > len(self.examples) else ''
        text = f'{self.done:<8}  {self.split}: {self.kind}, {self.count:,} ({", ".join(self.examples)}{more})'
        return f'{text}: {then}' if then else text


@dataclass
class Report:
    """What is there (`facts`, a line each) and what is wrong with it."""

    facts: list[str] = field(default_factory=list)
    findings: dict[tuple[str, str], Diagnostic] = field(default_factory=dict)

    def add(self, split: str, kind: str, example: object, count: int = 1) -> None:
        finding = self.findings.setdefault((split, kind), Diagnostic(split, kind))
        finding.count += count
        if len(finding.examples) < EXAMPLES:
            finding.examples.append(shown(example))

    def of(self, *done: str) -> list[Diagnostic]:
        """The findings about which this is done, the most serious first, and as they were found."""
        return [f for word in (ERROR, DROPPED, FIXED, INFO) if word in done for f in self.findings.values()
                if f.done == word]  # fmt: skip

    @property
    def errors(self) -> list[Diagnostic]:
        return self.of(*ERROR_RULES)

    def lines(self) -> list[str]:
        found = self.of(ERROR, DROPPED, FIXED, INFO)
        return [*map(shown, self.facts), *map(str, found or ['nothing is wrong'])]

    def as_data(self) -> dict:
        """For machines: facts and findings as plain data."""
        found = self.of(ERROR, DROPPED, FIXED, INFO)
        keys = ('split', 'kind', 'done', 'count', 'examples')
        return dict(facts=self.facts, findings=[{key: getattr(f, key) for key in keys} for f in found])

    def refuse(self, strict: bool = False) -> None:
        """Raise UsageError where something cannot be left out or mended, or `strict` and something is left out."""
        found = self.of(ERROR) or (self.errors if strict else [])
        if found:
            others = len(self.findings) - 1
            more = f' ({others} more finding{"s" * (others > 1)}: tools/check_data.py lists them)' if others else ''
            raise UsageError(f'the data: {str(found[0]).split(maxsplit=1)[1] if not strict else found[0]}{more}')
