"""Whole fits with SelfCompression, on modules that know nothing of it."""

import copy
import logging
import math

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import BackboneFinetuning, EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.plugins import MixedPrecision
from networks import Gan, Lit, batches, make_trainer, small_net
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from lightning_selfcompress import BitsPerWeight, NBytes, SelfCompression, convert, size_report
from lightning_selfcompress.quantize.layers import Quantized
from lightning_selfcompress.quantize.parameters import quantized_parameters
from lightning_selfcompress.size.price import ModelSize
from lightning_selfcompress.training.depth_optimizer import DepthOptimizer

PRICES = ["bytes", "bits"]


def learned(model):
    """Copies of all raw depths and exponents."""
    return [t.detach().clone() for p in quantized_parameters(model) for t in (p.raw_depth, p.exponent)]


def all_learning(model, before):
    """Whether something of what is learned has moved for every weight, since what :func:`learned` returned."""
    moved = [not torch.equal(a, b) for a, b in zip(before, learned(model), strict=True)]
    return all(depth or exponent for depth, exponent in zip(moved[::2], moved[1::2], strict=True))


def fp16_on_cpu():
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1024.0))


def lbfgs(module):
    return torch.optim.LBFGS(module.parameters(), lr=0.01, max_iter=3)


class ManualLit(Lit):
    """Manual optimization with one optimizer, accumulating two batches."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        self.manual_backward(self.loss(batch) / 2)
        if batch_idx % 2:
            optimizer.step()
            optimizer.zero_grad()


CASES = {
    "32-true": (Lit, {}),
    "64-true": (Lit, {"precision": "64-true"}),
    "bf16-mixed": (Lit, {"precision": "bf16-mixed"}),
    "bf16-true": (Lit, {"precision": "bf16-true"}),
    "16-mixed": (Lit, {"plugins": fp16_on_cpu}),
    "accumulate 4": (Lit, {"accumulate_grad_batches": 4}),
    "accumulate 3, the last one incomplete": (Lit, {"accumulate_grad_batches": 3}),
    "16-mixed, accumulate 2": (Lit, {"plugins": fp16_on_cpu, "accumulate_grad_batches": 2}),
    "gradient clipping": (Lit, {"gradient_clip_val": 1e-3}),
    "LBFGS": (lambda: Lit(lbfgs), {}),
    "several optimizers, manual": (Gan, {}),
    "several optimizers, manual, 16-mixed": (Gan, {"plugins": fp16_on_cpu}),
    "manual, accumulated": (ManualLit, {}),
    "manual, bf16-mixed": (ManualLit, {"precision": "bf16-mixed"}),
}


@pytest.mark.parametrize("case", CASES)
def test_size_gradient_is_what_gamma_says(case, monkeypatch):
    """At every step the gradient with gamma less that without is gamma * dQ/db, to 1e-4, in every setting."""
    make, settings = CASES[case]
    if "plugins" in settings:
        settings = settings | {"plugins": settings["plugins"]()}
    gamma = 1000.0
    recorded = []
    add = DepthOptimizer._add_size_gradient

    def record(self):
        grads = [None if p.raw_depth.grad is None else p.raw_depth.grad.clone() for p in self.size.parameters]
        add(self)
        size = ModelSize.of(model)
        for p, before in zip(self.size.parameters, grads, strict=True):
            raw = p.raw_depth.detach().clone().requires_grad_()
            (expected,) = torch.autograd.grad(raw.relu().sum() * p.weights_per_channel / size.original_numel, raw)
            task = torch.zeros_like(raw) if before is None else before
            recorded.append(((p.raw_depth.grad - task) / (gamma * expected)).flatten())

    monkeypatch.setattr(DepthOptimizer, "_add_size_gradient", record)
    model = make()
    make_trainer(SelfCompression(gamma=gamma, price="bits"), **settings).fit(model, batches())

    ratios = torch.cat(recorded)
    assert len(recorded) >= 2 * len(list(quantized_parameters(model))) or case.startswith("acc")
    torch.testing.assert_close(ratios, torch.ones_like(ratios), rtol=0, atol=1e-4)


# one loss and float32 weights; LBFGS takes its last of several evaluations
COMPARABLE = [n for n, (make, _) in CASES.items() if make in (Lit, ManualLit) and n not in ("64-true", "bf16-true")]


@pytest.mark.parametrize("case", COMPARABLE)
def test_task_gradient_of_depths_is_that_of_the_unscaled_loss(case, monkeypatch):
    """The loss's share in the first step's depth gradient is the same in every setting, within its precision."""
    make, settings = CASES[case]
    if "plugins" in settings:
        settings = settings | {"plugins": settings["plugins"]()}
    first = []
    add = DepthOptimizer._add_size_gradient

    def record(self):
        add(self)
        if not first:
            first.append(torch.cat([p.raw_depth.grad.float() for p in self.size.parameters]))

    monkeypatch.setattr(DepthOptimizer, "_add_size_gradient", record)
    torch.manual_seed(1)
    model = make()
    reference = copy.deepcopy(model.net)
    make_trainer(SelfCompression(gamma=0.0, initial_bits=3), **settings).fit(model, batches())

    accumulated = settings.get("accumulate_grad_batches", 2 if make is ManualLit else 1)
    convert(reference, initial_bits=3)
    for images, labels in list(batches())[:accumulated]:
        (nn.functional.cross_entropy(reference(images), labels) / accumulated).backward()
    expected = torch.cat([p.raw_depth.grad for p in quantized_parameters(reference)])
    exact = settings.keys() <= {"accumulate_grad_batches", "gradient_clip_val"}
    torch.testing.assert_close(first[0], expected, rtol=0, atol=(1e-5 if exact else 0.05) * expected.abs().max().item())


def test_discriminators_depths_do_not_see_the_generators_loss(monkeypatch):
    """What the generator's backward leaves in the discriminator's depths goes with the discriminator's zero_grad."""
    seen = []
    add = DepthOptimizer._add_size_gradient

    def record(self):
        before = copy.deepcopy(model.discriminator)
        add(self)
        if self.size.parameters[0].layer is model.discriminator[0]:
            seen.append((before, [p.raw_depth.grad.clone() for p in self.size.parameters]))

    monkeypatch.setattr(DepthOptimizer, "_add_size_gradient", record)
    model = Gan()
    steps = []
    loss = model.discriminator_loss
    model.discriminator_loss = lambda images, noise: (
        steps.append(_reference(model, images, noise)) or loss(images, noise)
    )
    make_trainer(SelfCompression(gamma=0.0, initial_bits=3)).fit(model, batches())

    assert len(seen) == len(steps) == 8
    for (_, found), expected in zip(seen, steps, strict=True):
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)


