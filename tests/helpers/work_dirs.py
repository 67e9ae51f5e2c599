"""Work dirs as written by trainings."""

import json

from mmengine.config import Config


def dump(config: Config, file) -> None:
    """Write a config as mmengine's `dump` does, but for the layout of the text, which takes yapf a second."""
    file.write_text('\n'.join(f'{key} = {value!r}' for key, value in config.to_dict().items()))


def write_session(folder, config: Config, records=(), world_size=8, timestamp='20260101_120000', tail='') -> None:
    """Write the files of a training session: config, scalars, text log."""
    session_dir = folder / timestamp
    (session_dir / 'vis_data').mkdir(parents=True)
    dump(config, session_dir / 'vis_data/config.py')
    lines = [json.dumps(record) for record in records]
    if records:
        (session_dir / 'vis_data/scalars.json').write_text('\n'.join(lines) + tail)
    (session_dir / f'{timestamp}.log').write_text(f'System environment:\n    GPU number: {world_size}\n')


def write_run_info(log_dir, **facts) -> None:
    """The run.json of a session, with other facts than those of 8 processes of 2 images."""
    info = dict(
        config_file=None, world_size=8, batch_size=2, accumulation_steps=1, precision='float32', by_epoch=True,
        max_epochs=36, max_iters=360, iters_per_epoch=10, start_epoch=0, start_iter=0, param_groups=[], versions={},
    )  # fmt: skip
    (log_dir / 'run.json').write_text(json.dumps(info | facts))


def coco(box, mask, epoch):
    return {'coco/bbox_mAP': box, 'coco/bbox_mAP_50': 0.7, 'coco/segm_mAP': mask, 'step': epoch}
