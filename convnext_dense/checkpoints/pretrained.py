"""Load weights of any code base into the backbone: detect the naming scheme, rename, compare, report."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from mmengine.logging import print_log
from mmengine.model import update_init_info
from mmengine.registry import WEIGHT_INITIALIZERS
from torch import nn

from ..errors import UsageError
from ..models.convnext import ARCHS, ConvNeXt
from ..models.swin import SwinMixin
from .detrex_naming import rename_detrex
from .hub import download
from .io import EMA_KEY_RE, STATE_DICT_KEYS, find_state_dicts, load_checkpoint
from .naming import (
    DINOV3_DUPLICATE_PREFIX,
    NAMING_SCHEMES,
    OUTPUT_NORM_RE,
    STEM,
    TRUNK_RE,
    ParsedNames,
    detect_scheme,
    to_canonical_shape,
)
from .swin_naming import rename_swin

PREFERRED_KEYS = ('', *STATE_DICT_KEYS)  # the first of these with a ConvNeXt is loaded, whatever else there is
FINAL_NORM_POLICIES = ('drop', 'reuse')
MAX_NAMES = 3  # names of each kind in a message
FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Checkpoint:
    """An open file of ConvNeXt weights.

    Attributes:
        name (str): The pretrained weight name, path or URL that was opened.
        file (Path): The local file.
        parsed (ParsedNames): Parsed parameter names.
        weights (dict[str, Tensor]): Weights of the ConvNeXt by canonical name, with classifier and final norm.
        unused_keys (list[str]): Keys under which the file contains other ConvNeXt weights, such as an average.
    """

    name: str
    file: Path
    parsed: ParsedNames
    weights: dict[str, torch.Tensor]
    unused_keys: list[str]

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of the stages; 0 if the file does not tell them."""
        names = (f'stages.{i}.0.dwconv.weight' for i in range(len(self.parsed.depths)))
        return tuple(self.weights[n].shape[0] if n in self.weights else 0 for n in names)

    @property
    def use_grn(self) -> bool:
        """Whether it is a ConvNeXt V2."""
        return any('.grn.' in name for name in self.weights)

    @property
    def arch(self) -> str:
        """Name of the arch, or its depths and channels if it has none."""
        return arch_name(self.parsed.depths, self.channels, self.use_grn)

    @property
    def title(self) -> str:
        """Description of the origin of the weights for messages."""
        title = self.parsed.scheme.title
        if 'norms.3.weight' in self.parsed.other_names:
            title = 'DINOv3 by Meta'
        is_dense_model = self.extra_names and self.parsed.prefix
        return f'the backbone of a trained detector or segmentor in the names of {title}' if is_dense_model else title

    @property
    def extra_names(self) -> list[str]:
        """Names in the file that do not belong to the ConvNeXt."""
        return [name for name in self.parsed.other_names if not name.startswith(DINOV3_DUPLICATE_PREFIX)]


def arch_name(depths: tuple[int, ...], channels: tuple[int, ...], use_grn: bool) -> str:
    """Return the name of an arch in messages, such as 'ConvNeXt V2 atto'."""
    name = next((n for n, a in ARCHS.items() if (a['depths'], a['channels']) == (depths, channels)), None)
    return f'ConvNeXt{" V2" if use_grn else ""} {name or f"depths {depths}, channels {channels}"}'


def open_checkpoint(source: str | Path) -> Checkpoint:
    """Open the ConvNeXt weights of a checkpoint.

    Args:
        source: A pretrained weight name, a path or a URL.

    Returns:
        The checkpoint; its tensors are read when they are used.

    Raises:
        UsageError: If the file cannot be found, downloaded or read, or contains no ConvNeXt, or several.
    """
    file = download(str(source))
    return _parse_checkpoint(load_checkpoint(file), str(source), file)


def _parse_checkpoint(content: dict, name: str, file: Path) -> Checkpoint:
    """Find the ConvNeXt weights in the content of a checkpoint."""
    convnexts = _find_convnexts(content, file)
    if not convnexts:
        names = [name for tensors in find_state_dicts(content).values() for name in tensors] or list(map(str, content))
        raise UsageError(
            f'{file}: no ConvNeXt weights by the names in it ({", ".join(names[:3]) or "none"}, ...): give weights of '
            f'{", ".join(scheme.title for scheme in NAMING_SCHEMES)}'
        )
    tensors, parsed = next(iter(convnexts.values()))
    for key in parsed.names:
        if tensors[key].layout != torch.strided or tensors[key].is_meta or not tensors[key].ndim:
            raise UsageError(f'{file}: {key} is not a tensor of weights: it is sparse, empty or a single number')
    weights = {canonical: to_canonical_shape(canonical, tensors[key]) for key, canonical in parsed.names.items()}
    return Checkpoint(name, file, parsed, weights, list(convnexts)[1:])


