"""What mmdet's and mmseg's SwinTransformer lack for the paper's comparisons: strict weights and layer-wise lr decay."""

from mmengine.model import initialize

from ..errors import UsageError


class SwinMixin:
    """Mixin before a SwinTransformer of mmdet or mmseg, which it leaves as it is but for pretrained weights.

    They load the weights that fit and say nothing of others, mmseg's none at all of a file in the original's names.
    Here `convnext_dense.checkpoints.swin` loads all or raises an error.
    """

    @property
    def pretrained(self) -> list[dict]:
        """The initializer that loads the pretrained weights of `init_cfg`, none without any."""
        return [{**self.init_cfg, 'type': 'PretrainedSwin'}] if self.init_cfg else []

    def init_weights(self) -> None:
        """Load the pretrained weights of `init_cfg`; without any, initialize randomly as the toolbox does."""
        if self.pretrained:
            initialize(self, self.pretrained)
        else:
            super().init_weights()

    @property
    def num_layers(self) -> int:
        """N of layer-wise lr decay: the number of blocks."""
        return sum(len(stage.blocks) for stage in self.stages)

    def layer_id(self, name: str, decay_type: str = 'layer_wise') -> int:
        """Return the layer id of a parameter for layer-wise lr decay, as SimMIM numbers Swin's.

        Args:
            name: Name of a parameter of this backbone.
            decay_type: 'layer_wise'.

        Returns:
            0 for the patch embedding, from 1 on for the blocks in their order, the id of the block before it for a
            downsampling layer, `num_layers + 1` for output norms.

        Raises:
            UsageError: For another `decay_type`.
        """
        if decay_type != 'layer_wise':
            raise UsageError(f"decay_type='{decay_type}' is not defined for a SwinTransformer: give 'layer_wise'")
        root, *rest = (part for part in name.split('.') if part != 'module' and not part.startswith('_'))
        if root != 'stages':
            return 0 if root in ('patch_embed', 'absolute_pos_embed') else self.num_layers + 1
        stage, kind = int(rest[0]), rest[1]
        blocks_before = sum(len(self.stages[i].blocks) for i in range(stage))
        return blocks_before + (1 + int(rest[2]) if kind == 'blocks' else len(self.stages[stage].blocks))
