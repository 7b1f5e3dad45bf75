"""Optimizers that go on after parameters were replaced by smaller ones."""

from copy import deepcopy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from lightning_selfcompress.removal.optimizer_state import shrink_optimizer
from lightning_selfcompress.removal.surgery import Shrunk, shrink

CHANNELS, UNITS = [0, 2, 3, 5], [0, 1, 3, 4, 6, 7, 9]  # of 6 and of 10; the others are dead
FEATURES = [channel * 16 + i for channel in CHANNELS for i in range(16)]
KEPT = {
    name: {dim: torch.tensor(indices) for dim, indices in kept.items()}
    for name, kept in {
        "0.weight": {0: CHANNELS},
        "1.weight": {0: CHANNELS},
        "1.bias": {0: CHANNELS},
        "4.weight": {0: UNITS, 1: FEATURES},
        "4.bias": {0: UNITS},
        "6.weight": {1: UNITS},
    }.items()
}
PRODUCERS = ("0.weight", "1.weight", "1.bias", "4.weight", "4.bias")  # whose dead rows make dead channels and units
EXACT = {torch.float32: 1e-6, torch.float64: 1e-12}


def make_net(dtype=torch.float64):
    """A network; its first layer has no bias, whose gradient before a BatchNorm is nothing but rounding."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(96, 10),
        nn.ReLU(),
        nn.Linear(10, 4),
    ).to(dtype)


def alive(net):
    """What of each parameter may move: 1, and 0 for the rows of dead channels and units."""
    masks = {name: torch.ones_like(p) for name, p in net.named_parameters()}
    for name in PRODUCERS:
        masks[name].zero_().index_fill_(0, KEPT[name][0], 1.0)
    return masks


def kill(net):
    """Sets dead channels and units to zero and returns the masks that hold them there."""
    masks = alive(net)
    with torch.no_grad():
        for name, p in net.named_parameters():
            p.mul_(masks[name])
    return masks


def train(net, optimizer, steps, masks=None, schedulers=(), scaler=None):
    """Trains on the batches of the steps asked for; what ``masks`` names has no gradient and is held at zero.

    Returns:
        The losses, and the learning rates of the groups after each step.
    """
    losses, rates = [], []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        dtype = next(net.parameters()).dtype
        x = torch.randn(16, 3, 6, 6, generator=generator).to(dtype)
        y = torch.randint(4, (16,), generator=generator)

        def closure(x=x, y=y):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(net(x), y)
            (loss if scaler is None else scaler.scale(loss)).backward()
            for name, p in net.named_parameters():
                if masks is not None and p.grad is not None:
                    p.grad.mul_(masks[name])
            return loss

        if scaler is None:
            losses.append(optimizer.step(closure).detach())
        else:
            losses.append(closure().detach())
            scaler.step(optimizer)
            scaler.update()
        if masks is not None:
            with torch.no_grad():
                for name, p in net.named_parameters():
                    p.mul_(masks[name])
        for scheduler in schedulers:
            scheduler.step()
        rates.append([group["lr"] for group in optimizer.param_groups])
    return torch.stack(losses), rates


def make_smaller(net, kept=KEPT):
    """Replaces the parameters of a network, layer by layer, by their kept entries and returns the records."""
    records = []
    for name, old in list(net.named_parameters()):
        if name in kept:
            new = nn.Parameter(shrink(old.detach(), kept[name]), requires_grad=old.requires_grad)
            setattr(net.get_submodule(name.split(".")[0]), name.split(".")[1], new)
            records.append(Shrunk(old, new, kept[name], tuple(old.shape)))
    net[1].running_mean, net[1].running_var = (b[CHANNELS] for b in (net[1].running_mean, net[1].running_var))
    return records


def pair(make, dtype, *, dead_from_start=True, prepare=None, batches=range(5), **training):
    """The network with channels held at zero and the smaller one, each with its optimizer after the same steps.

    Returns:
        The large network, its optimizer and masks; the small network, its optimizer and the records of the removal.
    """
    twins = []
    for _ in range(2):
        net = make_net(dtype)
        if prepare is not None:
            prepare(net)
        optimizer = make(net)
        train(net, optimizer, batches, kill(net) if dead_from_start else None, **training)
        twins.append((net, optimizer, kill(net)))
    (large, optimizer, masks), (small, its_optimizer, _) = twins
    records = make_smaller(small)
    shrink_optimizer(its_optimizer, records)
    return (large, optimizer, masks), (small, its_optimizer, records)


def assert_equal_where_kept(large, small, tolerance, kept=KEPT):
    """Compares the kept entries of the large network's parameters with those of the small one."""
    for (name, p), q in zip(large.named_parameters(), small.parameters(), strict=True):
        assert_close(q.detach(), shrink(p.detach(), kept.get(name, {})), rtol=0, atol=tolerance)


