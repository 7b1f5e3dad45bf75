"""The controller that moves gamma so that the size follows its set point."""

import math
from dataclasses import dataclass

FIRST = 0.1  # gamma at the start, below what presses on a network


PROPORTIONAL = 4.0  # what an error adds to log gamma as long as it is there


LAG = 80.0  # steps in which a lasting error adds as much again


FASTEST = 0.1  # most that log gamma changes in a step


RELEASE = 3.0  # how much more an error below the set point counts: what is gone is slow to come back


LEAST, MOST = 1e-3, 1e6  # of gamma


@dataclass
class Controller:
    """A proportional-integral law in log gamma, with limits on its slew and its integral.

    With the error ``e = log(size / set point)``, larger where it is below 0 (:data:`RELEASE` times), and steps s,
    ``log gamma = P (e + integral of e ds / LAG)``. Where a limit holds gamma, the integral waits (anti-windup).

    Args:
        integral: The part of log gamma that has built up.
        log_gamma: The logarithm of gamma.
    """

    integral: float = math.log(FIRST)
    log_gamma: float = math.log(FIRST)

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
        error = max(-1.0, min(1.0, error if error > 0 else RELEASE * error))
        integral = self.integral + PROPORTIONAL * error * steps / LAG
        wanted, most = integral + PROPORTIONAL * error, FASTEST * steps
        held = max(self.log_gamma - most, min(self.log_gamma + most, wanted))
        held = max(math.log(LEAST), min(math.log(MOST), held))
        if held == wanted or (wanted > held) != (error > 0):
            self.integral = integral
        self.log_gamma = held
