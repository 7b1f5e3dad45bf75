"""A teacher: its pull is the gradient of the distance it stands for, in every kind of training."""

import warnings

import pytest
import torch
from fits import Kill
from lightning.pytorch.callbacks import ModelCheckpoint
from networks import Lit, batches, make_trainer, small_net, trained_tensors
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_selfcompress import CheckpointError, SelfCompression, Teacher
from lightning_selfcompress.training.teacher import pull_towards

T = 2.0


class Plain(Lit):
    """Plain SGD, whose step shows the gradient."""

    def __init__(self, reduction="mean", **kwargs):
        super().__init__(**kwargs)
        self.reduction = reduction

    def loss(self, batch):
        return functional.cross_entropy(self.net(batch[0]), batch[1], reduction=self.reduction)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class WithDistance(Plain):
    """Adds the distance by hand, to the loss itself."""

    def __init__(self, teacher, share=1.0, **kwargs):
        super().__init__(**kwargs)
        self.teacher, self.share = [teacher.eval().double()], share

    def training_step(self, batch, batch_idx):
        mine = self.net(batch[0])
        with torch.no_grad():
            target = self.teacher[0](batch[0])
        distance = functional.kl_div(
            (mine / T).log_softmax(1),
            (target / T).log_softmax(1),
            log_target=True,
            reduction="sum" if self.reduction == "sum" else "batchmean",
        )
        own = functional.cross_entropy(mine, batch[1], reduction=self.reduction)
        return own + self.share * T**2 * distance


def teacher_net(seed=5):
    torch.manual_seed(seed)
    return small_net()


def lit_teacher(kind=Plain, **kwargs):
    module = kind(**kwargs)
    module.net = teacher_net()
    return module


def fit(model, teacher=None, data=None, callbacks=(), ckpt=None, **kwargs):
    torch.manual_seed(1)
    compression = SelfCompression(gamma=0.05, teacher=teacher, prune_every_n_epochs=0)
    trainer = make_trainer(compression, *callbacks, **({"max_epochs": 2, "precision": "64-true"} | kwargs))
    trainer.fit(model, batches(4) if data is None else data, ckpt_path=ckpt, weights_only=False)
    return trained_tensors(model)


def made(kind, *args, **kwargs):
    torch.manual_seed(3)
    return kind(*args, **kwargs)


def assert_same(a, b, **tolerance):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], msg=lambda m, n=name: f"{n}: {m}", **tolerance)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("trainer", [{}, {"accumulate_grad_batches": 2}, {"gradient_clip_val": 0.1}])
def test_equals_the_distance_added_to_the_loss(reduction, trainer):
    """The pull on the outputs moves all that is trained as the distance in the loss would."""
    taught = fit(made(Plain, reduction), lit_teacher(reduction=reduction), **trainer)
    by_hand = fit(made(WithDistance, teacher_net(), reduction=reduction), **trainer)
    assert_same(taught, by_hand, rtol=1e-4, atol=1e-6)
    untaught = fit(made(Plain, reduction), **trainer)
    assert not torch.allclose(untaught["net.0.weight"], taught["net.0.weight"], atol=1e-4)


@pytest.mark.parametrize("network", [teacher_net, lit_teacher], ids=["network", "module"])
def test_named_output(network):
    """An output that is named is compared as the one that is found."""
    found = fit(made(Plain), lit_teacher())
    named = fit(made(Plain), Teacher(network(), outputs="net"))
    assert_same(named, found, rtol=1e-5, atol=1e-7)


def test_weight():
    """The weight multiplies the distance."""
    taught = fit(made(Plain), Teacher(lit_teacher(), weight=0.3))
    assert_same(taught, fit(made(WithDistance, teacher_net(), 0.3)), rtol=1e-4, atol=1e-6)


