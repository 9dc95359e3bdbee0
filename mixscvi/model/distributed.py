"""Training by several processes (ranks): what they share, and what differs."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_only
from scvi.module.base import BaseModuleClass
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from mixscvi.model.loaders import training_minibatches
from mixscvi.model.random_states import get_random_states, set_random_states

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

__all__ = ["Ranks", "SplitAlike", "as_first_rank", "of_all_ranks", "of_first_rank"]


def of_first_rank(value: Any) -> Any:
    """What the first rank gives; all ranks must call it."""
    values = [value]
    torch.distributed.broadcast_object_list(values, src=0)
    return values[0]


def of_all_ranks(value: Any, n_ranks: int) -> list[Any]:
    """What each rank gives; all ranks must call it.

    Examples
    --------
    >>> of_all_ranks("alone", 1)
    ['alone']
    """
    if n_ranks == 1:
        return [value]
    values = [None] * n_ranks
    torch.distributed.all_gather_object(values, value)
    return values


@contextmanager
def as_first_rank(trainer: Trainer) -> Iterator[None]:
    """Let a process that trains alone be the first of one, for the time of the training.

    Lightning sets the rank of a process when several train together, and keeps it: what only the
    first does, such as the history, nobody would do in the others.
    """
    rank = getattr(rank_zero_only, "rank", None)
    if trainer.world_size > 1 or not rank:
        yield
        return
    rank_zero_only.rank = 0
    try:
        yield
    finally:
        rank_zero_only.rank = rank


class SplitAlike:
    """A splitter of scvi-tools, whose ranks split the cells alike and shuffle them by one seed."""

    shuffle_seed = 0

    @property
    def _n_ranks(self) -> int:
        shared = self.data_loader_kwargs.get("distributed_sampler", False)
        return torch.distributed.get_world_size() if shared else 1

    def setup(self, stage: str | None = None) -> None:
        """Split the cells into training, validation and test."""
        super().setup(stage)
        if self._n_ranks > 1:
            # Without a seed, each would draw a split of its own.
            split = self.train_idx, self.val_idx, self.test_idx, int(torch.randint(2**31, ()))
            split = of_first_rank(split)
            self.train_idx, self.val_idx, self.test_idx, self.shuffle_seed = split

    def train_dataloader(self) -> DataLoader:
        """Minibatches of the training cells."""
        loader = super().train_dataloader()
        if isinstance(loader.sampler, DistributedSampler):
            loader.sampler.seed = self.shuffle_seed
        return loader


class Ranks(Callback):
    """What a module needs to be trained by several ranks.

    - The components of a step are the same ones on all ranks: they are drawn from a generator that
      is seeded alike.
    - Noise and dropout differ: all ranks but the first are given random numbers of their own for
      the time of the training. Afterwards they have those of before again.
    - Parameters that the loss does not reach (scVI has some for every other likelihood) are frozen
      for that time, as Lightning's ``ddp`` waits for the gradient of each.
    - At the end, all ranks have the buffers of the first.

    Parameters
    ----------
    module
        The module, on the CPU.
    """

    def __init__(self, module: BaseModuleClass) -> None:
        self.module = module
        self._frozen: list[Tensor] = []
        self._states_before: dict[str, Any] | None = None
        self._generator_state: Tensor | None = None

    def state_dict(self) -> dict[str, Any]:
        """State of the generator of components."""
        return {"components": self.module.component_generator.get_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state for the start of the training."""
        self._generator_state = state_dict["components"]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Freeze what the loss does not reach."""
        loss_kwargs = cast(Mapping[str, Any], pl_module.loss_kwargs)
        self._frozen = _unreached(self.module, trainer.datamodule, loss_kwargs)
        for parameter in self._frozen:
            parameter.requires_grad_(False)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Seed components alike, and the rest apart."""
        seed = of_first_rank(int(torch.randint(2**62, ())))
        self.module.component_generator = torch.Generator().manual_seed(seed)
        if self._generator_state is not None:
            self.module.component_generator.set_state(self._generator_state)
        if trainer.global_rank > 0:
            self._states_before = get_random_states(pl_module.device)
            torch.manual_seed(seed + trainer.global_rank)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give random numbers and buffers back."""
        if self._states_before is not None:
            set_random_states(self._states_before, pl_module.device)
        for buffer in self.module.buffers():
            torch.distributed.broadcast(buffer, src=0)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the module as it was."""
        self.module.component_generator = None
        for parameter in self._frozen:
            parameter.requires_grad_(True)


def _unreached(
    module: BaseModuleClass, datamodule: Any, loss_kwargs: Mapping[str, Any]
) -> list[Tensor]:
    """Parameters to be trained that get no gradient from a minibatch."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    with torch.random.fork_rng(devices=[]):
        tensors = next(training_minibatches(datamodule, module.device))
        if not isinstance(tensors, Mapping):  # all cells, and those with labels
            tensors, labeled = tensors
            loss_kwargs = {**loss_kwargs, "labelled_tensors": labeled}
        trial = copy.deepcopy(module).train()  # its running statistics change
        _, _, losses = trial(tensors, loss_kwargs=loss_kwargs)
        trial_parameters = [p for p in trial.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(losses.loss, trial_parameters, allow_unused=True)
    return [p for p, gradient in zip(parameters, gradients, strict=True) if gradient is None]
