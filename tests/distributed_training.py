"""Trainings by two processes, which Lightning starts from this program.

Run as ``python distributed_training.py FOLDER``: each process writes what it saw, by name of the
training, into a file of its own in that folder.
"""

import os
import sys
import warnings
from pathlib import Path

TRAINED = {
    "batch_size": 8,
    "accelerator": "cpu",
    "enable_progress_bar": False,
    "check_val_every_n_epoch": 1,
}
SEPARATE, AMORTIZED = {}, {"component_encoder": "amortized"}
MODELS = {
    "all to all, normal": {},
    "all to all, mog, flow, nb": {"prior": "mog", "n_flow_steps": 1, "gene_likelihood": "nb"},
    "all to all, vamp, poisson": {
        "prior": "vamp", "n_prior_components": 5, "gene_likelihood": "poisson",
    },
    "some to all, normal, amortized": {"estimator": "some_to_all", **AMORTIZED},
    "some to all, mog, gene-cell": {
        "estimator": "some_to_all", "prior": "mog", "dispersion": "gene-cell",
    },
    "some to all, vamp": {"estimator": "some_to_all", "prior": "vamp", "n_prior_components": 5},
    "some to some, normal": {"estimator": "some_to_some", "n_sampled_components": 2},
    "some to some, mog, reference": {
        "estimator": "some_to_some", "prior": "mog", "likelihood": "reference",
    },
    "some to some, vamp, library": {
        "estimator": "some_to_some", "prior": "vamp", "n_prior_components": 5,
        "use_observed_lib_size": False, **AMORTIZED,
    },
    "two samples": {"n_samples": 2},
    "one component": {"n_components": 1},
    "one component, siwae": {"n_components": 1, "n_samples": 3, "objective": "siwae"},
    "scVI itself": {"n_components": 1, "likelihood": "reference"},
    "labels": {"labeled": True},
    "labels, some to all, flow": {
        "labeled": True, "estimator": "some_to_all", "n_flow_steps": 1, **AMORTIZED,
    },
    "labels, linear classifier, library": {
        "labeled": True, "linear_classifier": True, "use_observed_lib_size": False,
    },
    "labels, one component": {"labeled": True, "n_components": 1},
    "scANVI itself": {"labeled": True, "n_components": 1, "likelihood": "reference"},
}  # fmt: skip


def make_model(n_obs, seed, *, labeled=False, **kwargs):
    import scvi

    from conftest import synthetic_counts
    from fitting import BATCH, SMALL
    from mixscvi import MixSCANVI, MixSCVI

    adata = synthetic_counts(n_obs)
    if labeled:
        adata.obs["label"] = adata.obs["label"].where(adata.obs["batch"] != "b1", "unlabeled")
        setup = {"labels_key": "label", "unlabeled_category": "unlabeled"}
        MixSCANVI.setup_anndata(adata, **BATCH, **setup)
    else:
        MixSCVI.setup_anndata(adata, **BATCH)
    scvi.settings.seed = seed
    return (MixSCANVI if labeled else MixSCVI)(adata, **{**SMALL, "n_components": 3, **kwargs})


def watch(module):
    """Record the components that steps draw from, and a noise that each draws."""
    import torch

    seen = {"components": [], "noise": []}
    choose = getattr(module, "_choose_components", None)

    def watched(device):
        chosen = choose(device)
        if module.training:
            seen["components"].append([c.tolist() for c in chosen if c is not None])
        return chosen

    if choose is not None:
        module._choose_components = watched

    def before(module, args):
        with torch.random.fork_rng():
            seen["noise"].append(torch.randn(()).item())

    module.register_forward_pre_hook(before)
    return seen


def watch_cells(model):
    """Record the names of all cells, and of those with labels, of each training step."""
    import numpy as np

    seen = {"cells": [], "labeled": []}
    counts = np.asarray(model.adata.X)

    def names(tensors):
        same = (counts[None] == tensors["X"].numpy()[:, None]).all(-1)
        return [int(i) for i in same.argmax(1)]

    def before(module, args, kwargs):
        if module.training and "labelled_tensors" in kwargs.get("loss_kwargs", {}):
            seen["cells"].append(names(args[0]))
            seen["labeled"].append(names(kwargs["loss_kwargs"]["labelled_tensors"]))

    model.module.register_forward_pre_hook(before, with_kwargs=True)
    return seen