def _reference(model, images, noise):
    """Gradients of the discriminator's loss alone, on a copy."""
    discriminator, generator = copy.deepcopy(model.discriminator), copy.deepcopy(model.generator)
    discriminator.zero_grad()
    (discriminator(generator(noise).detach()).mean() - discriminator(images.flatten(1)).mean()).backward()
    return [p.raw_depth.grad for p in quantized_parameters(discriminator)]


class TestConversion:
    @pytest.mark.parametrize("price", PRICES)
    def test_is_idempotent_over_the_trainers_runs(self, price):
        """Validate, fit, fit again and test keep the same parameters and go on from where the depths were."""
        model, callback = Lit(), SelfCompression(gamma=1.0, price=price)
        weights = dict(model.named_parameters())
        make_trainer(callback).validate(model, batches(), verbose=False)
        depths = {p.name: p.raw_depth for p in quantized_parameters(model)}
        make_trainer(callback).fit(model, batches())
        after_first = learned(model)
        make_trainer(callback).fit(model, batches())
        make_trainer(callback).test(model, batches(), verbose=False)

        assert {p.name: p.raw_depth for p in quantized_parameters(model)} == depths
        assert all(dict(model.named_parameters())[name] is p for name, p in weights.items())
        assert all_learning(model, after_first)
        for before, after in zip(after_first, learned(model), strict=True):
            assert float((before - after).abs().max()) < 8 * 0.03
        if price == "bits":
            assert all(bool((a < b).any()) for a, b in zip(learned(model)[::2], after_first[::2], strict=True))

    @pytest.mark.parametrize("price", PRICES)
    @pytest.mark.parametrize("hook", ["setup", "configure_model"])
    def test_reaches_layers_built_by_the_module_itself(self, hook, price):
        """Layers made in the module's setup or configure_model are compressed and trained as well."""

        class Late(Lit):
            def __init__(self):
                super().__init__()
                self.net = None

        def build(self, stage=None):
            if self.net is None:
                self.net = small_net()

        setattr(Late, hook, build)
        model = Late()
        start = []
        model.on_train_start = lambda: start.extend(learned(model))
        make_trainer(SelfCompression(gamma=1.0, skip="net.6", price=price)).fit(model, batches())

        assert [p.name for p in quantized_parameters(model)] == ["net.0.weight", "net.4.weight"]
        assert all_learning(model, start)
        if price == "bits":
            assert all(bool((p.raw_depth < 8).all()) for p in quantized_parameters(model))
        assert hook not in model.__dict__

    def test_leaves_no_trace_in_the_module_but_its_layers(self):
        """After a fit, and after one that failed, no method of the module or its optimizer is wrapped any more."""

        class Failing(Lit):
            def training_step(self, batch, batch_idx):
                raise RuntimeError("on purpose")

        for model, fails in ((Lit(), False), (Failing(), True)):
            own = set(model.__dict__)
            trainer = make_trainer(SelfCompression(gamma=1.0))
            if fails:
                with pytest.raises(RuntimeError, match="on purpose"):
                    trainer.fit(model, batches())
            else:
                trainer.fit(model, batches())
            assert {k for k in model.__dict__ if k in ("setup", "configure_model", "configure_optimizers")} <= own
            assert all("zero_grad" not in o.__dict__ for o in trainer.optimizers)

    def test_starts_at_the_float_function(self):
        """Before the first step every quantized weight lies within half a level of its float value."""
        model = Lit()
        images = next(iter(batches()))[0]
        expected = copy.deepcopy(model.net).eval()(images)
        make_trainer(SelfCompression(gamma=1.0)).validate(model, batches(), verbose=False)

        for p in quantized_parameters(model):
            half = torch.exp2(p.exponent - 1).view(-1, *[1] * (p.latent.dim() - 1))
            assert bool(((p.layer.weight - p.latent).abs() <= half * 1.0001).all())
        assert float((model.net.eval()(images) - expected).abs().max()) < 0.02 * float(expected.abs().max())

    @pytest.mark.parametrize("when", ["on_fit_start", "on_train_start"])
    def test_starts_at_the_function_of_weights_loaded_late(self, when):
        """Weights that the module loads into itself at the start of training are what the exponents are fitted to."""

        class Pretrained(Lit):
            def training_step(self, batch, batch_idx):
                if batch_idx == 0:
                    for p in quantized_parameters(self):
                        half = torch.exp2(p.exponent - 1).view(-1, *[1] * (p.latent.dim() - 1))
                        errors.append(float(((p.layer.weight - p.latent).abs() / half).max()))
                return super().training_step(batch, batch_idx)

        def load(self):
            with torch.no_grad():
                for p in self.net.parameters():
                    if p.dim() > 1:
                        p.mul_(37.0)

        errors = []
        setattr(Pretrained, when, load)
        make_trainer(SelfCompression(gamma=0.0)).fit(Pretrained(), batches(1))

        assert len(errors) == 3
        assert max(errors) <= 1.0001

    def test_resumes_from_a_float_checkpoint(self, tmp_path):
        """``fit(ckpt_path=...)`` of a float run loads strictly and starts at the float network's function."""
        trained = Lit()
        trainer = make_trainer(enable_checkpointing=True, default_root_dir=tmp_path)
        trainer.fit(trained, batches())
        trainer.save_checkpoint(tmp_path / "float.ckpt")
        model = Lit()
        make_trainer(SelfCompression(gamma=0.0, bits_lr=0.0), max_epochs=1).fit(
            model, batches(), ckpt_path=tmp_path / "float.ckpt"
        )

        images = next(iter(batches()))[0]
        expected = trained.net.eval()(images)
        assert float((model.net.eval()(images) - expected).abs().max()) < 0.02 * float(expected.abs().max())

    def test_says_what_it_compresses_and_what_not(self, caplog):
        """Before training the plan is printed, with the reason for what stays in float."""
        with caplog.at_level(logging.INFO, logger="lightning_selfcompress"):
            make_trainer(SelfCompression(gamma=1.0, skip=["net.6"])).fit(Lit(), batches())

        text = "\n".join(r.getMessage() for r in caplog.records)
        assert "SelfCompression(gamma=1.0, initial_bits=8)" in text
        assert "2 layers (1 Conv2d, 1 Linear)" in text
        assert "1 Linear ('net.6'; 68 values): skip='net.6'" in text
        assert "BatchNorm2d" in text


