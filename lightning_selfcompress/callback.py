"""The Lightning callback: every hook calls one stage of the package."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import zip_longest
from numbers import Real
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from lightning_selfcompress.files.checkpoint import follow_shapes
from lightning_selfcompress.quantize.layers import Quantized
from lightning_selfcompress.quantize.parameters import quantized_parameters
from lightning_selfcompress.removal.optimizer_state import shrink_optimizer
from lightning_selfcompress.removal.surgery import Shrunk, remove
from lightning_selfcompress.size.price import ModelSize
from lightning_selfcompress.size.report import size_report
from lightning_selfcompress.training.depth_optimizer import DepthOptimizer, cooldown_factor, take_out
from lightning_selfcompress.training.module_setup import Conversion, let_train
from lightning_selfcompress.training.other_callbacks import averages, refuse
from lightning_selfcompress.training.removal_schedule import Removal, step_arguments
from lightning_selfcompress.training.scalars import layer_scalars, log_histogram, scalars
from lightning_selfcompress.training.strategies import check_strategy, gradient_average, shards_parameters
from lightning_selfcompress.training.strategy_guard import guard_strategy

Gamma = float | Callable[[int], float]


class SelfCompression(pl.Callback):
    """Makes the network smaller while it trains: learned bit depths for every output channel, and a price for bits.

    Minimizes ``loss + gamma * Q`` with Q the network's size in bits per original weight (Cséfalvay and Imber,
    "Self-Compressing Neural Networks", arXiv 2301.13142). The LightningModule, its optimizers and its schedulers stay
    as they are: layers are converted in place, and depths and exponents are trained by an optimizer of the callback's
    own, a step after each step of the optimizer that trains their weights. One in a Trainer: Q is the whole network's.

    Logs ``selfcompress/bits_per_weight``, ``selfcompress/nbytes`` and ``selfcompress/channels`` at the loggers' pace
    (also in ``trainer.callback_metrics``, for ModelCheckpoint and EarlyStopping, where they are as of the last logging
    or the end of an epoch), and at the end of each epoch the bits of each layer and a histogram of all depths.

    The size's gradient is added to that of the depths right before their step, not to the loss: it is the same
    gradient, exact under loss scaling, accumulation, manual optimization and skipped steps, and no loss is changed.
    A depth whose weight gets no gradient from the loss is not moved.

    Args:
        gamma: Loss per bit of the average weight, >= 0; or a function of the global step that returns it. 0 quantizes
            without pressure on the size.
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

    Raises:
        TypeError: If ``gamma`` is neither a number nor a function, or ``skip`` holds other than strings and types.
        ValueError: If a number is out of its range.
    """

    def __init__(
        self,
        gamma: Gamma,
        *,
        initial_bits: float = 8.0,
        bits_lr: float = 0.03,
        cooldown: float = 0.8,
        skip: Sequence[type[nn.Module] | str] = (),
        prune_every_n_epochs: int = 1,
        round_to: int = 1,
    ) -> None:
        super().__init__()
        if not callable(gamma):
            _check_gamma(gamma)
        if not _is_number(initial_bits) or not 2 <= initial_bits <= 24:
            raise ValueError(f"Expected initial_bits from 2 to 24, got {initial_bits!r}.")
        if not _is_number(bits_lr) or not 0 <= bits_lr < math.inf:
            raise ValueError(f"Expected bits_lr >= 0 (bits a step), got {bits_lr!r}.")
        if not _is_number(cooldown) or not 0 <= cooldown <= 1:
            raise ValueError(f"Expected cooldown from 0 to 1 (a share of the training), got {cooldown!r}.")
        for name, value, least in (("prune_every_n_epochs", prune_every_n_epochs, 0), ("round_to", round_to, 1)):
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"Expected {name} to be a whole number >= {least}, got {value!r}.")
        self.gamma = gamma
        self.initial_bits = float(initial_bits)
        self.bits_lr = float(bits_lr)
        self.cooldown = float(cooldown)
        self.skip = (skip,) if isinstance(skip, (str, type)) else tuple(skip)
        for entry in self.skip:
            if not isinstance(entry, (str, type)):
                raise TypeError(f"Expected module names, patterns or nn.Module types in skip, got {entry!r}.")
        self.prune_every_n_epochs, self.round_to = prune_every_n_epochs, round_to
        self._removal: Removal | None = None
        self._overdue = False  # a removal that was due before there was a batch to prove it with
        self._told: set[str] = set()
        self._depth_optimizers: list[DepthOptimizer] = []
        self._restored: dict[str, Any] | None = None
        self._earlier_skipped = 0
        self._conversion = Conversion(initial_bits=self.initial_bits, skip=self.skip)
        self._group_lengths: list[int] = []
        self._layers: tuple[Quantized, ...] = ()  # of the module in training; to walk through it at every step is slow
        self._load_hooks: list[RemovableHandle] = []

    @property
    def skipped_steps(self) -> int:
        """Steps of depths and exponents left out because a gradient was not finite."""
        return self._earlier_skipped + sum(d.skipped_steps for d in self._depth_optimizers)

    def setup(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        """Converts the layers there are, and those that the module's own ``setup`` and ``configure_model`` build."""
        if stage == "fit":
            check_strategy(trainer.strategy)
            refuse(self, trainer.callbacks)  # type: ignore[attr-defined]
        self._restored = None  # a state restored for a test is not one to go on with
        copies = partial(averages, trainer.callbacks)  # type: ignore[attr-defined]
        self._conversion.begin(pl_module, copies, training=stage == "fit")
        for network in (pl_module, *copies()):
            follow_shapes(network)
        if not shards_parameters(trainer.strategy):
            guard_strategy(trainer.strategy)
        if stage == "fit":
            let_train(quantized_parameters(pl_module))

    def on_fit_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Says what is compressed and what is not, and takes depths and exponents out of the user's optimizers."""
        self._conversion.unwrap(pl_module)
        plan = self._conversion.convert(pl_module, complete=True)
        rank_zero_info(f"SelfCompression(gamma={self.gamma!r}, initial_bits={self.initial_bits:g})\n{plan}")
        frozen = [p.name for p in quantized_parameters(pl_module) if not p.latent.requires_grad]
        if frozen:
            rank_zero_info(
                f"Frozen, so kept at their bit depths: {', '.join(frozen[:3])}{', ...' if len(frozen) > 3 else ''} "
                f"({len(frozen)} weights). To leave them in float and out of the size, name them in skip=."
            )
        self._start_removal(trainer, pl_module)
        self._attach(trainer, pl_module)

    def on_train_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Makes the size known to callbacks that monitor it, and frees quantized weights early where none is needed."""
        trainer.callback_metrics.update(_tensors(scalars(size_report(pl_module))))
        step_each_backward = pl_module.automatic_optimization and trainer.accumulate_grad_batches == 1
        for layer in _quantized_layers(pl_module):
            layer.release_after_backward = step_each_backward

    def on_train_epoch_start(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Looks for the layers there are, should any have been replaced since the last epoch."""
        self._layers = tuple(_quantized_layers(pl_module))

    def on_train_batch_start(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", batch: Any, batch_idx: int
    ) -> None:
        """Keeps up with what others did between batches: weights loaded or swapped, parameters added to optimizers."""
        self._conversion.recalibrate()
        owners = [depth_optimizer.owner for depth_optimizer in self._depth_optimizers]
        if owners and any(a is not b for a, b in zip_longest(owners, trainer.optimizers)):
            self._attach_again(trainer, pl_module)
        if self._group_lengths != [len(group["params"]) for o in trainer.optimizers for group in o.param_groups]:
            self._take_out(trainer, pl_module)
        if batch_idx % trainer.accumulate_grad_batches == 0:
            _forget_quantized(self._layers)
        if self._removal is not None:
            if self._overdue:
                self._removal.capture(*step_arguments(pl_module, batch, batch_idx))
                self._remove(trainer, pl_module)
            self._removal.before_batch(pl_module)
        for depth_optimizer in self._depth_optimizers:
            let_train(depth_optimizer.size.parameters)  # what was frozen may have been unfrozen
            depth_optimizer.set_lr(self.bits_lr * cooldown_factor(_progress(trainer, batch_idx), self.cooldown))

    def on_train_batch_end(
        self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Fades what is dead, and logs bits per weight, bytes and channels when the loggers are due."""
        if self._removal is not None and self._removal.after_batch(pl_module):
            self._resize(pl_module)
        if pl_module.automatic_optimization and trainer.fit_loop._should_accumulate():
            return
        if trainer._logger_connector.should_update_logs or trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._log(trainer, scalars(size_report(pl_module, exact=False)))
        if any(map(_saves_between_epochs, trainer.checkpoint_callbacks)):
            trainer.callback_metrics.update(_tensors(scalars(size_report(pl_module))))

    def on_train_epoch_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Removes dead channels; logs the totals, each layer's bits and channels, and a histogram of depths."""
        if self._removal is not None and (trainer.current_epoch + 1) % self.prune_every_n_epochs == 0:
            self._overdue = not self._removal.captured
            if not self._overdue:
                self._remove(trainer, pl_module)
        report = size_report(pl_module)
        self._log(trainer, scalars(report) | layer_scalars(report))
        log_histogram(trainer.loggers, pl_module, trainer.fit_loop.epoch_loop._batches_that_stepped)

    def on_validation_epoch_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Refreshes what ModelCheckpoint and EarlyStopping may monitor."""
        if not trainer.sanity_checking:
            trainer.callback_metrics.update(_tensors(scalars(size_report(pl_module))))

    def on_validation_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Forgets the weights that were validated, which a moving average may have lent."""
        _forget_quantized(_quantized_layers(pl_module))

    def on_fit_end(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Lets go of the user's optimizers; depths are held from now on, as no size presses on them."""
        self._layers = ()
        self._detach()
        let_train(quantized_parameters(pl_module), False)

    def on_exception(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", exception: BaseException) -> None:
        """Leaves module and optimizers in order when training breaks off."""
        self._layers = ()
        self.teardown(trainer, pl_module, trainer.state.fn)  # type: ignore[arg-type]

    def teardown(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule", stage: str) -> None:
        """Undoes what :meth:`setup` wrapped; the layers stay converted."""
        self._detach()
        self._conversion.unwrap(pl_module)
        if stage == "fit":
            let_train(quantized_parameters(pl_module), False)

    def state_dict(self) -> dict[str, Any]:
        """State of the optimizers of depths and exponents, in the user's optimizers' order, and of the removal."""
        states = [None if d.adam is None else d.adam.state_dict() for d in self._depth_optimizers]
        removal = self._removal.state_dict() if self._removal is not None else None
        return {"depth_optimizers": states, "skipped_steps": self.skipped_steps, "removal": removal}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keeps a state for the next ``fit``, whose optimizers do not exist yet."""
        self._restored = state_dict

    def _attach(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        self._earlier_skipped, self._depth_optimizers = self.skipped_steps, []
        self._take_out(trainer, pl_module)
        self._load_hooks = [  # a state is loaded after every callback's on_fit_start, and BaseFinetuning's adds groups
            o.register_load_state_dict_pre_hook(lambda *_: self._take_out(trainer, pl_module))
            for o in trainer.optimizers
        ]
        size = ModelSize.of(pl_module, self._removal.channels if self._removal is not None else None)
        owners = {id(p): o for o in reversed(trainer.optimizers) for group in o.param_groups for p in group["params"]}
        if owners.keys().isdisjoint(id(p) for p in pl_module.parameters()):
            _check_foreign(trainer.optimizers, pl_module)
            rank_zero_warn("SelfCompression: no optimizer trains this module, so bit depths are not trained either.")
            return
        wrappers = pl_module.optimizers(use_pl_optimizer=True)
        wrappers = wrappers if isinstance(wrappers, list) else [wrappers]
        for optimizer, wrapper in zip(trainer.optimizers, wrappers, strict=True):
            own = [p for p in size.parameters if owners.get(id(p.latent), trainer.optimizers[0]) is optimizer]
            self._depth_optimizers.append(
                DepthOptimizer(
                    optimizer,
                    size.part(own),
                    lr=self.bits_lr,
                    gamma=lambda: self._gamma_at(trainer.global_step),
                    gradient_scale=lambda: _loss_scale(trainer),
                    average=gradient_average(trainer.strategy),
                    wrappers=(wrapper,),
                )
            )
        self._restore()
        for depth_optimizer in self._depth_optimizers:
            depth_optimizer.attach()

    def _attach_again(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """Goes on with optimizers that were made anew during training."""
        self._restored = self.state_dict()
        self._detach()
        self._attach(trainer, pl_module)

    def _restore(self) -> None:
        state, self._restored = self._restored, None
        if state is None:
            return
        self._earlier_skipped = state["skipped_steps"]
        saved = state["depth_optimizers"]
        if saved and len(saved) != len(self._depth_optimizers):
            raise ValueError(
                f"Expected the {len(saved)} optimizer(s) of the checkpoint, got {len(self._depth_optimizers)}. Resume "
                f"with the configure_optimizers that the checkpoint was made with."
            )
        for depth_optimizer, one in zip(self._depth_optimizers, saved, strict=False):
            if depth_optimizer.adam is not None and one is not None:
                depth_optimizer.adam.load_state_dict(one)

    def _start_removal(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        self._removal, self._told = None, set()
        if not self.prune_every_n_epochs:
            return
        if shards_parameters(trainer.strategy):
            rank_zero_warn(
                f"SelfCompression: {type(trainer.strategy).__name__} shards parameters, so no channels are removed; "
                f"bit depths are learned all the same. To remove channels, train with one device or DDP; "
                f"prune_every_n_epochs=0 hides this."
            )
            return
        state = self._restored["removal"] if self._restored is not None else None
        self._removal, self._overdue = Removal(pl_module, round_to=self.round_to, state=state), False

    def _remove(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        """The same removal on every rank: rank 0 plans and proves it."""
        removal, self._overdue = self._removal, False
        assert removal is not None
        plan = removal.plan(trainer, pl_module) if trainer.is_global_zero else None
        edits, numbers, text = trainer.strategy.broadcast(
            (plan.edits, plan.channels, str(plan)) if plan is not None else ((), (), "")
        )
        for line in text.splitlines():
            if line.startswith("Removed") or (line.startswith("  ") and line.strip() not in self._told):
                self._told.add(line.strip())
                rank_zero_info(f"SelfCompression, epoch {trainer.current_epoch}: {line.strip()}")
        if not edits:
            return
        shrunk = removal.apply(pl_module, edits, numbers)
        for optimizer in trainer.optimizers:
            shrink_optimizer(optimizer, shrunk)
        for averaged in averages(trainer.callbacks):  # type: ignore[attr-defined]
            remove(averaged, edits)
        self._resize(pl_module, shrunk)
        configure_ddp = getattr(trainer.strategy, "configure_ddp", None)
        if callable(configure_ddp):
            trainer.strategy.model = pl_module
            configure_ddp()

    def _resize(self, pl_module: "pl.LightningModule", shrunk: Sequence[Shrunk] = ()) -> None:
        channels = self._removal.channels if self._removal is not None else None
        size = ModelSize.of(pl_module, channels)
        for depth_optimizer in self._depth_optimizers:
            depth_optimizer.resize(size.part(depth_optimizer.size.parameters), shrunk)

    def _detach(self) -> None:
        if self._removal is not None:
            self._removal.close()
        for depth_optimizer in self._depth_optimizers:
            depth_optimizer.detach()
        while self._load_hooks:
            self._load_hooks.pop().remove()

    def _take_out(self, trainer: "pl.Trainer", pl_module: "pl.LightningModule") -> None:
        learned = [t for p in quantized_parameters(pl_module) for t in (p.raw_depth, p.exponent)]
        for optimizer in trainer.optimizers:
            take_out(optimizer, learned)
        self._group_lengths = [len(group["params"]) for o in trainer.optimizers for group in o.param_groups]

    def _gamma_at(self, step: int) -> float:
        if not callable(self.gamma):
            return float(self.gamma)
        gamma = self.gamma(step)
        _check_gamma(gamma, f" from the function at step {step}")
        return float(gamma)

    def _log(self, trainer: "pl.Trainer", values: dict[str, float]) -> None:
        trainer.callback_metrics.update(_tensors(values))
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.fit_loop.epoch_loop._batches_that_stepped)


def _check_foreign(optimizers: Sequence[Optimizer], pl_module: "pl.LightningModule") -> None:
    foreign = [p for o in optimizers for group in o.param_groups for p in group["params"]]
    if foreign:
        raise ValueError(
            f"Expected an optimizer of this {type(pl_module).__name__}, got one of {len(foreign)} parameters that are "
            f"none of its own (the first has the shape {tuple(foreign[0].shape)}): nothing of it would be trained. "
            f"Make the optimizer in configure_optimizers, from self.parameters()."
        )


def _saves_between_epochs(checkpoint: Any) -> bool:
    """Whether a ModelCheckpoint may record a size after any batch: it has to be that of the file."""
    by_size = str(getattr(checkpoint, "monitor", "")).startswith("selfcompress/")
    return by_size and any(getattr(checkpoint, f"_{n}", None) for n in ("every_n_train_steps", "train_time_interval"))


def _quantized_layers(pl_module: "pl.LightningModule") -> Iterator[Quantized]:
    return (layer for layer in pl_module.modules() if isinstance(layer, Quantized))


def _forget_quantized(layers: Iterable[Quantized]) -> None:
    for layer in layers:
        layer.forget_quantized()


def _progress(trainer: "pl.Trainer", batch_idx: int) -> float:
    """Share of the training that is done, by whichever of epochs and steps ends it first; 0 if neither does."""
    batches = trainer.num_training_batches
    epochs = trainer.current_epoch + (batch_idx / batches if batches not in (0, math.inf) else 0.0)
    by_epochs = epochs / trainer.max_epochs if trainer.max_epochs and trainer.max_epochs > 0 else 0.0
    by_steps = trainer.global_step / trainer.max_steps if trainer.max_steps > 0 else 0.0
    return max(by_epochs, by_steps)


def _loss_scale(trainer: "pl.Trainer") -> float:
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return 1.0 if scaler is None else float(scaler.get_scale())


def _tensors(values: dict[str, float]) -> dict[str, Any]:
    return {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _check_gamma(gamma: Any, origin: str = "") -> None:
    if not _is_number(gamma):
        raise TypeError(
            f"Expected gamma to be a number >= 0 (loss per bit of the average weight) or a function of the global "
            f"step, got {gamma!r}{origin}."
        )
    if not 0 <= gamma < math.inf:
        raise ValueError(f"Expected a finite gamma >= 0 (loss per bit of the average weight), got {gamma!r}{origin}.")
