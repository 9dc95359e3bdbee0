"""The options that travel together."""

import dataclasses
import inspect

import pytest
from scvi.module import VAE

from mixscvi import MixSCVI
from mixscvi.mixture import StandardNormal
from mixscvi.module import FusedVAE, MixtureOptions, MixVAE, ScviVAE

PLAIN = {"n_components": 1}


def test_the_model_has_the_same_options_and_defaults():
    of_model = inspect.signature(MixSCVI).parameters
    for field in dataclasses.fields(MixtureOptions):
        assert of_model[field.name].default == field.default, field.name


@pytest.mark.parametrize(
    ("options", "is_scvi"),
    [
        (PLAIN, True),
        ({**PLAIN, "component_encoder": "amortized", "estimator": "some_to_some"}, True),
        ({"n_components": 2}, False),
        ({**PLAIN, "prior": "mog"}, False),
        ({**PLAIN, "prior": StandardNormal(10)}, False),
        ({**PLAIN, "n_flow_steps": 1}, False),
        ({**PLAIN, "n_samples": 2}, False),
    ],
)
def test_options_that_describe_scvi(options, is_scvi, make_adata):
    assert MixtureOptions(**options).is_scvi == is_scvi
    adata = make_adata()
    MixSCVI.setup_anndata(adata)
    for likelihood, expected in (("fused", FusedVAE), ("reference", ScviVAE)):
        model = MixSCVI(adata, likelihood=likelihood, **options)
        assert type(model.module) is (expected if is_scvi else MixVAE)
        assert model.module.mixture.likelihood == likelihood


def test_options_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        MixtureOptions().n_components = 5


@pytest.mark.parametrize("module_cls", [MixVAE, ScviVAE, FusedVAE])
def test_scvi_tools_finds_the_names_that_it_looks_for(module_cls):
    """It rebuilds a module by its signature, and asks whether batches can be transformed."""
    assert set(inspect.signature(VAE).parameters) <= set(inspect.signature(module_cls).parameters)
    module = module_cls(9, n_batch=2)
    assert "transform_batch" in inspect.signature(module.generative).parameters


@pytest.mark.parametrize("estimator", ["all_to_all", "some_to_all", "some_to_some"])
def test_siwae_is_for_one_component(estimator, make_adata):
    assert MixtureOptions(n_components=1, objective="siwae", n_samples=4).objective == "siwae"
    with pytest.raises(ValueError, match="Choose objective='miselbo'"):
        MixtureOptions(n_components=2, objective="siwae", estimator=estimator)
    adata = make_adata()
    MixSCVI.setup_anndata(adata)
    with pytest.raises(ValueError, match="objective='siwae' is for one component"):
        MixSCVI(adata, objective="siwae")