def assert_go_on_together(large, small, tolerance, batches=range(5, 15)):
    """Ten more steps of both on the same batches are the same steps, and not none."""
    (net, optimizer, masks), (smaller, its_optimizer, _) = large, small
    start = [p.detach().clone() for p in smaller.parameters()]
    losses, _ = train(net, optimizer, batches, masks)
    its_losses, _ = train(smaller, its_optimizer, batches)
    assert_close(its_losses, losses, rtol=0, atol=tolerance)
    assert_equal_where_kept(net, smaller, tolerance)
    assert max(float((p - q).detach().abs().max()) for p, q in zip(smaller.parameters(), start, strict=True)) > 1e-3
    assert_only_its_own_state(its_optimizer)


def assert_only_its_own_state(optimizer):
    """Every key of the state is a parameter of a group."""
    own = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert {id(p) for p in optimizer.state} <= own


ENTRYWISE = {
    "Adam": (torch.optim.Adam, {"lr": 0.01, "foreach": False}),
    "Adam foreach": (torch.optim.Adam, {"lr": 0.01, "foreach": True, "weight_decay": 0.01}),
    "Adam fused": (torch.optim.Adam, {"lr": 0.01, "fused": True}),
    "Adam amsgrad": (torch.optim.Adam, {"lr": 0.01, "amsgrad": True}),
    "AdamW": (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1, "foreach": False}),
    "AdamW foreach": (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.1, "foreach": True}),
    "AdamW fused amsgrad": (torch.optim.AdamW, {"lr": 0.01, "amsgrad": True, "fused": True}),
    "SGD": (torch.optim.SGD, {"lr": 0.05}),
    "SGD nesterov": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    "SGD foreach": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "foreach": True}),
    "SGD fused": (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "dampening": 0.1, "fused": True}),
    "RMSprop": (torch.optim.RMSprop, {"lr": 1e-3, "centered": True, "momentum": 0.9}),
    "Adagrad": (torch.optim.Adagrad, {"lr": 0.01, "foreach": False, "lr_decay": 0.01}),
    "Adagrad foreach": (torch.optim.Adagrad, {"lr": 0.01, "foreach": True}),
    "Adagrad fused": (torch.optim.Adagrad, {"lr": 0.01, "fused": True}),
    "Adadelta": (torch.optim.Adadelta, {}),
    "Rprop": (torch.optim.Rprop, {"lr": 1e-3}),
    "ASGD": (torch.optim.ASGD, {"lr": 0.01, "t0": 2, "lambd": 0.01}),
    "NAdam": (torch.optim.NAdam, {}),
    "RAdam": (torch.optim.RAdam, {"lr": 0.01}),
    "Adamax": (torch.optim.Adamax, {"lr": 0.01}),
}
LBFGS = {
    "fixed steps": {"lr": 0.05, "max_iter": 2, "history_size": 20},
    "strong_wolfe": {"lr": 0.3, "max_iter": 2, "history_size": 20, "line_search_fn": "strong_wolfe"},
}
# the same lengths of steps whatever the root mean squares, which follow the shape: what is left are the factors
ADAFACTOR_FACTORS = {"lr": 1e-5, "eps": (None, 1e3), "d": 1e9}


def maker(name):
    kind, settings = (torch.optim.LBFGS, LBFGS["strong_wolfe"]) if name == "LBFGS" else ENTRYWISE[name]
    return lambda net: kind(net.parameters(), **settings)


