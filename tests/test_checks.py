import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csc_matrix, csr_array, csr_matrix

from mixscvi.checks import (
    check_choice,
    check_counts,
    check_finite,
    check_genes,
    check_positive,
    check_positive_int,
)

FORMATS = {
    "dense": np.asarray,
    "csr": csr_matrix,
    "csc": csc_matrix,
    "csr_array": csr_array,
    "float64": lambda x: np.asarray(x, dtype=np.float64),
}


def names(n):
    return pd.Index([f"cell{i}" for i in range(n)])


def counts(n=9):
    return (np.arange(n * 4).reshape(n, 4) % 5).astype(np.float32)


@pytest.mark.parametrize("value", [1, 4, np.int64(4), np.int32(1)])
def test_positive_int_returns_a_plain_int(value):
    result = check_positive_int("n_components", value)
    assert result == value
    assert type(result) is int


@pytest.mark.parametrize("value", [2.5, 4.0, True, np.True_, "4", None, [4]])
def test_positive_int_refuses_other_types(value):
    with pytest.raises(TypeError, match="n_components must be an integer"):
        check_positive_int("n_components", value)


@pytest.mark.parametrize("value", [0, -1, np.int64(-3)])
def test_positive_int_refuses_small_values(value):
    with pytest.raises(ValueError, match=rf"n_components .*at least 1, got .*{int(value)}"):
        check_positive_int("n_components", value)


def test_positive_int_takes_another_least_value():
    assert check_positive_int("n_flow_steps", 0, least=0) == 0
    with pytest.raises(ValueError, match="at least 0"):
        check_positive_int("n_flow_steps", -1, least=0)


def test_choice_names_argument_value_and_choices():
    assert check_choice("prior", "mog", ("normal", "mog")) == "mog"
    with pytest.raises(ValueError, match="prior must be one of 'normal', 'mog', got 'vamp'"):
        check_choice("prior", "vamp", ("normal", "mog"))


@pytest.mark.parametrize("value", [None, 3, ["mog"]])
def test_choice_refuses_what_is_no_string(value):
    with pytest.raises(ValueError, match="prior must be one of"):
        check_choice("prior", value, ("normal", "mog"))


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_good_counts_pass(form):
    x = form(counts())
    before = x.copy()
    check_counts(x, names(9), source="adata.X")
    assert abs(x - before).max() == 0


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize(
    ("value", "what"),
    [(-1.0, "negative"), (np.nan, "NaN or inf"), (np.inf, "NaN or inf"), (-np.inf, "NaN or inf")],
)
def test_bad_values_name_the_source_and_the_first_cells(form, value, what):
    x = counts()
    x[[2, 7], 3] = value
    expected = rf"^adata\.layers\['c'\] has {what}.* in 2 of 9 cells, first: 'cell2', 'cell7': "
    with pytest.raises(ValueError, match=expected):
        check_counts(form(x), names(9), source="adata.layers['c']")


@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_empty_cells(form):
    x = counts(12)
    x[2:9] = 0
    expected = "no counts at all in 7 of 12 cells, first: 'cell2', .*'cell6' and 2 more"
    with pytest.raises(ValueError, match=expected):
        check_counts(form(x), names(12), source="adata.X")
    check_counts(form(x), names(12), source="adata.X", allow_empty=True)


def test_allowed_negative_values_pass_but_nan_does_not():
    x = counts()
    x[1, 1] = -0.5
    check_counts(x, names(9), source="adata.X", above=-1.0)
    x[4, 0] = np.nan
    with pytest.raises(ValueError, match="first: 'cell4'"):
        check_counts(x, names(9), source="adata.X", above=-1.0)


def test_a_cell_of_stored_zeros_is_empty():
    x = csr_matrix(counts())
    x.data[x.indptr[3] : x.indptr[4]] = 0
    with pytest.raises(ValueError, match="no counts at all in 1 of 9 cells, first: 'cell3'"):
        check_counts(x, names(9), source="adata.X")


