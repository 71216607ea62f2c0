"""What the processes of a group tell each other."""

from ccl_fast.distributed.peers import (
    EXCHANGES,
    Block,
    ExchangeWay,
    Peers,
    check_process_group,
    outside_of_graphs,
)

__all__ = ["EXCHANGES", "Block", "ExchangeWay", "Peers", "check_process_group", "outside_of_graphs"]
