"""Strict loading of weights and layer-wise lr decay for Swin, a baseline of the paper, in mmdet and mmseg."""

from mmengine.model import initialize

from ..errors import UsageError


class SwinMixin:
    """Mixin for a SwinTransformer of mmdet or mmseg, which only changes how pretrained weights are loaded.

    By themselves, both silently skip weights that do not fit; mmseg's skips all weights with the original's names.
    Here, `convnext_dense.checkpoints.swin` loads all of them or raises an error.
    """

    @property
    def pretrained(self) -> list[dict]:
        """The config of the initializer for the pretrained weights in `init_cfg`; [] without any."""
        return [{**self.init_cfg, 'type': 'PretrainedSwin'}] if self.init_cfg else []

    def init_weights(self) -> None:
        """Load the pretrained weights in `init_cfg`; without any, initialize randomly as mmdet and mmseg do."""
        if self.pretrained:
            initialize(self, self.pretrained)
        else:
            super().init_weights()

    @property
    def num_layers(self) -> int:
        """N of layer-wise lr decay: the number of blocks."""
        return sum(len(stage.blocks) for stage in self.stages)

    def layer_id(self, name: str, decay_type: str = 'layer_wise') -> int:
        """Return the layer id of a parameter for layer-wise lr decay, numbered as in SimMIM.

        Args:
            name: Name of a parameter of this backbone.
            decay_type: 'layer_wise'.

        Returns:
            0 for the patch embedding; from 1 on for the blocks in order; for a downsampling layer, the id of the block
            before it; `num_layers + 1` for output norms.

        Raises:
            UsageError: If `decay_type` is another one.
        """
        if decay_type != 'layer_wise':
            raise UsageError(f"decay_type='{decay_type}' is not defined for a SwinTransformer: give 'layer_wise'")
        root, *rest = (part for part in name.split('.') if part != 'module' and not part.startswith('_'))
        if root != 'stages':
            return 0 if root in ('patch_embed', 'absolute_pos_embed') else self.num_layers + 1
        stage, kind = int(rest[0]), rest[1]
        blocks_before = sum(len(self.stages[i].blocks) for i in range(stage))
        return blocks_before + (1 + int(rest[2]) if kind == 'blocks' else len(self.stages[stage].blocks))
