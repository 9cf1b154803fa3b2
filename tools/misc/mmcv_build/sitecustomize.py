"""Lets mmcv 2.1's setup.py run on Python 3.13, in processes that have this folder on their path.

It takes its version from a local variable that exec() makes in a function. Since Python 3.13
(PEP 667), exec() makes it in a copy.
"""

import builtins
import sys

_exec = builtins.exec


def _exec_with_locals(code, scope=None, local=None, /, **options):
    if scope is None:
        frame = sys._getframe(1)
        scope, local = frame.f_globals, frame.f_locals
    _exec(code, scope, local, **options)


builtins.exec = _exec_with_locals
