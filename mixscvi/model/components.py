"""Whether all components are of use, asked after training."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import scvi
import torch
from torch import Tensor

from mixscvi.mixture.death import dead_components, name_dead, often_dead
from mixscvi.model.checkpoints import CheckpointsMixin
from mixscvi.model.loaders import training_minibatches
from mixscvi.model.minified import WITHOUT_COUNTS
from mixscvi.model.training_arguments import check_training
from mixscvi.model.weights import warn_of_weights
from mixscvi.module.signatures import signed_as
from mixscvi.python_numbers import in_python
from mixscvi.warning import warn_user

if TYPE_CHECKING:
    from lightning import LightningDataModule

__all__ = ["ComponentsMixin"]

_N_CELLS = (32, 64)  # least and most
_N_DRAWS = 5  # of each component
_N_DRAWS_OF_MANY = 2
_N_DRAWS_OF_ALL = 5_000


class ComponentsMixin:
    """What makes :class:`mixscvi.MixSCVI` look for dead components, and tell of them.

    The model provides ``module``, ``device``, ``_make_data_loader`` and ``_validate_anndata``.
    """

    dead_components_: dict[int, float] | None = None
    """Components found dead after training, and in which share of the cells; ``None`` if nobody
    has looked, as after a stream that could be read once alone."""
    _told_of_dead_components = False

    @signed_as(CheckpointsMixin.train)
    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train the model; see ``SCVI.train``.

        Afterwards a few draws of some of the training cells say whether every component is of use:
        see :func:`mixscvi.mixture.dead_components`. The random numbers that follow are what
        they would be without.

        Parameters
        ----------
        max_epochs
            Most passes over the training cells; by default 400, and fewer for more than 20,000
            cells.
        accelerator, devices
            Where to train, as Lightning names it.
        train_size, validation_size
            Shares of the cells: 0.9 and the rest by default. Others are held out of both.
        batch_size
            Cells of a step, `B`.
        early_stopping
            Whether to stop when the bound of the validation cells has ceased to improve.
        plan_kwargs
            Of the optimization: ``{"lr": ..., "n_epochs_kl_warmup": ...}`` and more of
            ``scvi.train.TrainingPlan``.
        datasplitter_kwargs
            Of the split: ``{"external_indexing": [...]}`` has positions of the cells to train on,
            and of those to hold out.
        datamodule
            Minibatches of the user's own, for a model without an AnnData.
        *args, **kwargs
            These and others as in ``SCVI.train``, those of Lightning's trainer among them; and two
            more:
        checkpoint_dir
            Folder of a checkpoint. The same call with the same folder, in this process or another,
            goes on from it, and ends with the weights of a training that was not interrupted; a
            training that had ended is restored. Only `max_epochs` may differ: it may be larger.
        checkpoint_every
            Epochs from one checkpoint to the next; 10 by default.

        Raises
        ------
        TypeError
            If an argument, here or in `plan_kwargs` or `datasplitter_kwargs`, is of the wrong type,
            or there is none of its name.
        ValueError
            If the data are minified without counts; if an argument is out of range, or names a
            metric that is not logged or a choice that there is not; if ``external_indexing`` has a
            cell twice or not at all; or if the checkpoint is of other data, options or seed, naming
            what differs, or its file is truncated, damaged or holds Python objects.
        IndexError
            If ``external_indexing`` has positions that no cell has.
        FileNotFoundError
            If `ckpt_path` is no file.
        MemoryError
            If a step takes more memory than the machine has, naming what to choose.
        AttributeError
            If the model holds no data, and no `datamodule` is given, as in ``SCVI.train``.

        Warns
        -----
        UserWarning
            If weights are NaN or infinite at the end; or if a component is dead in more than a
            tenth of the cells. ``dead_components_`` then holds their numbers and shares, and
            :meth:`get_latent_representation` warns as well.

        Notes
        -----
        The latent mean is an average over all components, the dead ones included: do not cluster
        it. Train again, for longer, with fewer components, a smaller learning rate or
        ``component_encoder="amortized"``, whose components share weights. Likelihoods are sound:
        a dead component costs them draws, and log A nats at most.

        Examples
        --------
        A training that may be interrupted: the same call again goes on from the checkpoint.

        >>> import tempfile, mixscvi
        >>> adata = mixscvi.datasets.pbmc68k()
        >>> mixscvi.MixSCVI.setup_anndata(adata)
        >>> model = mixscvi.MixSCVI(adata, n_components=2, n_hidden=16)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     model.train(max_epochs=1, checkpoint_dir=folder, enable_progress_bar=False)
        >>> model.is_trained
        True
        """
        # torch's loaders take no numbers of NumPy's.
        args, kwargs = tuple(map(in_python, args)), in_python(kwargs)
        # Not that of the next train, which may take its arguments in another order.
        by_scvi_tools = getattr(scvi.model, self._by_scvi_tools).train
        given = inspect.signature(by_scvi_tools).bind(self, *args, **kwargs)
        self._check_arguments_of_training(given.arguments)
        datamodule = given.arguments.get("datamodule")
        if self.adata is None and datamodule is None:
            raise AttributeError("the model holds no data: give datamodule, or make it of an adata")
        if datamodule is None:
            if self.minified_data_type == WITHOUT_COUNTS:
                raise ValueError(
                    "train() needs the cells' counts, which minification has replaced: load the "
                    "model with the original data, or minify with "
                    "'latent_posterior_parameters_with_counts'"
                )
            self._validate_anndata()  # they may have been changed since the model was made
        result = super().train(*args, **kwargs)
        remedy = "choose a smaller learning rate, plan_kwargs={'lr': ...}"
        warn_of_weights(self.module, "the trained model", remedy)
        self.dead_components_ = self._find_dead_components(datamodule)
        self._told_of_dead_components = False
        if self.dead_components_:
            warn_user(
                f"{self._name_dead_components()} Fewer components, longer training, a smaller "
                "learning rate, or component_encoder='amortized' may help; "
                "get_component_diagnostics shows the ELBO of each component."
            )
        return result

    def _check_arguments_of_training(self, given: Mapping[str, Any]) -> None:
        plans: tuple[Callable[..., Any], ...] = ()
        splitter: Callable[..., Any] | None = None
        if self.module is not None:
            plans = (self._training_plan_cls, self.module.loss)
            splitter = self._data_splitter_cls
        n_obs = None if self.adata is None else self.adata.n_obs
        check_training(given, n_obs=n_obs, plans=plans, splitter=splitter)

    def _name_dead_components(self) -> str:
        shares = self.dead_components_ or {}
        named = name_dead(shares, self.module.n_components, "cell", "training cells")
        return f"{named}, and they spoil the latent mean."

    def _warn_of_dead_components(self) -> None:
        """Warn whoever uses the latents, once."""
        if self.dead_components_ and not self._told_of_dead_components:
            self._told_of_dead_components = True
            warn_user(f"{self._name_dead_components()} Do not cluster it: train again.")

    def _find_dead_components(
        self, datamodule: LightningDataModule | None
    ) -> dict[int, float] | None:
        """Components that are dead in more than a tenth of some training cells, with the share.

        ``None`` if no cell is left to look at.
        """
        n_components = self.module.n_components
        if n_components == 1:
            return {}
        least, most = _N_CELLS
        n_cells = min(most, max(least, _N_DRAWS_OF_ALL // (_N_DRAWS * n_components)))
        n_draws = (
            _N_DRAWS if _N_DRAWS * n_cells * n_components <= _N_DRAWS_OF_ALL else _N_DRAWS_OF_MANY
        )
        devices = [self.device] if self.device.type == "cuda" else []
        dead, found = [], 0
        with torch.random.fork_rng(devices):
            for tensors in self._some_training_cells(datamodule, n_cells):
                dead.append(dead_components(self.module.importance_draws(tensors, n_draws)).cpu())
                found += len(dead[-1])
                if found >= n_cells:
                    break
        # Nothing is left of a stream that is read once.
        return often_dead(torch.cat(dead)) if dead else None

    def _some_training_cells(
        self, datamodule: LightningDataModule | None, n_cells: int
    ) -> Iterator[dict[str, Tensor]]:
        if datamodule is None:
            cells = np.asarray(self.train_indices)
            # Evenly spaced, as cells are often sorted by sample.
            cells = cells[np.linspace(0, len(cells) - 1, min(n_cells, len(cells)), dtype=int)]
            # Not by `_minibatches`, which would look at the data again.
            yield from self._make_data_loader(self.adata, np.sort(cells))
            return
        yield from training_minibatches(datamodule, self.device)
