"""The rule of roles, on effects made to have them."""

import torch

from wpmerge.roles import count_roles, high, roles_of


def test_roles_by_hand():
    """Ten units in each of four layers, l* = 2; mean positive effects are small but for one unit a role."""
    weights, active, output = (torch.full((4, 10), 0.01, dtype=torch.float64) for _ in range(3))
    weights[3], active[3] = torch.nan, torch.nan
    weights[0, 4], active[0, 4] = 1.0, 1.0  # its weights carry it: source, no relay though A is high
    active[1, 2] = 0.5  # high only by activation
    output[1, 1], output[3, 7] = 1.0, 1.0  # only what lies after l* executes
    found = roles_of(weights, active, output, layer=2)
    assert {role: mask.nonzero().tolist() for role, mask in found.items()} == {
        "source": [[0, 4]],
        "aggregation": [[1, 2]],
        "execution": [[3, 7]],
    }
    counts = count_roles("head", found, {"source": weights, "aggregation": active, "execution": output})
    assert [each.thirds for each in counts] == [(1, 0, 0), (1, 0, 0), (0, 0, 1)]
    assert [each.strongest for each in counts] == [("head.0.4",), ("head.1.2",), ("head.3.7",)]
    assert [each.members for each in counts] == [each.strongest for each in counts]  # a single one each


def test_nothing_positive_is_high():
    assert not high(torch.full((2, 3), -1.0)).any()
    assert not high(torch.full((2, 3), torch.nan)).any()
