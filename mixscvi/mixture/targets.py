"""A density that is known up to a factor: called in bounded memory, counted and checked."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mixscvi.mixture.student_mixture import StudentMixture

__all__ = ["LogJoint", "Target", "working"]

LogJoint = Callable[[Tensor, Tensor], Tensor]
"""Maps draws `(N, n, D)` and the indices `(n,)` of their cells to log p(x, z), `(N, n)`."""

_COST_OF_SCORE = 3  # evaluations that a value with its gradient counts as


def working(tensor: Tensor) -> Tensor:
    """In double precision where the device has it."""
    return tensor if tensor.device.type == "mps" else tensor.double()


class Target:
    """The log-joint with its results checked, its calls bounded and counted; and draws for it.

    Parameters
    ----------
    log_joint
        What the caller gave.
    like
        Draws are handed over in its type.
    rows_per_call
        Most draws of all cells at once.
    generator
        Of all draws.

    Examples
    --------
    >>> import torch
    >>> target = Target(lambda z, cells: -z.square().sum(-1), torch.zeros(()), rows_per_call=100)
    >>> values, scores = target.scores(torch.ones(5, 3, 2), torch.arange(3))
    >>> values.shape, scores.shape, target.n_evaluations
    (torch.Size([5, 3]), torch.Size([5, 3, 2]), 15)
    """

    def __init__(
        self,
        log_joint: LogJoint,
        like: Tensor,
        rows_per_call: int,
        generator: torch.Generator | None = None,
    ) -> None:
        self.log_joint, self.like, self.rows_per_call = log_joint, like, rows_per_call
        self.generator = generator
        self.n_evaluations = 0  # of a cell that was in every call

    def draw(self, proposal: StudentMixture, n_draws: int) -> Tensor:
        """Stratified draws `(N, B, D)`, rounded as the log-joint will see them."""
        return proposal.sample_stratified(n_draws, self.generator).to(self.like)

    def _passes(self, draws: Tensor) -> tuple[Tensor, ...]:
        return draws.split(max(1, self.rows_per_call // draws.shape[1]))

    def _checked(self, values: Tensor, draws: Tensor, cells: Tensor) -> Tensor:
        if values.shape != draws.shape[:2]:
            raise ValueError(
                f"log_joint must return the shape {tuple(draws.shape[:2])} for draws of shape "
                f"{tuple(draws.shape)}, got {tuple(values.shape)}"
            )
        wrong = (values.isnan() | values.isposinf()).any(0)
        if wrong.any():
            raise ValueError(
                "log_joint must be finite or minus infinity, got NaN or infinity for the cells "
                f"{cells[wrong][:5].tolist()}"
            )
        return working(values)

    def values(self, draws: Tensor, cells: Tensor) -> Tensor:
        """log p(x, z) of draws, `(N, n)`."""
        self.n_evaluations += len(draws)
        passes = [
            self._checked(self.log_joint(some, cells), some, cells) for some in self._passes(draws)
        ]
        return torch.cat(passes)

    def scores(self, draws: Tensor, cells: Tensor) -> tuple[Tensor, Tensor]:
        """log p(x, z), `(N, n)`, and its gradient with respect to z, `(N, n, D)`."""
        self.n_evaluations += _COST_OF_SCORE * len(draws)
        passes = []
        for some in self._passes(draws):
            with torch.enable_grad():
                leaf = some.detach().requires_grad_()
                values = self.log_joint(leaf, cells)
                if not values.requires_grad:
                    raise ValueError("log_joint must be differentiable in the draws")
                (score,) = torch.autograd.grad(values.sum(), leaf)
            passes.append((self._checked(values.detach(), some, cells), working(score)))
        log_joint, scores = zip(*passes, strict=True)
        return torch.cat(log_joint), torch.cat(scores)
