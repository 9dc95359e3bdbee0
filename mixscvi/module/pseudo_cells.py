"""The inputs that a VampPrior on cells learns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["PseudoCells"]


class PseudoCells(nn.Module):
    """Learned inputs of the counts encoder: `K` cells that need not exist.

    Expression lives on the encoder's scale and stays non-negative if the data are; each categorical
    covariate is a softmax over its categories, but for those that :meth:`hide_categories` takes
    out. They are random until they start from real cells, by :meth:`initialize`, which the buffer
    `started` notes.

    Parameters
    ----------
    n_pseudo
        Number of pseudo-cells, `K`.
    n_genes
        Genes, `G`: the leading columns of the encoder's input.
    n_dense
        All dense columns of the encoder's input, `G` and continuous covariates.
    n_cat_list
        Number of categories of each covariate that the encoder sees.
    non_negative
        Whether expression is constrained to be non-negative.

    Examples
    --------
    >>> cells = PseudoCells(5, n_genes=20, n_dense=21, n_cat_list=[3], non_negative=True)
    >>> [part.shape for part in cells()]
    [torch.Size([5, 21]), torch.Size([5, 3])]
    """

    started: Tensor

    _SHARPNESS = 10.0
    _LEAST = 5e-3
    _LOGIT = 3.0

    def __init__(
        self,
        n_pseudo: int,
        n_genes: int,
        n_dense: int,
        n_cat_list: Sequence[int],
        *,
        non_negative: bool,
    ) -> None:
        super().__init__()
        self.n_genes = n_genes
        self.non_negative = non_negative
        self.register_buffer("started", torch.tensor(False))
        self.dense = nn.Parameter(torch.randn(n_pseudo, n_dense))
        # One category is nothing to learn, but keeps its place: a query brings more.
        self.n_cat_list = [max(n_cat, 1) for n_cat in n_cat_list]
        self.cat_logits = nn.ParameterList(
            torch.zeros(n_pseudo, n_cat) for n_cat in self.n_cat_list
        )
        for i, n_cat in enumerate(self.n_cat_list):
            self.register_buffer(self._mask_name(i), torch.zeros(n_cat, dtype=torch.bool))

    @staticmethod
    def _mask_name(covariate: int) -> str:
        return f"cat_hidden_{covariate}"

    def hide_categories(self, n_known: Sequence[int]) -> None:
        """Give no weight to categories that pseudo-cells are not to be of.

        Parameters
        ----------
        n_known
            For each covariate, how many of its first categories stay.
        """
        for i, n in enumerate(n_known):
            self.get_buffer(self._mask_name(i))[n:] = True

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # It was not stored once, when cells of all data were where they started.
        state_dict.setdefault(f"{prefix}started", torch.tensor(True))
        self._add_single_categories(state_dict, f"{prefix}cat_logits.")
        # Before there were masks, infinite logits hid a category.
        for i in range(len(self.cat_logits)):
            logits = state_dict.get(f"{prefix}cat_logits.{i}")
            mask = prefix + self._mask_name(i)
            if logits is not None and mask not in state_dict:
                state_dict[mask] = (logits == -torch.inf).all(0)
                state_dict[f"{prefix}cat_logits.{i}"] = logits.masked_fill(logits == -torch.inf, 0)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _add_single_categories(self, state_dict: dict[str, Any], prefix: str) -> None:
        """Make room for covariates of one category, which were not stored once."""
        stored = [name for name in state_dict if name.startswith(prefix)]
        several = [i for i, n_cat in enumerate(self.n_cat_list) if n_cat > 1]
        if len(stored) == len(self.n_cat_list) or len(stored) != len(several):
            return
        for of in ("cat_logits.", "cat_hidden_"):
            start = prefix.removesuffix("cat_logits.") + of
            values = [state_dict.pop(f"{start}{i}", None) for i in range(len(several))]
            for i, value in zip(several, values, strict=True):
                if value is not None:
                    state_dict[f"{start}{i}"] = value
        for i, n_cat in enumerate(self.n_cat_list):
            if n_cat == 1:
                state_dict[f"{prefix}{i}"] = self.cat_logits[i].detach().clone()

    @torch.no_grad()
    def initialize(self, inputs: Iterable[Sequence[Tensor]]) -> None:
        """Start from the encoder inputs of the first `K` real cells.

        If there are fewer, the others start as averages of two of them, in random proportions.

        Parameters
        ----------
        inputs
            Of some cells at a time: dense columns, `(n, n_dense)`, and the category of each cell,
            `(n, 1)`, for each covariate.

        Raises
        ------
        ValueError
            If there are no cells.
        """
        parts: list[list[Tensor]] = []
        missing = len(self.dense)
        for of_cells in inputs:
            parts.append([part[:missing] for part in of_cells])
            missing -= len(parts[-1][0])
            if not missing:
                break
        if missing == len(self.dense):
            raise ValueError("pseudo-cells start from real cells, got none")
        start, *categories = (torch.cat(part) for part in zip(*parts, strict=True))
        if missing:
            one, other = torch.randint(len(start), (2, missing), device=start.device)
            if len(start) > 1:
                other = torch.where(one == other, (one + 1) % len(start), other)
            share = 0.25 + 0.5 * torch.rand(missing, 1, device=start.device)
            start = torch.cat((start, torch.lerp(start[one], start[other], share)))
            categories = [torch.cat((category, category[one])) for category in categories]
        if self.non_negative:
            sharp = self._SHARPNESS * start[:, : self.n_genes].clamp_min(self._LEAST)
            start[:, : self.n_genes] = (sharp + (-(-sharp).expm1()).log()) / self._SHARPNESS
        self.dense.copy_(start)
        for logits, category in zip(self.cat_logits, categories, strict=False):  # or none encoded
            one_hot = F.one_hot(category.squeeze(-1).long(), logits.shape[-1])
            logits.copy_(self._LOGIT * one_hot)
        self.started.fill_(True)

    def forward(self) -> tuple[Tensor, ...]:
        """Make encoder inputs of the parameters.

        Returns
        -------
        Dense columns, `(K, n_dense)`, then weights `(K, n_cat)` for each covariate.
        """
        dense: Tensor = self.dense
        if self.non_negative:
            expression, rest = dense.split((self.n_genes, dense.shape[-1] - self.n_genes), dim=-1)
            dense = torch.cat((F.softplus(expression, beta=self._SHARPNESS), rest), dim=-1)
        weights = (
            logits.masked_fill(self.get_buffer(self._mask_name(i)), -torch.inf).softmax(-1)
            for i, logits in enumerate(self.cat_logits)
        )
        return dense, *weights
