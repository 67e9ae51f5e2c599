"""Training data sets that replace unreadable images and name the file that failed."""

import numpy as np
from mmengine.dataset import BaseDataset, ClassBalancedDataset, RepeatDataset
from mmengine.fileio import get as read_bytes
from mmengine.registry import DATASETS

from ..channel_files import ARRAY_SUFFIX, TIFF_SUFFIXES, explain_errors, read_channels
from ..errors import UnreadableImageError, UsageError
from .seeding import SeededIndex, seed_everything

FILE_KEYS = ('img_path', 'seg_map_path')  # keys of a sample's info: the files that its pipeline reads
IMAGE_SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff', '.webp', '.jpe', '.jp2', '.ppm', '.pgm', '.pbm')
CHANNEL_SUFFIXES = (*TIFF_SUFFIXES, ARRAY_SUFFIX)  # files that `channel_files` reads
MAX_RESAMPLES = 20  # attempts to replace an unreadable image, each with another random one


class SeededDataset:
    """Wraps a data set: a `SeededIndex` seeds the augmentations of its sample, and unreadable images are replaced.

    The sample that replaces others has their errors in its metainfo `replaced`.

    Args:
        dataset: Config of the data set.
    """

    def __init__(self, dataset: dict):
        self.dataset = DATASETS.build(dataset)

    def __getattr__(self, name):
        if name == 'dataset':  # requested during unpickling
            raise AttributeError(name)
        return getattr(self.dataset, name)

    def __setattr__(self, name, value):  # mmdet's hooks set the pipeline, among others
        if name == 'dataset':
            super().__setattr__(name, value)
        else:
            dataset = self.dataset
            while isinstance(dataset, (RepeatDataset, ClassBalancedDataset)):  # nothing reads their attributes
                dataset = dataset.dataset
            setattr(dataset, name, PathReportingPipeline(value) if name == 'pipeline' else value)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: SeededIndex) -> dict:
        seed_everything(*index.seed_key)
        idx, errors = int(index), []
        for _ in range(MAX_RESAMPLES):
            try:
                sample = self.dataset[idx]
            except UnreadableImageError as error:
                errors.append(str(error))
                idx = np.random.randint(len(self))
                continue
            if errors:
                sample['data_samples'].set_metainfo(dict(replaced=errors))
            return sample
        raise UnreadableImageError(f'{MAX_RESAMPLES} images in a row cannot be read; the last one is {errors[-1]}')


class PathReportingPipeline:
    """Wraps a transform pipeline so that an error caused by an unreadable file names the file.

    Args:
        pipeline: A callable from a sample's info to the sample.
    """

    def __init__(self, pipeline):
        self.pipeline = pipeline

    def __getattr__(self, name):
        if name == 'pipeline':
            raise AttributeError(name)
        return getattr(self.pipeline, name)

    def __call__(self, info: dict):
        """Transform the info of a sample; raise UnreadableImageError if one of its files cannot be read."""
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
    """Return the reason why an image cannot be read.

    Args:
        path: Path or URL of the file.

    Returns:
        The reason; None if the image can be read or does not have the suffix of an image.
    """
    import mmcv  # the backbone can be imported without mmcv

    try:
        content = read_bytes(path)
        if not content:
            return 'the file is empty'
        if path.lower().endswith(CHANNEL_SUFFIXES):
            return _channels_error(path)
        if not path.lower().endswith(IMAGE_SUFFIXES):
            return None  # a file for a custom pipeline
        return None if mmcv.imfrombytes(content, flag='unchanged') is not None else 'not a valid image'
    except OSError as error:
        return error.strerror or str(error)
    except Exception as error:  # decoders raise any exception
        return f'{type(error).__name__}: {str(error).strip().splitlines()[0]}'


def _channels_error(path: str) -> str | None:
    """The reason why a TIFF or an array cannot be read; None if rasterio, which would tell it, is not installed."""
    try:
        with explain_errors():
            read_channels(path)
    except UnreadableImageError as error:
        return str(error)
    except UsageError:
        pass
    return None


def count_images(dataset) -> int:
    """Return the number of different samples in a data set, without repetitions by wrappers."""
    return sum(map(len, leaf_datasets(dataset)))


def leaf_datasets(dataset) -> list:
    """Return the data sets that read images, inside those that wrap, repeat or concatenate them."""
    single = getattr(dataset, 'dataset', None)
    inner = getattr(dataset, 'datasets', None) or ([] if single is None else [single])
    return [leaf for each in inner for leaf in leaf_datasets(each)] if inner else [dataset]


def wrap_pipelines(dataset) -> None:
    """Wrap the pipelines of a data set, and of all data sets inside it, in `PathReportingPipeline`."""
    for leaf in leaf_datasets(dataset):
        if isinstance(leaf, BaseDataset) and not isinstance(leaf.pipeline, PathReportingPipeline):
            leaf.pipeline = PathReportingPipeline(leaf.pipeline)
