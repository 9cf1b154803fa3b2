"""Stand-ins for the modules that VMamba-family code imports, on this package's operators.

``import mmvmamba_kernels.stand_in`` before that code, or ``python -m mmvmamba_kernels.stand_in
train.py --its --options`` without touching it. ``kernels/README.md`` lists the modules.
"""

from mmvmamba_kernels.stand_in.finder import install

__all__ = ["install"]

install()
