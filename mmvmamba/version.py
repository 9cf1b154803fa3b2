"""The one place that states mmvmamba's version."""

__version__ = "0.1.0"
