"""One-line summary before a training starts; a warning about metrics of too few images or objects."""

import pytest
from mmengine.dataset import BaseDataset
from mmengine.logging import MMLogger

from convnext_dense.engine.summary_hook import describe_small_evaluation
from helpers.planned_runs import planned_run


@pytest.fixture
def lines(monkeypatch):
    lines = []
    for level in ('info', 'warning'):
        monkeypatch.setattr(MMLogger, level, lambda self, line, *args, level=level: lines.append((level, str(line))))
    return lines


def test_summary_by_epochs_and_by_iterations(tmp_path, lines):
    plan = [1.0] * 10
    warmup = dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=4)
    decay = dict(type='LinearLR', start_factor=1.0, end_factor=0.0, by_epoch=False, begin=0, end=20)
    loop = dict(by_epoch=True, max_epochs=4, val_interval=3)
    run = planned_run(
        plan, tmp_path / 'a', train_cfg=loop, evaluates=True, param_scheduler=[warmup, decay], accumulative_counts=2
    )
    run.train()
    assert ('info', 'training on 10 images: 10 optimizer steps in 4 epochs, 3 of them warmup, 2 evaluations') in lines
    warnings = [line for level, line in lines if level == 'warning' and 'come from only 2 images' in line]
    assert len(warnings) == 2
    planned_run(plan, tmp_path / 'b', train_cfg=dict(by_epoch=False, max_iters=7)).train()
    assert ('info', 'training on 10 images: 7 optimizer steps, 0 of them warmup') in lines


class Boxes(BaseDataset):
    def load_data_list(self):
        return [dict(instances=[dict(ignore_flag=i % 2) for i in range(n)]) for n in self.metainfo['counts']]


@pytest.mark.parametrize('counts, expected', [
    ([1], '1 image and 1 object'), ([4] * 19, '19 images and 38 objects'), ([2] * 49, '49 images and 49 objects'),
    ([4] * 25, None), ([0] * 50, None),
])  # fmt: skip
def test_few_images_or_objects(counts, expected):
    assert describe_small_evaluation(Boxes(metainfo=dict(counts=counts))) == expected
