"""mmseg dataset of a list of image and mask files, in any folders and with any suffixes."""

from os.path import join

from mmengine.fileio import load
from mmengine.registry import DATASETS
from mmseg.datasets import BaseSegDataset


@DATASETS.register_module()
class PairedSegDataset(BaseSegDataset):
    """Pairs of an image and its segmentation mask.

    Args:
        label_map: pairs of a label value and its class index, for values that are not the index of their class; 255 is
            ignored. It is applied after `reduce_zero_label`.
        **kwargs: arguments of `BaseSegDataset`. `ann_file` is JSON, a list of [image, mask] relative to `data_root`.
    """

    def __init__(self, label_map: list[list[int]] | None = None, **kwargs) -> None:
        self.custom_label_map = dict(label_map) if label_map else None
        super().__init__(**kwargs)

    def load_data_list(self) -> list[dict]:
        """Return one dict per pair, as mmseg's pipelines take them."""
        image_prefix, mask_prefix = self.data_prefix['img_path'], self.data_prefix['seg_map_path']
        common = dict(label_map=self.custom_label_map, reduce_zero_label=self.reduce_zero_label)
        return [
            dict(img_path=join(image_prefix, image), seg_map_path=join(mask_prefix, mask), seg_fields=[], **common)
            for image, mask in load(self.ann_file)
        ]
