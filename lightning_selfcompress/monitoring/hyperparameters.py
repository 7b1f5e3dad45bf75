"""The callback's arguments among the hyperparameters of TensorBoard, by which runs compare in the tab HParams."""

from argparse import Namespace
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from lightning_selfcompress.monitoring.scalars import PREFIX
from lightning_selfcompress.tensors import is_a, put_on
from lightning_selfcompress.training.lightning_private import has_default_metric

DEFAULT = "hp_metric"  # which Lightning declares where no metric is named


def own_hyperparameters(*, gamma: Any, target_size: Any, price: Any) -> dict[str, float | str | None]:
    """Returns what is shown of the callback's arguments: numbers and texts, or None for what was not given.

    >>> own_hyperparameters(gamma=None, target_size="20KB", price="bytes")
    {'selfcompress/gamma': None, 'selfcompress/target_size': '20KB', 'selfcompress/price': 'bytes'}

    Args:
        gamma: A number, or a function of the step, whose name is shown.
        target_size: A size in bytes, as a share, or as text.
        price: The name of a price, or a function, whose name is shown.
    """
    values = {"gamma": gamma, "target_size": None if target_size is None else str(target_size), "price": price}
    return {f"{PREFIX}/{name}": _shown(value) for name, value in values.items()}


def _shown(value: Any) -> Any:
    return getattr(value, "__name__", type(value).__name__) if callable(value) else value


class Hyperparameters:
    """Adds hyperparameters to those that a module or its user logs, or logs them alone where nobody else does.

    TensorBoard reads the first hyperparameters of a run and no later ones, and Lightning logs those of a module before
    any metric is known. So the arguments join the first ones that are logged, whoever logs them, and the final metric
    is written into Lightning's default metric, unless the module logs that itself. Neither ``hparams.yaml`` nor
    ``logger.hparams`` has the arguments.

    Args:
        loggers: Loggers of Lightning, of which those of TensorBoard are taken.
        own: Names and values, each a number, a text or None.
    """

    def __init__(self, loggers: Iterable[Any], own: Mapping[str, Any]) -> None:
        self._own = {name: value for name, value in own.items() if value is not None}
        self._sessions = [_Session(logger, self._own) for logger in loggers if is_a(logger, "TensorBoardLogger")]

    def follow(self, sizes: Mapping[str, float]) -> None:
        """Has the arguments join what is logged from now on.

        Args:
            sizes: What is known of the size before training.
        """
        for session in self._sessions:
            session.follow(sizes)

    def log(self, metric: tuple[str, float] | None, sizes: Mapping[str, float], *, step: int) -> None:
        """Logs the arguments where nobody has logged hyperparameters.

        Args:
            metric: Name and value of the metric that matters, if there is one.
            sizes: What is known of the size.
            step: The x axis.
        """
        for session in self._sessions:
            session.log(metric, sizes, step)

    def fill_default(self, value: float, *, step: int) -> None:
        """Gives Lightning's default metric a value where it was declared without one.

        Args:
            value: The metric that matters.
            step: The x axis.
        """
        for session in self._sessions:
            session.fill_default(value, step)

    def close(self) -> None:
        """Leaves the loggers as they were."""
        for session in self._sessions:
            session.let_go()


class _Session:
    """The hyperparameters of one logger."""

    def __init__(self, logger: Any, own: Mapping[str, Any]) -> None:
        self._logger, self._own = logger, own
        self._logged = False
        self._declared = False  # the default metric, without a value
        self._others: dict[str, Any] = {}  # which were logged, but not shown, since no metric came with them
        self.let_go: Callable[[], None] = lambda: None

    def follow(self, sizes: Mapping[str, float]) -> None:
        original = self._logger.log_hyperparams

        def joined(params: Any, metrics: Any = None, step: int | None = None) -> None:
            given = metrics if metrics is None or isinstance(metrics, dict) else {DEFAULT: metrics}
            params = dict(vars(params)) if isinstance(params, Namespace) else params
            shown = bool(given) or (given is None and has_default_metric(self._logger))
            if shown and isinstance(params, dict) and not self._logged:
                self._logged, self._declared = True, given is None
                self._write(original, params, (given or {DEFAULT: -1}) | dict(sizes), step)
                return
            self._logged |= shown
            self._others |= params if isinstance(params, dict) else {}  # what is no dict is left to Lightning
            original(params, given, step)

        self.let_go = put_on(self._logger, "log_hyperparams", joined)

    def log(self, metric: tuple[str, float] | None, sizes: Mapping[str, float], step: int) -> None:
        if not self._logged:
            self._logged = True
            self.let_go()
            own = dict([metric]) if metric is not None else {}
            self._write(self._logger.log_hyperparams, self._others, own | dict(sizes), step)

    def fill_default(self, value: float, step: int) -> None:
        if self._declared:
            self._logger.log_metrics({DEFAULT: value}, step=step)

    def _write(self, log: Callable[..., None], params: dict[str, Any], metrics: dict[str, float], step: Any) -> None:
        log({**params, **self._own}, metrics, step)
        for name in self._own:
            self._logger.hparams.pop(name, None)