class Manual(Plain):
    """Optimizes by itself."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        optimizer.step()


def test_manual_optimization():
    """The pull comes with any backward pass."""
    assert_same(fit(made(Manual), lit_teacher(Manual)), fit(made(Plain), lit_teacher()), rtol=1e-5, atol=1e-7)


def test_optimizer_with_several_closures():
    """Every call of the training step in a batch is taught."""

    class Lbfgs(Plain):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=3)

    calls = []
    teacher = lit_teacher()
    step = Plain.training_step

    class Counting(Plain):
        def training_step(self, batch, batch_idx):
            calls.append(batch_idx)
            return step(self, batch, batch_idx)

    teacher.__class__ = Counting
    model = made(Lbfgs)
    fit(model, teacher, batches(2), max_epochs=1)
    assert len(calls) >= len(model.losses) > 2


@pytest.mark.parametrize(
    ("loss", "kind"),
    [
        (functional.binary_cross_entropy_with_logits, "binary"),
        (functional.mse_loss, "values"),
        (functional.smooth_l1_loss, "values"),
    ],
)
def test_other_losses(loss, kind):
    """Yes-and-no logits and values are compared as such."""

    class Other(Plain):
        def loss(self, batch):
            return loss(self.net(batch[0]), functional.one_hot(batch[1], 4).float())

    class ByHand(Other):
        def training_step(self, batch, batch_idx):
            mine = self.net(batch[0])
            pull = pull_towards(mine, teacher(batch[0]), kind=kind, temperature=T) / mine.numel()
            return loss(mine, functional.one_hot(batch[1], 4).float()) + (mine * pull.detach()).sum()

    teacher = teacher_net().eval().double()
    assert_same(fit(made(Other), lit_teacher(Other)), fit(made(ByHand)), rtol=1e-4, atol=1e-6)


def test_ignored_samples_are_not_taught():
    """Positions that the loss ignores do not count."""
    images, labels = batches(4).dataset.tensors
    counts = torch.arange(len(labels)) % 8 < 4
    data = DataLoader(TensorDataset(images, torch.where(counts, labels, -100)), batch_size=8)
    half = DataLoader(TensorDataset(images[counts], labels[counts]), batch_size=4)

    class Frozen(Plain):
        """Without batch statistics, which ignored samples take part in."""

        def training_step(self, batch, batch_idx):
            self.eval()
            return super().training_step(batch, batch_idx)

    assert_same(fit(made(Frozen), lit_teacher(), data), fit(made(Frozen), lit_teacher(), half), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("kind", "seed"), [("classes", 0), ("binary", 1), ("values", 2)])
def test_pull_is_the_gradient_of_the_distance(kind, seed):
    """The closed form against autograd."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(2, 5, 3, dtype=torch.float64, generator=generator).unbind()
    student.requires_grad_()
    if kind == "classes":
        distance = T**2 * functional.kl_div(
            (student / T).log_softmax(-1), (teacher / T).log_softmax(-1), log_target=True, reduction="sum"
        )
    elif kind == "binary":
        p = (teacher / T).sigmoid()
        distance = T**2 * functional.binary_cross_entropy_with_logits(student / T, p, reduction="sum")
    else:
        distance = 0.5 * (student - teacher).square().sum()
    (gradient,) = torch.autograd.grad(distance, student)
    torch.testing.assert_close(pull_towards(student, teacher, kind=kind, temperature=T), gradient)


def test_logged_loss_stays_the_networks_own():
    """No loss changes: the first one is that of a training without a teacher."""
    plain, taught = made(Plain), made(Plain)
    fit(plain)
    fit(taught, lit_teacher())
    assert taught.losses[0] == plain.losses[0]
    assert taught.losses[-1] != plain.losses[-1]


def test_start_and_its_checkpoint_are_the_same_teacher(tmp_path):
    """The network before training teaches as its checkpoint does, and as the network itself."""
    trainer = make_trainer(max_epochs=1)
    first = made(Plain)
    trainer.fit(first, batches(4))
    trainer.save_checkpoint(tmp_path / "float.ckpt")
    network = made(Plain)
    network.load_state_dict(first.state_dict())

    def trained_before():
        model = made(Plain)
        model.load_state_dict(first.state_dict())
        return model

    by_start = fit(trained_before(), "start")
    assert_same(by_start, fit(trained_before(), str(tmp_path / "float.ckpt")))
    assert_same(by_start, fit(trained_before(), network))


