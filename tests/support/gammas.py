"""Functions and classes that YAML names for gamma."""


class Ramp:
    """gamma from 0 up to its value."""

    def __init__(self, gamma: float, steps: int) -> None:
        self.gamma, self.steps = gamma, steps

    def __call__(self, step: int) -> float:
        return self.gamma * min(1.0, step / self.steps)


def tenth(step: int) -> float:
    return 0.1 * min(1, step)
