"""The certificate's arithmetic in torch counts what the kernels count, and its run writes what it says."""

import json

import pytest
import torch

from benchmarks import certificate
from ccl_fast.ops.kmeans.assign import kmeans_assign
from tests.ops.kmeans_cases import crowded, gaussian


def some_crowded(n, k, d):
    """Half of the rows are in doubt, some between more than two centres."""
    x, centers = gaussian(n, k, d)
    doubled = [centers[:30] * (1 + 1e-6 * torch.randn(30, d)), centers[:10] * (1 + 1e-6 * torch.randn(10, d))]
    return x, torch.cat([centers, *doubled])


@pytest.mark.parametrize("make,n", [(gaussian, 2000), (crowded, 300), (some_crowded, 500)])
@pytest.mark.parametrize("d", [5, 70, 200])
def test_the_simulated_certificate_is_that_of_the_kernels(make, n, d, kmeans_device):
    x, centers = (rows.to(kmeans_device, torch.float32) for rows in make(n, 140, d))
    counted = certificate.count(x.cpu(), centers.cpu(), *certificate.frame(x.cpu()))
    doubtful, rechecked = kmeans_assign(x, centers, backend="cuda", return_rechecked=True)[2].tolist()
    assert counted.doubtful == pytest.approx(doubtful, rel=0.02, abs=1)
    assert counted.rechecked == pytest.approx(rechecked, rel=0.02, abs=1)
    assert counted.former == pytest.approx(counted.doubtful, rel=0.05, abs=2)


def test_a_quick_run_writes_every_iteration(tmp_path):
    text = certificate.run(True, tmp_path)
    (file,) = tmp_path.glob("*-cpu-kmeans-certificate.jsonl")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [row["iteration"] for row in rows] == [1, 2] and str(file) in text
    assert all(0 < row["doubtful"] < row["n"] and row["rechecked"] <= row["doubtful"] / 10 for row in rows)


def test_committed_figures_are_at_most_a_tenth_of_the_former():
    files = sorted(certificate.DIRECTORY.glob("*-cpu-kmeans-certificate*.jsonl"))
    rows = [json.loads(line) for line in files[-1].read_text().splitlines()]
    assert {row["d"] for row in rows} == {128, 512, 2048}
    assert all(row["rechecked"] <= row["former"] / 10 for row in rows)
