"""Checks of user input."""

from mixscvi.checks.annotation import (
    check_categories,
    check_column,
    check_finite,
    check_gene_list,
    check_genes,
    check_positive,
    check_unique,
    name_cells,
    warn_of_repeated,
)
from mixscvi.checks.arguments import (
    check_anndata,
    check_batches,
    check_boolean,
    check_choice,
    check_function,
    check_indices,
    check_library_size,
    check_loader,
    check_mapping,
    check_number,
    check_path,
    check_positive_int,
    check_text,
)
from mixscvi.checks.comparisons import check_comparison, groups_to_compare
from mixscvi.checks.compressed import check_compressed
from mixscvi.checks.counts import check_counts, check_numbers, has_fractions, is_in_memory

__all__ = [
    "check_anndata",
    "check_batches",
    "check_boolean",
    "check_categories",
    "check_choice",
    "check_column",
    "check_comparison",
    "check_compressed",
    "check_counts",
    "check_finite",
    "check_function",
    "check_gene_list",
    "check_genes",
    "check_indices",
    "check_library_size",
    "check_loader",
    "check_mapping",
    "check_number",
    "check_numbers",
    "check_path",
    "check_positive",
    "check_positive_int",
    "check_text",
    "check_unique",
    "groups_to_compare",
    "has_fractions",
    "is_in_memory",
    "name_cells",
    "warn_of_repeated",
]
