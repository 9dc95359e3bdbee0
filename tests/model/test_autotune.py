"""scvi-tools' tuning, on Ray."""

import pytest

from mixscvi import MixSCVI


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # of Ray's
def test_components_estimator_prior_and_learning_rate_are_tuned(
    make_adata, tmp_path, ray_cluster, monkeypatch
):
    pytest.importorskip("hyperopt")
    pytest.importorskip("scib_metrics")
    from ray import tune
    from scvi.autotune import run_autotune

    monkeypatch.setenv("RAY_AIR_NEW_OUTPUT", "0")
    adata = make_adata()
    MixSCVI.setup_anndata(adata, batch_key="batch")
    experiment = run_autotune(
        MixSCVI,
        adata,
        metrics=["elbo_validation"],
        mode="min",
        search_space={
            "model_params": {
                "n_hidden": 8,
                "n_latent": 2,
                "n_components": tune.grid_search([1, 3]),
                "estimator": tune.choice(["all_to_all", "some_to_all"]),
                "prior": tune.choice(["normal", "mog", "vamp"]),
            },
            "train_params": {
                "accelerator": "cpu",
                "max_epochs": 1,
                "plan_kwargs": {"lr": tune.loguniform(1e-4, 1e-2)},
            },
        },
        num_samples=1,
        seed=0,
        searcher="random",
        resources={"cpu": 1},
        logging_dir=str(tmp_path),
        ignore_reinit_error=True,
    )
    results = experiment.result_grid
    assert results.errors == []
    trials = {r.config["model_params"]["n_components"]: r.metrics for r in results}
    assert trials.keys() == {1, 3}
    assert all(metrics["elbo_validation"] > 0 for metrics in trials.values())
    best = results.get_best_result("elbo_validation", "min")
    assert best.metrics["elbo_validation"] == min(m["elbo_validation"] for m in trials.values())
