"""Several processes: what they tell each other, and how their rows travel."""

from ccl_fast.distributed.exchange import EXCHANGES, Block, Exchange, ExchangeWay
from ccl_fast.distributed.group import (
    NO_GROUP,
    Group,
    TorchGroup,
    check_process_group,
    open_group,
    outside_of_graphs,
)

__all__ = [
    "EXCHANGES",
    "NO_GROUP",
    "Block",
    "Exchange",
    "ExchangeWay",
    "Group",
    "TorchGroup",
    "check_process_group",
    "open_group",
    "outside_of_graphs",
]