@pytest.mark.parametrize("form", [csr_matrix, csc_matrix])
@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda x: x.indptr.__setitem__(2, 10**9), "do not lie one after the other, first at 2"),
        (lambda x: x.indptr.__setitem__(2, -(10**9)), "do not lie one after the other, first at 1"),
        (lambda x: x.indptr.__setitem__(0, 1), "do not lie one after the other, first at 0"),
        (lambda x: x.indptr.__setitem__(-1, 10**9), "have 1000000000 values, and"),
        (lambda x: x.indices.__setitem__(3, 10**6), "it has values outside its shape"),
        (lambda x: x.indices.__setitem__(3, -1), "it has values outside its shape"),
    ],
)
def test_damaged_sparse_counts_are_named_before_they_are_read(form, spoil, expected):
    x = form(counts())
    spoil(x)
    with pytest.raises(ValueError, match=f"adata.X is damaged: .*{expected}"):
        check_counts(x, names(9), source="adata.X")


def test_damaged_sparse_counts_in_a_file_are_named_before_they_are_read(tmp_path):
    path = tmp_path / "cells.h5ad"
    anndata.AnnData(csr_matrix(counts())).write_h5ad(path)
    with h5py.File(path, "r+") as file:
        file["X/indptr"][2] = 10**9
    adata = anndata.read_h5ad(path, backed="r")
    with pytest.raises(ValueError, match=r"adata\.X is damaged: its rows do not lie"):
        check_counts(adata.X, adata.obs_names, source="adata.X")
    adata.file.close()


@pytest.mark.parametrize("form", [csr_matrix, csc_matrix])
def test_places_by_unsigned_numbers_are_looked_at_as_well(form):
    """Their differences are never negative: SciPy wrote beyond the end of its own memory."""
    x = form(counts())
    x.indptr = x.indptr.astype(np.uint32)
    check_counts(x, names(9), source="adata.X")
    x.indptr[2] = 4_000_000_000
    with pytest.raises(ValueError, match=r"adata\.X is damaged: .* first at 2"):
        check_counts(x, names(9), source="adata.X")


@pytest.mark.parametrize(
    ("part", "change", "expected"),
    [
        ("indptr", lambda v: np.concatenate([v[:2], [2**40], v[3:]]).astype(np.uint64), "rows do"),
        ("indptr", lambda v: v > 0, "indptr are of the type bool"),
        ("indptr", lambda v: np.stack([v, v]), r"indptr are of .* shape \(2, 10\)"),
        ("indptr", lambda v: v[:0], "rows do not lie one after the other, first at 0"),
        ("indptr", lambda v: np.append(v[:-1], 10**6), "rows have 1000000 values, and"),
        ("indices", lambda v: v[:-2], r"rows have \d+ indices, and"),
        ("indices", lambda v: v + 0.5, "indices are of the type float64"),
        ("indices", lambda v: v + 10**6, "it has values outside its shape"),
        ("data", lambda v: v[:-2], r"rows have \d+ values, and"),
    ],
)
def test_damaged_parts_of_a_file_are_named(part, change, expected, tmp_path):
    path = tmp_path / "cells.h5ad"
    anndata.AnnData(csr_matrix(counts())).write_h5ad(path)
    with h5py.File(path, "r+") as file:
        values = file["X"][part][:]
        del file["X"][part]
        file["X"][part] = change(values)
    adata = anndata.read_h5ad(path, backed="r")
    with pytest.raises(ValueError, match=rf"adata\.X is damaged: .*{expected}"):
        check_counts(adata.X, adata.obs_names, source="adata.X")
    adata.file.close()


