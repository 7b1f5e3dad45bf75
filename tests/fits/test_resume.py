"""Trainings that go on from a checkpoint, in a fresh module, as if they had never stopped."""

import os
import random
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import fits
import lightning
import pytest
import torch
from fits import GAN, SCHEDULE, Kill, RecordingGan
from lightning.pytorch.callbacks import ModelCheckpoint
from networks import Lit, batches, make_trainer
from packaging.version import Version
from resumable import Resumable

from lightning_selfcompress import SelfCompression

EPOCHS = 3
counts_steps = pytest.mark.skipif(
    Version(lightning.__version__) < Version("2.5.5"),
    reason="this lightning counts a batch less after it went on in mid-epoch, and bits_lr cools down by batches",
)


def train(folder, *callbacks, make=Lit, schedule=SCHEDULE, ckpt_path=None, compression=None, **kwargs):
    torch.manual_seed(1)
    model = make()
    saved = ModelCheckpoint(folder, filename="{epoch}-{step}", save_top_k=-1, **kwargs.pop("save", {}))
    compression = compression or SelfCompression(gamma=0.05, cooldown=0.5)
    settings = {"max_epochs": EPOCHS, "enable_checkpointing": True} | kwargs
    trainer = make_trainer(compression, Kill(schedule), saved, *callbacks, **settings)
    trainer.fit(model, Resumable(), batches(2), ckpt_path=ckpt_path)
    return model, trainer


def assert_same(model, whole):
    """Shapes, parameters, depths: all equal to the bit."""
    mine, theirs = model.state_dict(), whole.state_dict()
    assert {k: v.shape for k, v in mine.items()} == {k: v.shape for k, v in theirs.items()}
    assert all(torch.equal(mine[k], theirs[k]) for k in mine)


TIMINGS = {
    "each epoch's end": {"save_on_train_epoch_end": True},
    "each validation's end": {"save_on_train_epoch_end": False},
    "every 25th step": {"every_n_train_steps": 25},
}


@counts_steps
@pytest.mark.case("Checkpoints", "fit(ckpt_path=) into a fresh module, saved at {timing}: equal to the bit")
@pytest.mark.parametrize("timing", TIMINGS)
def test_resumed_equals_uninterrupted(timing, tmp_path):
    """From each checkpoint of a run a fresh module goes on with the same losses and ends as the same network."""
    whole, _ = train(tmp_path / "whole", save=TIMINGS[timing])
    assert whole.net[0].out_channels == 3
    checkpoints = sorted((tmp_path / "whole").glob("*.ckpt"), key=lambda p: int(p.stem.split("step=")[1]))
    assert len(checkpoints) >= EPOCHS
    for path in checkpoints[:-1]:
        step = int(path.stem.split("step=")[1])
        model, _ = train(tmp_path / path.stem, ckpt_path=path)
        assert model.losses == whole.losses[step:], path
        assert_same(model, whole)


class Branching(Lit):
    """Takes one of its branches from the third step of an epoch on, so that it is long before it has been seen."""

    def __init__(self):
        super().__init__()
        self.late = torch.nn.Linear(4, 4)

    def loss(self, batch):
        out = self.net(batch[0])
        out = self.late(out) if self.trainer.global_step >= 30 else out
        return torch.nn.functional.cross_entropy(out, batch[1])


def adam_with_schedule(module):
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)]


KINDS = {
    "two optimizers under manual optimization": {"make": RecordingGan, "schedule": GAN},
    "AdamW with a schedule": {"make": lambda: Lit(adam_with_schedule)},
    "SGD with momentum": {"make": lambda: Lit(lambda m: torch.optim.SGD(m.parameters(), 0.05, momentum=0.9))},
    "LBFGS": {"make": lambda: Lit(lambda m: torch.optim.LBFGS(m.parameters(), lr=0.1, max_iter=3))},
    "accumulated batches": {"accumulate_grad_batches": 5, "save": {"every_n_train_steps": 5}},
    "bf16-mixed": {"precision": "bf16-mixed"},
    "clipped gradients": {"gradient_clip_val": 0.1},
    "a branch first taken after the checkpoint": {"make": Branching},
}


