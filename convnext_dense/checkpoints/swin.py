"""Load Swin weights of the original code, mmdet or mmseg into a SwinTransformer of mmdet or mmseg."""

import re

from mmengine.registry import WEIGHT_INITIALIZERS
from torch import nn

from ..errors import UsageError
from .hub import download
from .io import find_state_dicts, load_checkpoint
from .naming import OUTPUT_NORM_RE
from .pretrained import LoadPlan, StrictInitializer, check_values, describe_mismatch
from .swin_naming import PREFIX_RE, rename_swin

CLASSIFIER_RE = re.compile(r'^(?:head|norm)\.')
BUFFER_NAMES = ('relative_position_index', 'attn_mask')  # computed from the sizes of window and image


@WEIGHT_INITIALIZERS.register_module()
class PretrainedSwin(StrictInitializer):
    """Initializer for `init_cfg` of a `StrictSwinTransformer`."""

    backbone = 'StrictSwinTransformer'

    def plan(self, module: nn.Module) -> LoadPlan:
        """Compare the checkpoint with a SwinTransformer and return what it would load; nothing is changed.

        Args:
            module: SwinTransformer of mmdet or mmseg. Only its output norms may keep their initialization.

        Raises:
            UsageError: If the file cannot be read or contains no Swin, or a tensor is missing, unknown, not finite or
                of another shape (such as of another window size).
        """
        file = download(self.checkpoint)
        renamed = (rename_swin(tensors) for tensors in find_state_dicts(load_checkpoint(file)).values())
        tensors = next((weights for weights in renamed if weights is not None), None)
        if tensors is None:
            raise UsageError(
                f'{file}: no Swin weights by the names in it: give those of the original code, mmdet or mmseg'
            )
        prefix = next(match[1] for match in map(PREFIX_RE.match, tensors) if match)
        state = module.state_dict()
        weights, unused = {}, []
        for name, tensor in tensors.items():
            short = name.removeprefix(prefix)
            is_unused_norm = OUTPUT_NORM_RE.fullmatch(short) and short not in state
            if not name.startswith(prefix) or CLASSIFIER_RE.match(short) or is_unused_norm:
                unused.append(name)
            elif not short.endswith(BUFFER_NAMES):
                weights[short] = tensor
        expected = {name: tensor for name, tensor in state.items() if not name.endswith(BUFFER_NAMES)}
        has_output_norms = any(map(OUTPUT_NORM_RE.fullmatch, weights))
        kept_init = [] if has_output_norms else [name for name in expected if OUTPUT_NORM_RE.fullmatch(name)]
        problems = describe_mismatch({name: t for name, t in expected.items() if name not in kept_init}, weights)
        if problems:
            raise UsageError(f'{file} does not fit the Swin of the config: {problems}')
        check_values(file, weights)
        return LoadPlan(f'{self.checkpoint} (Swin)', weights, len(expected), kept_init, unused, [])