class TestBadInput:
    @pytest.mark.parametrize(
        ("arguments", "error", "said"),
        [
            ({"gamma": -0.1}, ValueError, "gamma >= 0 .*got -0.1"),
            ({"gamma": math.nan}, ValueError, "finite gamma >= 0 .*got nan"),
            ({"gamma": math.inf}, ValueError, "finite gamma >= 0 .*got inf"),
            ({"gamma": "0.1"}, TypeError, "gamma to be a number .*got '0.1'"),
            ({"gamma": True}, TypeError, "gamma to be a number .*got True"),
            ({"gamma": 1.0, "initial_bits": 1.5}, ValueError, "initial_bits from 2 to 24, got 1.5"),
            ({"gamma": 1.0, "initial_bits": math.nan}, ValueError, "initial_bits from 2 to 24, got nan"),
            ({"gamma": 1.0, "bits_lr": -1}, ValueError, "bits_lr >= 0 .*got -1"),
            ({"gamma": 1.0, "bits_lr": math.nan}, ValueError, "bits_lr >= 0 .*got nan"),
            ({"gamma": 1.0, "cooldown": 1.5}, ValueError, "cooldown from 0 to 1 .*got 1.5"),
            ({"gamma": 1.0, "skip": [3]}, TypeError, "skip, got 3"),
        ],
    )
    def test_wrong_arguments_fail_at_once(self, arguments, error, said):
        """The constructor names the value and what was expected."""
        with pytest.raises(error, match=said):
            SelfCompression(**arguments)

    @pytest.mark.parametrize("value", [-1.0, math.nan, "much"])
    def test_gamma_function_that_returns_nonsense_is_named_with_its_step(self, value):
        """A gamma function is checked at every step, and the error says at which."""
        with pytest.raises((ValueError, TypeError), match=r"got .* from the function at step 3"):
            make_trainer(SelfCompression(gamma=lambda step: value if step == 3 else 0.1)).fit(Lit(), batches())

    @pytest.mark.parametrize("late", [False, True])
    def test_skip_that_matches_nothing(self, late):
        """The error names the entry and modules near to it, and the module is as it was."""

        class Late(Lit):
            def setup(self, stage):
                pass

        model = Late() if late else Lit()
        with pytest.raises(ValueError, match=r"skip='net.heads' matches no module of La?i?te?. .*for example 'net"):
            make_trainer(SelfCompression(gamma=1.0, skip=["net.heads"])).fit(model, batches())
        assert not any(isinstance(m, Quantized) for m in model.modules())

    def test_nothing_to_compress(self):
        """The error names the module, what could be compressed and why nothing was."""

        class Bare(Lit):
            def __init__(self):
                super().__init__()
                self.net = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(64))

        with pytest.raises(ValueError, match=r"something to compress in Bare, found nothing.*Conv2d(.|\n)*BatchNorm1d"):
            make_trainer(SelfCompression(gamma=1.0)).fit(Bare(), batches())

    @pytest.mark.parametrize("price", PRICES)
    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_gradient_that_is_not_finite_is_skipped_and_counted(self, bad, price):
        """A loss that is not finite leaves depths and exponents bit for bit, and the count says so."""

        class Broken(Lit):
            def training_step(self, batch, batch_idx):
                history.append(learned(self))
                return self.loss(batch) * (bad if batch_idx == 5 else 1.0)

        history = []
        callback = SelfCompression(gamma=1.0, price=price)
        model = Broken(lambda m: torch.optim.SGD(m.parameters(), lr=0.0))
        make_trainer(callback).fit(model, batches(6))

        assert callback.skipped_steps == 1
        assert all(torch.equal(a, b) for a, b in zip(history[5], learned(model), strict=True))
        for now, then in zip(history[4][1::2], history[5][1::2], strict=True):
            assert not torch.equal(now, then)
        if price == "bits":
            assert not any(torch.equal(a, b) for a, b in zip(history[4], history[5], strict=True))


