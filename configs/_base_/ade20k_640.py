"""ADE20K at 640 x 640: the rows that start from ImageNet-22K."""

_base_ = 'ade20k.py'

larger = dict(
    RandomResize=dict(scale=(2560, 640)), RandomCrop=dict(crop_size=(640, 640)), Resize=dict(scale=(2560, 640))
)
train_pipeline = [{**step, **larger.get(step.type, {})} for step in _base_.train_pipeline]
test_pipeline = [{**step, **larger.get(step.type, {})} for step in _base_.test_pipeline]
del larger

train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
