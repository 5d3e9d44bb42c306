from types import SimpleNamespace

import pytest
from torch import nn

from megarec.dense.masters import check_supported
from megarec.errors import UserError


def test_what_no_checkpoint_can_hold_is_refused_before_the_training() -> None:
    module = nn.Linear(2, 2)
    check_supported(SimpleNamespace(optimizer=SimpleNamespace(), module=module))
    with pytest.raises(UserError, match="do not reach into NVMe"):
        check_supported(SimpleNamespace(optimizer=SimpleNamespace(swap_optimizer=True), module=module))
    module.bias.requires_grad_(False)
    with pytest.raises(UserError, match="to be trained; bias is not"):
        check_supported(SimpleNamespace(optimizer=SimpleNamespace(), module=module))
