"""Whether the weights of a model are numbers."""

from __future__ import annotations

from torch import nn

from mixscvi.warning import warn_user

__all__ = ["warn_of_weights"]


def warn_of_weights(module: nn.Module, source: str, remedy: str) -> None:
    """Warn if weights are NaN or infinite, of which no number that means anything comes.

    Parameters
    ----------
    module
        Has the weights.
    source
        What they are of, for the message.
    remedy
        What to do.

    Examples
    --------
    >>> warn_of_weights(nn.Linear(2, 2), "the model", "train it anew")
    """
    wrong = [
        name
        for name, value in module.state_dict().items()
        if value.is_floating_point() and not bool(value.isfinite().all())
    ]
    if wrong:
        warn_user(
            f"{source} has {len(wrong)} weights that are NaN or infinite, first {wrong[0]}: what "
            f"comes of them means nothing; {remedy}"
        )
