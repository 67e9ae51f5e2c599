"""The weights of any source for this backbone: recognised, renamed, matched and reported, or refused."""

import difflib
from dataclasses import dataclass
from pathlib import Path

import torch
from mmengine.logging import print_log
from mmengine.model import update_init_info
from mmengine.registry import WEIGHT_INITIALIZERS
from torch import nn

from ..errors import UsageError
from ..models.convnext import ARCHS, ConvNeXt
from .hub import download
from .io import EMA_KEYS, STATE_DICT_KEYS, find_state_dicts, load_checkpoint
from .naming import (
    DINOV3_DUPLICATE_PREFIX,
    NAMING_SCHEMES,
    OUTPUT_NORM_RE,
    STEM,
    TRUNK_RE,
    ParsedNames,
    detect_scheme,
    to_canonical,
)

COMMON_ARCHS = ('', *STATE_DICT_KEYS)  # keys of which the first with a ConvNeXt is the one that is meant
FINAL_NORM_POLICIES = ('drop', 'reuse')
FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Checkpoint:
    """A file of ConvNeXt weights: `weights` by our names, classifier and final norm included; `wrappers` under which
    it keeps other weights that are not taken, such as an average's."""

    name: str
    file: Path
    source: ParsedNames
    weights: dict[str, torch.Tensor]
    wrappers: list[str]

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of the stages, as far as the file shows them."""
        names = (f'stages.{i}.0.dwconv.weight' for i in range(len(self.source.depths)))
        return tuple(self.weights[n].shape[0] if n in self.weights else 0 for n in names)

    @property
    def grn(self) -> bool:
        return any('.grn.' in name for name in self.weights)

    @property
    def arch(self) -> str:
        """The name of its arch, else its depths and channels."""
        return arch_name(self.source.depths, self.channels, self.grn)

    @property
    def title(self) -> str:
        """The source in words."""
        title = self.source.format.title
        if 'norms.3.weight' in self.source.others:
            title = 'DINOv3 by Meta'
        finished = self.beyond and self.source.prefix
        return f'a finished model in the names of {title}, its backbone taken' if finished else title

    @property
    def beyond(self) -> list[str]:
        """Names in the file that belong to no ConvNeXt."""
        return [name for name in self.source.others if not name.startswith(DINOV3_DUPLICATE_PREFIX)]


def arch_name(depths: tuple[int, ...], channels: tuple[int, ...], grn: bool) -> str:
    known = next((n for n, a in ARCHS.items() if (a['depths'], a['channels']) == (depths, channels)), None)
    return f'ConvNeXt{" V2" if grn else ""} {known or f"depths {depths}, channels {channels}"}'


def open_checkpoint(source: str | Path) -> Checkpoint:
    """The ConvNeXt weights that a known name, a path or a URL holds.

    Raises:
        UsageError: the file cannot be had or read, or holds no ConvNeXt, or several.
    """
    file = download(str(source))
    content = load_checkpoint(file)
    convnexts = _find_convnexts(content, file)
    if not convnexts:
        names = [name for tensors in find_state_dicts(content).values() for name in tensors] or list(map(str, content))
        raise UsageError(
            f'{file}: no ConvNeXt weights by the names in it ({", ".join(names[:3]) or "none"}, ...): known are those '
            f'of {", ".join(f.title for f in NAMING_SCHEMES)}'
        )
    tensors, found = next(iter(convnexts.values()))
    for theirs in found.names:
        if tensors[theirs].layout != torch.strided or tensors[theirs].is_meta or not tensors[theirs].ndim:
            raise UsageError(f'{file}: {theirs} is not a tensor of weights: it is sparse, empty or a single number')
    weights = {ours: to_canonical(ours, tensors[theirs]) for theirs, ours in found.names.items()}
    return Checkpoint(str(source), file, found, weights, list(convnexts)[1:])


def _find_convnexts(content: dict, file: str | Path) -> dict[str, tuple[dict[str, torch.Tensor], ParsedNames]]:
    """The dicts of tensors in a checkpoint that hold a ConvNeXt, by their keys, the one that is taken first.

    Raises:
        UsageError: there are several, and nothing says which is meant.
    """
    found, where = {}, find_state_dicts(content)
    for key, tensors in where.items():
        try:
            source = detect_scheme(tensors)
        except UsageError as error:
            if not found:
                raise UsageError(f'{file}: {error}') from None
            continue
        if source:
            found[key] = tensors, source
    rivals = [key for key in found if key not in COMMON_ARCHS and not EMA_KEYS.search(key)]
    if found and next(iter(found)) in rivals and len(rivals) > 1:
        raise UsageError(f'{file}: it holds several ConvNeXts ({", ".join(rivals)}): keep one of them in the file')
    return found


@dataclass(frozen=True)
class LoadPlan:
    """What a checkpoint gives a backbone: `weights` to load, our names `initial` that stay as they are (output norms),
    `ignored` names of the file, and `notes` on what was done to fit it."""

    title: str
    weights: dict[str, torch.Tensor]
    total: int
    initial: list[str]
    ignored: list[str]
    notes: list[str]

    def __str__(self) -> str:
        line = (
            f'{self.title}: {len(self.weights)} of {self.total} backbone tensors loaded, {len(self.initial)} left at '
            f'initial value (output norms), {len(self.ignored)} ignored'
        )
        return '; '.join([line, *self.notes])


def load_backbone(backbone: ConvNeXt, source: str | Path, final_norm: str = 'drop') -> str:
    """Fill a ConvNeXt from a known name, a path or a URL, and return the report, one line. Raises as `match`."""
    found = plan_load(backbone, source, final_norm)
    backbone.load_state_dict(found.weights, strict=False)
    return str(found)


def plan_load(backbone: ConvNeXt, source: str | Path | Checkpoint, final_norm: str = 'drop') -> LoadPlan:
    """What a known name, a path, a URL or an open checkpoint holds for a ConvNeXt.

    Only the output norms may stay at their initial values, all of them, since ImageNet weights have none. What the file
    holds beyond the trunk (its classifier, stages that `out_indices` leaves unbuilt) is ignored. A stem for RGB is
    fitted to other inputs: summed for one channel, else repeated and rescaled.

    Args:
        final_norm: what becomes of the norm before the classifier: 'drop', as in the paper, or 'reuse' as the last
            output norm, for weights whose final norm was trained on features of patches (DINOv3).

    Raises:
        UsageError: the file cannot be had, read or recognised; a tensor of the trunk is missing, has another shape, is
            unknown or not finite.
    """
    if final_norm not in FINAL_NORM_POLICIES:
        raise UsageError(f"final_norm='{final_norm}': give {' or '.join(FINAL_NORM_POLICIES)}")
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    weights, notes = dict(checkpoint.weights), []
    final = {leaf: weights.pop(f'norm.{leaf}', None) for leaf in ('weight', 'bias')}
    last = len(backbone.depths) - 1
    has_outputs = any(OUTPUT_NORM_RE.fullmatch(name) for name in weights)
    if final_norm == 'reuse' and last in backbone.out_indices:
        if any(tensor is None for tensor in final.values()):
            raise UsageError(
                f"{checkpoint.file} has no final norm (norm.weight, norm.bias): final_norm='reuse' needs one"
            )
        weights |= {f'norm{last}.{leaf}': tensor for leaf, tensor in final.items()}
        notes.append(f'the final norm became output norm {last}')
    ours = backbone.state_dict()
    theirs = {n: t for n, t in weights.items() if not n.startswith('head.') and not _is_unused_stage(n, backbone)}
    if STEM in theirs and _needs_stem_adaptation(theirs[STEM], ours[STEM]):
        theirs[STEM] = adapt_input_conv(theirs[STEM], ours[STEM].shape[1])
        notes.append(f'the stem fitted from 3 to {ours[STEM].shape[1]} channels')
    # A file has all output norms or none.
    initial = [] if has_outputs else [name for name in ours if OUTPUT_NORM_RE.fullmatch(name) and name not in theirs]
    problems = _describe_mismatch(
        {n: tuple(t.shape) for n, t in ours.items() if n not in initial},
        {n: tuple(t.shape) for n, t in theirs.items()} | dict.fromkeys(checkpoint.source.unknown, ()),
    )
    if problems:
        wanted = arch_name(backbone.depths, backbone.channels, backbone.use_grn)
        raise UsageError(
            f'{checkpoint.file} is {checkpoint.arch} ({checkpoint.title}) and does not fit the config, {wanted}: '
            f'{problems}'
        )
    check_values(checkpoint.file, theirs)
    ignored = [n for n, o in checkpoint.source.names.items() if o not in theirs] + checkpoint.source.others
    return LoadPlan(f'{checkpoint.name} ({checkpoint.title})', theirs, len(ours), initial, ignored, notes)


def load_model_weights(content: dict, file: str | Path, model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights of a whole model in a checkpoint of any source, by the names that `model` has: those of its ConvNeXt
    renamed, the others as they are. Of a ConvNeXt alone those that `match` finds for the model's.

    Raises:
        UsageError: the file holds several ConvNeXts, or one alone that does not fit.
    """
    convnexts = _find_convnexts(content, file)
    backbones = [(f'{name}.', module) for name, module in model.named_modules() if isinstance(module, ConvNeXt)]
    if not convnexts or not backbones:
        return next(iter(find_state_dicts(content).values()), {})
    tensors, source = next(iter(convnexts.values()))
    prefix, backbone = backbones[0]
    if all(name.startswith(DINOV3_DUPLICATE_PREFIX) for name in source.others):
        found, own = plan_load(backbone, file), backbone.state_dict()
        weights = found.weights | {name: own[name] for name in found.initial}
        return {f'{prefix}{name}': tensor for name, tensor in weights.items()}
    before = source.prefix.partition(prefix)[0] if prefix in source.prefix else ''  # of a Lightning module, say
    weights = {}
    for name, tensor in tensors.items():
        ours = source.names.get(name, '')
        if TRUNK_RE.match(ours) or OUTPUT_NORM_RE.fullmatch(ours):
            weights[prefix + ours] = to_canonical(ours, tensor)
        else:
            weights[name.removeprefix(before)] = tensor
    return weights


