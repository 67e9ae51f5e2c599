"""UperNet on crops of 640 x 640: the rows that start from ImageNet-22K."""

_base_ = 'upernet_160k.py'

model = dict(data_preprocessor=dict(size=(640, 640)), test_cfg=dict(crop_size=(640, 640), stride=(426, 426)))
