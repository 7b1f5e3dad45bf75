"""A loader that goes on in the middle of an epoch."""

import torch
from networks import batches


class Resumable:
    """A loader that shuffles, and goes on in the middle of an epoch, as torchdata's StatefulDataLoader does."""

    def __init__(self, n=60, size=4):
        self.batches = list(batches(n, size))
        self.epoch, self.position = 0, 0
        self.sampler = self

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(self.epoch)).tolist()
        for i in range(self.position % len(self), len(self)):
            self.position = i + 1
            yield self.batches[order[i]]

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]
