"""ADE20K as DINOv3's linear evaluation trains on it: hues are turned all the way around, not by up to 36 degrees."""

_base_ = 'ade20k.py'

train_pipeline = [
    {**step, 'hue_delta': 90} if step.type == 'PhotoMetricDistortion' else step for step in _base_.train_pipeline
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