@counts_steps
@pytest.mark.case("Checkpoints", "resumed in the middle of an epoch, {kind}: equal to the bit")
@pytest.mark.parametrize("kind", KINDS)
def test_resumed_in_mid_epoch(kind, tmp_path):
    """In the middle of an epoch and of a fade, a fresh module goes on as the run that was not stopped."""
    settings = {"max_epochs": 2, "save": {"every_n_train_steps": 25}, **KINDS[kind]}
    whole, trainer = train(tmp_path, **settings)
    path = min(tmp_path.glob("*.ckpt"), key=lambda p: int(p.stem.split("step=")[1]))
    model, resumed = train(tmp_path / "resumed", ckpt_path=path, **settings)
    assert len(model.losses) < len(whole.losses)
    assert model.losses == whole.losses[-len(model.losses) :]
    assert resumed.global_step == trainer.global_step
    assert_same(model, whole)


@pytest.mark.case("Checkpoints", "removal only every second epoch, resumed between: the same removals")
def test_resumed_between_removals(tmp_path):
    """A run that removes every second epoch removes at the same epochs after it went on from between them."""

    def compression():
        return SelfCompression(gamma=0.05, prune_every_n_epochs=2)

    whole, _ = train(tmp_path, max_epochs=4, compression=compression())
    model, _ = train(
        tmp_path / "b", max_epochs=4, compression=compression(), ckpt_path=tmp_path / "epoch=0-step=60.ckpt"
    )
    assert whole.net[0].out_channels == 3
    assert_same(model, whole)


@pytest.mark.case("Checkpoints", "resumed for more epochs than the first run had")
def test_resumed_for_longer(tmp_path):
    """What is saved after a fit goes on in a longer one: shapes, optimizers and the callback's own state."""
    _, first = train(tmp_path, max_epochs=2)
    first.save_checkpoint(tmp_path / "end.ckpt")
    model, _ = train(tmp_path / "longer", max_epochs=3, ckpt_path=tmp_path / "end.ckpt")
    assert len(model.losses) == 60
    assert (model.net[0].out_channels, model.net[4].out_features) == (3, 10)


@pytest.mark.case("Checkpoints", "a float run's checkpoint starts a compressing run, strict_loading={strict}")
@pytest.mark.parametrize("strict", [True, False])
def test_float_checkpoint_starts_a_compressing_run(strict, tmp_path):
    """It goes on from the float weights, its optimizer's state and its epoch, at the float function."""

    def make():
        model = Lit()
        model.strict_loading = strict
        return model

    saved = ModelCheckpoint(tmp_path, filename="float")
    plain = make_trainer(saved, enable_checkpointing=True)
    floating = make()
    plain.fit(floating, Resumable())
    model, trainer = train(tmp_path / "on", make=make, ckpt_path=tmp_path / "float.ckpt")
    assert len(model.losses) == 120
    assert model.losses[0] == pytest.approx(floating.loss(first_batch(1)).item(), abs=0.02)
    assert model.net[0].out_channels < 6
    assert trainer.current_epoch == EPOCHS


def first_batch(epoch):
    loader = Resumable()
    loader.set_epoch(epoch)
    return next(iter(loader))


@pytest.mark.case("Checkpoints", "resumed after the callback was taken off the list")
def test_resumed_without_the_callback(tmp_path, refusal):
    """A Trainer without the callback says what opens the file, and leaves the module as it is."""
    train(tmp_path, max_epochs=1)
    model = Lit()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with refusal(RuntimeError, "lightning_selfcompress.load_from_checkpoint"):
        make_trainer(max_epochs=2).fit(model, Resumable(), ckpt_path=tmp_path / "epoch=0-step=60.ckpt")
    assert model.state_dict().keys() == before.keys()


@pytest.mark.case("Checkpoints", "resumed from save_weights_only=True")
def test_resumed_from_weights_only(tmp_path, refusal):
    """Weights alone are no training to go on with: Lightning refuses, as for a float network."""
    train(tmp_path, max_epochs=1, save={"save_weights_only": True})
    with refusal(KeyError, "checkpoint contains only the model"):
        train(tmp_path / "on", ckpt_path=tmp_path / "epoch=0-step=60.ckpt")


