"""mmdet's copy-paste for images of different sizes."""

from mmdet.datasets.transforms import CopyPaste, Pad, RandomCrop
from mmengine.registry import TRANSFORMS


@TRANSFORMS.register_module()
class AnySizeCopyPaste(CopyPaste):
    """mmdet's `CopyPaste`; the image that objects come from is cropped and padded to the size of the other one.

    mmdet's own needs images that its pipeline has brought to one size.
    """

    def transform(self, results: dict) -> dict:
        """Paste objects of `results['mix_results']` into an image with boxes and `BitmapMasks`."""
        height, width = results['img'].shape[:2]
        crop = RandomCrop(crop_size=(width, height), recompute_bbox=True, allow_negative_crop=True)
        results['mix_results'] = [Pad(size=(width, height))(crop(source)) for source in results['mix_results']]
        dtype = results['img'].dtype
        results = super().transform(results)
        results['img'] = results['img'].astype(dtype)  # mmdet returns int64
        return results
