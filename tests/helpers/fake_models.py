"""A detector and a segmentor whose predictions follow from the colors of an image alone."""

from types import SimpleNamespace

import cv2
import numpy as np
import torch
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData, PixelData
from mmseg.structures import SegDataSample

COLORS = np.array([[220, 40, 40], [40, 200, 60], [50, 60, 230]], np.uint8)  # BGR of the classes


class FakePredictor:
    """Replaces `Predictor` in tests of tiling: predicts each image by a function of its pixels."""

    color_type = 'color'

    def __init__(self, task, predict):
        self.task, self.predict = task, predict
        self.model = SimpleNamespace(decode_head=SimpleNamespace(threshold=0.3))
        self.sizes = []

    def prepare(self, image):
        return image

    def forward(self, images, batch_size=1):
        assert len(images) <= batch_size
        self.sizes += [image.shape[:2] for image in images]
        return [self.predict(image) for image in images]


def detect_colors(image):
    """One detection for each connected area of a class's color; the score falls with the area that is missing."""
    boxes, labels, masks = [], [], []
    for label, color in enumerate(COLORS):
        n, areas, stats, _ = cv2.connectedComponentsWithStats((image == color).all(2).astype(np.uint8))
        for k in range(1, n):
            x, y, w, h, _ = stats[k]
            boxes.append([x, y, x + w, y + h])
            labels.append(label)
            masks.append(areas == k)
    masks = np.stack(masks) if masks else np.zeros((0, *image.shape[:2]), bool)
    sample = DetDataSample(metainfo=dict(ori_shape=image.shape[:2]))
    sample.pred_instances = InstanceData(
        bboxes=torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4),
        labels=torch.tensor(labels, dtype=torch.long),
        scores=torch.from_numpy(1 - 1 / (1.0 + masks.sum((1, 2)))).float(),
        masks=torch.from_numpy(masks),
    )
    return sample


def detect_boxes(image):
    """The same without masks."""
    sample = detect_colors(image)
    del sample.pred_instances.masks
    return sample


def segment_colors(image):
    """Logits (4, H, W) that are linear in the colors of each pixel."""
    logits = np.concatenate([np.full((1, *image.shape[:2]), 50.0), image.transpose(2, 0, 1) / 2.0])
    sample = SegDataSample()
    sample.seg_logits = PixelData(data=torch.from_numpy(logits).float())
    sample.pred_sem_seg = PixelData(data=sample.seg_logits.data.argmax(0, keepdim=True))
    return sample
