"""UperNet with a Swin backbone on crops of 640 x 640: the rows that start from ImageNet-22K."""

_base_ = 'upernet_160k_swin.py'

model = dict(data_preprocessor=dict(size=(640, 640)))