def naming_scheme_of(content: dict, file: str | Path) -> str | None:
    """The key of the format in which a checkpoint names its ConvNeXt; None where it has none."""
    convnexts = _find_convnexts(content, file)
    return next(iter(convnexts.values()))[1].format.key if convnexts else None


def check_state_dict_matches(
    model: nn.Module, weights: dict[str, torch.Tensor], file: str | Path, parts: tuple[str, ...] = ('',)
) -> None:
    """Raise UsageError unless weights have exactly the names and shapes of `model`, or of those parts of it whose names
    start so."""
    theirs = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    ours = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    problems = _describe_mismatch(
        *({n: s for n, s in names.items() if n.startswith(parts)} for names in (ours, theirs))
    )
    if problems:
        raise UsageError(f'{file} does not fit the config: {problems}; give the config that it was trained with')


@WEIGHT_INITIALIZERS.register_module()
class PretrainedConvNeXt:
    """mmengine's initializer behind `init_cfg=dict(type='Pretrained', checkpoint=...)` of our backbone, with
    `final_norm` as in `match`."""

    def __init__(self, checkpoint: str | None = None, final_norm: str = 'drop', **unknown):
        if not isinstance(checkpoint, str) or unknown:
            raise UsageError(
                f'init_cfg of ConvNeXt takes checkpoint=(a known name, a path or a URL) and final_norm, not '
                f'{", ".join(unknown) or checkpoint!r}: prefixes and wrappers are found in the file'
            )
        self.checkpoint, self.final_norm = checkpoint, final_norm

    def __call__(self, module: nn.Module) -> None:
        print_log(load_backbone(module, self.checkpoint, self.final_norm), logger='current')
        if hasattr(module, '_params_init_info'):
            update_init_info(module, init_info=f'loaded from {self.checkpoint}')


