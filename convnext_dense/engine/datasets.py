"""Training data sets that replace unreadable images, up to a limit, and name the file that failed."""

import numpy as np
from mmengine.dataset import BaseDataset
from mmengine.fileio import get as read_bytes
from mmengine.registry import DATASETS

from ..errors import UnreadableImageError
from .seeding import SeededIndex, seed_everything

FILE_KEYS = ('img_path', 'seg_map_path')  # the files of a sample
MAX_RESAMPLES = 20  # unreadable images in a row that a sample gets over


class SeededDataset:
    """Another data set, whose samples are seeded by the `Draw` that asks for them. An image that cannot be read is
    replaced by another, and the sample's metainfo `replaced` says so."""

    def __init__(self, dataset: dict):
        self.dataset = DATASETS.build(dataset)

    def __getattr__(self, name):
        if name == 'dataset':  # asked for while unpickled
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __setattr__(self, name, value):  # mmdet's hooks set a pipeline, or what follows the epoch
        if name == 'dataset':
            super().__setattr__(name, value)
        else:
            setattr(self.dataset, name, PathReportingPipeline(value) if name == 'pipeline' else value)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, draw: SeededIndex) -> dict:
        seed_everything(*draw.key)
        index, replaced = int(draw), []
        for _ in range(MAX_RESAMPLES):
            try:
                sample = self.dataset[index]
            except UnreadableImageError as error:
                replaced.append(str(error))
                index = np.random.randint(len(self))
                continue
            if replaced:
                sample['data_samples'].set_metainfo(dict(replaced=replaced))
            return sample
        raise UnreadableImageError(f'{MAX_RESAMPLES} images in a row cannot be read, the last is {replaced[-1]}')


class PathReportingPipeline:
    """The pipeline of a data set; where it fails on a file that cannot be read, the error names the file."""

    def __init__(self, pipeline):
        self.pipeline = pipeline

    def __getattr__(self, name):
        if name == 'pipeline':
            raise AttributeError(name)
        return getattr(self.pipeline, name)

    def __call__(self, info: dict):
        paths = [info[key] for key in FILE_KEYS if isinstance(info.get(key), str)]
        try:
            return self.pipeline(info)
        except Exception as error:
            for path in paths:
                reason = read_error(path)
                if reason:
                    raise UnreadableImageError(f'{path}: {reason}') from error
            raise


def read_error(path: str) -> str | None:
    """Why an image cannot be read; None where it can."""
    import mmcv  # beside the backbone nothing needs mmcv at import

    try:
        content = read_bytes(path)
        if not content:
            return 'an empty file'
        if not path.lower().endswith(IMAGE_SUFFIXES):
            return None  # read by a pipeline of its own
        return None if mmcv.imfrombytes(content, flag='unchanged') is not None else 'not an image, or a broken one'
    except OSError as error:
        return error.strerror or str(error)
    except Exception as error:  # decoders raise what they like
        return f'{type(error).__name__}: {str(error).strip().splitlines()[0]}'


def count_images(dataset) -> int:
    """How many images a data set holds, however often it repeats them."""
    parts = getattr(dataset, 'datasets', None) or [getattr(dataset, 'dataset', None)]
    return sum(map(count_images, parts)) if parts[0] is not None else len(dataset)


def wrap_pipelines(dataset) -> None:
    """Have the pipelines of a data set, and of those it is made of, name the files that they cannot read."""
    for inner in [getattr(dataset, 'dataset', None), *getattr(dataset, 'datasets', [])]:
        if inner is not None:
            wrap_pipelines(inner)
    if isinstance(dataset, BaseDataset) and not isinstance(dataset.pipeline, PathReportingPipeline):
        dataset.pipeline = PathReportingPipeline(dataset.pipeline)


IMAGE_SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff', '.webp', '.jpe', '.jp2', '.ppm', '.pgm', '.pbm')