def decay_or_not(module):
    """Every parameter has to be in exactly one group, by the type of its module; unknown ones are refused."""
    decay, rest = set(), set()
    for path, m in module.named_modules():
        for name, _ in m.named_parameters(recurse=False):
            full = f"{path}.{name}"
            if name == "weight" and type(m) in (nn.Linear, nn.Conv2d):
                decay.add(full)
            elif name == "bias" or (name == "weight" and isinstance(m, nn.BatchNorm2d)):
                rest.add(full)
    named = dict(module.named_parameters())
    assert decay | rest == named.keys()
    groups = [{"params": [named[n] for n in sorted(s)]} for s in (decay, rest)]
    return torch.optim.AdamW([groups[0] | {"weight_decay": 0.5}, groups[1]], lr=1e-3)


def with_scheduler(make, **config):
    def configure(module):
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3, weight_decay=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": make(optimizer), "interval": "step", **config}}

    return configure


SCHEDULERS = torch.optim.lr_scheduler
OPTIMIZERS = {
    "decay by type of module": decay_or_not,
    "single weights by attribute": lambda m: torch.optim.SGD(
        [m.net[0].weight, m.net[4].weight, m.net[6].bias], lr=0.01
    ),
    "named parameters": lambda m: torch.optim.Adam(list(m.named_parameters()), lr=1e-3),
    "only the bias": lambda m: torch.optim.Adam([m.net[6].bias], lr=1e-3),
    "fused": lambda m: torch.optim.Adam(m.parameters(), lr=1e-3, fused=True),
    "LBFGS": lbfgs,
    "LambdaLR": with_scheduler(lambda o: SCHEDULERS.LambdaLR(o, lambda step: 0.5)),
    "OneCycleLR": with_scheduler(lambda o: SCHEDULERS.OneCycleLR(o, 0.01, total_steps=20)),
    "CyclicLR": with_scheduler(lambda o: SCHEDULERS.CyclicLR(o, 1e-4, 1e-2, cycle_momentum=False)),
    "CosineAnnealingWarmRestarts": with_scheduler(lambda o: SCHEDULERS.CosineAnnealingWarmRestarts(o, 3)),
    "SequentialLR": with_scheduler(
        lambda o: SCHEDULERS.SequentialLR(o, [SCHEDULERS.ConstantLR(o), SCHEDULERS.ExponentialLR(o, 0.9)], [2])
    ),
    "ReduceLROnPlateau": with_scheduler(SCHEDULERS.ReduceLROnPlateau, interval="epoch", monitor="loss"),
    "several groups by size": lambda m: torch.optim.SGD(
        [{"params": [p for p in m.parameters() if (p.dim() > 1) is large], "lr": 0.01} for large in (True, False)]
    ),
}
if hasattr(torch.optim, "Muon"):
    OPTIMIZERS["Muon"] = lambda m: torch.optim.Muon([p for p in m.parameters() if p.dim() == 2], lr=1e-3)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_users_optimizers_and_schedulers_never_meet_depths(name):
    """No depth or exponent is in a group of the user's optimizer, nothing crashes, and with bits_lr=0 none moves."""
    if name == "named parameters" and torch.__version__ < "2.6":
        pytest.skip("optimizers take named parameters since torch 2.6")
    model = Lit(OPTIMIZERS[name])
    trainer = make_trainer(SelfCompression(gamma=1.0, bits_lr=0.0), max_epochs=2)
    trainer.fit(model, batches())

    ours = {id(t) for p in quantized_parameters(model) for t in (p.raw_depth, p.exponent)}
    assert ours.isdisjoint(id(p) for o in trainer.optimizers for g in o.param_groups for p in g["params"])
    for p in quantized_parameters(model):
        assert torch.equal(p.raw_depth, torch.full_like(p.raw_depth, 8.0))


