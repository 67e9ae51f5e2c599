"""Known weights by name, and where a name, a path or a URL leads to."""

import hashlib
import os
import re
import sys
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from urllib.parse import urlparse
from urllib.request import Request, urlopen

import torch
from mmengine.utils import ProgressBar

try:
    import fcntl
except ImportError:  # not on Windows: two downloads at once then take twice as long
    fcntl = None

from ..errors import UsageError

ORIGINAL = 'https://dl.fbaipublicfiles.com/convnext'
V2_FILES = f'{ORIGINAL}/convnextv2'
V2_SIZES = ('atto', 'femto', 'pico', 'nano', 'tiny', 'base', 'large', 'huge')


@dataclass(frozen=True)
class WeightEntry:
    """A published file: its address, or None where its owner gives it out only on request; what it was made from."""

    url: str | None
    training: str
    licence: str
    where: str = ''


def _files(folder: str, names: str, training: str, licence: str, ending: str = '.pth') -> dict[str, WeightEntry]:
    return {name: WeightEntry(f'{folder}/{name}{ending}', training, licence) for name in names.split()}


MIT = 'MIT'
NON_COMMERCIAL = 'CC BY-NC 4.0'
DINOV3_LICENSE = 'DINOv3 License (on request)'
DINOV3_SITE = 'https://ai.meta.com/resources/models-and-libraries/dinov3-downloads/'
# The addresses and licences as the authors' own READMEs give them.
WEIGHTS = {
    # The ImageNet weights from which the paper's dense results start: the final ones, not the EMA's.
    **_files(ORIGINAL, 'convnext_tiny_1k_224 convnext_small_1k_224 convnext_base_1k_224', 'ImageNet-1K', MIT),
    **_files(
        ORIGINAL,
        'convnext_tiny_22k_224 convnext_small_22k_224 convnext_base_22k_224 convnext_large_22k_224 '
        'convnext_xlarge_22k_224',
        'ImageNet-22K',
        MIT,
    ),
    **_files(
        ORIGINAL,
        'convnext_tiny_1k_224_ema convnext_small_1k_224_ema convnext_base_1k_224_ema convnext_large_1k_224_ema '
        'convnext_base_1k_384 convnext_large_1k_384',
        'ImageNet-1K',
        MIT,
    ),
    **_files(
        ORIGINAL,
        'convnext_tiny_22k_1k_224 convnext_small_22k_1k_224 convnext_base_22k_1k_224 convnext_large_22k_1k_224 '
        'convnext_xlarge_22k_1k_224_ema convnext_tiny_22k_1k_384 convnext_small_22k_1k_384 convnext_base_22k_1k_384 '
        'convnext_large_22k_1k_384 convnext_xlarge_22k_1k_384_ema',
        'ImageNet-22K, then 1K',
        MIT,
    ),
    **_files(
        f'{ORIGINAL}/coco',
        'mask_rcnn_convnext_tiny_1k_3x cascade_mask_rcnn_convnext_tiny_1k_3x cascade_mask_rcnn_convnext_small_1k_3x '
        'cascade_mask_rcnn_convnext_base_1k_3x cascade_mask_rcnn_convnext_base_22k_3x '
        'cascade_mask_rcnn_convnext_large_22k_3x cascade_mask_rcnn_convnext_xlarge_22k_3x',
        'COCO detector',
        MIT,
    ),
    **_files(
        f'{ORIGINAL}/ade20k',
        'upernet_convnext_tiny_1k_512x512 upernet_convnext_small_1k_512x512 upernet_convnext_base_1k_512x512 '
        'upernet_convnext_base_22k_640x640 upernet_convnext_large_22k_640x640 upernet_convnext_xlarge_22k_640x640',
        'ADE20K segmentor',
        MIT,
    ),
    **_files(
        f'{V2_FILES}/pt_only',
        ' '.join(f'convnextv2_{size}_1k_224_fcmae' for size in V2_SIZES),
        'ImageNet-1K without labels (FCMAE)',
        NON_COMMERCIAL,
        '.pt',
    ),
    **_files(
        f'{V2_FILES}/im1k',
        ' '.join(f'convnextv2_{size}_1k_224_ema' for size in V2_SIZES),
        'FCMAE, then ImageNet-1K',
        NON_COMMERCIAL,
        '.pt',
    ),
    **_files(
        f'{V2_FILES}/im22k',
        'convnextv2_nano_22k_224_ema convnextv2_nano_22k_384_ema convnextv2_tiny_22k_224_ema '
        'convnextv2_tiny_22k_384_ema convnextv2_base_22k_224_ema convnextv2_base_22k_384_ema '
        'convnextv2_large_22k_224_ema convnextv2_large_22k_384_ema convnextv2_huge_22k_384_ema '
        'convnextv2_huge_22k_512_ema',
        'FCMAE, then ImageNet-22K, then 1K',
        NON_COMMERCIAL,
        '.pt',
    ),
    **{
        f'dinov3_convnext_{size}_pretrain_lvd1689m-{mark}': WeightEntry(
            None, 'DINOv3, 1.7 G images', DINOV3_LICENSE, DINOV3_SITE
        )
        for size, mark in dict(tiny='21b726bb', small='296db49d', base='801f2ba9', large='61fa432d').items()
    },
}
WEIGHT_URLS = {name: known.url for name, known in WEIGHTS.items() if known.url}
EXAMPLE_NAMES = tuple(WEIGHTS)[:8]  # to be named in errors


