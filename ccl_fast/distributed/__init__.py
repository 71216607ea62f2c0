"""What the processes of a group tell each other."""

from ccl_fast.distributed.peers import (
    EXCHANGES,
    Block,
    PeerError,
    Peers,
    check_process_group,
    first_sentence,
    outside_of_graphs,
)

__all__ = ["EXCHANGES", "Block", "PeerError", "Peers", "check_process_group", "first_sentence", "outside_of_graphs"]