def test_weight_decay_has_no_effect_on_depths():
    """Depths trained beside AdamW with heavy decay end where they end beside AdamW without, weights held still."""
    ends = []
    for decay in (0.0, 0.5):
        torch.manual_seed(3)
        model = Lit(lambda m, decay=decay: torch.optim.AdamW(m.parameters(), lr=0.0, weight_decay=decay))
        make_trainer(SelfCompression(gamma=1.0)).fit(model, batches())
        ends.append(learned(model))
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_parameters_that_another_callback_adds_later_are_taken_out():
    """BackboneFinetuning unfreezes a backbone with its depths; they leave the user's optimizer before its next step."""

    class Two(Lit):
        def __init__(self):
            super().__init__(lambda m: torch.optim.SGD(m.net[-1].parameters(), lr=0.01, weight_decay=0.5))
            self.backbone = self.net[0]

    model = Two()
    finetuning = BackboneFinetuning(unfreeze_backbone_at_epoch=1, verbose=False)
    trainer = make_trainer(SelfCompression(gamma=0.0, bits_lr=0.0), finetuning, max_epochs=3)
    trainer.fit(model, batches())

    ours = {id(t) for p in quantized_parameters(model) for t in (p.raw_depth, p.exponent)}
    assert len(trainer.optimizers[0].param_groups) == 2
    assert ours.isdisjoint(id(p) for g in trainer.optimizers[0].param_groups for p in g["params"])
    assert torch.equal(model.net[0].bit_depth, torch.full((6,), 8.0))


@pytest.mark.parametrize("price", PRICES)
def test_depths_stay_float32_in_bf16_and_move(price):
    """Under bf16-true the weights are bfloat16, depths and exponents float32, and steps of 0.02 bits add up."""
    model, start = Lit(), []
    model.on_train_start = lambda: start.extend(learned(model))
    make_trainer(SelfCompression(gamma=10.0, price=price), precision="bf16-true").fit(model, batches())

    for p, exponent in zip(quantized_parameters(model), start[1::2], strict=True):
        assert p.latent.dtype == torch.bfloat16
        assert p.raw_depth.dtype == p.exponent.dtype == torch.float32
        moved = 8 - p.raw_depth if price == "bits" else p.exponent - exponent
        assert bool((moved > 0.05).all())


def test_gamma_function_gets_the_global_step():
    """A callable gamma is asked once a step, with 0, 1, 2, ..., also when batches are accumulated."""
    asked = []
    make_trainer(SelfCompression(gamma=lambda step: asked.append(step) or 0.1), accumulate_grad_batches=2).fit(
        Lit(), batches()
    )
    assert asked == [0, 1, 2, 3]


