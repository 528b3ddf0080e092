"""Principal axes against scikit-learn's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.preprocessing import normalize
from torch import Tensor

from saeens_models.metrics import principal_axes


@pytest.fixture
def dictionaries() -> list[Tensor]:
    """Rows of any length whose directions differ most along two dimensions, around another one."""
    generator = torch.Generator().manual_seed(8)
    spread = torch.tensor([3.0, 0.2, 2.0, 0.1, 0.3, 0.2, 0.1])
    return [torch.randn(n, 7, generator=generator) * spread + torch.eye(7)[4] for n in (4100, 9, 25)]  # more than are summed at once


def test_they_are_those_of_scikit_learn_on_unit_rows(dictionaries: list[Tensor]) -> None:
    rows = normalize(torch.cat(dictionaries).numpy())
    expected = PCA(3, svd_solver="full").fit(rows)
    found = principal_axes(iter(dictionaries), 3)
    np.testing.assert_allclose(found.explained_variance_ratio, expected.explained_variance_ratio_, atol=1e-6)
    np.testing.assert_allclose(found.mean, expected.mean_, atol=1e-6)
    sign = np.sign((found.axes.numpy() * expected.components_).sum(1))
    np.testing.assert_allclose(found.axes, sign[:, None] * expected.components_, atol=1e-5)
    coordinates = torch.cat([found.coordinates(W_dec) for W_dec in dictionaries])
    np.testing.assert_allclose(coordinates, sign * expected.transform(rows), atol=1e-5)
    assert coordinates.dtype == torch.float32


def test_their_signs_do_not_depend_on_the_order_of_rows(dictionaries: list[Tensor]) -> None:
    found, again = principal_axes(dictionaries), principal_axes([W_dec.flip(0) for W_dec in reversed(dictionaries)])
    torch.testing.assert_close(found.axes, again.axes, atol=1e-5, rtol=0)
    assert all(axis[axis.abs().argmax()] > 0 for axis in found.axes)


def test_rows_that_are_all_alike_lie_on_one_point() -> None:
    found = principal_axes([torch.tensor([[2.0, 0.0, 0.0], [5.0, 0.0, 0.0]])])
    assert found.explained_variance_ratio.tolist() == [0, 0]
    torch.testing.assert_close(found.coordinates(torch.tensor([[1.0, 0.0, 0.0]])), torch.zeros(1, 2), atol=1e-6, rtol=0)


def test_bad_input_is_refused(dictionaries: list[Tensor]) -> None:
    with pytest.raises(ValueError, match="at least one"):
        principal_axes([])
    with pytest.raises(ValueError, match="n_axes must be 1 to 7"):
        principal_axes(dictionaries, 8)
    with pytest.raises(ValueError, match="got 7 and 3"):
        principal_axes([*dictionaries, torch.ones(2, 3)])
    with pytest.raises(ValueError, match="row 1"):
        principal_axes([torch.eye(2) * torch.tensor([[1.0], [0.0]])])