@pytest.mark.parametrize("form", [np.asarray, csr_matrix, csc_matrix])
def test_cells_beyond_the_first_block_are_read(form, monkeypatch):
    monkeypatch.setattr("mixscvi.checks.counts._AT_ONCE", 16)
    x = counts()
    check_counts(form(x), names(9), source="adata.X")
    x[8, 0] = -2
    with pytest.raises(ValueError, match="1 of 9 cells, first: 'cell8'"):
        check_counts(form(x), names(9), source="adata.X")


@pytest.mark.parametrize("value", [0.0, -1.0, np.nan, np.inf])
def test_positive_factors(value):
    factors = np.ones((6, 1))
    check_positive(factors, names(6), source="adata.obs['factor']")
    factors[4] = value
    expected = r"adata\.obs\['factor'\] must be positive .* 1 of 6 cells, first: 'cell4'"
    with pytest.raises(ValueError, match=expected):
        check_positive(factors, names(6), source="adata.obs['factor']")


@pytest.mark.parametrize(
    ("given", "detail"),
    [
        (["a", "b"], "1 genes are missing, first: c"),
        (["a", "b", "c", "d"], "1 other genes, first: d"),
        (["a", "c", "b"], "another order, first at 1: c, expected b"),
        (["a", "b", "x"], "1 genes are missing, first: c"),
    ],
)
def test_genes_name_the_first_difference(given, detail):
    with pytest.raises(ValueError, match=detail):
        check_genes(pd.Index(given), ["a", "b", "c"])


def test_equal_genes_pass_whatever_holds_them():
    check_genes(pd.Index(["a", "b"]), np.array(["a", "b"]))
    check_genes([1, 2], ["1", "2"])


def test_a_repeated_gene_is_named():
    with pytest.raises(ValueError, match="1 other genes, first: a"):
        check_genes(["a", "b", "a"], ["a", "b"])


def test_values_that_log1p_cannot_take():
    x = counts()
    x[2, 1] = -1.0
    with pytest.raises(ValueError, match="values of -1 or less in 1 of 9 cells.*above -1"):
        check_counts(x, names(9), source="adata.X", above=-1.0)


def test_covariates_that_are_not_numbers():
    table = pd.DataFrame({"age": [1.0, np.nan, np.inf]}, index=["a", "b", "c"])
    with pytest.raises(ValueError, match=r"adata.obs\['age'\] is NaN or infinite in 2 of 3.*'b'"):
        check_finite(table, source="adata.obs")


def test_what_single_precision_cannot_hold_is_not_finite():
    names = pd.Index(["a", "b"])
    for values in ([[1.0, 1e39], [1.0, 0.0]], [[3e38, 3e38], [1.0, 0.0]]):
        with pytest.raises(ValueError, match="NaN or infinite values in 1 of 2 cells, first: 'a'"):
            check_counts(np.array(values), names, source="adata.X")
    with pytest.raises(
        ValueError, match="NaN or infinite in 1 of 2 cells, first: 'b': expected .* 3e"
    ):
        check_finite(pd.DataFrame({"age": [1.0, 1e300]}, index=names), source="adata.obs")


@pytest.mark.parametrize("above", [None, -1.0, -np.inf])
@pytest.mark.parametrize("form", [np.asarray, csr_matrix, csc_matrix])
@pytest.mark.parametrize("value", [0.0, 0.5, -0.5, -1.0, -2.0, 1e39, -1e39, np.nan, -np.inf])
@pytest.mark.parametrize("allow_empty", [True, False])
def test_a_look_at_all_values_finds_what_a_walk_over_them_does(
    above, form, value, allow_empty, monkeypatch
):
    x = counts().astype(np.float64)
    x[3, 1:] = 0
    x[3, 0] = value

    def outcome():
        try:
            check_counts(form(x), names(9), source="adata.X", above=above, allow_empty=allow_empty)
        except ValueError as error:
            return str(error)

    looked = outcome()
    monkeypatch.setattr("mixscvi.checks.counts._IN_MEMORY", ())
    assert looked == outcome()