def test_gamma_zero_presses_on_nothing():
    """With gamma 0 a depth without gradient from the task stays exactly where it is."""

    class Constant(Lit):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) * 0.0

    model = Constant()
    make_trainer(SelfCompression(gamma=0.0)).fit(model, batches())
    assert all(torch.equal(p.raw_depth, torch.full_like(p.raw_depth, 8.0)) for p in quantized_parameters(model))


def test_loss_is_the_users_own():
    """The logged and the returned loss are the task's: the size term is in neither."""
    losses = []
    for gamma in (0.0, 1000.0):
        torch.manual_seed(5)
        model = Lit(lambda m: torch.optim.SGD(m.parameters(), lr=0.0))
        trainer = make_trainer(SelfCompression(gamma=gamma, bits_lr=0.0))
        trainer.fit(model, batches())
        losses.append([*model.losses, float(trainer.callback_metrics["loss"])])
    assert losses[0] == losses[1]


def test_skipped_batches_move_nothing():
    """A training_step that returns None moves no depth."""

    class Lazy(Lit):
        def training_step(self, batch, batch_idx):
            return None

    model = Lazy()
    make_trainer(SelfCompression(gamma=1.0)).fit(model, batches())
    assert all(torch.equal(p.raw_depth, torch.full_like(p.raw_depth, 8.0)) for p in quantized_parameters(model))


def test_resumed_training_equals_uninterrupted(tmp_path):
    """A second epoch resumed from a checkpoint of the first ends where two epochs in one go end, to the bit."""
    torch.manual_seed(11)
    start = Lit()
    whole, first = copy.deepcopy(start), copy.deepcopy(start)
    make_trainer(SelfCompression(gamma=1.0), max_epochs=2).fit(whole, batches())
    each_epoch = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    make_trainer(SelfCompression(gamma=1.0), each_epoch, max_epochs=2, enable_checkpointing=True).fit(first, batches())
    second = Lit()
    make_trainer(SelfCompression(gamma=1.0), max_epochs=2).fit(second, batches(), ckpt_path=tmp_path / "epoch=0.ckpt")

    state = second.state_dict()
    assert state.keys() == whole.state_dict().keys()
    assert all(torch.equal(state[k], v) for k, v in whole.state_dict().items())


def test_callback_state_loads_with_weights_only(tmp_path):
    """A checkpoint with the callback's state needs no pickled classes."""
    trainer = make_trainer(SelfCompression(gamma=1.0))
    trainer.fit(Lit(), batches())
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    state = torch.load(tmp_path / "one.ckpt", weights_only=True)["callbacks"]["SelfCompression"]
    assert len(state["depth_optimizers"]) == 1


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"max_epochs": 2}, [1.0] * 9 + [7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]),
        ({"max_epochs": -1, "max_steps": 4}, [1.0, 1.0, 1.0, 0.5]),
        ({"max_epochs": 9, "max_steps": 4}, [1.0, 1.0, 1.0, 0.5]),
        ({"max_epochs": 2, "accumulate_grad_batches": 4}, [1.0, 1.0, 5 / 8, 1 / 8]),
    ],
)
def test_learning_rate_falls_to_zero_over_the_cooldown(settings, expected, monkeypatch):
    """The rate of depths is held for half of the training, then falls in a straight line, by epochs or by steps."""
    rates = []
    step = DepthOptimizer.step
    monkeypatch.setattr(
        DepthOptimizer, "step", lambda self: rates.append(self.adam.param_groups[0]["lr"]) or step(self)
    )
    make_trainer(SelfCompression(gamma=1.0, bits_lr=0.1, cooldown=0.5), **settings).fit(Lit(), batches())
    assert rates == pytest.approx([0.1 * factor for factor in expected])


