"""Images are prepared in the graph as mmdet's and mmseg's own data preprocessors do it."""

import numpy as np
import pytest
import torch
from mmdet.models import DetDataPreprocessor
from mmdet.structures import DetDataSample
from mmengine.model import BaseDataPreprocessor, ImgDataPreprocessor
from mmseg.models import SegDataPreProcessor
from mmseg.structures import SegDataSample

from convnext_dense.channel_files import ChannelReader
from convnext_dense.errors import UsageError
from convnext_dense.export.preprocessing import Preprocess
from helpers.channels import MEANS, STDS, made_image

RGB = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375])
GRAY = dict(mean=[114.5], std=[57.6])
PREPROCESSORS = {
    'mmdet': (DetDataPreprocessor, dict(**RGB, bgr_to_rgb=True, pad_size_divisor=32), 3),
    'mmdet bgr': (DetDataPreprocessor, dict(mean=[103, 116, 123], std=[1, 1, 1], pad_size_divisor=16, pad_value=7), 3),
    'mmdet unpadded': (DetDataPreprocessor, dict(**RGB, rgb_to_bgr=True), 3),
    'mmdet gray': (DetDataPreprocessor, dict(**GRAY, pad_size_divisor=32), 1),
    'mmdet raw values': (DetDataPreprocessor, dict(bgr_to_rgb=True, pad_size_divisor=32), 3),
    'mmengine': (ImgDataPreprocessor, dict(**RGB, bgr_to_rgb=True, pad_size_divisor=32), 3),
    'mmseg': (SegDataPreProcessor, dict(**RGB, bgr_to_rgb=True, size=(512, 512)), 3),
    'mmseg bgr': (SegDataPreProcessor, dict(**RGB, size=(512, 512)), 3),
    'mmseg gray': (SegDataPreProcessor, dict(**GRAY, bgr_to_rgb=True, size=(512, 512)), 1),
    'mmseg gray repeated': (SegDataPreProcessor, dict(**RGB, bgr_to_rgb=True, size=(512, 512)), 1),
    'mmseg five channels': (SegDataPreProcessor, dict(**GRAY, bgr_to_rgb=True, size=(512, 512)), 5),
    'mmseg size': (SegDataPreProcessor, dict(**RGB, bgr_to_rgb=True, size=(8, 8), test_cfg=dict(size=(64, 80))), 3),
    'mmseg divisor': (SegDataPreProcessor, dict(**RGB, size=(8, 8), pad_val=3, test_cfg=dict(size_divisor=32)), 3),
}  # fmt: skip
SIZES = ((64, 96), (65, 33), (33, 127), (70, 90))


def reference_result(preprocessor, images):
    """What the preprocessor makes of images whose colors are in the order of cv2.imread."""
    samples = [(SegDataSample if isinstance(preprocessor, SegDataPreProcessor) else DetDataSample)() for _ in images]
    images = images.flip(1) if images.shape[1] == 3 else images
    return preprocessor(dict(inputs=list(images), data_samples=samples), training=False)['inputs']


@pytest.fixture(params=PREPROCESSORS)
def case(request):
    cls, settings, channels = PREPROCESSORS[request.param]
    preprocessor = cls(**settings)
    return preprocessor, Preprocess(preprocessor), channels


@pytest.mark.parametrize('dtype', [torch.uint8, torch.float32])
def test_equals_the_models_preprocessor(case, dtype):
    preprocessor, preprocess, channels = case
    for i, size in enumerate(SIZES):
        images = torch.randint(0, 256, (2, channels, *size), generator=torch.Generator().manual_seed(i)).to(dtype)
        expected, actual = reference_result(preprocessor, images), preprocess(images)
        assert actual.dtype == torch.float32 and torch.equal(actual, expected)


def test_one_graph_for_all_sizes(case):
    preprocessor, preprocess, channels = case
    batch, height, width = torch.export.Dim.DYNAMIC, torch.export.Dim.DYNAMIC, torch.export.Dim.DYNAMIC
    images = torch.zeros(2, channels, 64, 50, dtype=torch.uint8)
    shapes = ({0: batch, 2: height, 3: width},)
    graph = torch.export.export(preprocess, (images,), dynamic_shapes=shapes, strict=False).module()
    for i, size in enumerate(SIZES):
        images = torch.randint(0, 256, (3, channels, *size), generator=torch.Generator().manual_seed(i)).byte()
        assert torch.equal(graph(images), reference_result(preprocessor, images))


class OtherPreprocessor(SegDataPreProcessor):
    def forward(self, data, training=False):
        return super().forward(data, training)


def test_unsupported_preprocessors_are_refused():
    for unsupported in (OtherPreprocessor(), BaseDataPreprocessor()):
        with pytest.raises(UsageError, match=f'the data_preprocessor {type(unsupported).__name__} cannot be exported'):
            Preprocess(unsupported)
    with pytest.raises(UsageError, match='images of 1 channel: the data_preprocessor takes 3'):
        Preprocess(DetDataPreprocessor(**RGB))(torch.zeros(1, 1, 32, 32))
    with pytest.raises(UsageError, match='images of 4 channels: the data_preprocessor takes 1 or 3'):
        Preprocess(SegDataPreProcessor(**RGB))(torch.zeros(1, 4, 32, 32))


@pytest.mark.parametrize('channels', [1, 3, 5])
def test_channels_are_normalized_as_their_reader_does(channels):
    reader = ChannelReader(range(1, channels + 1), MEANS[:channels], STDS[:channels], channels, 'uint16')
    pixels = made_image(0, channels=channels)[0].astype(np.float32)
    pixels[3:9, 5:9, 0], pixels[20, 20, -1] = np.nan, np.inf
    preprocess = Preprocess(SegDataPreProcessor(bgr_to_rgb=False, size=(64, 64)), reader)
    actual = preprocess(torch.from_numpy(pixels).permute(2, 0, 1)[None])[0]
    assert torch.equal(actual.permute(1, 2, 0), torch.from_numpy(reader.normalize(pixels)))
