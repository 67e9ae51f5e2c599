"""Work dirs as trainings leave them."""

import json

from mmengine.config import Config


def start(folder, config: Config, records=(), processes=8, timestamp='20260101_120000', cut='') -> None:
    """What mmengine leaves in a work dir when it trains: config, log of numbers, text log."""
    place = folder / timestamp
    (place / 'vis_data').mkdir(parents=True)
    config.dump(place / 'vis_data/config.py')
    lines = [json.dumps(record) for record in records]
    if records:
        (place / 'vis_data/scalars.json').write_text('\n'.join(lines) + cut)
    (place / f'{timestamp}.log').write_text(f'System environment:\n    GPU number: {processes}\n')


def coco(box, mask, epoch):
    return {'coco/bbox_mAP': box, 'coco/bbox_mAP_50': 0.7, 'coco/segm_mAP': mask, 'step': epoch}