def resolve(source: str) -> str:
    """The path or URL that `source`, a known name, a path or a URL, stands for; nothing is downloaded.

    Raises:
        UsageError: it is no known name and no file is there.
    """
    known = WEIGHTS.get(source)
    if known and not known.url:
        raise UsageError(f"'{source}' is given out by its owner alone: ask at {known.where} and give the file's path")
    place = known.url if known else source
    if not is_url(place) and not os.path.isfile(place):
        raise UsageError(
            f"no checkpoint '{source}': give a file that exists, a URL or a known name, such as "
            f'{", ".join(EXAMPLE_NAMES)}'
        )
    return place


def download(source: str) -> Path:
    """The local file of `source`. A URL is downloaded once into torch's hub folder; who else wants it meanwhile waits.

    Raises:
        UsageError: as `locate`; it cannot be downloaded, or not whole.
    """
    place = resolve(source)
    if not is_url(place):
        return Path(place)
    name = PurePosixPath(urlparse(place).path)
    # Other people's files are often called epoch_12.pth: their address goes into the name.
    mark = '' if source in WEIGHT_URLS else f'-{hashlib.sha256(place.encode()).hexdigest()[:8]}'
    file = Path(torch.hub.get_dir(), 'checkpoints', f'{name.stem}{mark}{name.suffix}')
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        # The lock stays: who removes it lets a third one in beside the second.
        with open(file.with_name(f'.{file.name}.lock'), 'w') as lock:
            if fcntl:
                fcntl.flock(lock, fcntl.LOCK_EX)
            if not file.exists():
                _download(place, file)
    return file


def is_url(place: str) -> bool:
    return urlparse(str(place)).scheme in ('http', 'https')


def _download(url: str, file: Path) -> None:
    """Into a file beside it, moved into place when it is as long as announced and has the hash that a name may end in,
    as torch's own do (...-21b726bb.pth)."""
    announced = re.search(r'-(?!\d+\.)([0-9a-f]{8,})\.\w+$', urlparse(url).path)  # all digits are a date
    partial = Path(f'{file}.{os.getpid()}.part')
    try:
        with (
            urlopen(Request(url, headers={'User-Agent': 'convnext_dense'}), timeout=60) as answer,
            open(partial, 'wb') as f,
        ):
            length, digest = int(answer.headers.get('Content-Length') or 0), hashlib.sha256()
            bar = ProgressBar(length // 2**20, file=sys.stderr)
            while chunk := answer.read(2**20):
                f.write(chunk)
                digest.update(chunk)
                bar.update()
            print(file=sys.stderr)
        if length and partial.stat().st_size != length:
            raise OSError(f'{partial.stat().st_size} of {length} bytes came')
        if announced and not digest.hexdigest().startswith(announced[1]):
            raise OSError(f'its hash does not begin with {announced[1]}')
        partial.replace(file)
    except (OSError, HTTPException, ValueError) as error:
        partial.unlink(missing_ok=True)
        raise UsageError(
            f'cannot download {url} ({error}): fetch it elsewhere and put it at {file}, or give its path '
            'as init_cfg.checkpoint'
        ) from error