@pytest.mark.parametrize("dtype", EXACT)
@pytest.mark.parametrize("name", ENTRYWISE)
class TestEntrywise:
    """Optimizers whose step of an entry depends on nothing but that entry's gradients."""

    def test_dead_from_the_start(self, name, dtype):
        """Ten steps of the small network are those of the large one with the same channels frozen at zero."""
        assert_go_on_together(*pair(maker(name), dtype), EXACT[dtype])

    def test_alive_before(self, name, dtype):
        """They are the same where the removed channels had lived, and left their traces in the state."""
        assert_go_on_together(*pair(maker(name), dtype, dead_from_start=False), EXACT[dtype])


class TestTraining:
    """What goes on along with the steps."""

    @pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
    def test_several_groups(self, kind):
        """Each group keeps its parameters, in its own order, with its learning rate and weight decay."""

        def make(net):
            weights = [p for p in net.parameters() if p.dim() > 1]
            vectors = [p for p in net.parameters() if p.dim() == 1]
            return kind([{"params": vectors[::-1], "lr": 0.02}, {"params": weights, "weight_decay": 0.1}], lr=0.01)

        large, small = pair(make, torch.float64)
        assert [group["lr"] for group in small[1].param_groups] == [0.02, 0.01]
        assert_go_on_together(large, small, 1e-12)

    @pytest.mark.parametrize("name", ["Adam foreach", "SGD nesterov", "Adagrad fused"])
    def test_frozen_parameters(self, name):
        """Parameters that are not trained are replaced as well, stay frozen and get no state and no step."""

        def prepare(net):
            net[0].weight.requires_grad_(False)
            net[6].weight.requires_grad_(False)

        large, small = pair(maker(name), torch.float64, prepare=prepare)
        net, optimizer, _ = small
        before = net[0].weight.detach().clone()
        assert_go_on_together(large, small, 1e-12)
        assert torch.equal(net[0].weight, before)
        assert [p.requires_grad for p in optimizer.param_groups[0]["params"]] == [False] + [True] * 4 + [False, True]

    @pytest.mark.parametrize("name", ["AdamW", "SGD nesterov"])
    @pytest.mark.parametrize("scheduler", ["OneCycleLR", "LambdaLR"])
    def test_schedulers(self, scheduler, name):
        """Schedulers attached before go on with the same learning rates, and so do the steps."""
        schedulers = []

        def make(net):
            optimizer = maker(name)(net)
            if scheduler == "OneCycleLR":
                schedulers.append(torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.05, total_steps=20))
            else:
                schedulers.append(torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.8**step))
            return optimizer

        (net, optimizer, masks), (smaller, its_optimizer, _) = pair(make, torch.float64)
        losses, rates = train(net, optimizer, range(5, 15), masks, schedulers[:1])
        its_losses, its_rates = train(smaller, its_optimizer, range(5, 15), None, schedulers[1:])
        assert its_rates == rates
        assert len({rate for [rate] in rates}) == 10
        assert_close(its_losses, losses, rtol=0, atol=1e-12)
        assert_equal_where_kept(net, smaller, 1e-12)

    @pytest.mark.parametrize("name", ["Adam fused", "SGD nesterov"])
    def test_grad_scaler(self, name):
        """A GradScaler in use before goes on scaling and unscaling, with the same steps and the same scale."""
        scalers = []

        def make(net):
            scalers.append(torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=4))
            return maker(name)(net)

        (net, optimizer, masks), (smaller, its_optimizer, _) = pair(make, torch.float32)
        losses, _ = train(net, optimizer, range(5, 15), masks, scaler=scalers[0])
        its_losses, _ = train(smaller, its_optimizer, range(5, 15), scaler=scalers[1])
        assert scalers[0].get_scale() == scalers[1].get_scale() == 4096.0
        assert_close(its_losses, losses, rtol=0, atol=1e-6)
        assert_equal_where_kept(net, smaller, 1e-6)

    @pytest.mark.parametrize("name", [*ENTRYWISE, "LBFGS"])
    def test_state_dict_loads_into_a_fresh_optimizer(self, name):
        """A fresh optimizer over the new parameters goes on from the saved state with the very same steps."""
        make = maker(name)
        ends = []
        for reload in (False, True):
            _, (net, optimizer, _) = pair(make, torch.float32)
            if reload:
                saved = optimizer.state_dict()
                optimizer = make(net)
                optimizer.load_state_dict(saved)
            losses, _ = train(net, optimizer, range(5, 8))
            ends.append([losses, *(p.detach() for p in net.parameters())])
        assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))
        assert not torch.equal(ends[0][0][0], ends[0][0][-1])

    @pytest.mark.parametrize("name", [*ENTRYWISE, "LBFGS"])
    def test_before_the_first_step(self, name):
        """Without any step before, the small network trains like one whose optimizer was made for it."""
        make = maker(name)
        ends = []
        for fresh in (False, True):
            net = make_net()
            kill(net)
            optimizer = make(net)
            records = make_smaller(net)
            if fresh:
                optimizer = make(net)
            else:
                shrink_optimizer(optimizer, records)
            train(net, optimizer, range(3))
            assert_only_its_own_state(optimizer)
            ends.append([p.detach() for p in net.parameters()])
        assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))

    def test_removing_again(self):
        """A second removal from the parameters that came of the first goes on just as well."""
        large, small = pair(maker("Adam"), torch.float64)
        assert_go_on_together(large, small, 1e-12)
        (net, optimizer, masks), (smaller, its_optimizer, _) = large, small
        second = {"6.weight": {1: torch.tensor([0, 2, 3, 5, 6])}, "4.weight": {0: torch.tensor([0, 2, 3, 5, 6])}}
        second["4.bias"] = second["4.weight"]
        kept = KEPT | {
            name: {**KEPT[name], dim: KEPT[name][dim][indices]}
            for name, dims in second.items()
            for dim, indices in dims.items()
        }
        for name in ("4.weight", "4.bias"):
            masks[name].zero_()[kept[name][0]] = 1.0
        with torch.no_grad():
            for name, p in net.named_parameters():
                p.mul_(masks[name])
        records = []
        for name, dims in second.items():
            layer, attribute = name.split(".")
            old = smaller.get_parameter(name)
            setattr(smaller[int(layer)], attribute, nn.Parameter(shrink(old.detach(), dims)))
            records.append(Shrunk(old, smaller.get_parameter(name), dims, tuple(old.shape)))
        shrink_optimizer(its_optimizer, iter(records))
        train(net, optimizer, range(15, 20), masks)
        train(smaller, its_optimizer, range(15, 20))
        assert_equal_where_kept(net, smaller, 1e-12, kept)
        assert_only_its_own_state(its_optimizer)


