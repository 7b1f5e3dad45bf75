"""The controller that moves gamma so that the size follows its set point."""

import math
from dataclasses import dataclass

FIRST = 0.1  # gamma at the start, below what presses on a network


PROPORTIONAL = 3.0  # what an error adds to log gamma as long as it is there


LAG = 40.0  # steps in which a lasting error adds as much again


AHEAD = 20.0  # steps that the error is foreseen over: a size goes on falling for a while


SMOOTH = 0.7  # share of the earlier rate of change in its running mean


FASTEST = 0.1  # most that log gamma changes in a step


RELEASE = 3.0  # how much more an error below the set point counts: what is gone is slow to come back


LEAST, MOST = 1e-7, 1e6  # of gamma


@dataclass
class Controller:
    """A proportional-integral law in log gamma on a foreseen error, with limits on its slew and its integral.

    With the error ``e = log(size / set point)`` and its rate of change r, a running mean, the foreseen error is
    ``f = e + AHEAD r``, times :data:`RELEASE` where it is below 0. With steps s,
    ``log gamma = P (f + integral of f ds / LAG)``. Where a limit holds gamma, the integral waits (anti-windup).

    Args:
        integral: The part of log gamma that has built up.
        log_gamma: The logarithm of gamma.
        error: The error at the last update.
        rate: The rate of change of the error, by step.
    """

    integral: float = math.log(FIRST)
    log_gamma: float = math.log(FIRST)
    error: float = 0.0
    rate: float = 0.0

    @property
    def gamma(self) -> float:
        """The weight of the price in the loss."""
        return math.exp(self.log_gamma)

    def update(self, steps: float, error: float) -> None:
        """Moves gamma.

        Args:
            steps: Steps since the last update, > 0.
            error: ``log(size / set point)``; above 0 the network is too large.
        """
        self.rate = SMOOTH * self.rate + (1 - SMOOTH) * (error - self.error) / steps
        self.error = error
        foreseen = error + AHEAD * self.rate
        foreseen = max(-1.0, min(1.0, foreseen if foreseen > 0 else RELEASE * foreseen))
        integral = self.integral + PROPORTIONAL * foreseen * steps / LAG
        wanted, most = integral + PROPORTIONAL * foreseen, FASTEST * steps
        held = max(self.log_gamma - most, min(self.log_gamma + most, wanted))
        held = max(math.log(LEAST), min(math.log(MOST), held))
        if held == wanted or (wanted > held) != (foreseen > 0):
            self.integral = integral
        self.log_gamma = held
