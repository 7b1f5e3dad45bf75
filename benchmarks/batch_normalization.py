"""What batch normalization's statistics cost in validation, with and without the estimate before it.

    python benchmarks/batch_normalization.py                  # 3 networks, 3 seeds, constant and decaying rate
    python benchmarks/batch_normalization.py --epochs 10 --seeds 1 --networks mlp

Three networks are trained on scikit-learn's digits: as float networks, compressed without the estimate, and compressed
as the callback does it. Both compressed trainings are the same to the bit but for the statistics, which is checked. For
each the table shows the accuracy on 497 images that were not trained on, in percent: of the last epoch, and of the
worst of all epochs after the first third, each beside the accuracy with statistics of all training images. No model is
chosen, so these are no results to compare with others.
"""

import argparse
import copy
import statistics
import warnings
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from quiet import quiet
from sklearn.datasets import load_digits
from step_time import Block
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from lightning_selfcompress import SelfCompression, recalibrate
from lightning_selfcompress.tables import table
from lightning_selfcompress.training.normalization import Normalization


def mlp() -> nn.Module:
    """Two hidden layers of 128 with BatchNorm1d."""
    hidden = [nn.Linear(64, 128, bias=False), nn.BatchNorm1d(128), nn.ReLU()]
    more = [nn.Linear(128, 128, bias=False), nn.BatchNorm1d(128), nn.ReLU()]
    return nn.Sequential(nn.Flatten(), *hidden, *more, nn.Linear(128, 10))


def conv() -> nn.Module:
    """Two convolutions with BatchNorm2d."""
    one = [nn.Conv2d(1, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU()]
    two = [nn.Conv2d(32, 64, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    return nn.Sequential(*one, *two, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(256, 10))


def resnet() -> nn.Module:
    """Three residual blocks."""
    stem = [nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU()]
    blocks = [Block(16, 16, 1), Block(16, 32, 2), Block(32, 64, 2)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


NETWORKS: dict[str, Callable[[], nn.Module]] = {"mlp": mlp, "conv": conv, "resnet": resnet}


class Classifier(pl.LightningModule):
    """Trains a network with Adam; notes the accuracy of each epoch, and that with statistics of all training images."""

    def __init__(self, net: nn.Module, images: Tensor, *, steps: int | None) -> None:
        super().__init__()
        self.net, self.images, self.steps = net, [images], steps
        self.accuracies: list[tuple[float, float]] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Returns the cross-entropy."""
        return functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Notes the accuracies of one batch, which is all of the validation split."""
        if not self.trainer.sanity_checking and self.trainer.state.fn != "validate":
            estimated = copy.deepcopy(self.net)
            recalibrate(estimated, self.images[0].split(64))
            pair = [(net.eval()(batch[0]).argmax(1) == batch[1]).float().mean().item() for net in (self.net, estimated)]
            self.accuracies.append((100 * pair[0], 100 * pair[1]))

    def configure_optimizers(self) -> Any:
        """Returns Adam, with a rate that falls to zero where the number of steps is given."""
        optimizer = torch.optim.Adam(self.parameters(), lr=3e-3)
        if self.steps is None:
            return optimizer
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def train(name: str, seed: int, epochs: int, *, decays: bool, callbacks: list[pl.Callback]) -> Classifier:
    """Trains one network and returns it with its accuracies."""
    digits = load_digits()
    images, labels = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16, torch.tensor(digits.target)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    trained, judged = order[:1300], order[1300:]
    torch.manual_seed(seed)
    model = Classifier(NETWORKS[name](), images[trained], steps=20 * epochs if decays else None)
    data = DataLoader(TensorDataset(images[trained], labels[trained]), batch_size=64, shuffle=True, drop_last=True)
    settings: dict[str, Any] = {"enable_checkpointing": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    trainer = pl.Trainer(
        max_epochs=epochs, logger=False, enable_progress_bar=False, callbacks=callbacks, accelerator="cpu", **settings
    )
    trainer.fit(model, data, DataLoader(TensorDataset(images[judged], labels[judged]), batch_size=len(judged)))
    return model


def row(model: Classifier, epochs: int) -> tuple[float, float, float]:
    """Returns the last accuracy, that with statistics of all images, and the largest gap after the first third."""
    later = model.accuracies[epochs // 3 :]
    return (*model.accuracies[-1], max(best - now for now, best in later))


def main() -> None:
    """Trains all networks and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--gamma", type=float, default=1.0)
    parser.add_argument("--bits-lr", type=float, default=0.06)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    quiet()
    refresh, rows, gaps = Normalization.refresh, [], []
    for name in options.networks:
        for decays in (False, True):
            found: dict[str, list[tuple[float, float, float]]] = {"float": [], "without": [], "with": []}
            for seed in range(options.seeds):
                arguments = {"gamma": options.gamma, "bits_lr": options.bits_lr, "cooldown": 0.8 if decays else 0.0}
                models = {"float": train(name, seed, options.epochs, decays=decays, callbacks=[])}
                for kind in ("without", "with"):
                    Normalization.refresh = refresh if kind == "with" else lambda *_: None  # type: ignore[method-assign]
                    callbacks: list[pl.Callback] = [SelfCompression(price="bits", **arguments)]
                    models[kind] = train(name, seed, options.epochs, decays=decays, callbacks=callbacks)
                pairs = zip(models["with"].parameters(), models["without"].parameters(), strict=True)
                assert all(torch.equal(a, b) for a, b in pairs)
                for kind, model in models.items():
                    found[kind].append(row(model, options.epochs))
            gaps += [gap for _, _, gap in found["with"]]
            for kind, values in found.items():
                last, estimated, gap = zip(*values, strict=True)
                texts = (" ".join(f"{v:.1f}" for v in some) for some in (last, estimated, gap))
                rows.append((name, "decaying" if decays else "constant", kind, *texts, f"{statistics.median(gap):.1f}"))
                print(rows[-1], flush=True)
    head = ("network", "rate", "estimate", "last epoch", "all images", "largest gap", "median of gaps")
    print(table(head, rows))
    print(f"with the estimate, the largest gap in any epoch of any run: {max(gaps):.1f} points")


if __name__ == "__main__":
    main()
