"""The memory that backbones need at their peak, measured in a process of its own.

`python peak_memory.py HEIGHT WIDTH ARGUMENTS PASS...` prints, for each PASS, a list of
`[peak in MiB, finite]`, one for each of the JSON list ARGUMENTS of `VMamba`'s arguments. A PASS is
'forward' or 'training'.
"""

import json
import sys
from pathlib import Path

import torch

from mmvmamba.models import VMamba


def resident(field: str) -> float:
    """VmRSS, or VmHWM, its highest value, in MiB."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"{field}:")[2].split()[0]) / 1024


def run(model: VMamba, image: torch.Tensor, training: bool) -> list[torch.Tensor]:
    """The maps and, in training, the parameters' gradients."""
    with torch.set_grad_enabled(training):
        results = list(model(image))
    if training:
        sum(out.square().mean() for out in results).backward()
        results += [parameter.grad for parameter in model.parameters()]
    return results


def measure(arguments: dict, size: tuple[int, int], training: bool) -> tuple[float, bool]:
    """The peak above the model and its image, and whether all results are finite."""
    model = VMamba(**arguments).train(training)
    image = torch.randn(1, 3, *size)
    # What the first call of any size loads and sets up is not what this size needs.
    run(model, image[:, :, :64, :64], training)
    before = resident("VmRSS")
    # Sets the highest value to the current one; see proc(5).
    Path("/proc/self/clear_refs").write_text("5")
    results = run(model, image, training)
    peak = resident("VmHWM")
    return peak - before, all(torch.isfinite(result).all().item() for result in results)


def main() -> None:
    """Measures what the command line names."""
    height, width, arguments, *passes = sys.argv[1:]
    torch.manual_seed(0)
    size = int(height), int(width)
    found = {
        what: [measure(each, size, what == "training") for each in json.loads(arguments)]
        for what in passes
    }
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
