"""The one place that states mmvmamba's version."""

__version__ = "1.0.0"
