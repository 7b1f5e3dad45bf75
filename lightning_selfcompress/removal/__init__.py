"""Dead channels leave a network: planned, proved in a dry run, and taken out of modules and optimizers alike."""

from lightning_selfcompress.removal.dry_run import prove
from lightning_selfcompress.removal.optimizer_state import shrink_optimizer
from lightning_selfcompress.removal.plan import RemovalPlan, plan_removal
from lightning_selfcompress.removal.surgery import remove

__all__ = ["RemovalPlan", "plan_removal", "prove", "remove", "shrink_optimizer"]
