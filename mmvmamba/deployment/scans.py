"""What drives a model's scans as an ONNX graph: all that activation maps are computed from.

`mmvmamba.analysis.activation_maps` has the equations. A graph of them would run the whole backbone
for every position that is asked for; this one runs once for an image, and the page of
`mmvmamba.demo` computes the map of a position from its results (`demo/web/maps.js`).
"""

import dataclasses
from pathlib import Path

from torch import Tensor, nn

from mmvmamba.analysis.activation_maps import Mixed, capture, driven
from mmvmamba.deployment.deployable import Deployable
from mmvmamba.deployment.export import backbone_of, example_for, trace, write
from mmvmamba.deployment.record import Record, scans_path
from mmvmamba.engine.errors import UsageError
from mmvmamba.models.compared.vision_mamba import BidirectionalMixer

PARTS = ("Q", "K", "dt", "A")
"""What is given of each stage; see `mmvmamba.analysis.activation_maps.Driven`."""


class Scans(nn.Module):
    """From an image to what drives the scans of the last block of each stage.

    Args:
        model: A model as it is deployed.
    """

    def __init__(self, model: Deployable):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Computes it.

        Args:
            images: As the model takes them, (1, C, H, W).

        Returns:
            For each stage, `PARTS` in float32. Their maps cover the padded image.
        """
        given = (driven(mixed.mixer, mixed.x) for mixed in self.last_blocks(images))
        return tuple(getattr(one, part).float() for one in given for part in PARTS)

    def last_blocks(self, images: Tensor) -> list[Mixed]:
        """The last block of each stage, and what it is given.

        Raises:
            UsageError: If the model is Vim, whose scans go along a sequence.
        """
        found = capture(backbone_of(self.model), self.model.normalised(images)[0])
        if any(isinstance(mixed.mixer, BidirectionalMixer) for mixed in found):
            raise UsageError(
                "--activation-maps: the page draws VMamba's scans, which go over a map."
            )
        # Later blocks of a stage take the place of earlier ones.
        return list({mixed.stage: mixed for mixed in found}.values())


def export_scans(model: Deployable, out: Path, record: Record) -> Record:
    """Writes the graph of an exported model's scans beside it, and adds it to the JSON.

    Args:
        model: What was exported.
        out: Its file.
        record: What `mmvmamba.deployment.export.export_model` gave.

    Returns:
        The record with the scans.
    """
    module = Scans(model).eval()
    images, dynamic = example_for(module, record.size and tuple(record.size), batched=False)
    blocks = module.last_blocks(images)
    outputs = [f"stage{mixed.stage}.{part}" for mixed in blocks for part in PARTS]
    write(trace(module, images, dynamic), scans_path(out), "onnx", outputs)
    stages = [
        {
            "stage": mixed.stage,
            "block": mixed.block,
            "paths": [path._asdict() for path in driven(mixed.mixer, mixed.x).paths],
        }
        for mixed in blocks
    ]
    record = dataclasses.replace(record, scans={"divisor": model.divisor, "stages": stages})
    record.save(out)
    return record