class TestLogging:
    def test_to_tensorboard_and_csv(self, tmp_path):
        """Totals appear at the loggers' pace, layers and a histogram at epoch ends; a CSV logger gets the scalars."""
        board, csv = TensorBoardLogger(tmp_path, name="tb", version=""), CSVLogger(tmp_path, name="csv", version="")
        model = Lit()
        make_trainer(SelfCompression(gamma=1.0), logger=[board, csv], log_every_n_steps=4, max_epochs=2).fit(
            model, batches()
        )
        events = EventAccumulator(board.log_dir, size_guidance={"scalars": 0, "histograms": 0})
        events.Reload()

        bits = [(e.step, e.value) for e in events.Scalars("selfcompress/bits_per_weight")]
        assert {step for step, _ in bits} == {3, 7, 8, 11, 15, 16}
        assert bits[-1][1] == pytest.approx(size_report(model).bits_per_weight)
        assert events.Scalars("selfcompress/nbytes")[-1].value == size_report(model).nbytes
        assert events.Scalars("selfcompress_channels/total")[-1].value == size_report(model).channels == 26
        assert len(events.Scalars("selfcompress_bits/net.0")) == 2
        assert len(events.Histograms("selfcompress_depths/histogram")) == 2
        assert "selfcompress_bits/net.6" in (tmp_path / "csv" / "metrics.csv").read_text().splitlines()[0]

    def test_is_done_once_a_step(self, tmp_path, monkeypatch):
        """With accumulated batches the sizes are logged at the steps, not at every batch of them."""

        class Counting(SelfCompression):
            def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
                before = len(logged)
                super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
                calls.extend([batch_idx] * (len(logged) - before))

        calls, logged = [], []
        csv = CSVLogger(tmp_path)
        monkeypatch.setattr(csv, "log_metrics", lambda metrics, step: logged.append(step))
        trainer = make_trainer(Counting(gamma=1.0), logger=csv, log_every_n_steps=1, accumulate_grad_batches=4)
        trainer.fit(Lit(), batches())
        assert trainer.global_step == 2
        assert calls == [3, 7]

    @pytest.mark.parametrize(
        ("price", "monitor", "threshold"), [("bits", "bits_per_weight", 7.9), ("bytes", "nbytes", 3500)]
    )
    def test_sizes_can_be_monitored(self, price, monitor, threshold, tmp_path):
        """ModelCheckpoint and EarlyStopping take the sizes that the callback keeps in callback_metrics."""
        checkpoint = ModelCheckpoint(tmp_path, monitor="selfcompress/nbytes", mode="min")
        stopping = EarlyStopping(f"selfcompress/{monitor}", stopping_threshold=threshold, mode="min")
        model = Lit()
        trainer = make_trainer(
            SelfCompression(gamma=10.0, price=price), stopping, checkpoint, max_epochs=20, enable_checkpointing=True
        )
        trainer.fit(model, batches(), batches())

        assert getattr(size_report(model), monitor) < threshold
        assert trainer.current_epoch < 20
        assert float(checkpoint.best_model_score) == size_report(model).nbytes

    def test_metrics_can_be_logged_by_the_user(self):
        """``self.log`` takes BitsPerWeight and NBytes, in validation and at the end of training epochs."""

        class Measured(Lit):
            def __init__(self):
                super().__init__()
                self.bits, self.nbytes = BitsPerWeight(self), NBytes(self)

            def validation_step(self, batch, batch_idx):
                self.log("bits", self.bits)

            def on_train_epoch_end(self):
                self.log("nbytes", self.nbytes)

        model = Measured()
        trainer = make_trainer(SelfCompression(gamma=1.0), max_epochs=2)
        trainer.fit(model, batches(), batches())
        assert float(trainer.callback_metrics["bits"]) == pytest.approx(size_report(model).bits_per_weight)
        assert float(trainer.callback_metrics["nbytes"]) == size_report(model).nbytes


class Student(Lit):
    """Distillation: the loss compares with a frozen teacher, and a target network that no optimizer holds follows."""

    def __init__(self):
        super().__init__(lambda m: torch.optim.Adam(m.net.parameters(), lr=1e-3))
        self.teacher, self.target = small_net().requires_grad_(False), small_net()

    def loss(self, batch):
        with torch.no_grad():
            goal = self.teacher(batch[0]) + self.target(batch[0])
        return nn.functional.mse_loss(self.net(batch[0]), goal)


@pytest.mark.parametrize("price", PRICES)
def test_networks_that_are_not_trained_keep_their_depths(price, caplog):
    """A frozen teacher and a target network feel no pressure on their size; the frozen one is named in advance."""
    model, start = Student(), []
    model.on_train_start = lambda: start.append({n: t.clone() for n, t in model.state_dict().items()})
    with caplog.at_level(logging.INFO, logger="lightning_selfcompress"):
        make_trainer(SelfCompression(gamma=10.0, price=price)).fit(model, batches())
    for name, tensor in model.state_dict().items():
        if name.startswith(("teacher.", "target.")) and ".1." not in name:  # statistics of normalization move
            assert torch.equal(tensor, start[0][name])
    for p in quantized_parameters(model.net):
        moved = (
            8 - p.raw_depth
            if price == "bits"
            else p.exponent - start[0][f"net.{p.name.removesuffix('weight')}exponent"]
        )
        assert bool((moved > 0).all())
    text = "\n".join(r.getMessage() for r in caplog.records)
    assert "Frozen, so kept at their bit depths: teacher.0.weight, teacher.4.weight, teacher.6.weight (3 w" in text