class TestLBFGS:
    """One history over all parameters in a row."""

    @pytest.mark.parametrize(
        ("search", "dtype", "tolerance"),
        [
            ("fixed steps", torch.float32, 1e-6),
            ("fixed steps", torch.float64, 1e-12),
            ("strong_wolfe", torch.float32, 5e-5),
            ("strong_wolfe", torch.float64, 1e-12),
        ],
    )
    def test_dead_from_the_start(self, search, dtype, tolerance):
        """Ten steps, with their history, are those of the large network with the same channels frozen at zero.

        Not to 1e-6 with strong_wolfe in float32: its search magnifies rounding, be it a last bit of each weight, to
        some 5e-6.
        """
        large, small = pair(lambda net: torch.optim.LBFGS(net.parameters(), **LBFGS[search]), dtype, batches=[0] * 5)
        assert len(small[1].state[small[1].param_groups[0]["params"][0]]["old_dirs"]) > 2
        assert_go_on_together(large, small, tolerance, batches=[0] * 10)

    @pytest.mark.parametrize("search", LBFGS)
    def test_frozen_parameters(self, search):
        """The history runs through frozen parameters as well, and is cut along with them."""
        large, small = pair(
            lambda net: torch.optim.LBFGS(net.parameters(), **LBFGS[search]),
            torch.float64,
            prepare=lambda net: net[4].weight.requires_grad_(False),
            batches=[0] * 5,
        )
        assert_go_on_together(large, small, 1e-12, batches=[0] * 10)

    def test_keeps_what_it_remembers_of_kept_entries(self):
        """Where channels had lived, each vector holds the kept entries as they were, and numbers stay the same."""
        make = lambda net: torch.optim.LBFGS(net.parameters(), **LBFGS["fixed steps"])  # noqa: E731 - as elsewhere
        (net, optimizer, _), (smaller, its_optimizer, _) = pair(make, torch.float64, dead_from_start=False)
        state, its_state = optimizer.state[net[0].weight], its_optimizer.state[smaller[0].weight]
        entries = torch.cat(
            [
                shrink(torch.ones_like(p), {}).flatten() if name not in KEPT else kept_mask(p, KEPT[name]).flatten()
                for name, p in net.named_parameters()
            ]
        ).bool()
        for name in ("d", "prev_flat_grad"):
            assert torch.equal(its_state[name], state[name][entries])
        for name in ("old_dirs", "old_stps"):
            assert len(its_state[name]) == len(state[name]) > 1
            assert all(torch.equal(a, b[entries]) for a, b in zip(its_state[name], state[name], strict=True))
        for name in ("ro", "H_diag", "t", "func_evals", "n_iter", "prev_loss"):
            assert its_state[name] == state[name]
        assert its_optimizer._numel() == int(entries.sum())

    def test_first_parameter_stays(self):
        """The history is cut too where the parameter it is kept under is not replaced."""
        first, second = (nn.Parameter(torch.ones(n)) for n in (2, 4))
        optimizer = torch.optim.LBFGS([first, second], lr=0.1)
        optimizer.state[first]["d"] = torch.arange(6.0)
        kept = {0: torch.tensor([1, 3])}
        shrink_optimizer(optimizer, [Shrunk(second, nn.Parameter(torch.ones(2)), kept, tuple(second.shape))])
        assert optimizer.state[first]["d"].tolist() == [0.0, 1.0, 3.0, 5.0]

    def test_complex_parameters(self):
        """A complex entry takes two places in the history, and both are kept."""
        old = nn.Parameter(torch.ones(3, dtype=torch.complex64))
        optimizer = torch.optim.LBFGS([old])
        optimizer.state[old]["d"] = torch.arange(6.0)
        kept = {0: torch.tensor([0, 2])}
        new = nn.Parameter(shrink(old.detach(), kept))
        shrink_optimizer(optimizer, [Shrunk(old, new, kept, tuple(old.shape))])
        assert optimizer.state[new]["d"].tolist() == [0.0, 1.0, 4.0, 5.0]