@pytest.mark.parametrize("every", [0, 1])
def test_resumed_training_keeps_its_teacher(tmp_path, every):
    """A training that goes on after a removal has the teacher that it began with, at its full width."""

    def run(ckpt=None):
        torch.manual_seed(1)
        compression = SelfCompression(gamma=0.05, teacher="start", prune_every_n_epochs=every)
        saving = ModelCheckpoint(tmp_path / str(every), "{epoch}", save_top_k=-1, save_weights_only=False)
        trainer = make_trainer(Kill(), compression, saving, max_epochs=4, enable_checkpointing=True)
        model = made(Lit)
        trainer.fit(model, batches(40), ckpt_path=ckpt, weights_only=False)
        return model

    whole = run()
    resumed = run(tmp_path / str(every) / "epoch=1.ckpt")
    assert resumed.net[0].out_channels == (3 if every else 6)
    assert_same(trained_tensors(resumed), trained_tensors(whole), rtol=0, atol=0)


def test_random_steps_draw_the_same_numbers():
    """A step that augments its batch shows both networks the same images, and the training's numbers go on."""
    seen = []

    class Noisy(Plain):
        def loss(self, batch):
            images = batch[0] + torch.randn_like(batch[0])
            seen.append(images)
            return functional.cross_entropy(self.net(images), batch[1])

    fit(made(Noisy), lit_teacher(Noisy))
    assert all(torch.equal(a, b) for a, b in zip(seen[::2], seen[1::2], strict=True))
    with_teacher = seen[1::2]
    seen.clear()
    fit(made(Noisy))
    assert all(torch.equal(a, b) for a, b in zip(seen, with_teacher, strict=True))


def test_half_precision():
    """Under bfloat16 the pull takes the dtype of the outputs."""

    class InFloat(WithDistance):
        def __init__(self, teacher):
            super().__init__(teacher)
            self.teacher[0].float()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        taught = fit(made(Plain), lit_teacher(), precision="bf16-mixed")
        by_hand = fit(made(InFloat, teacher_net()), precision="bf16-mixed")
    assert_same(taught, by_hand, rtol=0.1, atol=5e-3)


def test_no_outputs_are_told_of_once():
    """A loss of the user's own, in which no outputs are found, is told of with what to do."""

    class Own(Plain):
        def loss(self, batch):
            return -self.net(batch[0]).log_softmax(1).gather(1, batch[1][:, None]).mean()

    with pytest.warns(UserWarning, match=r"teaches nothing.*outputs=") as told:
        fit(made(Own), lit_teacher(Own))
    assert sum("teaches nothing" in str(w.message) for w in told) == 1


def test_wrong_teachers(tmp_path):
    """Each says what is expected."""
    with pytest.raises(TypeError, match="path of a checkpoint"):
        SelfCompression(gamma=0.1, teacher=3)
    with pytest.raises(ValueError, match="temperature > 0"):
        Teacher("start", temperature=0)
    with pytest.raises(ValueError, match="outputs="):
        SelfCompression(gamma=0.1, teacher=small_net())
    with pytest.raises(ValueError, match="Its modules: net"):
        fit(made(Plain), Teacher(lit_teacher(), outputs="head"))
    with pytest.raises(FileNotFoundError):
        fit(made(Plain), str(tmp_path / "none.ckpt"))
    torch.save({"state_dict": {"net.0.weight": torch.zeros(6, 1, 3, 3)}}, tmp_path / "other.ckpt")
    with pytest.raises(CheckpointError, match="lacks net"):
        fit(made(Plain), str(tmp_path / "other.ckpt"))
    model = made(Plain)
    with pytest.raises(ValueError, match="module itself"):
        fit(model, model)


@pytest.mark.parametrize("whole", [True, False], ids=["module", "network"])
def test_compiled(whole):
    """A compiled training is taught like another one."""

    class Quiet(Plain):
        """What can be compiled in one graph: dynamo cannot trace self.log everywhere, nor an item in a list."""

        def training_step(self, batch, batch_idx):
            return self.loss(batch)

    model = made(Quiet)
    if not whole:
        model.net.compile(backend="eager")
    compiled = torch.compile(model, backend="eager") if whole else model
    fit(compiled, lit_teacher())
    assert_same(trained_tensors(model), fit(made(Plain), lit_teacher()), rtol=1e-4, atol=1e-6)
