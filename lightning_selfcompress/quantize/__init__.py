"""The quantizer, the layers that apply it, and the conversion of a network to these layers and back."""

from lightning_selfcompress.quantize.channel_axis import ChannelAxis
from lightning_selfcompress.quantize.conversion_plan import ConversionPlan, PlannedLayer
from lightning_selfcompress.quantize.formula import bit_depth, codes, q, step_size
from lightning_selfcompress.quantize.layers import Quantized, QuantizedSpec
from lightning_selfcompress.quantize.parameters import QuantizedParameter, quantized_parameters

__all__ = [
    "ChannelAxis",
    "ConversionPlan",
    "PlannedLayer",
    "Quantized",
    "QuantizedParameter",
    "QuantizedSpec",
    "bit_depth",
    "codes",
    "q",
    "quantized_parameters",
    "step_size",
]
