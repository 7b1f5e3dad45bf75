"""Quantized activations: the formula, the modules that quantize what they take or return, and where that is."""

from lightning_selfcompress.activations.calibrate import calibrate_activations
from lightning_selfcompress.activations.formula import q_a
from lightning_selfcompress.activations.layers import remove_activations
from lightning_selfcompress.activations.places import find_points

__all__ = ["calibrate_activations", "find_points", "q_a", "remove_activations"]
