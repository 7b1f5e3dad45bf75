"""Bit depths follow codes that have become smaller."""

import torch
from depths import mixed_net, with_depths

from lightning_selfcompress.quantize.parameters import quantized_parameters
from lightning_selfcompress.size.tighten import tighten


def test_changes_no_code_and_clips_no_weight():
    """Weights stay as they are, depths only fall, dead channels stay dead, and a second time changes nothing."""
    torch.manual_seed(0)
    net = with_depths(mixed_net(), -1.0, 12.0)
    with torch.no_grad():
        for p in quantized_parameters(net):
            p.exponent.add_(3)
    before = [(p.quantized()[0].clone(), p.raw_depth.detach().clone()) for p in quantized_parameters(net)]
    tighten(net)
    fell = 0
    for p, (value, depth) in zip(quantized_parameters(net), before, strict=True):
        now, known = p.quantized()
        assert torch.equal(now, value)
        assert bool((p.raw_depth <= depth).all())
        assert torch.equal(p.raw_depth <= 0, depth <= 0)
        lower = (p.raw_depth < depth).view(known.scale.shape)
        level = p.spec.axis.split(p.latent.detach()) * known.inverse
        assert not bool((lower & ((level < known.low) | (level > known.high))).any())
        fell += int(lower.sum())
    assert fell > 10
    tight = [p.raw_depth.detach().clone() for p in quantized_parameters(net)]
    tighten(net)
    assert all(torch.equal(p.raw_depth, depth) for p, depth in zip(quantized_parameters(net), tight, strict=True))