@pytest.mark.parametrize("price", PRICES)
def test_toggled_off_weights_take_their_depths_along(price):
    """With toggle_optimizer, the generator's loss leaves no gradient in the discriminator's depths."""
    left = []

    class Toggling(Gan):
        def training_step(self, batch, batch_idx):
            one, two = self.optimizers()
            noise = torch.randn(len(batch[0]), 5)
            self.toggle_optimizer(one)
            self.manual_backward(-self.discriminator(self.generator(noise)).mean())
            left.extend(p.raw_depth.grad for p in quantized_parameters(self.discriminator))
            one.step()
            one.zero_grad()
            self.untoggle_optimizer(one)
            self.toggle_optimizer(two)
            self.manual_backward(self.discriminator_loss(batch[0], noise))
            two.step()
            two.zero_grad()
            self.untoggle_optimizer(two)

    model, start = Toggling(), []
    model.on_train_start = lambda: start.extend(learned(model))
    make_trainer(SelfCompression(gamma=1000.0, price=price)).fit(model, batches())
    assert left == [None] * len(left) != []
    assert all_learning(model, start)
    if price == "bits":
        assert all(bool((p.raw_depth < 8).all()) for p in quantized_parameters(model))


@pytest.mark.parametrize("hook", ["setup", "configure_model"])
def test_module_initializes_and_ties_its_layers_as_floats(hook):
    """What setup and configure_model write into weights, or tie, or parametrize, is what training starts with."""

    class Own(Lit):
        def __init__(self):
            super().__init__()
            self.net[4] = nn.Linear(216, 216)
            self.net[6] = nn.Linear(216, 216)

    def build(self, stage=None):
        nn.init.constant_(self.net[0].weight, 0.25)
        self.net[6].weight = self.net[4].weight

    setattr(Own, hook, build)
    model = Own()
    model.make_optimizer = lambda m: torch.optim.SGD(m.parameters(), lr=0.0)
    make_trainer(SelfCompression(gamma=0.0, bits_lr=0.0)).fit(model, batches(1))
    torch.testing.assert_close(model.net[0].weight.detach(), torch.full((6, 1, 3, 3), 0.25), rtol=1 / 254, atol=0)
    assert model.net[4].latent("weight") is model.net[6].latent("weight")
    assert model.net[4].bit_depth is model.net[6].bit_depth


def test_state_restored_for_a_test_is_not_that_of_the_next_fit(tmp_path):
    """After ``test(ckpt_path=...)`` a fit of another network starts its depths' optimizer anew."""
    callback = SelfCompression(gamma=1.0)
    trainer = make_trainer(callback)
    model = Lit()
    trainer.fit(model, batches())
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    make_trainer(callback).test(model, batches(), ckpt_path=tmp_path / "one.ckpt", verbose=False)
    make_trainer(callback).fit(Lit(), batches(3))
    steps = [s["step"].item() for d in callback._depths._optimizers for s in d.adam.state.values()]
    assert set(steps) == {3}


def test_module_without_optimizer_says_so():
    """Where nothing is optimized, depths are not either, and a warning says it."""
    model = Lit(lambda m: None)
    with pytest.warns(UserWarning, match="no optimizer trains this module"):
        make_trainer(SelfCompression(gamma=1.0)).fit(model, batches())
    assert all(bool((p.raw_depth == 8).all()) for p in quantized_parameters(model))


def test_optimizers_made_anew_during_training_are_followed():
    """Depths go on falling, with their moments, after the strategy made new optimizers."""

    class Anew(pl.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == 1:
                trainer.strategy.setup_optimizers(trainer)

    callback, model = SelfCompression(gamma=10.0, cooldown=0.0), Lit()
    make_trainer(callback, Anew(), max_epochs=2).fit(model, batches())
    assert {s["step"].item() for d in callback._depths._optimizers for s in d.adam.state.values()} == {16}


@pytest.mark.parametrize("accumulated", [1, 4])
def test_moving_average_lent_for_validation_leaves_no_stale_weights(accumulated):
    """Weights swapped through ``.data`` for a validation are not what the next training step computes with."""

    class Lend(pl.Callback):
        def on_validation_start(self, trainer, pl_module):
            self.kept = [p.detach().clone() for p in pl_module.net.parameters()]
            for p in pl_module.net.parameters():
                p.data.mul_(2.0)

        def on_validation_end(self, trainer, pl_module):
            for p, kept in zip(pl_module.net.parameters(), self.kept, strict=True):
                p.data.copy_(kept)

    ends = []
    for callbacks in ([], [Lend()]):
        torch.manual_seed(2)
        model = Lit()
        trainer = make_trainer(
            SelfCompression(gamma=1.0), *callbacks, val_check_interval=3, accumulate_grad_batches=accumulated
        )
        trainer.fit(model, batches(), batches(2))
        ends.append(model.losses)
    assert ends[0] == ends[1]
