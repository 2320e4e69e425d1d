"""Helpers of the OASIS diffusion tutorial: one module beside each notebook."""

__version__ = "0.1.0"
