"""The cells that a VampPrior learns."""

import pytest
import torch
from scvi import REGISTRY_KEYS

from mixscvi.module import PseudoCells
from naive_module import COVARIATES, make_module, make_tensors


@pytest.mark.parametrize("likelihood", ["zinb", "normal"])
def test_pseudo_cells_start_as_real_cells(likelihood):
    module = make_module(prior="vamp", gene_likelihood=likelihood, **COVARIATES)
    tensors = make_tensors(module, 4)
    if likelihood == "normal":
        tensors[REGISTRY_KEYS.X_KEY][:, 1] = -0.5
    module.initialize_pseudo_cells([tensors])
    dense, batch, *covariates = module.prior.pseudo_inputs()
    expected = torch.cat(
        [tensors[REGISTRY_KEYS.X_KEY].log1p(), tensors[REGISTRY_KEYS.CONT_COVS_KEY]], dim=1
    )
    torch.testing.assert_close(dense, expected, rtol=0, atol=0.006)
    assert torch.equal(batch.argmax(-1), tensors[REGISTRY_KEYS.BATCH_KEY][:, 0])
    for i, covariate in enumerate(covariates):
        assert torch.equal(covariate.argmax(-1), tensors[REGISTRY_KEYS.CAT_COVS_KEY][:, i])
        torch.testing.assert_close(covariate.sum(-1), torch.ones(4))
        assert covariate.amax(-1).min() > 0.8


def test_pseudo_expression_is_never_negative():
    pseudo = PseudoCells(5, 3, 4, [2], non_negative=True)
    with torch.no_grad():
        pseudo.dense.fill_(-1.0)
    dense, _ = pseudo()
    assert (dense[:, :3] >= 0).all()
    assert (dense[:, 3] == -1).all()


def test_hidden_categories_have_no_weight_whatever_the_optimizer_does():
    pseudo = PseudoCells(5, 3, 3, [2, 4], non_negative=True)
    pseudo.hide_categories([2, 3])
    optimizer = torch.optim.Adam(pseudo.parameters(), lr=0.1, weight_decay=0.1)
    for _ in range(20):
        optimizer.zero_grad()
        _, first, second = pseudo()
        (first.square().sum() + second[:, 0].sum()).backward()
        optimizer.step()
    _, first, second = pseudo()
    assert first.isfinite().all()
    assert (second[:, 3] == 0).all()
    torch.testing.assert_close(second.sum(-1), torch.ones(5))
    assert all(parameter.isfinite().all() for parameter in pseudo.parameters())


def test_hidden_categories_are_saved():
    pseudo = PseudoCells(5, 3, 3, [4], non_negative=True)
    pseudo.hide_categories([3])
    other = PseudoCells(5, 3, 3, [4], non_negative=True)
    other.load_state_dict(pseudo.state_dict())
    assert torch.equal(other()[1], pseudo()[1])


def test_infinite_logits_of_earlier_files_become_a_mask():
    pseudo = PseudoCells(5, 3, 3, [4], non_negative=True)
    state = {name: value for name, value in pseudo.state_dict().items() if "hidden" not in name}
    state["cat_logits.0"][:, 3] = -torch.inf
    pseudo.load_state_dict(state)
    assert all(parameter.isfinite().all() for parameter in pseudo.parameters())
    assert (pseudo()[1][:, 3] == 0).all()


def test_pseudo_cells_of_earlier_files_have_started():
    pseudo = PseudoCells(5, 3, 3, [4], non_negative=True)
    assert not pseudo.started
    pseudo.load_state_dict(pseudo.state_dict())
    assert not pseudo.started
    pseudo.load_state_dict({k: v for k, v in pseudo.state_dict().items() if k != "started"})
    assert pseudo.started


def test_pseudo_cells_need_a_cell():
    with pytest.raises(ValueError, match="start from real cells, got none"):
        PseudoCells(5, 3, 3, [4], non_negative=True).initialize([])
