"""What training minimizes, on the validation split: the figure by which the best checkpoint is chosen."""

import lightning.pytorch as pl

from lightning_selfcompress.monitoring.scalars import PREFIX, log, make_known
from lightning_selfcompress.tensors import is_a


class Objective(pl.Callback):
    """Logs ``selfcompress/objective`` at the end of each validation: a validation loss plus ``gamma * price``.

    It is what training minimizes, measured on data that training does not see, so the checkpoint in which it is least
    is the best one. Without a SelfCompression callback in the Trainer it is the validation loss alone, so a float
    network is chosen by the same line.

    >>> from lightning.pytorch.callbacks import ModelCheckpoint
    >>> from lightning_selfcompress import Objective, SelfCompression
    >>> best = ModelCheckpoint(monitor="selfcompress/objective")
    >>> callbacks = [SelfCompression(gamma=0.05), Objective("val_loss"), best]

    Args:
        loss: Name under which the module logs its loss in validation.

    Raises:
        ValueError: At the end of a validation, if nothing of that name was logged.
    """

    def __init__(self, loss: str) -> None:
        super().__init__()
        self.loss = loss

    def on_validation_epoch_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Makes the objective known as soon as the loss is, for callbacks that are listed before this one."""
        if not trainer.sanity_checking and self.loss in trainer.callback_metrics:
            make_known(trainer, self._objective(trainer))

    def on_validation_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Logs the objective; a module may log its loss as late as in its own ``on_validation_epoch_end``."""
        if trainer.sanity_checking:
            return
        if self.loss not in trainer.callback_metrics:
            known = ", ".join(sorted(map(repr, trainer.callback_metrics))) or "nothing"
            raise ValueError(
                f"Expected a loss {self.loss!r} that the module logs in validation, found {known}. Log it with "
                f"self.log({self.loss!r}, loss) in validation_step, or name another one in Objective()."
            )
        log(trainer, self._objective(trainer))

    def _objective(self, trainer: "pl.Trainer") -> dict[str, float]:
        compression = [c for c in trainer.callbacks if is_a(c, "SelfCompression")]  # type: ignore[attr-defined]
        size_loss = sum(c.size_loss(trainer) for c in compression)
        return {f"{PREFIX}/objective": float(trainer.callback_metrics[self.loss]) + size_loss}
