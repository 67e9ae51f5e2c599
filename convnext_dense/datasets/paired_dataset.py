"""Segmentation data as a list of pairs, for mmseg: images of mixed endings, in any folders."""

from os.path import join

from mmengine.fileio import load
from mmengine.registry import DATASETS
from mmseg.datasets import BaseSegDataset


@DATASETS.register_module()
class PairedSegDataset(BaseSegDataset):
    """Pairs of an image and a label map. `ann_file` is JSON, a list of [image, label map], relative to `data_root`.

    Args:
        label_map: pairs of a label and its class, for labels that are not the number of their class; 255 is ignored.
            Labels are looked up after `reduce_zero_label`.
    """

    def __init__(self, label_map: list[list[int]] | None = None, **kwargs) -> None:
        self.changed_labels = dict(label_map) if label_map else None
        super().__init__(**kwargs)

    def load_data_list(self) -> list[dict]:
        images, labels = self.data_prefix['img_path'], self.data_prefix['seg_map_path']
        common = dict(label_map=self.changed_labels, reduce_zero_label=self.reduce_zero_label)
        return [
            dict(img_path=join(images, image), seg_map_path=join(labels, label), seg_fields=[], **common)
            for image, label in load(self.ann_file)
        ]