def watched_training(n_obs, seed, options, **train_kwargs):
    import torch

    model = make_model(n_obs, seed, **options)
    seen = watch(model.module)
    seen |= watch_cells(model)
    trainable = [name for name, p in model.module.named_parameters() if p.requires_grad]
    model.train(**{**TRAINED, "strategy": "ddp", "devices": 2, **train_kwargs})
    history = {key: values.iloc[:, 0].tolist() for key, values in model.history.items()}
    return {
        # The first were drawn by the trial that finds unused parameters.
        **{name: values[1:] for name, values in seen.items()},
        "rank": model.trainer.global_rank,
        "history": history,
        "state": {k: v.clone() for k, v in model.module.state_dict().items()},
        "trainable": trainable
        == [name for name, p in model.module.named_parameters() if p.requires_grad],
        "seed": torch.initial_seed(),
        "split": [model.train_indices.tolist(), model.validation_indices.tolist()],
        "steps": model.trainer.global_step,
    }


def trainings_alone_after(model):
    """Each process trains a model of its own, and goes on with one that both have trained."""
    from lightning.pytorch.utilities import rank_zero_only

    model.train(**TRAINED, strategy="ddp", devices=2, max_epochs=1)
    rank = rank_zero_only.rank
    results = {}
    for name, alone in {"alone": make_model(40, 0), "alone, gone on": model}.items():
        alone.train(**TRAINED, max_epochs=2)
        results[name] = {
            "state": {k: v.clone() for k, v in alone.module.state_dict().items()},
            "history": {key: values.iloc[:, 0].tolist() for key, values in alone.history.items()},
            "steps": alone.trainer.global_step,
            "rank kept": rank_zero_only.rank == rank == int(os.environ["LOCAL_RANK"]),
        }
    return results


def main(folder):
    import scvi
    import torch

    scvi.settings.verbosity = 40  # it announces every semi-supervised training
    warnings.filterwarnings("ignore", ".*early_stopping was automatically disabled.*")
    results = {}
    for name, options in MODELS.items():
        results[name] = watched_training(40, 0, options, max_epochs=2)
    # 0.9 * 38 = 34 cells for training: 17 for each process, of which the last is alone.
    single = {"train_size": 34 / 38, "max_epochs": 2}
    results["a last cell alone"] = watched_training(38, 0, {}, **single)
    results["without a seed"] = watched_training(40, None, {}, max_epochs=1)
    long = {"max_epochs": 12, "batch_size": 16, "train_size": 0.75}
    long["plan_kwargs"] = {"lr": 1e-2, "n_epochs_kl_warmup": 1}
    results["bound"] = watched_training(240, 0, {}, **long)
    whole = {"max_epochs": 5, "checkpoint_every": 2}
    options = {"estimator": "some_to_all"}
    dirs = [Path(folder, name) for name in ("whole", "resumed")]
    results["whole"] = watched_training(40, 0, options, checkpoint_dir=dirs[0], **whole)
    watched_training(40, 0, options, checkpoint_dir=dirs[1], **whole | {"max_epochs": 2})
    results["resumed"] = watched_training(40, 0, options, checkpoint_dir=dirs[1], **whole)
    labeled = {"labeled": True}
    few = {"n_samples_per_label": 4, "max_epochs": 3}
    results["some labels"] = watched_training(40, 0, labeled, **few)
    results["labels, without a seed"] = watched_training(40, None, labeled, **few)
    whole = {"max_epochs": 5, "checkpoint_every": 2, "n_samples_per_label": 4}
    dirs = [Path(folder, name) for name in ("labels whole", "labels resumed")]
    results |= trainings_alone_after(make_model(40, 0))
    results["labels whole"] = watched_training(40, 0, labeled, checkpoint_dir=dirs[0], **whole)
    watched_training(40, 0, labeled, checkpoint_dir=dirs[1], **whole | {"max_epochs": 2})
    results["labels resumed"] = watched_training(40, 0, labeled, checkpoint_dir=dirs[1], **whole)
    torch.save(results, Path(folder, f"rank{results['bound']['rank']}.pt"))


if __name__ == "__main__":
    os.chdir(sys.argv[1])  # where scvi-tools writes its logs
    main(sys.argv[1])
