"""Trainings with checkpoints, and a program whose processes are killed in the middle of them.

Run as ``python killed_training.py FOLDER``: for each case, a process trains into a folder of the
case's name and is killed (SIGKILL) within its sixth epoch.
"""

import os
import signal
import sys
from pathlib import Path

CASES = {
    "four components, early stopping": (
        {"n_components": 4},
        {"early_stopping": True, "early_stopping_patience": 4, "early_stopping_warmup_epochs": 3},
    ),
    "one component, plateau": (
        {"n_components": 1},
        {
            "plan_kwargs": {"reduce_lr_on_plateau": True, "lr_patience": 1, "lr_threshold": 9.0},
        },
    ),
    "stopped by steps": ({"n_components": 2}, {"max_steps": 25, "check_val_every_n_epoch": 1}),
    "scVI itself": ({"n_components": 1, "likelihood": "reference"}, {"early_stopping": True}),
    "drawn components, warm-up in steps": (
        {"n_components": 6, "estimator": "some_to_some", "prior": "vamp", "n_prior_components": 5},
        {
            "check_val_every_n_epoch": 3,
            "plan_kwargs": {"n_epochs_kl_warmup": None, "n_steps_kl_warmup": 9},
        },
    ),
    "labels, some of each in an epoch": (
        {"labeled": True, "n_components": 3},
        {"n_samples_per_label": 6, "early_stopping": True, "early_stopping_patience": 5},
    ),
    "scANVI itself": (
        {"labeled": True, "n_components": 1, "likelihood": "reference"},
        {"n_samples_per_label": 6, "check_val_every_n_epoch": 1},
    ),
}
TRAINED = {
    "max_epochs": 7,
    "batch_size": 16,
    "train_size": 0.75,
    "checkpoint_every": 2,
    "accelerator": "cpu",
    "enable_progress_bar": False,
}


def make_model(seed=0, *, labeled=False, **model_kwargs):
    import scvi

    from conftest import synthetic_counts
    from fitting import SMALL
    from mixscvi import MixSCANVI, MixSCVI

    adata = synthetic_counts()
    if labeled:
        adata.obs["label"] = adata.obs["label"].where(adata.obs["batch"] != "b1", "unlabeled")
        setup = {"labels_key": "label", "unlabeled_category": "unlabeled"}
        MixSCANVI.setup_anndata(adata, batch_key="batch", **setup)
    else:
        MixSCVI.setup_anndata(adata, batch_key="batch")
    scvi.settings.seed = seed
    return (MixSCANVI if labeled else MixSCVI)(adata, **{**SMALL, **model_kwargs})


def train(model, folder, **train_kwargs):
    model.train(**{**TRAINED, "checkpoint_dir": folder, **train_kwargs})
    return model


def train_and_be_killed(folder, model_kwargs, train_kwargs):
    from lightning.pytorch.callbacks import LambdaCallback

    from mixscvi import MixSCANVI, MixSCVI
    from mixscvi.model.runner import Runner

    class KilledRunner(Runner):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.trainer.callbacks.append(LambdaCallback(on_train_batch_end=self._kill))

        def _kill(self, trainer, *args):
            if trainer.current_epoch == 5:
                os.kill(os.getpid(), signal.SIGKILL)

    MixSCVI._train_runner_cls = MixSCANVI._train_runner_cls = KilledRunner
    train(make_model(**model_kwargs), folder, **train_kwargs)


if __name__ == "__main__":
    import mixscvi.model  # noqa: F401  # once, for all processes

    for name, (model_kwargs, train_kwargs) in CASES.items():
        child = os.fork()
        if not child:
            train_and_be_killed(Path(sys.argv[1], name), model_kwargs, train_kwargs)
            os._exit(1)
        if not os.WIFSIGNALED(os.waitpid(child, 0)[1]):
            sys.exit(f"{name} was not killed")
