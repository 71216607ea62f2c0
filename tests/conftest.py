import os

import pytest
import torch

if not torch.cuda.is_available():
    # Before any kernel is imported: without a GPU the Triton kernels themselves run, interpreted, on CPU tensors.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def kernel_device() -> torch.device:
    """Where Triton's kernels run in this session: compiled on a GPU, or interpreted on the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
