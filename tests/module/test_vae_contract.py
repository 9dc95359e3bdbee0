"""The contract that every combination of encoder, estimator, prior and flow keeps."""

import numpy as np
import pytest
import torch
from scvi import REGISTRY_KEYS

from naive_module import COMBINATIONS, COVARIATES, make_module, make_tensors, take


@pytest.fixture(params=COMBINATIONS.values(), ids=COMBINATIONS)
def combination(request):
    return {"gene_likelihood": "nb", **COVARIATES, **request.param}


def never_trained_by_scvi(name, module):
    """Parameters that scvi-tools makes and does not use in this configuration."""
    return (
        (name.startswith("l_encoder") and module.use_observed_lib_size)
        or (name.startswith("decoder.px_r_decoder") and module.dispersion != "gene-cell")
        or (name.startswith("decoder.px_dropout_decoder") and module.gene_likelihood != "zinb")
    )


def train_steps(module, tensors, n_steps, *, seed=1):
    torch.manual_seed(seed)
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-2)
    losses, reached = [], set()
    for _ in range(n_steps):
        optimizer.zero_grad()
        _, _, losses_of_step = module(tensors)
        losses_of_step.loss.backward()
        for name, parameter in module.named_parameters():
            if parameter.grad is not None and parameter.grad.abs().max() > 0:
                reached.add(name)
        optimizer.step()
        losses.append(losses_of_step.loss.item())
    return losses, reached


def test_contract_training(combination):
    module = make_module(**combination).train()
    tensors = make_tensors(module, 8)
    if combination["prior"] == "vamp":
        module.initialize_pseudo_cells([take(tensors, slice(4))])
    losses, reached = train_steps(module, tensors, 12)
    assert np.isfinite(losses).all()
    expected = {
        name for name, _ in module.named_parameters() if not never_trained_by_scvi(name, module)
    }
    assert expected - reached == set()
    assert np.mean(losses[-3:]) < np.mean(losses[:3])

    again = make_module(**combination).train()
    if combination["prior"] == "vamp":
        again.initialize_pseudo_cells([take(tensors, slice(4))])
    assert train_steps(again, tensors, 12)[0] == losses
    for name, value in again.state_dict().items():
        assert torch.equal(value, module.state_dict()[name]), name


def test_contract_every_component_is_trained(combination):
    """Each component's own parameters move, also where a step samples but two of them."""
    module = make_module(**combination).train()
    start = {name: p.detach().clone() for name, p in module.z_encoder.named_parameters()}
    train_steps(module, make_tensors(module, 8), 12)
    for name, parameter in module.z_encoder.named_parameters():
        if parameter.shape[0] == module.n_components:
            moved = (parameter - start[name]).flatten(1).abs().amax(1)
            assert (moved > 0).all(), name


def test_contract_evaluation(combination):
    """What a cell gets does not depend on the cells beside it."""
    module = make_module(**combination).train()
    tensors = make_tensors(module, 8)
    train_steps(module, tensors, 3)
    module.eval()
    together = module.posterior(tensors)
    assert together.component_loc.shape == (8, 3, 2)
    z = torch.randn(8, 2)
    library = tensors[REGISTRY_KEYS.X_KEY].sum(1, keepdim=True).log()

    def decode(cells):
        inputs = module._get_generative_input(
            take(tensors, cells), {"z": z[cells], "library": library[cells]}
        )
        return module.generative(**inputs)["px"].mu

    for i in range(8):
        cell = slice(i, i + 1)
        alone = module.posterior(take(tensors, cell))
        torch.testing.assert_close(
            alone.component_loc, together.component_loc[cell], rtol=1e-5, atol=1e-5
        )
        torch.testing.assert_close(
            alone.component_scale, together.component_scale[cell], rtol=1e-5, atol=1e-5
        )
        torch.testing.assert_close(decode(cell), decode(slice(None))[cell], rtol=1e-4, atol=1e-5)
    shuffled = module.posterior(take(tensors, torch.arange(7, -1, -1)))
    torch.testing.assert_close(shuffled.component_loc.flip(0), together.component_loc)


def test_contract_state_dict(combination, tmp_path):
    module = make_module(**combination).train()
    tensors = make_tensors(module, 8)
    train_steps(module, tensors, 3)
    module.eval()
    torch.save(module.state_dict(), tmp_path / "module.pt")
    other = make_module(**combination, seed=5).eval()
    assert not torch.equal(
        other.posterior(tensors).component_loc, module.posterior(tensors).component_loc
    )
    other.load_state_dict(torch.load(tmp_path / "module.pt"))
    assert torch.equal(
        other.posterior(tensors).component_loc, module.posterior(tensors).component_loc
    )

    def evaluate(any_module):
        torch.manual_seed(2)
        return any_module.marginal_ll(tensors, 30)

    assert evaluate(module).isfinite().all()
    assert torch.equal(evaluate(module), evaluate(other))
