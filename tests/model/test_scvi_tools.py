"""What others build on models of scvi-tools works with a mixture."""

import numpy as np
import pytest
from scvi.criticism import PosteriorPredictiveCheck
from scvi.external import SOLO

from fitting import fit, seeded
from mixscvi import MixSCVI


@pytest.fixture(params=[1, 4], scope="module", ids="A={}".format)
def trained(request, make_adata):
    return fit(MixSCVI, make_adata(), n_components=request.param)


@pytest.mark.filterwarnings("ignore:Prior to scvi-tools 1.1.3:UserWarning")
def test_solo_finds_doublets_in_the_latents(trained):
    solo = SOLO.from_scvi_model(trained)
    # Cells and twice as many doublets of them, by their latents and library sizes.
    assert solo.adata.shape == (3 * trained.adata.n_obs, trained.module.n_latent + 1)
    np.testing.assert_allclose(
        solo.adata[: trained.adata.n_obs].X[:, :-1],
        trained.get_latent_representation(),
        rtol=1e-5,
        atol=1e-6,
    )
    solo.train(max_epochs=2, accelerator="cpu", enable_progress_bar=False, logger=None)
    predicted = solo.predict()
    assert list(predicted.columns) == ["doublet", "singlet"]
    assert len(predicted) == trained.adata.n_obs


def test_solo_of_one_batch(make_adata):
    model = fit(MixSCVI, make_adata(sparse=True), {"batch_key": "batch"}, n_components=4)
    solo = SOLO.from_scvi_model(model, restrict_to_batch="b1")
    assert solo.adata.n_obs == 3 * (model.adata.obs["batch"] == "b1").sum()


@pytest.mark.filterwarnings("ignore")  # of scanpy's, sparse's and xarray's own
def test_posterior_predictive_check(trained):
    # scvi-tools' calibration asks for a model of this name.
    check = seeded(PosteriorPredictiveCheck, trained.adata, {"model1": trained}, n_samples=3)
    assert check.samples_dataset["model1"].shape == (*trained.adata.shape, 3)
    check.coefficient_of_variation("cells")
    check.coefficient_of_variation("features")
    check.zero_fraction()
    check.calibration_error()
    for name in ("cv_gene", "cv_cell", "zero_fraction", "calibration"):
        values = np.asarray(check.metrics[name]["model1"], dtype=float)
        assert np.isfinite(values).any(), name
