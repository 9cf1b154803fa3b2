"""Comparison of an operator with its float64 oracle, output and gradients."""

from mmvmamba_kernels.testing import errors, output_and_gradients


def doubled(args):
    return {name: t.detach().double().requires_grad_() for name, t in args.items()}


def compare(function, oracle, args, tolerance):
    """Check output and all gradients against the float64 loop on the same values."""
    expected = output_and_gradients(oracle, doubled(args))
    actual = output_and_gradients(function, args)
    for name, t in args.items():
        assert actual[name].dtype == t.dtype
        assert actual[name].shape == t.shape
    found = errors(actual, expected)
    assert max(found.values()) < tolerance, found
