"""Published weights by name, and downloads of checkpoints."""

import hashlib
import os
import re
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from urllib.parse import urlparse

import torch
from filelock import FileLock

from ..errors import UsageError
from .hf_hub import HF_PREFIX, HF_SITE, download_from_hf, is_hf_name
from .io import clear_cache, load_checkpoint

ORIGINAL = 'https://dl.fbaipublicfiles.com/convnext'
# Beginning of the SHA-256 at the end of a file name, as in torch.hub (...-21b726bb.pth). Only digits would be a date.
HASH_SUFFIX_RE = re.compile(r'-(?!\d+\.)([0-9a-f]{8,})\.\w+$')


@dataclass(frozen=True)
class WeightEntry:
    """A published checkpoint.

    Attributes:
        url (str, optional): URL of the file; None if it is only sent on request, or is on the Hugging Face Hub.
        training (str): The data that it was trained on.
        license (str): Its license.
        request_url (str): URL at which to request it, or its page, if it has no `url`.
        backbone (str): Type of the backbone: 'ConvNeXt', or one of the paper's baselines.
    """

    url: str | None
    training: str
    license: str
    request_url: str = ''
    backbone: str = 'ConvNeXt'


MIT, CC_BY_NC = 'MIT', 'CC BY-NC 4.0'
DINOV3_SITE = 'https://ai.meta.com/resources/models-and-libraries/dinov3-downloads/'
DINOV3_HASHES = dict(tiny='21b726bb', small='296db49d', base='801f2ba9', large='61fa432d')  # in the names of the files
V2_SIZES = 'atto femto pico nano tiny base large huge'
V2_22K = 'FCMAE, then ImageNet-22K, then 1K'
# (file below the original's folder, values for the braces, training data, license), from the authors' READMEs. The
# paper's dense results start from the first ones, not from the EMA weights.
PUBLISHED_FILES = (
    ('convnext_{}_1k_224.pth', 'tiny small base', 'ImageNet-1K', MIT),
    ('convnext_{}_22k_224.pth', 'tiny small base large xlarge', 'ImageNet-22K', MIT),
    ('convnext_{}_1k_224_ema.pth', 'tiny small base large', 'ImageNet-1K', MIT),
    ('convnext_{}_1k_384.pth', 'base large', 'ImageNet-1K', MIT),
    ('convnext_{}_22k_1k_224.pth', 'tiny small base large', 'ImageNet-22K, then 1K', MIT),
    ('convnext_{}_22k_1k_224_ema.pth', 'xlarge', 'ImageNet-22K, then 1K', MIT),
    ('convnext_{}_22k_1k_384.pth', 'tiny small base large', 'ImageNet-22K, then 1K', MIT),
    ('convnext_{}_22k_1k_384_ema.pth', 'xlarge', 'ImageNet-22K, then 1K', MIT),
    ('coco/mask_rcnn_convnext_{}_1k_3x.pth', 'tiny', 'COCO detector', MIT),
    ('coco/cascade_mask_rcnn_convnext_{}_1k_3x.pth', 'tiny small base', 'COCO detector', MIT),
    ('coco/cascade_mask_rcnn_convnext_{}_22k_3x.pth', 'base large xlarge', 'COCO detector', MIT),
    ('ade20k/upernet_convnext_{}_1k_512x512.pth', 'tiny small base', 'ADE20K segmentor', MIT),
    ('ade20k/upernet_convnext_{}_22k_640x640.pth', 'base large xlarge', 'ADE20K segmentor', MIT),
    ('convnextv2/pt_only/convnextv2_{}_1k_224_fcmae.pt', V2_SIZES, 'ImageNet-1K without labels (FCMAE)', CC_BY_NC),
    ('convnextv2/im1k/convnextv2_{}_1k_224_ema.pt', V2_SIZES, 'FCMAE, then ImageNet-1K', CC_BY_NC),
    ('convnextv2/im22k/convnextv2_{}_22k_224_ema.pt', 'nano tiny base large', V2_22K, CC_BY_NC),
    ('convnextv2/im22k/convnextv2_{}_22k_384_ema.pt', 'nano tiny base large huge', V2_22K, CC_BY_NC),
    ('convnextv2/im22k/convnextv2_{}_22k_512_ema.pt', 'huge', V2_22K, CC_BY_NC),
)
# detrex's DINO with ConvNeXt, and the paper's baselines, by full URL. The last three are torchvision's ResNet-50 and
# the weights that mmdet calls open-mmlab://resnext101_...
DETREX_STORAGE = 'https://github.com/IDEA-Research/detrex-storage/releases/download/v0.4.0'
SWIN_STORAGE = 'https://github.com/SwinTransformer/storage/releases/download'
OTHER_FILES = (
    ('ConvNeXt', f'{DETREX_STORAGE}/dino_convnext_{{}}_4scale_12ep.pth',
     'tiny_1k small_1k base_1k large_1k tiny_384 small_384 base_384 large_384', 'COCO detector', 'Apache-2.0'),
    ('Swin', f'{SWIN_STORAGE}/v1.0.0/swin_{{}}_patch4_window7_224.pth', 'tiny small base', 'ImageNet-1K', MIT),
    ('Swin', f'{SWIN_STORAGE}/v1.0.0/swin_{{}}_patch4_window7_224_22k.pth', 'base large', 'ImageNet-22K', MIT),
    ('Swin', f'{SWIN_STORAGE}/v1.0.2/mask_rcnn_swin_{{}}_patch4_window7.pth', 'tiny', 'COCO detector', MIT),
    ('Swin', f'{SWIN_STORAGE}/v1.0.2/cascade_mask_rcnn_swin_{{}}_patch4_window7.pth', 'tiny small base',
     'COCO detector', MIT),
    ('Swin', f'{SWIN_STORAGE}/v1.0.1/upernet_swin_{{}}_patch4_window7_512x512.pth', 'tiny small base',
     'ADE20K segmentor', MIT),
    ('ResNet', 'https://download.pytorch.org/models/{}.pth', 'resnet50-0676ba61', 'ImageNet-1K', 'BSD-3-Clause'),
    ('ResNeXt', 'https://mmassets.onedl.ai/pretrain/third_party/{}.pth',
     'resnext101_32x4d-a5af3160 resnext101_64x4d-ee2c6f71', 'ImageNet-1K', 'Apache-2.0'),
)  # fmt: skip
WEIGHTS = (
    {
        PurePosixPath(file.format(part)).stem: WeightEntry(f'{ORIGINAL}/{file.format(part)}', training, license)
        for file, parts, training, license in PUBLISHED_FILES
        for part in parts.split()
    }
    | {
        f'dinov3_convnext_{size}_pretrain_lvd1689m-{sha256}': WeightEntry(
            None, 'DINOv3, 1.7 G images', 'DINOv3 License (on request)', DINOV3_SITE
        )
        for size, sha256 in DINOV3_HASHES.items()
    }
    | {
        PurePosixPath(url.format(part)).stem: WeightEntry(url.format(part), training, license, backbone=backbone)
        for backbone, url, parts, training, license in OTHER_FILES
        for part in parts.split()
    }
)
# timm's ungated copies on the Hugging Face Hub.
HF_FILES = (
    ('dinov3_lvd1689m', 'tiny small base large', 'DINOv3, 1.7 G images', 'DINOv3 License'),
    ('eupe_lvd1689m', 'tiny small base', 'EUPE, 1.7 G images', 'FAIR Noncommercial Research License'),
)
WEIGHTS |= {
    f'{HF_PREFIX}timm/convnext_{size}.{tag}': WeightEntry(
        None, training, license, f'{HF_SITE}/timm/convnext_{size}.{tag}'
    )
    for tag, sizes, training, license in HF_FILES
    for size in sizes.split()
}
WEIGHT_URLS = {name: entry.url for name, entry in WEIGHTS.items() if entry.url}
EXAMPLE_NAMES = tuple(WEIGHTS)[:8]  # names in error messages