def _find_convnexts(content: dict, file: str | Path) -> dict[str, tuple[dict[str, torch.Tensor], ParsedNames]]:
    """Return the state dicts of a checkpoint that contain a ConvNeXt, by key; the first one is to be loaded.

    Raises:
        UsageError: If there are several and it is ambiguous which one to load.
    """
    convnexts = {}
    for key, tensors in find_state_dicts(content).items():
        try:
            parsed = detect_scheme(tensors)
        except UsageError as error:
            if not convnexts:
                raise UsageError(f'{file}: {error}') from None
            continue
        if parsed:
            convnexts[key] = tensors, parsed
    rivals = [key for key in convnexts if key not in PREFERRED_KEYS and not EMA_KEY_RE.search(key)]
    if convnexts and next(iter(convnexts)) in rivals and len(rivals) > 1:
        raise UsageError(f'{file}: it contains several ConvNeXts ({", ".join(rivals)}): keep one of them in the file')
    return convnexts


@dataclass(frozen=True)
class LoadPlan:
    """The weights that a checkpoint would load into a backbone.

    Attributes:
        title (str): Description of the checkpoint and its origin.
        weights (dict[str, Tensor]): Weights to load, by the backbone's parameter names.
        total (int): Number of tensors in the backbone.
        kept_init (list[str]): Parameters that keep their initialization: output norms.
        unused (list[str]): Names in the file that are not loaded.
        notes (list[str]): Changes that were made so that the weights fit.
    """

    title: str
    weights: dict[str, torch.Tensor]
    total: int
    kept_init: list[str]
    unused: list[str]
    notes: list[str]

    def __str__(self) -> str:
        line = (
            f'{self.title}: {len(self.weights)} of {self.total} backbone tensors loaded, {len(self.kept_init)} kept at '
            f'initialization (output norms), {len(self.unused)} unused'
        )
        return '; '.join([line, *self.notes])


def load_backbone(backbone: ConvNeXt, source: str | Path, final_norm: str = 'drop') -> str:
    """Load pretrained weights into a backbone.

    Args:
        backbone: The backbone. Either all of its parameters are changed in place, or none.
        source: A pretrained weight name, a path or a URL.
        final_norm: 'drop' or 'reuse', as for `plan_load`.

    Returns:
        One line with the number of tensors that were loaded, kept at initialization and unused.

    Raises:
        UsageError: As for `plan_load`.
    """
    plan = plan_load(backbone, source, final_norm)
    backbone.load_state_dict(plan.weights, strict=False)
    return str(plan)


def plan_load(backbone: ConvNeXt, source: str | Path | Checkpoint, final_norm: str = 'drop') -> LoadPlan:
    """Compare a checkpoint with a backbone and return what it would load; nothing is changed.

    Only the output norms may keep their initialization, because ImageNet weights do not have them. Content beyond the
    trunk (the classifier, stages that `out_indices` excludes) is unused. An RGB stem is adapted to other numbers of
    input channels: summed for one channel, otherwise repeated and rescaled.

    Args:
        backbone: The backbone to compare with.
        source: A pretrained weight name, a path, a URL or an open checkpoint.
        final_norm: What to do with the norm before the classifier: 'drop' it, as in the paper, or 'reuse' it as the
            last output norm, for weights whose final norm was trained on patch features (DINOv3).

    Returns:
        The plan.

    Raises:
        UsageError: As for `open_checkpoint`, or if a tensor of the trunk is missing, unknown, not finite or of another
            shape.
    """
    if final_norm not in FINAL_NORM_POLICIES:
        raise UsageError(f"final_norm='{final_norm}' is unknown: give {' or '.join(FINAL_NORM_POLICIES)}")
    checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(source)
    weights, notes = dict(checkpoint.weights), []
    final = {leaf: weights.pop(f'norm.{leaf}', None) for leaf in ('weight', 'bias')}
    last_stage = len(backbone.depths) - 1
    has_output_norms = any(OUTPUT_NORM_RE.fullmatch(name) for name in weights)
    if final_norm == 'reuse' and last_stage in backbone.out_indices:
        if any(tensor is None for tensor in final.values()):
            raise UsageError(
                f"{checkpoint.file} has no final norm (norm.weight, norm.bias): final_norm='reuse' needs one"
            )
        weights |= {f'norm{last_stage}.{leaf}': tensor for leaf, tensor in final.items()}
        notes.append(f'the final norm is used as output norm {last_stage}')
    state = backbone.state_dict()
    weights = {n: t for n, t in weights.items() if not n.startswith('head.') and not _is_unused_stage(n, backbone)}
    if STEM in weights and _needs_stem_adaptation(weights[STEM], state[STEM]):
        weights[STEM] = adapt_input_conv(weights[STEM], state[STEM].shape[1])
        notes.append(f'the stem is adapted from 3 to {state[STEM].shape[1]} input channels')
    # A file contains either all output norms or none.
    kept_init = [] if has_output_norms else [n for n in state if OUTPUT_NORM_RE.fullmatch(n) and n not in weights]
    expected_state = {n: t for n, t in state.items() if n not in kept_init}
    problems = describe_mismatch(expected_state, weights, checkpoint.parsed.unknown)
    if problems:
        expected = arch_name(backbone.depths, backbone.channels, backbone.use_grn)
        raise UsageError(
            f'{checkpoint.file} is {checkpoint.arch} ({checkpoint.title}) and does not fit the config, {expected}: '
            f'{problems}'
        )
    check_values(checkpoint.file, weights)
    parsed = checkpoint.parsed
    unused = [name for name, canonical in parsed.names.items() if canonical not in weights] + parsed.other_names
    return LoadPlan(f'{checkpoint.name} ({checkpoint.title})', weights, len(state), kept_init, unused, notes)


