"""Networks of the zoo after removals."""

import torch
from killing import half_removed, watched
from zoo import ZOO

from lightning_selfcompress.quantize.convert import convert
from lightning_selfcompress.quantize.parameters import quantized_parameters


def shrunk(name):
    """A network of the zoo with depths of all kinds, half of its removable channels gone; its inputs."""
    torch.manual_seed(0)
    full, inputs = ZOO[name].make(), ZOO[name].inputs()
    convert(full)
    channels, _ = watched(full, *inputs)
    # torch's own attention takes no fewer channels than it was made with, which the dry run finds out
    small = full if name in ("vit", "masked_transformer") else half_removed(full, channels)[0]
    with torch.no_grad():
        for p in quantized_parameters(small):
            p.raw_depth.mul_(torch.rand_like(p.raw_depth).add_(0.2).clamp_(max=1))
            p.exponent.add_(torch.randn_like(p.exponent))
            p.layer.forget_quantized()
    return small.eval(), inputs


def outputs(net, inputs):
    torch.manual_seed(0)
    with torch.no_grad():
        out = net(*inputs)
    return [t for t in (out if isinstance(out, tuple | list) else [out]) if isinstance(t, torch.Tensor)]
