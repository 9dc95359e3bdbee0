"""Memory that a training step takes at least, and what to choose where there is less."""

from __future__ import annotations

from typing import Any

from torch import nn

from mixscvi.mixture import Estimator
from mixscvi.module import MixtureOptions
from mixscvi.system import physical_memory

__all__ = ["activations_of_a_step", "check_step", "too_large_a_step"]

_BYTES = 4
_BYTES_TRAINED = 16  # of a weight with its gradient, and two moments of Adam
# scvi-tools makes them for all models, and trains them in some.
_MAYBE_UNUSED = ("l_encoder", "px_r_decoder", "px_dropout_decoder")
_PER_HIDDEN_UNIT = 3  # of the linear layer, normalized, and activated: all are kept for backward
_GIB = 2**30


def activations_of_a_step(module: Any, mixture: MixtureOptions, batch_size: int) -> int:
    """Bytes that the backward pass of a training step needs at least, beside weights.

    Parameters
    ----------
    module
        Of the model.
    mixture
        Its posterior and objective.
    batch_size
        Cells of a step, `B`.

    Examples
    --------
    Four draws of six cells, each of 20 genes with two outputs, and 128 hidden units:

    >>> from mixscvi.module import MixVAE
    >>> mixture = MixtureOptions(n_components=4)
    >>> activations_of_a_step(MixVAE(20, n_latent=3, mixture=mixture), mixture, 6)
    78720
    """
    estimator = Estimator(mixture.estimator)
    n_drawn = estimator.n_drawn(mixture.n_components, mixture.n_sampled_components)
    n_encoded = n_drawn if estimator is Estimator.SOME_TO_SOME else mixture.n_components
    n_rows = mixture.n_samples * batch_size * n_drawn  # L * B * S
    widths = [
        part.out_features
        for part in module.decoder.px_decoder.modules()
        if isinstance(part, nn.Linear)
    ]
    n_outputs = 2 if module.gene_likelihood == "zinb" else 1
    of_draw = _PER_HIDDEN_UNIT * sum(widths) + n_outputs * module.n_input + 2 * module.n_latent
    if hasattr(module, "y_prior"):  # networks below z see each draw with each label
        of_draw += module.n_labels * (_PER_HIDDEN_UNIT * sum(widths) + 4 * module.n_latent)
    of_code = widths if mixture.component_encoder == "separate" else widths[-1:]
    of_component = _PER_HIDDEN_UNIT * sum(of_code) + 2 * module.n_latent
    return _BYTES * (n_rows * of_draw + batch_size * n_encoded * of_component)


def check_step(model: Any, batch_size: int) -> None:
    """Raise if a training step cannot fit into the memory of this machine.

    Nothing is tried: systems hand out more memory than they have, and end whoever uses it.

    Parameters
    ----------
    model
        The model, to be trained on the CPU; the allocators of other devices raise themselves.
    batch_size
        Cells of a step.

    Raises
    ------
    MemoryError
        Naming what makes it large, and what to choose.
    """
    memory = physical_memory()
    if memory is None:
        return
    needed = activations_of_a_step(model.module, model._mixture, batch_size)
    for name, parameter in model.module.named_parameters():
        is_trained = parameter.requires_grad and not any(part in name for part in _MAYBE_UNUSED)
        needed += parameter.numel() * (_BYTES_TRAINED if is_trained else _BYTES)
    if needed > memory:
        raise MemoryError(
            f"{too_large_a_step(model, batch_size)} It takes at least {needed / _GIB:.0f} GiB, of "
            f"{memory / _GIB:.0f}."
        )


def too_large_a_step(model: Any, batch_size: int) -> str:
    """What to say of a training step that does not fit into memory."""
    mixture = model._mixture
    return (
        f"a training step of batch_size={batch_size} cells with n_components="
        f"{mixture.n_components}, n_sampled_components={mixture.n_sampled_components}, n_samples="
        f"{mixture.n_samples} does not fit into memory: choose smaller ones, or estimator="
        "'some_to_some', whose steps encode and decode n_sampled_components alone."
    )