def kept_mask(p, kept):
    """1 where an entry of a parameter is kept along all of its dimensions."""
    mask = torch.ones_like(p)
    for dim, indices in kept.items():
        along = torch.zeros(p.shape[dim], dtype=p.dtype).index_fill_(0, indices, 1.0)
        mask = mask * along.view([-1 if d == dim else 1 for d in range(p.dim())])
    return mask.detach()


def matrices(kept, settings, kind=None, shape=(4, 6), dead=False, dtype=torch.float64):
    """One matrix and its smaller copy, after five steps of which the removed rows and columns had their part or not.

    Returns:
        The matrix, its optimizer and what is kept; the smaller one and its optimizer.
    """
    kind = torch.optim.Adafactor if kind is None else kind
    kept = {dim: torch.as_tensor(indices) for dim, indices in kept.items()}
    p = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype))
    optimizers = [kind([p], **settings) for _ in range(2)]
    for step in range(5):
        gradient = torch.randn(shape, generator=torch.Generator().manual_seed(step)).to(dtype)
        p.grad = gradient * kept_mask(p, kept) if dead else gradient
        optimizers[0].step()
    optimizers[1].load_state_dict(deepcopy(optimizers[0].state_dict()))
    q = nn.Parameter(shrink(p.detach(), kept))
    shrink_optimizer(optimizers[1], [Shrunk(p, q, kept, tuple(p.shape))])
    return (p, optimizers[0], kept), (q, optimizers[1])


