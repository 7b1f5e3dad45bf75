"""Fits in threads of one process: each is as it is alone, and nothing global stays behind."""

import threading

import pytest
import torch
from fits import Kill, data
from networks import Lit, make_trainer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from lightning_selfcompress import SelfCompression
from lightning_selfcompress.quantize.layers import _of_thread

SCHEDULE = {0: {"net.0": [1, 4], "net.4": [0, 7, 15]}}


class Meets(Lit):
    """Waits in some of its steps for another one."""

    def __init__(self, barrier):
        super().__init__()
        self.wait = barrier.wait if barrier is not None else lambda timeout: None

    def training_step(self, batch, batch_idx):
        if batch_idx < 5:
            self.wait(60)
        loss = super().training_step(batch, batch_idx)
        if batch_idx < 5:
            self.wait(60)
        return loss


def fit(barrier, seed):
    torch.manual_seed(seed)
    model = Meets(barrier)
    start = torch.load  # nothing but a name that is there before and after
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(seed + i)) * 0.2)
    compression = SelfCompression(gamma=0.1)
    make_trainer(compression, Kill(SCHEDULE), max_epochs=2).fit(model, data(torch.float32))
    assert torch.load is start
    return model


@pytest.mark.parametrize("count", [2, 3])
def test_overlapping_fits_equal_fits_alone(count):
    """Fits whose steps overlap end with the networks that each has alone, to the bit."""
    alone = [fit(None, seed) for seed in range(count)]
    hooks = len(_global_optimizer_pre_hooks), len(_global_optimizer_post_hooks)
    barrier, found, errors = threading.Barrier(count), {}, []

    def run(seed):
        try:
            found[seed] = fit(barrier, seed)
        except BaseException as error:
            errors.append(error)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for seed, model in enumerate(alone):
        state, other = model.state_dict(), found[seed].state_dict()
        assert all(torch.equal(state[name], other[name]) for name in state)
        assert model.net[0].out_channels == 4
    assert (len(_global_optimizer_pre_hooks), len(_global_optimizer_post_hooks)) == hooks
    assert _of_thread.reader is None
    assert torch.backends.mha.get_fastpath_enabled()
