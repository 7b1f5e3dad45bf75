"""The Lightning callback: every hook calls one stage of the package."""

from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as pl
from torch import Tensor, nn

from lightning_selfcompress.activations.calibrate import check_bits
from lightning_selfcompress.files.checkpoint import couple_as_saved
from lightning_selfcompress.monitoring.hyperparameters import own_hyperparameters
from lightning_selfcompress.monitoring.monitor import Monitor
from lightning_selfcompress.quantize.layers import Quantized
from lightning_selfcompress.quantize.parameters import forget_quantized, quantized_layers
from lightning_selfcompress.size.prices import price_of
from lightning_selfcompress.size.report import size_report
from lightning_selfcompress.training.arguments import Gamma, Price, check_goal, check_numbers, check_skip, gamma_at
from lightning_selfcompress.training.budget import Budget, is_last_batch, start_budget
from lightning_selfcompress.training.depth_training import DepthTraining, let_train
from lightning_selfcompress.training.distillation import Distillation, start_distillation
from lightning_selfcompress.training.intercept import intercept
from lightning_selfcompress.training.messages import speak_beside, warn
from lightning_selfcompress.training.module_setup import ModuleSetup
from lightning_selfcompress.training.normalization import Normalization
from lightning_selfcompress.training.operation_uses import note_uses_for_price, uses_are_known
from lightning_selfcompress.training.other_callbacks import refuse
from lightning_selfcompress.training.removal_schedule import RemovalSchedule, start_removal
from lightning_selfcompress.training.strategies import check_strategy, shards_parameters
from lightning_selfcompress.training.teacher import Taught, Teacher


def _nothing() -> None:
    """Has nothing to take back."""


_PARTS = ("_module_setup", "_depths", "_removal", "_normalization", "_budget", "_distillation", "_monitor", "_restored")
_OF_ONE_FIT = {**dict.fromkeys(_PARTS), "_layers": (), "_restore": _nothing}
_SET_BY_LIGHTNING = ("log", "log_dict")  # methods of the module in training


