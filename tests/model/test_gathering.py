"""What minibatches give, put together."""

import pytest
import torch

from mixscvi.model.gathering import gather


@pytest.mark.parametrize("sizes", [(1,), (3, 3, 1), (1, 1, 1, 1, 9, 1), tuple(range(1, 40))])
def test_as_if_concatenated(sizes):
    torch.manual_seed(0)
    parts = [(torch.randn(n, 4, 2), torch.arange(n), torch.rand(n) < 0.5) for n in sizes]
    for given, expected in zip(gather(iter(parts)), zip(*parts, strict=True), strict=True):
        torch.testing.assert_close(torch.from_numpy(given), torch.cat(expected), rtol=0, atol=0)


def test_nothing_of_a_minibatch_is_kept():
    """Neither its tensors, nor rows to spare."""
    first = torch.zeros(2, 3)
    (rows,) = gather((part,) for part in (first, torch.ones(5, 3), torch.ones(1, 3)))
    first += 7
    assert rows.sum() == 18
    assert rows.base is None


def test_none():
    with pytest.raises(ValueError, match="dataloader must give minibatches, got none"):
        gather(iter([]))