def load_model_weights(content: dict, file: str | Path, model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the weights of a checkpoint with the parameter names of a whole model.

    Args:
        content: Content of the checkpoint.
        file: Path of the checkpoint, for messages.
        model: Model with the target names.

    Returns:
        The weights. In a trained detector or segmentor, the parameters of its ConvNeXt or Swin are renamed (in detrex's
        DINO, all parameters); for a checkpoint of only a backbone, they are those of `plan_load`.

    Raises:
        UsageError: If the file contains several ConvNeXts, or only a backbone that does not fit.
    """
    convnexts = _find_convnexts(content, file)
    backbones = [(f'{name}.', module) for name, module in model.named_modules() if isinstance(module, ConvNeXt)]
    if not convnexts or not backbones:
        weights = next(iter(find_state_dicts(content).values()), {})
        has_swin = any(isinstance(module, SwinMixin) for module in model.modules())
        return rename_swin(weights) or weights if has_swin else weights
    tensors, parsed = next(iter(convnexts.values()))
    prefix, backbone = backbones[0]
    if all(name.startswith(DINOV3_DUPLICATE_PREFIX) for name in parsed.other_names):
        plan = plan_load(backbone, _parse_checkpoint(content, str(file), Path(file)))
        state = backbone.state_dict()
        weights = plan.weights | {name: state[name] for name in plan.kept_init}
        return {f'{prefix}{name}': tensor for name, tensor in weights.items()}
    outer_prefix = parsed.prefix.partition(prefix)[0] if prefix in parsed.prefix else ''  # such as a Lightning module's
    weights = {}
    for name, tensor in tensors.items():
        canonical = parsed.names.get(name, '')
        if TRUNK_RE.match(canonical) or OUTPUT_NORM_RE.fullmatch(canonical):
            weights[prefix + canonical] = to_canonical_shape(canonical, tensor)
        else:
            weights[name.removeprefix(outer_prefix)] = tensor
    return rename_detrex(weights)


def naming_scheme_of(content: dict, file: str | Path) -> str | None:
    """Return the key of the naming scheme of the ConvNeXt in a checkpoint; None if there is none."""
    convnexts = _find_convnexts(content, file)
    return next(iter(convnexts.values()))[1].scheme.key if convnexts else None


def check_state_dict_matches(
    model: nn.Module, weights: dict[str, torch.Tensor], file: str | Path, prefixes: tuple[str, ...] = ('',)
) -> None:
    """Check that weights have exactly the names and shapes of a model.

    Args:
        model: Model to compare with.
        weights: Weights by name.
        file: Path of the checkpoint, for messages.
        prefixes: Only names that start with one of these are compared. Defaults to all.

    Raises:
        UsageError: If a name is missing or unknown, or a shape differs.
    """
    state_dicts = model.state_dict(), weights
    problems = describe_mismatch(*({n: t for n, t in s.items() if n.startswith(prefixes)} for s in state_dicts))
    if problems:
        raise UsageError(f'{file} does not fit the config: {problems}; give the config that it was trained with')


class StrictInitializer:
    """Base of mmengine initializers that load a checkpoint completely or raise an error; subclasses define `plan`.

    Args:
        checkpoint (str): A pretrained weight name, a path or a URL.

    Raises:
        UsageError: If another argument is given, or no checkpoint.
    """

    backbone, arguments = '', 'checkpoint (a pretrained weight name, a path or a URL)'

    def __init__(self, checkpoint: str | None = None, **unknown):
        if not isinstance(checkpoint, str) or unknown:
            raise UsageError(
                f'init_cfg of {self.backbone} takes {self.arguments}, not {", ".join(unknown) or repr(checkpoint)}: '
                'prefixes and wrappers are detected in the file'
            )
        self.checkpoint = checkpoint

    def __call__(self, module: nn.Module) -> None:
        """Load the weights into a backbone and log the report."""
        plan = self.plan(module)
        module.load_state_dict(plan.weights, strict=False)
        print_log(str(plan), logger='current')
        if hasattr(module, '_params_init_info'):
            update_init_info(module, init_info=f'loaded from {self.checkpoint}')


@WEIGHT_INITIALIZERS.register_module()
class PretrainedConvNeXt(StrictInitializer):
    """Initializer for `init_cfg=dict(type='Pretrained', ...)` of the ConvNeXt backbone.

    Args:
        checkpoint (str): A pretrained weight name, a path or a URL.
        final_norm (str): 'drop' or 'reuse', as for `plan_load`. Defaults to 'drop'.
    """

    backbone, arguments = 'ConvNeXt', f'{StrictInitializer.arguments} and final_norm'

    def __init__(self, checkpoint: str | None = None, final_norm: str = 'drop', **unknown):
        super().__init__(checkpoint, **unknown)
        self.final_norm = final_norm

    def plan(self, module: nn.Module) -> LoadPlan:
        """Return what would be loaded into a ConvNeXt; see `plan_load`."""
        return plan_load(module, self.checkpoint, self.final_norm)


def describe_mismatch(
    expected: dict[str, torch.Tensor], actual: dict[str, torch.Tensor], unknown: Sequence[str] = ()
) -> str:
    """Describe how names and shapes differ, with the most similar unknown name for each missing one; '' if none do."""
    shared = {n: (tuple(actual[n].shape), tuple(tensor.shape)) for n, tensor in expected.items() if n in actual}
    reshaped = [f'{n} is {shape}, not {wanted}' for n, (shape, wanted) in shared.items() if shape != wanted]
    missing = [n for n in expected if n not in actual]
    unknown = [*(n for n in actual if n not in expected), *unknown]
    if len(missing) <= MAX_NAMES:
        similar = {n: difflib.get_close_matches(n, unknown, 1, 0.8) for n in missing}
        missing = [f'{n} (did you mean {similar[n][0]}?)' if similar[n] else n for n in missing]
    problems = {'missing': missing, 'unknown': unknown, 'of another shape': reshaped}
    return '; '.join(
        f'{len(names)} {problem} ({", ".join(names[:MAX_NAMES])}{", ..." if len(names) > MAX_NAMES else ""})'
        for problem, names in problems.items()
        if names
    )


def _is_unused_stage(name: str, backbone: ConvNeXt) -> bool:
    """Return whether a name belongs to a stage or an output norm that `out_indices` excludes."""
    built, depth = len(backbone.stages), len(backbone.depths)
    trunk = TRUNK_RE.match(name)
    if trunk:
        return built <= int(trunk[2]) < depth
    return bool(OUTPUT_NORM_RE.fullmatch(name)) and int(name.split('.')[0][4:]) not in backbone.out_indices


def _needs_stem_adaptation(weight: torch.Tensor, current: torch.Tensor) -> bool:
    return weight.ndim == 4 and weight.shape[1] == 3 != current.shape[1] and weight.shape[0] == current.shape[0]


def adapt_input_conv(weight: torch.Tensor, in_channels: int) -> torch.Tensor:
    """Adapt the weight of an RGB stem to another number of input channels, preserving the scale of its output.

    Args:
        weight: Weight of shape (C, 3, k, k).
        in_channels: Number of input channels.

    Returns:
        Weight of shape (C, in_channels, k, k): the sum over RGB for one channel, otherwise RGB repeated and rescaled.
    """
    if in_channels == 1:
        return weight.sum(1, keepdim=True)
    repeated = weight.repeat(1, -(-in_channels // 3), 1, 1)[:, :in_channels]
    return repeated * (3 / in_channels)


def check_values(file: Path, weights: dict[str, torch.Tensor]) -> None:
    """Check that weights are finite and of a floating point dtype from float16 to float64.

    Raises:
        UsageError: If a tensor has another dtype, or contains NaN or Inf.
    """
    for name, tensor in weights.items():
        if tensor.dtype not in FLOAT_DTYPES:
            kind = 'complex' if tensor.is_complex() else 'quantized'
            raise UsageError(f'{file}: {name} is {tensor.dtype}: {kind} weights cannot be loaded, give fp16 to fp64')
        # If the sum is finite, so are all values, and it needs no copy; a sum of finite values may overflow, though.
        total = tensor.sum(dtype=torch.promote_types(tensor.dtype, torch.float32))
        if not total.isfinite() and not tensor.isfinite().all():
            raise UsageError(f'{file}: {name} contains NaN or Inf: the training that wrote it had failed')