def resolve(source: str) -> str:
    """Return the path or URL of a checkpoint without downloading it.

    Args:
        source: A pretrained weight name, a path, a URL or 'hf-hub:owner/name'.

    Returns:
        The path of an existing file, a URL, or 'hf-hub:owner/name' unchanged.

    Raises:
        UsageError: If it is not a pretrained weight name, a URL or an existing file, or if its weights are not public.
    """
    if is_hf_name(source):
        return source
    entry = WEIGHTS.get(source)
    if entry and not entry.url:
        size = source.split('_')[2]
        raise UsageError(
            f"'{source}' is not public: give timm's copy, {HF_PREFIX}timm/convnext_{size}.dinov3_lvd1689m, or request "
            f'it at {entry.request_url} and give the path of the file'
        )
    location = entry.url if entry else source
    if not is_url(location) and not os.path.isfile(location):
        raise UsageError(
            f"no checkpoint '{source}': give an existing file, a URL or a pretrained weight name, such as "
            f'{", ".join(EXAMPLE_NAMES)}'
        )
    return location


def download(source: str) -> Path:
    """Return the local file of a checkpoint; if necessary, download it into torch's hub folder.

    If several processes need the same file, one downloads it and the others wait.

    Args:
        source: A pretrained weight name, a path, a URL or 'hf-hub:owner/name'.

    Returns:
        The path of the file.

    Raises:
        UsageError: As for `resolve`, or if the download fails or is not a complete checkpoint.
    """
    location = resolve(source)
    if is_hf_name(location):
        return download_from_hf(location)
    if not is_url(location):
        return Path(location)
    name = PurePosixPath(urlparse(location).path)
    # Other files are often called epoch_12.pth, so a hash of their URL becomes part of the name.
    url_hash = '' if source in WEIGHT_URLS else f'-{hashlib.sha256(location.encode()).hexdigest()[:8]}'
    path = Path(torch.hub.get_dir(), 'checkpoints', f'{name.stem}{url_hash}{name.suffix}')
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name(f'.{path.name}.lock')):
            if not path.exists():
                _download(location, path)
    return path


def is_url(location: str) -> bool:
    """Return whether a location is an http(s) URL."""
    return urlparse(str(location)).scheme in ('http', 'https')


def _download(url: str, path: Path) -> None:
    hash_suffix = HASH_SUFFIX_RE.search(urlparse(url).path)
    partial = path.with_name(f'{path.stem}.part{path.suffix}')
    try:
        torch.hub.download_url_to_file(url, str(partial), hash_suffix and hash_suffix[1])
    except (OSError, HTTPException, RuntimeError, ValueError) as error:
        raise UsageError(
            f'cannot download {url} ({error}): download it elsewhere and save it as {path}, or give its path '
            'as init_cfg.checkpoint'
        ) from error
    try:  # torch.hub does not notice a truncated download
        load_checkpoint(partial)
    except UsageError as error:
        partial.unlink()
        raise UsageError(str(error).replace(str(partial), url)) from error
    clear_cache()  # Windows does not rename a file that is mapped into memory
    partial.replace(path)