@pytest.mark.case("Checkpoints", "trainer.fit(ckpt_path='last') where one was saved by save_last")
def test_last(tmp_path):
    """``last`` is found and gone on with."""

    def run(folder, **kwargs):
        compression = SelfCompression(gamma=0.05, cooldown=0)  # which would follow the number of epochs
        return train(folder, save={"save_last": True}, compression=compression, **kwargs)[0]

    whole = run(tmp_path / "whole")
    run(tmp_path / "parts", max_epochs=1)
    assert_same(run(tmp_path / "parts", ckpt_path="last"), whole)


def record(folder, ckpt_path):
    """A run that writes each loss to a file as it goes, slowly enough to be killed; a process of its own."""

    class Writing(Lit):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            with (folder / "losses").open("a") as file:
                file.write(f"{self.trainer.global_step} {self.losses[-1].hex()}\n")

    saved = {"every_n_train_steps": 11, "save_last": True, "save_top_k": 1, "monitor": "loss"}
    torch.manual_seed(1)
    model = Writing()
    checkpoint = ModelCheckpoint(folder, **saved)
    trainer = make_trainer(
        SelfCompression(gamma=0.05), Kill(), checkpoint, max_epochs=EPOCHS, enable_checkpointing=True
    )
    trainer.fit(model, Resumable(), ckpt_path=ckpt_path)
    torch.save(model.state_dict(), folder / "end.pt")


def run_and_kill(folder, after):
    """Starts or goes on with a run, and kills it once it has written that many losses; returns whether it had to."""
    last = folder / "last.ckpt"
    process = subprocess.Popen(
        [sys.executable, __file__, str(folder), str(last) if last.exists() else ""],
        stdout=subprocess.DEVNULL,
        stderr=(folder / "stderr").open("w"),
        env=os.environ | {"PYTHONPATH": str(Path(fits.__file__).parent)},
    )
    losses, start = folder / "losses", len(lines(folder))
    while process.poll() is None:
        if after is not None and losses.exists() and len(lines(folder)) - start >= after:
            process.send_signal(signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):
            process.wait(0.05)
    assert process.returncode in (0, -signal.SIGKILL), (folder / "stderr").read_text()[-2000:]
    return process.returncode != 0


class InstanceNormalized(Lit):
    """A network whose normalization has no tensor that could tell its size."""

    def __init__(self):
        super().__init__()
        self.net[1] = torch.nn.InstanceNorm2d(6)


def test_a_normalization_without_tensors(tmp_path):
    """The size of a normalization layer without tensors goes with a checkpoint, so that training goes on from it."""
    whole, _ = train(tmp_path / "whole", make=InstanceNormalized)
    first = min((tmp_path / "whole").glob("epoch=0-*.ckpt"))
    resumed, _ = train(tmp_path / "resumed", make=InstanceNormalized, ckpt_path=first)
    assert resumed.net[1].num_features == resumed.net[0].out_channels < 6
    assert_same(resumed, whole)


def lines(folder):
    return (folder / "losses").read_text().splitlines() if (folder / "losses").exists() else []


@counts_steps
@pytest.mark.case(
    "Checkpoints", "killed with SIGKILL at random moments, restarted from the last checkpoint: equal to the bit"
)
def test_killed_and_restarted(tmp_path):
    """Whenever a run is killed, nothing is lost but the steps since the last checkpoint."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        folder.mkdir()
    assert not run_and_kill(whole, None)
    moments = random.Random(3)
    kills = sum(run_and_kill(broken, moments.randrange(20, 80)) for _ in range(2))
    assert kills == 2
    assert not run_and_kill(broken, None)
    expected = set(lines(whole))
    assert len(expected) == 180
    assert set(lines(broken)) == expected
    ends = [torch.load(folder / "end.pt", weights_only=True) for folder in (whole, broken)]
    assert all(torch.equal(ends[0][k], ends[1][k]) for k in ends[0])


if __name__ == "__main__":
    torch.set_num_threads(1)
    record(Path(sys.argv[1]), sys.argv[2] or None)