def _describe_mismatch(ours: dict[str, tuple], theirs: dict[str, tuple], most: int = 3) -> str:
    """What keeps two sets of names and shapes from being equal, shortly, with the nearest name of one that is missing;
    empty where nothing does."""
    reshaped = [f'{n} is {theirs[n]}, not {ours[n]}' for n in ours if n in theirs and ours[n] != theirs[n]]
    missing = [n for n in ours if n not in theirs]
    unknown = [n for n in theirs if n not in ours]
    if len(missing) <= most:
        near = {n: difflib.get_close_matches(n, unknown, 1, 0.8) for n in missing}
        missing = [f'{n}, perhaps called {near[n][0]}' if near[n] else n for n in missing]
    parts = [
        (f'{len(names)} of another shape', names) if kind == 'shape' else (f'{len(names)} {kind}', names)
        for kind, names in (('missing', missing), ('unknown', unknown), ('shape', reshaped))
        if names
    ]
    return '; '.join(
        f'{title} ({", ".join(names[:most])}{", ..." if len(names) > most else ""})' for title, names in parts
    )


def _is_unused_stage(name: str, backbone: ConvNeXt) -> bool:
    """Whether a tensor belongs to a stage or an output norm of the arch that `out_indices` leaves out."""
    built, depth = len(backbone.stages), len(backbone.depths)
    trunk = TRUNK_RE.match(name)
    if trunk:
        return built <= int(trunk[2]) < depth
    return bool(OUTPUT_NORM_RE.fullmatch(name)) and int(name.split('.')[0][4:]) not in backbone.out_indices


def _needs_stem_adaptation(theirs: torch.Tensor, ours: torch.Tensor) -> bool:
    return theirs.ndim == 4 and theirs.shape[1] == 3 != ours.shape[1] and theirs.shape[0] == ours.shape[0]


def adapt_input_conv(stem: torch.Tensor, in_channels: int) -> torch.Tensor:
    """A stem for RGB, C x 3 x k x k, for other inputs, with a response of about the same size."""
    if in_channels == 1:
        return stem.sum(1, keepdim=True)
    repeated = stem.repeat(1, -(-in_channels // 3), 1, 1)[:, :in_channels]
    return repeated * (3 / in_channels)


def check_values(file: Path, weights: dict[str, torch.Tensor]) -> None:
    """Raise UsageError unless weights are finite numbers of a precision that loads."""
    for name, tensor in weights.items():
        if tensor.dtype not in FLOAT_DTYPES:
            what = 'complex' if tensor.is_complex() else 'quantised'
            raise UsageError(f'{file}: {name} is of {tensor.dtype}: {what} weights do not load, give fp16 to fp64')
        # A sum is finite only where all is, and needs no copy; of finite values it may overflow.
        total = tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32))
        if not total.isfinite() and not tensor.isfinite().all():
            raise UsageError(f'{file}: {name} holds NaN or Inf: the training that wrote it had failed')