class SelfCompression(pl.Callback):
    """Makes the network smaller while it trains: learned bit depths for every output channel, and a price for bits.

    Minimizes ``loss + gamma * price``, with gamma given or steered to a size. Learned depths and exponents are those of
    Cséfalvay and Imber, "Self-Compressing Neural Networks", arXiv 2301.13142. The LightningModule, its optimizers and
    its schedulers stay as they are: layers are converted in place, and depths and exponents are trained by an optimizer
    of the callback's own, a step after each step of the optimizer that trains their weights.

    Logged at the loggers' pace, and known to ModelCheckpoint and EarlyStopping as of the last logging or the end of an
    epoch, under ``selfcompress/``: ``bits_per_weight`` (the paper's Q), ``nbytes``, ``percent_of_float``,
    ``weights_left``, ``gamma``, ``size_loss`` (``gamma * price``), ``target`` and ``loss`` (of the last backward pass,
    without the size); at the end of each epoch layers under ``selfcompress_bits/`` and ``selfcompress_channels/``.
    TensorBoard gets pictures and charts as well. :class:`Objective` logs what is minimized, on the validation split.

    The price's gradient is evaluated when a backward pass begins, and added right before the step, not to the loss: it
    is the same gradient, exact under loss scaling, accumulation, manual optimization and skipped steps, and no loss is
    changed. What gets no gradient from the loss is not moved.

    >>> import lightning.pytorch as pl
    >>> from lightning_selfcompress import SelfCompression
    >>> from lightning_selfcompress.demo import DigitsData, DigitsNet
    >>> callback = SelfCompression(gamma=0.1, prune_every_n_epochs=2)
    >>> trainer = pl.Trainer(max_epochs=1, limit_train_batches=2, callbacks=[callback], logger=False)
    >>> trainer.fit(DigitsNet(), datamodule=DigitsData())  # doctest: +SKIP

    Args:
        gamma: Loss per bit of the average weight, >= 0; or a function of the global step that returns it. 0 quantizes
            without pressure on the size.
        target_size: The largest packed file to end with, instead of ``gamma``: bytes, a share of the float network such
            as ``"10%"``, or text such as ``"50KB"``. Gamma is steered so that the training ends at or just under it.
        price: What is made small, in bits per weight: ``"bytes"``, the codes in the packed file, through weights,
            exponents and depths; ``"bits"``, the paper's Q, through depths; ``"operations"``, Q by how often weights
            are used; or a function of the module that returns a scalar.
        initial_bits: Bit depth all channels start with, from 2 to 24. At 8 the network starts at its float function.
        bits_lr: Learning rate of depths and exponents, >= 0: about the bits a depth can move in one step. 0 holds
            them where they are.
        cooldown: Share of the training, at its end, over which ``bits_lr`` falls to zero in a straight line, from 0 to
            1. Depths that still jitter when training ends cost accuracy. Where the Trainer has neither ``max_epochs``
            nor ``max_steps``, or a single epoch of unknown length, there is none.
        skip: What to leave in float: names of modules (with everything inside), patterns such as ``"blocks.*.attn"``,
            or module types.
        prune_every_n_epochs: Epochs from one removal of dead channels to the next, >= 1; 0 removes none. A removal
            changes no output of the network: it is tried on a copy first.
        round_to: Channels are removed so that widths stay multiples of this, >= 1, where hardware wants it.
        teacher: A float network whose outputs the network is drawn to beside its own loss: ``"start"``, the network as
            it is when training begins; the path of a checkpoint of it; a network; or a :class:`Teacher`.
        activations: Bit depth of what layers read, from 2 to 8, for integer kernels; None leaves it in float.

    Raises:
        TypeError: If there is not exactly one of ``gamma`` and ``target_size``, or an argument is of another type.
        ValueError: If a number is out of its range, or there is no such price.
    """

    def __init__(
        self,
        gamma: Gamma | None = None,
        *,
        target_size: int | float | str | None = None,
        price: Price = "bytes",
        initial_bits: float = 8.0,
        bits_lr: float = 0.03,
        cooldown: float = 0.8,
        skip: Sequence[type[nn.Module] | str] = (),
        prune_every_n_epochs: int = 1,
        round_to: int = 1,
        teacher: Taught = None,
        activations: int | None = None,
    ) -> None:
        super().__init__()
        numbers = {"initial_bits": initial_bits, "bits_lr": bits_lr, "cooldown": cooldown, "round_to": round_to}
        check_numbers(prune_every_n_epochs=prune_every_n_epochs, **numbers)
        check_goal(gamma, target_size, bits_lr=bits_lr, prune_every_n_epochs=prune_every_n_epochs)
        price_of(price)  # raises where there is no such price
        self.gamma, self.target_size, self.price = gamma, target_size, price
        self.initial_bits, self.bits_lr, self.cooldown = float(initial_bits), float(bits_lr), float(cooldown)
        self.skip = (skip,) if isinstance(skip, (str, type)) else tuple(skip)
        check_skip(self.skip)
        self.prune_every_n_epochs, self.round_to = prune_every_n_epochs, round_to
        self.teacher = Teacher.of(teacher)
        self.activations = None if activations is None else check_bits(activations)
        self._skipped_before = 0  # steps, in earlier fits
        self._module_setup: ModuleSetup | None = None
        self._depths: DepthTraining | None = None
        self._removal: RemovalSchedule | None = None
        self._normalization: Normalization | None = None
        self._budget: Budget | None = None
        self._distillation: Distillation | None = None
        self._monitor: Monitor | None = None
        self._restore: Callable[[], None] = _nothing
        self._restored: dict[str, Any] | None = None  # a state for the next fit, whose optimizers do not exist yet
        self._layers: tuple[Quantized, ...] = ()  # of the module in training; to walk through it at every step is slow

    def __getstate__(self) -> dict[str, Any]:
        """The arguments: a copy of a callback is one that has not begun to train, as there is no Trainer in it."""
        own = {name: value for name, value in self.__dict__.items() if name not in _SET_BY_LIGHTNING}
        return {**own, **_OF_ONE_FIT, "_skipped_before": self.skipped_steps}

    @property
    def skipped_steps(self) -> int:
        """Steps of depths and exponents left out because a gradient was not finite."""
        return self._skipped_before if self._depths is None else self._depths.skipped_steps

    def size_loss(self, trainer: "pl.Trainer") -> float:
        """Gamma times the price of a Trainer's module, with the gamma of its last step."""
        price = self._make_price()(trainer.lightning_module).bits_per_weight()
        return self._gamma_now(trainer) * float(price.detach())

    def channel_bits(self, pl_module: "pl.LightningModule") -> dict[str, Tensor]:
        """Bits of every channel the module was converted with, by weight, ``(channels,)``; NaN where it was removed."""
        assert self._monitor is not None
        return self._monitor.channel_bits.of(pl_module)

    def setup(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        """Converts the layers there are, and those that the module's own ``setup`` and ``configure_model`` build."""
        speak_beside(trainer)
        if stage == "fit":
            check_strategy(trainer.strategy)
            refuse(self, trainer.callbacks)  # type: ignore[attr-defined]
        self._restored = None  # a state restored for a test is not one to go on with
        settings: Any = {"initial_bits": self.initial_bits, "skip": self.skip, "activations": self.activations}
        self._module_setup = ModuleSetup(trainer, **settings)
        self._module_setup.begin(pl_module, training=stage == "fit")
        shown = own_hyperparameters(gamma=self.gamma, target_size=self.target_size, price=self.price)
        self._monitor = self._monitor or Monitor(gamma=self._gamma_now, size_loss=self.size_loss, hyperparameters=shown)

    def on_fit_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Says what is compressed and what is not, and begins to train depths and to look for channels."""
        assert self._module_setup is not None
        assert self._monitor is not None
        goal = f"gamma={self.gamma!r}" if self.target_size is None else f"target_size={self.target_size!r}"
        told = f"SelfCompression({goal}, initial_bits={self.initial_bits:g})"
        self._module_setup.finish(pl_module, told, resumed=bool(self._restored))
        state, self._restored = self._restored or {}, None
        self._distillation = start_distillation(trainer, pl_module, self.teacher, state.get("teacher"))
        self._budget = start_budget(trainer, pl_module, self.target_size, state.get("budget"))
        every, round_to, removed = self.prune_every_n_epochs, self.round_to, state.get("removal")
        self._removal = start_removal(trainer, pl_module, every_n_epochs=every, round_to=round_to, state=removed)
        self._normalization = None if shards_parameters(trainer.strategy) else Normalization(pl_module)
        target = self._budget.target if self._budget is not None else None
        self._monitor.begin(trainer, pl_module, target, state.get("monitor"))
        self._depths = DepthTraining(
            trainer,
            pl_module,
            gamma=self._gamma_at,
            price=self._make_price(),
            lr=self.bits_lr,
            cooldown=self.cooldown,
            skipped_steps=self.skipped_steps,
            state=state or None,
        )

    def on_train_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Makes the size known to callbacks that monitor it."""
        assert self._monitor is not None
        self._monitor.refresh(trainer, pl_module)

    def on_train_epoch_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Looks for the layers there are, should any have been replaced since the last epoch."""
        self._take_up_layers(trainer, pl_module)
        if self._normalization is not None:
            self._normalization.begin_epoch()

    def on_train_batch_start(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", batch: Any, batch_idx: int
    ) -> None:
        """Keeps up with what others did between batches: weights loaded or swapped, optimizers made anew."""
        assert self._module_setup is not None
        assert self._depths is not None
        if self._distillation is not None:
            self._distillation.close()
        self._module_setup.recalibrate()
        if self._module_setup.find(pl_module, batch, batch_idx):
            self._depths.renew(trainer)
            self._take_up_layers(trainer, pl_module)
        self._depths.before_batch(trainer, batch_idx)
        if batch_idx % trainer.accumulate_grad_batches == 0:
            forget_quantized(self._layers)
        if self.price == "operations" and not uses_are_known(pl_module):
            note_uses_for_price(trainer, pl_module, batch, batch_idx)
            self._depths.resize()
        if self._budget is not None and not self._budget.begun:
            channels = self._removal.look_ahead(trainer, pl_module, batch, batch_idx) if self._removal else None
            self._budget.begin(pl_module, channels, self.round_to)
        if self._removal is not None:
            if self._removal.makes_up_for(trainer, pl_module, batch, batch_idx):
                self._remove(trainer, pl_module)
            self._removal.before_batch(trainer, pl_module)
        if self._normalization is not None:
            self._normalization.keep(trainer, pl_module, batch, batch_idx)
        if self._distillation is not None:
            self._distillation.arm(pl_module)  # outside of what watches the step

    def on_before_backward(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", loss: Tensor) -> None:
        """Evaluates the size's gradient for the steps to come; the loss stays what it is."""
        assert self._depths is not None
        assert self._monitor is not None
        self._depths.stage()
        self._monitor.loss = loss.detach()

    def on_train_batch_end(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Fades what is dead, and logs the size when the loggers are due."""
        assert self._depths is not None
        assert self._monitor is not None
        for layer in self._layers if batch_idx == 0 else ():
            layer.pristine = False  # of frozen layers too, whose weights no gradient reaches
        if self._removal is not None and self._removal.after_batch(trainer, pl_module):
            self._depths.resize()
        if self._budget is not None:
            self._budget.update(trainer, pl_module, self._removal.channels if self._removal else None, batch_idx)
            if is_last_batch(trainer, batch_idx):
                self._land(trainer, pl_module)
        self._monitor.end_batch(trainer, pl_module)

    def on_train_epoch_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Has the module's own ``on_train_epoch_end`` see the widths of its epoch: removal comes right after it."""
        self._restore()

        def around(method: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            result = method(*args, **kwargs)
            self._end_epoch(trainer, pl_module)
            return result

        self._restore = intercept(pl_module, "on_train_epoch_end", around)

    def _end_epoch(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Removes dead channels, and shows what is left."""
        assert self._depths is not None
        assert self._monitor is not None
        if self._normalization is not None:
            self._normalization.refresh(trainer, pl_module)
        if self._removal is not None and self._removal.is_due(trainer.current_epoch):
            self._remove(trainer, pl_module)
        report = size_report(pl_module)
        if self._budget is not None:
            self._budget.correct(pl_module, report.nbytes)
        for text in self._depths.problems(self._gamma_now(trainer), report):
            warn(f"SelfCompression: {text}")
        self._monitor.end_epoch(trainer, pl_module, report)

    def _remove(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Removes dead channels now."""
        assert self._depths is not None
        assert self._monitor is not None
        assert self._removal is not None
        shrunk = self._removal.carry_out(trainer, pl_module)
        self._depths.resize(shrunk)
        self._monitor.removed(shrunk)

    def _land(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Removes what is dead, and ends within the budget, so that what is validated and saved is what is exported."""
        assert self._depths is not None
        assert self._budget is not None
        if self._removal is not None and self._removal.is_due(trainer.current_epoch):
            self._remove(trainer, pl_module)
        self._budget.land(trainer, pl_module, self._normalization)

    def on_validation_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Takes up what a checkpoint that was just loaded says of the network's channels."""
        assert self._monitor is not None
        couple_as_saved(pl_module, self._restored)
        self._monitor.begin_validation(trainer)
        if self._normalization is not None and trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._normalization.refresh(trainer, pl_module)

    on_test_start = on_predict_start = on_validation_start

    def on_validation_batch_start(
        self,
        trainer: "pl.Trainer",
        pl_module: "pl.LightningModule",
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Has a batch of validation watched, of the sanity check or of the first validation."""
        if self._removal is not None and trainer.state.fn == "fit":
            self._removal.before_validation_batch(trainer, pl_module, dataloader_idx)

    def on_validation_epoch_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Refreshes what ModelCheckpoint and EarlyStopping may monitor."""
        assert self._monitor is not None
        if not trainer.sanity_checking:
            self._monitor.refresh(trainer, pl_module)

    def on_validation_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Forgets the weights that were validated, which a moving average may have lent."""
        assert self._monitor is not None
        if not trainer.sanity_checking:
            self._monitor.end_validation(trainer)
        forget_quantized(quantized_layers(pl_module))

    def on_train_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Ends within the budget where another callback has stopped the training before its time."""
        assert self._monitor is not None
        if self._budget is not None and not self._budget.landed:
            self._land(trainer, pl_module)
            self._monitor.refresh(trainer, pl_module)

    def on_fit_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Lets go of the user's optimizers; depths are held from now on, as no size presses on them."""
        assert self._monitor is not None
        self._monitor.end(trainer, pl_module)
        self._detach()
        let_train(pl_module, False)

    def on_exception(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", exception: BaseException) -> None:
        """Leaves module and optimizers in order when training breaks off."""
        self.teardown(trainer, pl_module, trainer.state.fn)  # type: ignore[arg-type]

    def teardown(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        """Undoes what :meth:`setup` wrapped; the layers stay converted."""
        self._detach()
        if self._module_setup is not None:
            self._module_setup.close(pl_module)
        if stage == "fit":
            let_train(pl_module, False)

    def state_dict(self) -> dict[str, Any]:
        """State of the optimizers of depths and exponents, in the user's optimizers' order, and of the removal."""
        depths = {"depth_optimizers": [], "skipped_steps": self.skipped_steps}
        depths = depths if self._depths is None else self._depths.state_dict()
        return depths | {
            "removal": self._removal.state_dict() if self._removal is not None else None,
            "budget": self._budget.state_dict() if self._budget is not None else None,
            "teacher": self._distillation.state_dict() if self._distillation is not None else None,
            "monitor": self._monitor.state_dict() if self._monitor is not None else None,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps a state for the next ``fit``, whose optimizers do not exist yet."""
        self._restored = state_dict

    def _take_up_layers(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Goes by the layers there are, which free quantized weights early where none is needed."""
        self._layers = tuple(quantized_layers(pl_module))
        for layer in self._layers:
            layer.release_after_backward = pl_module.automatic_optimization and trainer.accumulate_grad_batches == 1
        if self._removal is not None:
            self._removal.begin_epoch(pl_module)

    def _detach(self) -> None:
        self._layers = ()
        self._restore()
        for part in (self._distillation, self._normalization, self._removal, self._depths, self._monitor):
            if part is not None:
                part.close()

    def _make_price(self) -> Callable[[nn.Module], Any]:
        return price_of(self.price, narrow=self.target_size is not None)

    def _gamma_at(self, step: int) -> float:
        if self._budget is not None:
            return self._budget.gamma
        return gamma_at(self.gamma, step)

    def _gamma_now(self, trainer: "pl.Trainer") -> float:
        return self._gamma_at(trainer.global_step) if self._depths is None else self._depths.gamma(trainer)
