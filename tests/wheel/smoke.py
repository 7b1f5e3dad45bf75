"""Tries an installed package: files written, read and finalized; with ``--lightning`` a short fit, too."""

import sys
import tempfile
from pathlib import Path

import torch
from torch import nn


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 2))


def serve() -> None:
    """What a server does: it needs torch and numpy."""
    from lightning_selfcompress import convert, export, finalize, load, size_report

    model, x = net(), torch.randn(3, 8)
    convert(model)
    with tempfile.TemporaryDirectory() as folder:
        nbytes = export(model, Path(folder) / "net.scnn")
        plain = load(Path(folder) / "net.scnn", into=net())
    assert nbytes == size_report(model).nbytes
    assert torch.equal(plain(x), model(x))
    assert torch.equal(finalize(model)(x), model(x))


def fit() -> None:
    """What a user does first."""
    import lightning.pytorch as pl

    from lightning_selfcompress import SelfCompression

    class Lit(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = net()

        def training_step(self, batch: list[torch.Tensor], batch_idx: int) -> torch.Tensor:
            return self.net(batch[0]).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.01)

    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randn(16, 8)), batch_size=4)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=2,
        callbacks=[SelfCompression(gamma=0.1, price="bits")],
        logger=False,
        enable_progress_bar=False,
    )
    trainer.fit(Lit(), data)
    assert trainer.callback_metrics["selfcompress/bits_per_weight"] < 8


if __name__ == "__main__":
    serve()
    if "--lightning" in sys.argv:
        fit()
    else:
        assert "lightning" not in sys.modules
