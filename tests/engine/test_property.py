"""Random nets, every extension, against brute force; `make property` runs many more.

To see a net that failed: `print(random_net(seed, BLOCKS, COUPLERS))`.
"""

from functools import cache

import pytest
from tests.engine.property_check import Findings, check
from tests.engine.random_blocks import BLOCKS, COUPLERS
from tests.engine.random_nets import random_net

NETS = 200


@cache
def findings_of(seed: int) -> Findings:
    net = random_net(seed, BLOCKS, COUPLERS)
    try:
        return check(net)
    except Exception as error:
        error.add_note(str(net))
        raise


@pytest.mark.parametrize("seed", range(NETS))
@pytest.mark.filterwarnings("ignore:The tensor attributes self:UserWarning")  # torch's own, of exported recurrence
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths:UserWarning")
def test_net(seed):
    findings_of(seed)


def test_few_nets_are_refused():
    refused = [findings_of(seed).refused for seed in range(50)]
    assert 0 < sum(refused) < 0.25 * len(refused)


def test_a_seed_is_a_net():
    assert str(random_net(7, BLOCKS, COUPLERS)) == str(random_net(7, BLOCKS, COUPLERS))
