"""X_0 against its parts put together by hand."""

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megarec.config.models import WukongConfig
from megarec.errors import UserError
from megarec.models.blocks import KeyedDropout
from megarec.models.inputs import InputLayer
from tests.models.layouts import layout


@given(
    dim=st.integers(1, 5),
    full=st.lists(st.integers(1, 3), max_size=3),
    small=st.lists(st.integers(1, 3), max_size=3),
    numeric=st.integers(0, 3),
    emitted=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    bias=st.booleans(),
    p=st.sampled_from([0.0, 0.5]),
)
@settings(max_examples=80, deadline=None)
def test_parts_lie_in_order(
    dim: int, full: list[int], small: list[int], numeric: int, emitted: tuple[int, int], bias: bool, p: float
) -> None:
    assume(full or small or numeric)
    config = WukongConfig(
        dim=dim,
        bias=bias,
        small_mlp=[4],
        small_embeddings=emitted[0],
        numeric_mlp=[3, 2],
        numeric_embeddings=emitted[1],
    )
    places = layout(dim, full, small)
    layer = InputLayer(places, numeric, config, embedding_dropout=p).double()
    numbers = torch.randn(6, numeric, dtype=torch.float64)
    embedded = torch.randn(6, places.width, dtype=torch.float64, requires_grad=True)
    keys = torch.arange(6)

    masked = KeyedDropout(p)(embedded, keys)
    expected = [masked[:, i * dim : (i + 1) * dim] for i in range(sum(full))]
    for present, inputs, name, count in (
        (bool(small), masked[:, sum(full) * dim :], "small_mlp", emitted[0]),
        (bool(numeric), numbers, "numeric_mlp", emitted[1]),
    ):
        assert present == any(key.startswith(name) for key in layer.state_dict())
        if present:
            out = getattr(layer, name)(inputs)
            expected += [out[:, i * dim : (i + 1) * dim] for i in range(count)]

    actual = layer(numbers, embedded, keys)
    assert actual.shape == (6, layer.embeddings, dim)
    torch.testing.assert_close(actual, torch.stack(expected, dim=1))
    if full or small:
        weights = torch.randn_like(actual)
        gradients = [torch.autograd.grad(x, embedded, weights)[0] for x in (actual, torch.stack(expected, dim=1))]
        torch.testing.assert_close(*gradients)


def test_no_feature_at_all_is_a_user_error() -> None:
    with pytest.raises(UserError, match=r"data\.features"):
        InputLayer(layout(8, [], []), 0, WukongConfig(dim=8))
