"""Optimizers that step another optimizer, which they keep in an attribute."""

import torch


class Sam(torch.optim.Optimizer):
    """Sharpness-aware minimization with a base optimizer that steps at the point above."""

    def __init__(self, params, base, rho=0.05):
        super().__init__(params, {"rho": rho})
        self.base = base(self.param_groups)
        self.param_groups = self.base.param_groups

    @torch.no_grad()
    def first_step(self):
        for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            self.state[p]["e"] = 0.05 * p.grad
            p.add_(self.state[p]["e"])
        self.zero_grad()

    @torch.no_grad()
    def second_step(self):
        for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            p.sub_(self.state[p].pop("e"))
        self.base.step()
        self.zero_grad()

    def step(self, closure=None):
        raise NotImplementedError


class Lookahead(torch.optim.Optimizer):
    """Steps another optimizer, and every fifth time goes half the way back."""

    def __init__(self, inner):
        self.inner, self.count = inner, 0
        super().__init__(inner.param_groups, {})
        self.param_groups = inner.param_groups
        self.slow = [p.detach().clone() for group in self.param_groups for p in group["params"]]

    def step(self, closure=None):
        loss = self.inner.step(closure)
        self.count += 1
        if self.count % 5 == 0:
            with torch.no_grad():
                for slow, p in zip(self.slow, (p for g in self.param_groups for p in g["params"]), strict=True):
                    if slow.shape == p.shape:
                        slow.lerp_(p, 0.5)
                        p.copy_(slow)
        return loss