def steps_of_both(large, small, step):
    """What a gradient that is zero where entries were removed changes in the kept entries, in each of two matrices."""
    (p, optimizer, kept), (q, its_optimizer) = large, small
    before = shrink(p.detach(), kept).clone(), q.detach().clone()
    p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step)).to(p.dtype) * kept_mask(p, kept)
    q.grad = shrink(p.grad, kept)
    optimizer.step()
    its_optimizer.step()
    return q.detach() - before[1], shrink(p.detach(), kept) - before[0]


def relative(actual, expected):
    return float((actual - expected).norm() / expected.norm())


class TestAdafactor:
    """Squared gradients kept as means over rows and columns, and lengths of steps as root mean squares."""

    @pytest.mark.parametrize("dtype", EXACT)
    @pytest.mark.parametrize("foreach", [False, True])
    def test_factors(self, foreach, dtype):
        """With lengths of steps held, ten steps are those of the large network with the channels frozen at zero."""

        def make(net):
            return torch.optim.Adafactor(net.parameters(), foreach=foreach, **ADAFACTOR_FACTORS)

        assert_go_on_together(*pair(make, dtype), EXACT[dtype])

    def test_columns_that_had_lived(self):
        """Where only columns go the factors are exact too if those had lived; no step after differs."""
        large, small = matrices({1: [0, 2, 5]}, ADAFACTOR_FACTORS)
        for step in range(5, 15):
            assert_close(*steps_of_both(large, small, step), rtol=0, atol=1e-12)

    def test_rows_that_had_lived(self):
        """Where rows had lived the first estimate of the squared gradients is exact, and no later one is.

        The larger network's mean over its rows forgets the removed ones a little at each step. That is a number which
        the smaller state has no place for.
        """
        large, small = matrices({0: [0, 1, 3], 1: [0, 2, 5]}, ADAFACTOR_FACTORS)
        (p, optimizer, kept), (q, its_optimizer) = large, small
        state, its_state = optimizer.state[p], its_optimizer.state[q]
        estimate = shrink(state["row_var"] @ state["col_var"] / state["row_var"].mean(-2, keepdim=True), kept)
        assert_close(
            its_state["row_var"] @ its_state["col_var"] / its_state["row_var"].mean(-2, keepdim=True), estimate
        )
        first, second = (steps_of_both(large, small, step) for step in (5, 6))
        assert 1e-3 < relative(*first) < 0.1
        assert 1e-3 < relative(*second) < 0.1

    def test_without_any_gradient_so_far(self):
        """Where all squared gradients had been zero they stay zero."""
        old, kept = nn.Parameter(torch.ones(2, 4, 6)), {1: torch.tensor([0, 2]), 2: torch.tensor([1, 4, 5])}
        optimizer = torch.optim.Adafactor([old])
        old.grad = torch.zeros_like(old)
        optimizer.step()
        new = nn.Parameter(shrink(old.detach(), kept))
        shrink_optimizer(optimizer, [Shrunk(old, new, kept, tuple(old.shape))])
        assert torch.equal(optimizer.state[new]["row_var"], torch.zeros(2, 2, 1))
        assert torch.equal(optimizer.state[new]["col_var"], torch.zeros(2, 1, 3))

    @pytest.mark.parametrize("d", [1.0, 1e9])
    def test_lengths_follow_the_shape(self, d):
        """A step has the direction it has in the large network, and is longer by at most the root of N over n.

        Adafactor's steps are as long as the root mean square of the weights, which zeros make smaller: with N entries,
        of which n are kept, they grow by sqrt(N / n). Where updates are clipped to a root mean square of d, in both
        networks, that factor falls out. The smaller network's steps are those of Adafactor on a network that never had
        the channels.
        """

        def make(net):
            with torch.no_grad():  # consumers' columns are zero too: the weights' norms are the same in both networks
                net[1].bias.fill_(0.1)
                for name, p in net.named_parameters():
                    p.mul_(kept_mask(p, KEPT.get(name, {})))
            return torch.optim.Adafactor(net.parameters(), d=d, eps=(None, 1e-30))

        (net, optimizer, masks), (smaller, its_optimizer, _) = pair(make, torch.float64)
        before = [shrink(p.detach().clone(), KEPT.get(name, {})) for name, p in net.named_parameters()]
        its_before = [p.detach().clone() for p in smaller.parameters()]
        train(net, optimizer, [5], masks)
        train(smaller, its_optimizer, [5])
        for (name, p), q, start, its_start in zip(
            net.named_parameters(), smaller.parameters(), before, its_before, strict=True
        ):
            step, its_step = shrink(p.detach(), KEPT.get(name, {})) - start, q.detach() - its_start
            factor, most = float(its_step.norm() / step.norm()), (p.numel() / q.numel()) ** 0.5
            assert_close(its_step, step * factor, rtol=0, atol=1e-12)
            assert 1 - 1e-12 < factor < most + 1e-12
            assert d == 1.0 or factor == pytest.approx(most, rel=1e-10)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="Muon came with torch 2.9")
