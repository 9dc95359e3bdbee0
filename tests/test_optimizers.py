import sys

import pytest
import torch

from mixscvi.optimizers import check_restored_optimizer, fused


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_parameters_are_updated_where_they_lie(name, monkeypatch):
    """By the fused kernel, which would copy what is not contiguous."""
    optimizer_cls = getattr(torch.optim, name)
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(5, 3, 4, generator=generator)
    parameters = [
        torch.nn.Parameter(values.clone()),
        torch.nn.Parameter(values.permute(2, 0, 1).contiguous().permute(1, 2, 0)),
        torch.nn.Parameter(torch.tensor(1.0)),
    ]
    updated = []
    module = sys.modules["torch.optim.adam"]
    original = module._fused_adam

    def seen(params, grads, exp_avgs, *args, **kwargs):
        updated.append((params, grads, exp_avgs))
        return original(params, grads, exp_avgs, *args, **kwargs)

    monkeypatch.setattr(module, "_fused_adam", seen)
    ours = fused(optimizer_cls)(parameters, lr=0.1)
    reference = torch.nn.Parameter(values.clone())
    theirs = optimizer_cls([reference], lr=0.1, fused=True)
    for _ in range(3):
        gradient = torch.randn(5, 3, 4, generator=generator)
        parameters[0].grad, reference.grad = gradient.clone(), gradient.clone()
        parameters[1].grad = gradient.permute(2, 0, 1).contiguous().permute(1, 2, 0)
        parameters[2].grad = torch.tensor(0.5)
        ours.step()
        theirs.step()
        assert torch.equal(parameters[0], reference)
        torch.testing.assert_close(parameters[1], reference, rtol=1e-6, atol=1e-6)
    assert parameters[2] < 1
    for tensors in updated[0]:
        assert all(tensor.is_contiguous() for tensor in tensors)
    assert updated[0][0][1].data_ptr() == parameters[1].data_ptr()


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("other", ["gradient", "moments"])
def test_what_lies_in_memory_otherwise_than_its_parameter_is_paired_with_it(other, amsgrad):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(5, 3, generator=generator)
    weight = torch.nn.Parameter(values.T.contiguous().T)
    reference = torch.nn.Parameter(values.clone())
    ours = fused(torch.optim.Adam)([weight], lr=0.1, amsgrad=amsgrad)
    theirs = torch.optim.Adam([reference], lr=0.1, amsgrad=amsgrad)
    for _ in range(3):
        gradient = torch.randn(5, 3, generator=generator)
        reference.grad = gradient.clone()
        weight.grad = gradient.clone() if other == "gradient" else gradient.T.contiguous().T
        ours.step()
        theirs.step()
        torch.testing.assert_close(weight, reference)
        if other == "moments":
            for name, moment in ours.state[weight].items():
                ours.state[weight][name] = moment.contiguous()


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_are_removed_or_zeroed(set_to_none):
    weights = [torch.nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizer = fused(torch.optim.Adam)(
        [{"params": weights[:1]}, {"params": weights[1:], "lr": 0.1}]
    )
    sum(weight.sum() for weight in weights).backward()
    optimizer.zero_grad(set_to_none=set_to_none)
    for weight in weights:
        if set_to_none:
            assert weight.grad is None
        else:
            assert torch.equal(weight.grad, torch.zeros(2))


@pytest.mark.parametrize("cls", [torch.optim.Adam, torch.optim.SGD, torch.optim.RMSprop])
def test_states_of_every_optimizer_are_given_back(cls):
    weight = torch.nn.Parameter(torch.ones(3, 2))
    options = {"momentum": 0.9} if cls is torch.optim.SGD else {}
    first, second = (cls([weight], lr=0.1, **options) for _ in range(2))
    weight.grad = torch.ones(3, 2)
    first.step()
    second.load_state_dict(first.state_dict())
    check_restored_optimizer(second)


def test_a_state_that_is_missing_or_no_tensor():
    weight = torch.nn.Parameter(torch.ones(3, 2))
    optimizer = torch.optim.Adam([weight])
    good = {"step": torch.tensor(1.0), "exp_avg": torch.ones(3, 2), "exp_avg_sq": torch.ones(3, 2)}
    for wrong, expected in (
        ({"step": torch.ones(3)}, r"step of an optimizer must .* shape \(\), got \(3,\)"),
        ({"exp_avg": torch.ones(3, 2, dtype=torch.complex64)}, "exp_avg .*must be dense, real"),
        ({"exp_avg": torch.ones(2, 3)}, r"exp_avg .* \(3, 2\), got \(2, 3\)"),
        ({"exp_avg": None}, "exp_avg of an optimizer must be a tensor, got None"),
        ({"step": "x"}, "step of an optimizer must be a tensor, got 'x'"),
    ):
        optimizer.state[weight] = good | wrong
        with pytest.raises((TypeError, ValueError), match=expected):
            check_restored_optimizer(optimizer)
    del good["exp_avg_sq"]
    optimizer.state[weight] = good
    with pytest.raises(ValueError, match="state of an optimizer lacks exp_avg_sq"):
        check_restored_optimizer(optimizer)


class LowRank(torch.optim.AdamW):
    """Somebody's own, with smaller moments than parameters."""


def test_moments_of_others_are_looked_at_where_torchs_kernels_would_read_them():
    weight = torch.nn.Parameter(torch.ones(3, 2))
    optimizer = LowRank([weight])
    optimizer.state[weight] = {"exp_avg": torch.ones(2), "exp_avg_sq": torch.ones(2)}
    check_restored_optimizer(optimizer)
    optimizer.param_groups[0]["fused"] = True
    with pytest.raises(ValueError, match=r"exp_avg .* \(3, 2\), got \(2,\)"):
        check_restored_optimizer(optimizer)
