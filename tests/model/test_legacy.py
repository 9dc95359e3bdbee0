"""Models saved before scvi-tools 0.15: converted whole or not at all, and run only if trusted."""

import os
import pickle

import numpy as np
import pandas as pd
import pytest
import torch
from scvi.model import SCANVI, SCVI

from fitting import COVARIATES, fit
from mixscvi import MixSCANVI, MixSCVI

FILES = ("model_params.pt", "var_names.csv", "attr.pkl")


class Payload:
    """Unpickling it makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def setup_dict(model):
    """How scvi-tools described the data that it had set up."""
    registry = model.registry["field_registries"]
    summary = {"n_vars": registry["X"]["summary_stats"]["n_vars"]}
    data, mappings = {"X": {"attr_name": "X", "attr_key": None}}, {}
    for new, old in (("batch", "batch_indices"), ("labels", "labels")):
        state = registry[new]["state_registry"]
        summary[f"n_{new}"] = registry[new]["summary_stats"][f"n_{new}"]
        data[old] = {"attr_name": "obs", "attr_key": f"_scvi_{new}"}
        mappings[f"_scvi_{new}"] = {
            "original_key": state["original_key"],
            "mapping": state["categorical_mapping"],
        }
    found = {
        "scvi_version": "0.14.6",
        "data_registry": data,
        "categorical_mappings": mappings,
        "summary_stats": summary,
    }
    if "field_keys" in registry["extra_categorical_covs"]["state_registry"]:
        state = registry["extra_categorical_covs"]["state_registry"]
        data["cat_covs"] = {"attr_name": "obsm", "attr_key": "_scvi_extra_categoricals"}
        data["cont_covs"] = {"attr_name": "obsm", "attr_key": "_scvi_extra_continuous"}
        found["extra_categoricals"] = {
            "mappings": state["mappings"],
            "keys": list(state["field_keys"]),
            "n_cats_per_key": list(state["n_cats_per_key"]),
        }
        found["extra_continuous_keys"] = np.array(
            registry["extra_continuous_covs"]["state_registry"]["columns"]
        )
    return found


def save_legacy(model, folder, prefix="", **attributes):
    """Write a model as scvi-tools 0.14 did."""
    folder.mkdir()
    torch.save(model.module.state_dict(), folder / f"{prefix}model_params.pt")
    np.savetxt(folder / f"{prefix}var_names.csv", model.get_var_names(), fmt="%s")
    init = model.init_params_
    flat = {**init["non_kwargs"], "model_kwargs": init["kwargs"].get("kwargs", {})}
    flat = {k: v for k, v in flat.items() if k not in ("registry", "linear_classifier")}
    content = {
        "is_trained_": True,
        "history_": model.history_,
        "train_indices_": model.train_indices_,
        "init_params_": {**flat, "use_cuda": False},
        "scvi_setup_dict_": setup_dict(model),
        **attributes,
    }
    with (folder / f"{prefix}attr.pkl").open("wb") as file:
        pickle.dump(content, file)
    return folder


@pytest.fixture(scope="module")
def trained(make_adata):
    return fit(SCVI, make_adata(), {**COVARIATES, "labels_key": "label"})


@pytest.fixture
def legacy(trained, tmp_path):
    return save_legacy(trained, tmp_path / "legacy")


def convert(folder, **kwargs):
    MixSCVI.convert_legacy_save(folder, folder.parent / "new", allow_pickle=True, **kwargs)
    return folder.parent / "new"


@pytest.mark.parametrize("prefix", [None, "of_"])
def test_what_was_converted_loads_without_running_anything(prefix, trained, tmp_path):
    folder = save_legacy(trained, tmp_path / "legacy", prefix or "")
    new = convert(folder, prefix=prefix)
    assert [file.name for file in new.iterdir()] == [f"{prefix or ''}model.pt"]
    loaded = MixSCVI.load(new, trained.adata.copy(), prefix=prefix, accelerator="cpu")
    assert loaded.module.n_components == 1
    np.testing.assert_array_equal(
        loaded.get_latent_representation(), trained.get_latent_representation()
    )
    pd.testing.assert_frame_equal(loaded.history["elbo_train"], trained.history["elbo_train"])
    without = MixSCVI.load(new, False, prefix=prefix)
    assert list(without.get_var_names()) == list(trained.get_var_names())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["legacy", "new"]


def test_labels_of_a_semi_supervised_model(make_adata, tmp_path):
    adata = make_adata()
    setup = {"labels_key": "label", "unlabeled_category": "type0", "batch_key": "batch"}
    model = fit(SCANVI, adata, setup)
    folder = save_legacy(model, tmp_path / "legacy", unlabeled_category_="type0")
    MixSCANVI.convert_legacy_save(folder, tmp_path / "new", allow_pickle=True)
    loaded = MixSCANVI.load(tmp_path / "new", adata.copy(), accelerator="cpu")
    np.testing.assert_array_equal(loaded.predict(), model.predict())


def test_nothing_runs_unless_the_files_are_trusted(legacy, tmp_path):
    for name in ("attr.pkl", "model_params.pt"):
        path = legacy / name
        whole = path.read_bytes()
        if name == "attr.pkl":
            path.write_bytes(pickle.dumps(Payload(tmp_path / "ran")))
        else:
            torch.save(Payload(tmp_path / "ran"), path)
        with pytest.raises(ValueError, match=r"attr\.pkl holds Python objects.*allow_pickle=True"):
            MixSCVI.convert_legacy_save(legacy, tmp_path / "new")
        assert not (tmp_path / "ran").exists()
        with pytest.raises(ValueError, match=rf"{name} (must hold|holds no)"):
            convert(legacy)
        assert (tmp_path / "ran").exists(), "whoever trusts the file has it run"
        (tmp_path / "ran").rmdir()
        path.write_bytes(whole)
    assert [path.name for path in tmp_path.iterdir()] == ["legacy"]


def _shortened(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _without_last_line(path):
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))


def _emptied(path):
    path.write_bytes(b"")


def _turned(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _of_bytes(path):
    path.write_bytes(b"\xff\xfe\x00\x01" * 9)


SPOILED = {
    "weights missing": ("model_params.pt", os.remove, "is missing"),
    "genes missing": ("var_names.csv", os.remove, "is missing"),
    "attributes missing": ("attr.pkl", os.remove, "is missing"),
    "weights cut": ("model_params.pt", _shortened, "is damaged"),
    "genes cut": ("var_names.csv", _shortened, "is truncated: its last line"),
    "attributes cut": ("attr.pkl", _shortened, "is truncated or damaged"),
    "genes cut at a line": ("var_names.csv", _without_last_line, "19 genes, and the registry 20"),
    "weights empty": ("model_params.pt", _emptied, "is damaged"),
    "genes empty": ("var_names.csv", _emptied, "is truncated"),
    "attributes empty": ("attr.pkl", _emptied, r"is truncated or damaged.*EOFError"),
    "a bit of the weights": ("model_params.pt", _turned, "is damaged at its record"),
    "weights of bytes": ("model_params.pt", _of_bytes, "is damaged"),
    "genes of bytes": ("var_names.csv", _of_bytes, "is damaged: it is no text"),
    "attributes of bytes": ("attr.pkl", _of_bytes, "is truncated or damaged"),
}


@pytest.mark.parametrize(("name", "spoil", "expected"), SPOILED.values(), ids=SPOILED)
def test_spoiled_files_are_named_and_nothing_is_left(name, spoil, expected, legacy, tmp_path):
    spoil(legacy / name)
    with pytest.raises((FileNotFoundError, ValueError), match=rf"{name}.* {expected}"):
        convert(legacy)
    assert [path.name for path in tmp_path.iterdir()] == ["legacy"]


def _change(name, **changed):
    def change(content):
        content[name] = {**content[name], **changed}

    return change


TAMPERED = {
    "another size": (_change("init_params_", n_hidden=13), "size mismatch|describes a model"),
    "a huge size": (_change("init_params_", n_hidden=10**9), "n_hidden=1000000000"),
    "a size of text": (_change("init_params_", n_latent="x"), "n_latent must be an integer"),
    "no setup": (_change("scvi_setup_dict_", data_registry={}), "n_batch"),
    "an attribute of code": (lambda content: content.update(module={}), "attribute module"),
}


@pytest.mark.parametrize(("change", "expected"), TAMPERED.values(), ids=TAMPERED)
def test_attributes_of_another_model(change, expected, legacy, tmp_path):
    content = pickle.loads((legacy / "attr.pkl").read_bytes())
    change(content)
    (legacy / "attr.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(
        ValueError, match=rf"attr\.pkl is damaged, or does not belong.*({expected})"
    ):
        convert(legacy)
    assert [path.name for path in tmp_path.iterdir()] == ["legacy"]


def test_a_folder_that_exists_is_kept_unless_told(legacy, trained, tmp_path):
    new = tmp_path / "new"
    new.mkdir()
    (new / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="output_dir_path .* already exists"):
        convert(legacy)
    _shortened(legacy / "attr.pkl")
    with pytest.raises(ValueError, match="attr.pkl"):
        convert(legacy, overwrite=True)
    assert [path.name for path in new.iterdir()] == ["notes.txt"]


def test_models_of_scvi_tools_that_did_not_name_their_genes_twice(trained, tmp_path):
    """Those before 1.2 kept the names beside the registry alone."""
    trained.save(tmp_path / "old")
    stored = torch.load(tmp_path / "old" / "model.pt", weights_only=False)
    del stored["attr_dict"]["registry_"]["field_registries"]["X"]["state_registry"]["column_names"]
    torch.save(stored, tmp_path / "old" / "model.pt")
    for adata in (trained.adata.copy(), False):
        loaded = MixSCVI.load(tmp_path / "old", adata, allow_pickle=True, accelerator="cpu")
        assert list(loaded.get_var_names()) == list(trained.get_var_names())
