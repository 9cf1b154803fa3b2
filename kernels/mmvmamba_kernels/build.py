"""``python -m mmvmamba_kernels.build``: see :mod:`mmvmamba_kernels.backends.native.build`."""

import sys

from mmvmamba_kernels.backends.native.build import main

if __name__ == "__main__":
    sys.exit(main())