class TestMuon:
    """Updates made orthogonal in bfloat16, and lengths of steps that follow the shape."""

    def test_dead_from_the_start(self):
        """With matrices as wide as before ten steps are those of the large network to bfloat16's last bit.

        The iteration that makes an update orthogonal is exact on rows and columns of zeros, but for the order of its
        sums, and each of its steps rounds to bfloat16's 2 ** -8. Here, where the matrices are small, nothing differs.
        """

        def make(net):
            return torch.optim.Muon([p for p in net.parameters() if p.dim() == 2], lr=0.01)

        assert_go_on_together(*pair(make, torch.float64), 10 * 0.01 * 2**-8)

    @pytest.mark.parametrize("dtype", EXACT)
    @pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
    @pytest.mark.parametrize(
        ("rows", "columns", "tolerance"),
        [((10, 7), (96, 64), 2**-8), ((96, 64), (10, 7), 2**-8), ((10, 6), (8, 8), 2**-4), ((8, 8), (10, 6), 2**-4)],
    )
    def test_lengths_follow_the_shape(self, rows, columns, tolerance, adjust, dtype):
        """A step has the direction it has in the large network, and the length that ``adjust_lr_fn`` gives its shape.

        The direction is that to bfloat16's last bit; where a matrix that was tall is wide after, or the other way
        round, the iteration runs on its transpose, and its five rounds differ by up to 2 ** -4.
        """
        kept = {0: range(rows[1]), 1: range(1, columns[1] + 1) if columns[1] < columns[0] else range(columns[1])}
        settings = {"lr": 0.01, "adjust_lr_fn": adjust, "weight_decay": 0.0}
        sizes = (rows[0], columns[0])
        large, small = matrices(kept, settings, torch.optim.Muon, sizes, dead=True, dtype=dtype)
        length = {
            "original": lambda rows, columns: max(1.0, rows / columns) ** 0.5,
            "match_rms_adamw": lambda rows, columns: max(rows, columns) ** 0.5,
        }[adjust]
        for step in range(5, 10):
            actual, expected = steps_of_both(large, small, step)
            expected = expected * length(rows[1], columns[1]) / length(rows[0], columns[0])
            assert relative(actual, expected) < tolerance


