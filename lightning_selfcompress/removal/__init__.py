"""The removal of dead channels: a plan, a dry run that proves it, and surgery on modules and optimizers."""

from lightning_selfcompress.removal.dry_run import prove
from lightning_selfcompress.removal.optimizer_state import shrink_optimizer
from lightning_selfcompress.removal.plan import RemovalPlan, plan_removal
from lightning_selfcompress.removal.surgery import remove

__all__ = ["RemovalPlan", "plan_removal", "prove", "remove", "shrink_optimizer"]
