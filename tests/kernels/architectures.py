"""GPU architectures that kernels are compiled for on machines that may have none."""

import pytest

ARCHITECTURES = (80, 90, 120)


def on_architectures(name, cases):
    """Cases named ``name``, with ``architecture``: in the default run each on one of them in turn.

    What a compiler makes of a kernel differs little between them; slow tests compile the rest.
    """
    return pytest.mark.parametrize(
        ("architecture", name),
        [
            pytest.param(architecture, case, marks=() if i % 3 == j else pytest.mark.slow)
            for i, case in enumerate(cases)
            for j, architecture in enumerate(ARCHITECTURES)
        ],
        ids=str,
    )
