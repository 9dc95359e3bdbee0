"""Model files: nothing of them runs, and what is wrong with one is said."""

import contextlib
import os
import pickle
import re
import shutil
import zipfile
from importlib.metadata import version
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from scvi.model import SCVI

from fitting import BATCH, COVARIATES, assert_same_state, fit, rewrite
from mixscvi import MixSCANVI, MixSCVI
from mixscvi.mixture import GaussianMixture, Prior, StandardNormal


class Payload:
    """What a crafted file holds: unpickling it makes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.fixture(scope="module")
def trained(make_adata):
    return fit(MixSCVI, make_adata(), COVARIATES, n_components=2)


@pytest.fixture
def saved(trained, tmp_path):
    trained.save(tmp_path / "model")
    return tmp_path / "model"


def ways_to_read(adata, folder):
    return {
        "load": lambda: MixSCVI.load(folder, adata),
        "load without data": lambda: MixSCVI.load(folder, adata=False),
        "load_query_data": lambda: MixSCVI.load_query_data(adata, str(folder)),
        "load_query_data of a path": lambda: MixSCVI.load_query_data(adata, folder),
        "prepare_query_anndata": lambda: MixSCVI.prepare_query_anndata(adata, str(folder)),
        "load_registry": lambda: MixSCVI.load_registry(str(folder)),
        "view_setup_args": lambda: MixSCVI.view_setup_args(str(folder)),
    }


WAYS = list(ways_to_read(None, ""))


@pytest.mark.parametrize("archive", [True, False], ids=["archive", "bare pickle"])
@pytest.mark.parametrize("place", ["attr_dict", "model_state_dict", "var_names", "top"])
@pytest.mark.parametrize("way", WAYS)
def test_a_payload_is_refused_and_does_not_run(way, place, archive, trained, saved, tmp_path):
    stored = torch.load(saved / "model.pt", weights_only=True)
    payload = Payload(tmp_path / "ran")
    if place == "top":
        stored = payload
    elif place == "var_names":
        stored[place] = payload
    else:
        stored[place]["extra_"] = payload
    torch.save(stored, saved / "model.pt", _use_new_zipfile_serialization=archive)
    with pytest.raises(ValueError, match=r"model\.pt (holds Python objects|is truncated, or not)"):
        ways_to_read(trained.adata.copy(), saved)[way]()
    assert not (tmp_path / "ran").exists()
    with contextlib.suppress(ValueError, UserWarning):
        MixSCVI.load(saved, trained.adata.copy(), allow_pickle=True)
    assert (tmp_path / "ran").exists(), "the payload works: whoever trusts the file has it run"


@pytest.mark.parametrize("way", WAYS)
def test_a_bare_pickle_is_refused(way, trained, saved, tmp_path):
    (saved / "model.pt").write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
    with pytest.raises(ValueError, match=r"model\.pt is truncated, or not the file of a model"):
        ways_to_read(trained.adata.copy(), saved)[way]()
    assert not (tmp_path / "ran").exists()


def test_the_setup_method_of_a_file_is_not_just_any(trained, saved, tmp_path):
    """scvi-tools calls what the registry names, with arguments from the registry."""
    evil = tmp_path / "evil"
    evil.mkdir()
    torch.save(Payload(tmp_path / "ran"), evil / "model.pt")

    def change(stored):
        registry = stored["attr_dict"]["registry_"]
        registry["setup_method_name"] = "load_query_data"
        registry["setup_args"] = {"reference_model": str(evil), "allow_pickle": True}

    rewrite(saved, change)
    with pytest.raises(ValueError, match=r"model\.pt .*tampered with.*'load_query_data'"):
        MixSCVI.load(saved, trained.adata.copy())
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["_module", "module", "__class__", "adata", "__dict__"])
def test_attributes_that_no_model_stores(name, trained, saved):
    rewrite(saved, lambda stored: stored["attr_dict"].update({name: {}}))
    with pytest.raises(ValueError, match=rf"model\.pt .*tampered with \(KeyError.*{name}"):
        MixSCVI.load(saved, trained.adata.copy())


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda s: s.pop("attr_dict"), "not the file of a model"),
        (lambda s: s["attr_dict"].pop("registry_"), "not the file of a model"),
        (lambda s: s["model_state_dict"].update(px_r=3), "px_r is no tensor"),
        (lambda s: s["model_state_dict"].pop("px_r"), "weights are not those of the model"),
        (lambda s: s["model_state_dict"].update(px_r=torch.ones(3)), "weights are not those"),
        (lambda s: s["mixscvi"]["notes"].append([["nowhere", 3], "tuple", None]), "not the file"),
        (lambda s: s["mixscvi"]["notes"].append([["var_names"], "posix", None]), "not the file"),
        (
            lambda s: s["mixscvi"]["notes"].append(
                [["var_names"], "array", {"dtype": "object", "shape": [3]}]
            ),
            r"tampered with \(ValueError: cannot reshape",
        ),
        (lambda s: s["mixscvi"].update(data_id=3), "data_id is no text"),
        (lambda s: s["attr_dict"].update(init_params_=3), "init_params_ is no dictionary"),
        (lambda s: s["mixscvi"].update(format=99), "later version of mixscvi"),
        (
            lambda s: s["attr_dict"]["init_params_"]["non_kwargs"].update(n_latent=4),
            "weights are not those of the model",
        ),
    ],
)
def test_a_tampered_file(change, expected, trained, saved):
    rewrite(saved, change)
    with pytest.raises(ValueError, match=rf"model\.pt .*{expected}"):
        MixSCVI.load(saved, trained.adata.copy())


def _put(value, *path):
    def change(stored):
        for name in path[:-1]:
            stored = stored[name]
        if value is None:
            del stored[path[-1]]
        else:
            stored[path[-1]] = value

    return change


REGISTRY = ("attr_dict", "registry_")
BATCH_FIELD = (*REGISTRY, "field_registries", "batch")
DESCRIBED = {
    "no name": (_put(None, *REGISTRY, "model_name"), "KeyError: 'model_name'"),
    "no setup": (_put(None, *REGISTRY, "setup_args"), "KeyError: 'setup_args'"),
    "setup a number": (_put(3, *REGISTRY, "setup_args"), "setup_args is no dictionary, got 3"),
    "key a number": (_put(3, *REGISTRY, "setup_args", "batch_key"), "batch_key is no text, got 3"),
    "keys a text": (
        _put("x", *REGISTRY, "setup_args", "categorical_covariate_keys"),
        "categorical_covariate_keys is no list, got 'x'",
    ),
    "a field without statistics": (
        _put(None, *BATCH_FIELD, "summary_stats"),
        "KeyError: 'summary_stats'",
    ),
    "a number that is a text": (
        _put("2", *BATCH_FIELD, "summary_stats", "n_batch"),
        "batch.summary_stats.n_batch is no integer, got '2'",
    ),
    "a negative number": (
        _put(-2, *BATCH_FIELD, "summary_stats", "n_batch"),
        "n_batch is negative, got -2",
    ),
    "a gene that is a number": (_put(3, "var_names", 0), r"var_names\[0\] is no text, got 3"),
    "no arguments": (_put(None, "attr_dict", "init_params_", "kwargs"), "KeyError: 'kwargs'"),
    "an argument of another type": (
        _put("x", "attr_dict", "init_params_", "non_kwargs", "n_components"),
        "cannot be made .*n_components must be an integer of at least 1, got 'x'",
    ),
    "covariates that are none": (
        _put(None, *REGISTRY, "setup_args", "categorical_covariate_keys"),
        "(cannot be made|weights are not those) .*RuntimeError",
    ),
    "another class": (_put("SCVI", *REGISTRY, "model_name"), "is of another class"),
}
QUERY_WAYS = ("load", "load_query_data")
FROZEN = {
    "no dictionary": (3, "TypeError"),
    "no flags": ({"known": [2], "embeddings": {}}, "KeyError"),
    "flags of another type": ({"flags": {"unfrozen": 3}}, "TypeError"),
    "other flags": ({"flags": {"frozen": True}, "known": [2, 2]}, "TypeError"),
    "more categories": ({"flags": {}, "known": [2, 10**6]}, "known must be a number of categories"),
    "half a category": ({"flags": {}, "known": [1.5, 2]}, "known must be .*got 1.5"),
}


@pytest.mark.parametrize(("surgery", "expected"), FROZEN.values(), ids=FROZEN)
def test_what_is_frozen_is_described_otherwise(surgery, expected, trained, saved):
    rewrite(saved, lambda stored: stored["attr_dict"].update(surgery_=surgery))
    with pytest.raises(ValueError, match=rf"model\.pt was tampered with.*{expected}"):
        MixSCVI.load(saved, trained.adata.copy())


@pytest.mark.parametrize("way", QUERY_WAYS)
@pytest.mark.parametrize(("change", "expected"), DESCRIBED.values(), ids=DESCRIBED)
def test_a_model_that_is_described_otherwise(change, expected, way, trained, saved):
    rewrite(saved, change)
    with pytest.raises(ValueError, match=rf"model\.pt .*{expected}"):
        ways_to_read(trained.adata.copy(), saved)[way]()


def test_data_that_do_not_go_with_a_whole_file_keep_their_error(trained, saved):
    adata = trained.adata.copy()
    del adata.obs["donor"]
    with pytest.raises(KeyError, match="categorical_covariate_keys='donor' is no column") as found:
        MixSCVI.load(saved, adata)
    assert "model.pt" in found.value.__notes__[0]


def test_a_device_that_is_not_there_is_no_fault_of_the_file(saved):
    with pytest.raises(Exception, match="(?i)accelerator") as found:
        MixSCVI.load(saved, False, accelerator="abacus")
    assert "tampered" not in str(found.value)


def _change_registry(field, **changed):
    def change(stored):
        fields = stored["attr_dict"]["registry_"]["field_registries"]
        fields[field]["summary_stats"].update(changed)

    return change


def _change_arguments(**changed):
    return lambda stored: stored["attr_dict"]["init_params_"]["non_kwargs"].update(changed)


def _with_a_prior_of(**sizes):
    def change(stored):
        _change_arguments(prior=sizes)(stored)
        path = ["attr_dict", "init_params_", "non_kwargs", "prior"]
        stored["mixscvi"]["notes"].append([path, "prior", "GaussianMixture"])

    return change


def _with_an_activation_of(**sizes):
    def change(stored):
        _change_arguments(n_latent=sizes)(stored)
        path = ["attr_dict", "init_params_", "non_kwargs", "n_latent"]
        stored["mixscvi"]["notes"].append([path, "activation", "MultiheadAttention"])

    return change


def _with_texts_of(dtype):
    def change(stored):
        note = [["var_names"], "array", {"dtype": dtype, "shape": [20]}]
        stored["mixscvi"]["notes"] = [note]

    return change


HUGE = 10**9
LARGE = {
    **{
        name: (_change_arguments(**{name: HUGE}), f"{name}={HUGE}")
        for name in ("n_hidden", "n_latent", "n_layers", "n_components", "n_flow_steps")
    },
    "two of them": (
        _change_arguments(n_hidden=1_000, n_latent=1_000),
        "n_hidden=1000, n_latent=1000, but has [0-9]+ weights",
    ),
    "many components": (_change_arguments(n_components=900), "n_components=900, n_hidden=12"),
    "n_vars": (_change_registry("X", n_vars=HUGE), f"n_vars={HUGE}"),
    "n_batch": (_change_registry("batch", n_batch=HUGE), f"n_batch={HUGE}"),
    "n_batch with others": (_change_registry("batch", n_batch=1_000), "n_batch=1000"),
    "a prior": (_with_a_prior_of(n_latent=HUGE, n_components=HUGE), f"n_latent={HUGE}"),
    "an activation": (_with_an_activation_of(embed_dim=64, num_heads=1), "MultiheadAttention"),
    "texts": (_with_texts_of(f"<U{HUGE // 2}"), "an array of 20 texts has the type <U"),
    "a tensor": (
        lambda s: s["model_state_dict"].update(px_r=torch.ones(1).expand(HUGE, HUGE)),
        rf"model_state_dict.px_r claims the shape \({HUGE}, {HUGE}\), more than the file holds",
    ),
    "a sparse tensor": (
        lambda s: s["model_state_dict"].update(
            px_r=torch.sparse_coo_tensor(torch.tensor([[0]]), torch.ones(1), (HUGE,))
        ),
        "px_r is no dense tensor",
    ),
}


@pytest.fixture
def little_memory():
    """No more than 2 GB beyond what there is."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + 2 * 2**30
    resource.setrlimit(resource.RLIMIT_AS, (most, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs the size of the process")
@pytest.mark.parametrize(("change", "expected"), LARGE.values(), ids=LARGE)
def test_a_file_of_a_huge_model_is_named_and_nothing_is_made(
    change, expected, trained, saved, little_memory
):
    rewrite(saved, change)
    for data in (trained.adata, False):
        with pytest.raises(ValueError, match=rf"model\.pt .*{expected}"):
            MixSCVI.load(saved, data)


def test_a_storage_larger_than_its_record(trained, saved):
    """torch believes the number in the pickle, and would read what is beside it in memory."""
    path = saved / "model.pt"
    torch.save({"model_state_dict": {"px_r": torch.ones(300)}}, path)
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    (pickled,) = [name for name in records if name.endswith("data.pkl")]
    small, large = b"M" + (300).to_bytes(2, "little"), b"J" + HUGE.to_bytes(4, "little")
    assert records[pickled].count(small) == 2
    records[pickled] = records[pickled].replace(small, large)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in records.items():
            archive.writestr(name, content)
    with pytest.raises(ValueError, match=r"model\.pt is damaged"):
        MixSCVI.load(saved, trained.adata)


def test_records_that_unpack_to_more_than_the_file(trained, saved):
    path = saved / "model.pt"
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    name = next(name for name in records if "/data/" in name)
    records[name] = bytes(10**7)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for record, content in records.items():
            archive.writestr(record, content)
    with pytest.raises(ValueError, match=rf"model\.pt is damaged at its record '{name}'"):
        MixSCVI.load(saved, trained.adata)


def test_a_truncated_or_damaged_file(trained, saved):
    path = saved / "model.pt"
    raw = path.read_bytes()
    for n_bytes in (0, 1, 100, len(raw) // 2, len(raw) - 1):
        path.write_bytes(raw[:n_bytes])
        with pytest.raises(ValueError, match=r"model\.pt is truncated, or not the file of a model"):
            MixSCVI.load(saved, trained.adata)
    path.write_bytes(raw)
    with zipfile.ZipFile(path) as archive:
        record = max(archive.infolist(), key=lambda item: item.file_size)
    damaged = bytearray(raw)
    damaged[record.header_offset + 200 + record.file_size // 2] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"model\.pt is damaged at its record"):
        MixSCVI.load(saved, trained.adata)
    path.unlink()
    with pytest.raises(ValueError, match=r"Failed to load model file at .*model\.pt"):
        MixSCVI.load(saved, trained.adata)


def test_truncated_data(trained, tmp_path):
    trained.save(tmp_path / "model", save_anndata=True)
    path = tmp_path / "model" / "adata.h5ad"
    whole = path.read_bytes()
    path.write_bytes(whole[:2000])
    with pytest.raises(ValueError, match=r"adata\.h5ad is truncated or damaged"):
        MixSCVI.load(tmp_path / "model")
    for changed in ("obs", "X/indptr", "var/_index"):
        path.write_bytes(whole)
        with h5py.File(path, "a") as file:
            if changed in file:
                del file[changed]
            else:
                file["X"].attrs["encoding-type"] = "nothing"
        with pytest.raises(ValueError, match=r"adata\.h5ad is truncated or damaged"):
            MixSCVI.load(tmp_path / "model")


def test_a_model_without_data_says_so(saved):
    with pytest.warns(UserWarning, match="holds no data, and no adata was given"):
        model = MixSCVI.load(saved)
    assert model.adata is None
    assert model.get_var_names()[0] == "gene0"


def test_what_is_stored_comes_back(trained, saved):
    loaded = MixSCVI.load(saved, trained.adata.copy(), accelerator="cpu")
    assert_same_state(loaded, trained)
    assert loaded.init_params_ == trained.init_params_
    assert loaded.history.keys() == trained.history.keys()
    for name, table in trained.history.items():
        assert loaded.history[name].equals(table)
    np.testing.assert_array_equal(loaded.train_indices, trained.train_indices)
    np.testing.assert_equal(dict(MixSCVI.load_registry(saved)), dict(trained.registry))


def test_scvi_tools_reads_the_registry_and_the_weights(trained, saved):
    """Its hub and its checkpoints do."""
    registry = SCVI.load_registry(str(saved))
    assert registry["model_name"] == "MixSCVI"
    state = registry["field_registries"]["batch"]["state_registry"]
    assert state["categorical_mapping"] == ["b0", "b1"]
    weights = torch.load(saved / "model.pt", weights_only=False)["model_state_dict"]
    trained.module.load_state_dict(weights)


@pytest.mark.parametrize("kind", ["integers", "intervals", "times", "booleans"])
def test_categories_of_other_types(kind, make_adata, tmp_path):
    import pandas as pd

    adata = make_adata()
    number = np.arange(adata.n_obs) % 2
    adata.obs["batch"] = pd.Categorical(
        {
            "integers": number + 3,
            "intervals": pd.cut(number, 2),
            "times": pd.Timestamp("2024-02-03") + pd.to_timedelta(number, "D"),
            "booleans": number == 1,
        }[kind]
    )
    model = fit(MixSCVI, adata, BATCH, n_components=2)
    model.save(tmp_path / "model")
    loaded = MixSCVI.load(tmp_path / "model", adata.copy(), accelerator="cpu")
    np.testing.assert_array_equal(
        loaded.get_latent_representation(), model.get_latent_representation()
    )
    before, after = (
        list(m.registry["field_registries"]["batch"]["state_registry"]["categorical_mapping"])
        for m in (model, loaded)
    )
    assert [type(value) for value in after] == [type(value) for value in before]
    assert after == before


class Wide(Prior):
    """A prior of the user's own."""

    def __init__(self, n_latent):
        super().__init__()
        self.log_scale = torch.nn.Parameter(torch.zeros(n_latent))

    def forward(self, encoder):
        normal = torch.distributions.Normal(torch.zeros_like(self.log_scale), self.log_scale.exp())
        return torch.distributions.Independent(normal, 1)


def test_a_prior_of_the_users_own_is_given_again(make_adata, tmp_path):
    adata = make_adata()
    model = fit(MixSCVI, adata, BATCH, n_components=2, prior=Wide(3))
    path = tmp_path / "model"
    model.save(path)
    with pytest.raises(ValueError, match=r"model\.pt leaves out the argument 'prior'.*Wide"):
        MixSCVI.load(path, adata)
    with pytest.raises(
        ValueError, match=r"arguments must be among.*\['prior'\], got \['n_latent'\]"
    ):
        MixSCVI.load(path, adata, arguments={"n_latent": 3})
    assert MixSCVI.load_registry(path)["model_name"] == "MixSCVI"
    loaded = MixSCVI.load(path, adata, arguments={"prior": Wide(3)}, accelerator="cpu")
    assert_same_state(loaded, model)
    query = make_adata(n_obs=40, seed=3, batches=("new",))
    mapped = MixSCVI.load_query_data(query, path, arguments={"prior": Wide(3)})
    assert torch.equal(mapped.module.prior.log_scale, model.module.prior.log_scale)


@pytest.mark.parametrize("prior", [GaussianMixture(3, 5), StandardNormal(3)])
def test_our_own_priors_and_torchs_activations(prior, make_adata, tmp_path):
    adata = make_adata()
    kwargs = {
        "extra_encoder_kwargs": {"activation_fn": torch.nn.LeakyReLU},
        "var_activation": torch.nn.Softplus(beta=2.0),
    }
    model = fit(MixSCVI, adata, n_components=2, prior=prior, **kwargs)
    model.save(tmp_path / "model")
    loaded = MixSCVI.load(tmp_path / "model", adata, accelerator="cpu")
    assert_same_state(loaded, model)
    np.testing.assert_array_equal(
        loaded.get_latent_representation(), model.get_latent_representation()
    )


def test_attributes_that_no_file_holds(make_adata, tmp_path):
    model = fit(MixSCVI, make_adata(), n_components=2)
    model.notes_ = {"made by": object()}
    with pytest.raises(TypeError, match=r"got a builtins.object at .*'notes_'.*'made by'"):
        model.save(tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_models_of_scvi_tools_are_read_when_trusted(make_adata, tmp_path):
    adata = make_adata()
    model = fit(SCVI, adata, BATCH)
    path = str(tmp_path / "scvi")
    model.save(path)
    with pytest.raises(ValueError, match=r"model\.pt holds Python objects.*allow_pickle=True"):
        MixSCVI.load(path, adata)
    loaded = MixSCVI.load(path, adata, allow_pickle=True, accelerator="cpu")
    assert loaded.module.n_components == 1
    np.testing.assert_array_equal(
        loaded.get_latent_representation(), model.get_latent_representation()
    )
    loaded.save(tmp_path / "anew")
    MixSCVI.load(tmp_path / "anew", adata)
    query = make_adata(n_obs=40, seed=3, batches=("new",))
    with pytest.raises(ValueError, match="allow_pickle=True"):
        MixSCVI.load_query_data(query, path)
    MixSCVI.load_query_data(query, path, allow_pickle=True)


def test_models_saved_before_are_read_when_trusted(trained, tmp_path):
    """As scvi-tools' own method writes them."""
    SCVI.save(_Unwrapped(trained), str(tmp_path / "old"))
    with pytest.raises(ValueError, match="allow_pickle=True"):
        MixSCVI.load(tmp_path / "old", trained.adata.copy())
    loaded = MixSCVI.load(
        tmp_path / "old", trained.adata.copy(), allow_pickle=True, accelerator="cpu"
    )
    assert_same_state(loaded, trained)


class _Unwrapped:
    """A model, for a method of a base class."""

    def __init__(self, model):
        self._model = model

    def __getattr__(self, name):
        return getattr(self._model, name)


def as_hub(model, folder, **save):
    """The folder of a model as a hub model of scvi-tools."""
    from huggingface_hub import ModelCard
    from scvi.hub import HubMetadata, HubModel

    model.save(folder, **save)
    metadata = HubMetadata.from_dir(
        str(folder), anndata_version=version("anndata"), model_parent_module="mixscvi"
    )
    card = ModelCard("---\nlicense: cc-by-4.0\n---\nA model.")
    HubModel(str(folder), metadata=metadata, model_card=card).save(overwrite=True)
    return HubModel(str(folder))  # as whoever fetches the folder makes it


@pytest.mark.parametrize("kept", ["data", "minified data", "nothing"])
@pytest.mark.parametrize("cls", [MixSCVI, MixSCANVI])
def test_hub(cls, kept, make_adata, tmp_path):
    pytest.importorskip("huggingface_hub")
    labels = {} if cls is MixSCVI else {"labels_key": "label", "unlabeled_category": "type0"}
    model = fit(cls, make_adata(), BATCH | labels, n_components=2)
    adata = model.adata.copy()
    if kept == "minified data":
        model.minify_adata()
    hub = as_hub(model, tmp_path / "hub", save_anndata=kept != "nothing")
    assert hub.metadata.model_cls_name == cls.__name__
    assert hub.metadata.model_parent_module == "mixscvi"
    assert "A model." in hub.model_card.content
    assert repr(hub) == ""  # scvi-tools prints it
    if kept == "nothing":
        assert hub.adata is None
        hub.load_model(adata)
    else:
        assert hub.adata.n_obs == adata.n_obs
        assert (hub.adata.X.sum() == 0) == (kept == "minified data")
    assert type(hub.model) is cls
    np.testing.assert_allclose(
        hub.model.get_latent_representation(), model.get_latent_representation(), rtol=1e-6
    )


@pytest.mark.filterwarnings("ignore:No revision was passed:UserWarning")
@pytest.mark.parametrize("kept", ["data", "minified data"])
def test_a_hub_model_is_pulled_with_its_data(kept, make_adata, tmp_path, monkeypatch):
    """From a repository that is a folder here: all but the transfer."""
    hub_package = pytest.importorskip("huggingface_hub")
    from scvi.hub import HubModel, _model

    model = fit(MixSCVI, make_adata(), BATCH, n_components=2)
    if kept == "minified data":
        model.minify_adata()
    as_hub(model, tmp_path / "repository", save_anndata=True)
    card = (tmp_path / "repository" / "README.md").read_text()

    def snapshot_download(repo_id, allow_patterns, cache_dir, **kwargs):
        assert repo_id == "lab/model"
        Path(cache_dir).mkdir()
        for name in allow_patterns:
            if (tmp_path / "repository" / name).exists():
                shutil.copy(tmp_path / "repository" / name, cache_dir)
        return cache_dir

    monkeypatch.setattr(hub_package, "snapshot_download", snapshot_download)
    monkeypatch.setattr(_model, "snapshot_download", snapshot_download, raising=False)
    monkeypatch.setattr(hub_package.ModelCard, "load", lambda name: hub_package.ModelCard(card))
    pulled = HubModel.pull_from_huggingface_hub("lab/model", cache_dir=str(tmp_path / "pulled"))
    assert {path.name for path in (tmp_path / "pulled").iterdir()} == {
        "model.pt", "adata.h5ad", "_scvi_required_metadata.json",
    }  # fmt: skip
    assert type(pulled.model) is MixSCVI
    assert pulled.adata.n_obs == model.adata.n_obs
    np.testing.assert_allclose(
        pulled.model.get_latent_representation(), model.get_latent_representation(), rtol=1e-6
    )


@pytest.mark.parametrize("file", ["model.pt", "adata.h5ad"])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "a payload", "empty"])
def test_a_hub_model_that_came_damaged(damage, file, trained, tmp_path):
    pytest.importorskip("huggingface_hub")
    hub, path = as_hub(trained, tmp_path / "hub", save_anndata=True), tmp_path / "hub" / file
    content = path.read_bytes()
    if damage == "flipped":
        middle = len(content) // 2
        path.write_bytes(content[:20] + b"\x00" * middle + content[20 + middle :])
    elif damage == "a payload":
        torch.save(Payload(tmp_path / "ran"), path)
    else:
        path.write_bytes(content[: len(content) // 2 if damage == "truncated" else 0])
    with pytest.raises(ValueError, match=re.escape(file)):
        hub.load_model()
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("cls", [MixSCVI, MixSCANVI])
def test_no_reference_is_read_for_mudata(cls, tmp_path):
    torch.save(Payload(tmp_path / "ran"), tmp_path / "model.pt")
    with pytest.raises(NotImplementedError, match="call prepare_query_anndata"):
        cls.prepare_query_mudata(None, str(tmp_path))
    assert not (tmp_path / "ran").exists()