class TestPlaces:
    """Where the new parameters and their state are."""

    def test_keeps_groups_and_lists(self):
        """Groups, lists and names stay the same objects; each new parameter has the place and state of its old one."""
        net = make_net()
        names, params = zip(*net.named_parameters(), strict=True)
        optimizer = torch.optim.Adam(
            [
                {"params": list(params[:3]), "param_names": list(names[:3])},
                {"params": list(params[3:]), "param_names": list(names[3:])},
            ]
        )
        train(net, optimizer, [0])
        groups, state = list(optimizer.param_groups), optimizer.state
        lists = [group[key] for group in groups for key in ("params", "param_names")]
        exp_avg = {name: shrink(state[p]["exp_avg"], KEPT.get(name, {})) for name, p in zip(names, params, strict=True)}
        shrink_optimizer(optimizer, make_smaller(net))
        assert all(a is b for a, b in zip(optimizer.param_groups, groups, strict=True))
        now = [group[key] for group in groups for key in ("params", "param_names")]
        assert all(a is b for a, b in zip(now, lists, strict=True))
        assert [name for group in groups for name in group["param_names"]] == list(names)
        placed = [p for group in groups for p in group["params"]]
        assert all(p is net.get_parameter(name) for name, p in zip(names, placed, strict=True))
        assert optimizer.state is state
        assert all(p is q for p, q in zip(state, placed, strict=True))
        assert all(torch.equal(state[net.get_parameter(name)]["exp_avg"], exp_avg[name]) for name in names)

    @pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.LBFGS])
    def test_holds_none_of_them(self, kind):
        """An optimizer of other parameters stays as it is."""
        net, other = make_net(), make_net()
        optimizer = kind(other.parameters())
        train(other, optimizer, [0])
        params = list(optimizer.param_groups[0]["params"])
        state = {p: dict(entries) for p, entries in optimizer.state.items()}
        shrink_optimizer(optimizer, make_smaller(net))
        assert all(p is q for p, q in zip(optimizer.param_groups[0]["params"], params, strict=True))
        assert {p: dict(entries) for p, entries in optimizer.state.items()} == state

    def test_holds_some_of_them(self):
        """Of two optimizers that share a network each takes its own part of the records."""
        twins = []
        for smaller in (False, True):
            net = make_net()
            optimizers = [torch.optim.Adam(net[:4].parameters()), torch.optim.SGD(net[4:].parameters(), 0.1, 0.9)]
            masks = kill(net)
            for optimizer in optimizers * 2:
                train(net, optimizer, [0], masks)
            if smaller:
                records, masks = make_smaller(net), None
                for optimizer in optimizers:
                    shrink_optimizer(optimizer, records)
                    assert_only_its_own_state(optimizer)
            for optimizer in optimizers * 2:
                train(net, optimizer, [1], masks)
            twins.append(net)
        assert_equal_where_kept(*twins, 1e-12)

    def test_any_dimensions(self):
        """State of four dimensions is sliced along several of them at once, scalars and other shapes stay."""
        old = nn.Parameter(torch.randn(4, 5, 3, 2))
        optimizer = torch.optim.Adam([old])
        old.grad = torch.randn_like(old)
        optimizer.step()
        exp_avg, row, vector = optimizer.state[old]["exp_avg"], torch.randn(4, 1, 3, 1), torch.randn(4)
        optimizer.state[old]["nested"] = {"list": [row, None, vector], "tuple": (exp_avg, 3)}
        kept = {0: torch.tensor([1, 3]), 1: torch.tensor([0, 4]), 3: torch.tensor([1])}
        new = nn.Parameter(shrink(old.detach(), kept))
        shrink_optimizer(optimizer, [Shrunk(old, new, kept, tuple(old.shape))])
        state, expected = optimizer.state[new], exp_avg[[1, 3]][:, [0, 4]][..., [1]]
        assert torch.equal(state["exp_avg"], expected)
        assert state["exp_avg_sq"].shape == new.shape
        assert state["step"].item() == 1
        assert torch.equal(state["nested"]["list"][0], row[[1, 3]])
        assert state["nested"]["list"][1] is None
        assert state["nested"]["list"][2] is vector
        assert torch.equal(state["nested"]["tuple"][0], expected)
        assert state["nested"]["tuple"][1:] == (3,)

    @pytest.mark.parametrize("fused", [False, True])
    def test_layout_in_memory(self, fused):
        """A new parameter in channels_last gets its state in the same layout, in which fused kernels read it."""
        old = nn.Parameter(torch.randn(6, 4, 3, 3))
        optimizer = torch.optim.Adam([old], fused=fused)
        old.grad = torch.randn_like(old)
        optimizer.step()
        kept = {0: torch.tensor([0, 2, 5])}
        ends = []
        for layout in (torch.contiguous_format, torch.channels_last):
            new = nn.Parameter(shrink(old.detach(), kept).to(memory_format=layout))
            twin = torch.optim.Adam([old], fused=fused)
            twin.load_state_dict(deepcopy(optimizer.state_dict()))
            shrink_optimizer(twin, [Shrunk(old, new, kept, tuple(old.shape))])
            assert twin.state[new]["exp_avg"].stride() == new.stride()
            new.grad = shrink(old.grad, kept).to(memory_format=layout)
            twin.step()
            ends.append(new.detach())
        assert_close(*ends, rtol=0, atol=1e-7)
