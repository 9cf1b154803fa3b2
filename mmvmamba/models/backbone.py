"""What backbones share: weights that are loaded strictly."""

from mmengine.logging import print_log
from mmengine.model import BaseModule

from mmvmamba.models.checkpoint import Channels, LoadReport, load_backbone, split_pretrained


class Backbone(BaseModule):
    """A backbone whose checkpoints are loaded by `load_backbone`."""

    foreign_parts: tuple[str, ...] = ()
    """How keys begin that an official file has and the backbone need not have."""
    own_parts: tuple[str, ...] = ()
    """How keys begin that the backbone has and a file for another task has not."""

    def init_weights(self) -> None:
        """Initialises as `init_cfg` says; without one, the constructor's weights stay.

        Raises:
            CheckpointError: If `init_cfg` names a checkpoint that cannot be loaded completely.
        """
        if self._is_init:
            return
        configured = self.init_cfg
        pretrained, self.init_cfg = split_pretrained(configured)
        super().init_weights()
        self.init_cfg = configured
        for cfg in pretrained:
            options = {key: cfg.get(key) for key in ("prefix", "in_channels", "entry")}
            self.load_pretrained(cfg["checkpoint"], **options)

    def load_pretrained(
        self,
        source: str,
        prefix: str | None = None,
        in_channels: Channels | None = None,
        entry: str | None = None,
    ) -> LoadReport:
        """Loads weights strictly and logs what became of every key; see `load_backbone`."""
        report = load_backbone(self, source, prefix, in_channels, entry)
        print_log(f"{type(self).__name__}: {report}", logger="current")
        return report
