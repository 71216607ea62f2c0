# ruff: noqa: E402 (the extra must be there)
"""The results file and the tables of natural images, from folders as `ccl-fast compare` leaves them."""

import json
import statistics

import pytest

for extra in ("torchmetrics", "lightning", "kornia", "tensorboard", "jsonargparse", "scipy"):
    pytest.importorskip(extra)

from benchmarks.pages import readme
from benchmarks.training import natural
from ccl_fast.training.config import FIELDS
from ccl_fast.training.objectives import OPTIONS

SETS = ("near", "far", "data/imagenet-other")


def report(seed, value, split=(0, 1), **arguments):
    """Every AUROC of SimCLR is 0.5 + seed / 100, of CCL that and `value`."""

    def results(auroc):
        metrics = {"auroc": auroc, "fpr95_id": 1 - auroc, "aupr_ood": 0.1}
        return {detector: dict.fromkeys(SETS, metrics) for detector in natural.DETECTORS}

    base, log = 0.5 + seed / 100, []
    for epoch, share in ((1, 0.4), (2, 0.6)):
        log.append({"stage": "ccl", "epoch": epoch, "same_class": share, "believed": share / 2})
    both = {"simclr": base, "ccl": base + value}
    return {
        "arguments": {name: FIELDS[name].default for name in OPTIONS}
        | {"objective": "ccl", "clusters": 20, "in_classes": list(split), "seed": seed}
        | arguments,
        "images": {"train": 1234},
        "results": {name: results(auroc) for name, auroc in both.items()},
        "knn": {name: {"encoder": auroc, "head": auroc - 0.1} for name, auroc in both.items()},
        "log": {"simclr": [{"stage": "warm-up"}, {"stage": "simclr", "epoch": 2}], "ccl": [{"stage": "warm-up"}, *log]},
        "default": "encoder/nearest_neighbor",
        "environment": {"torch": "2.0", "python": "3.11", "date": "2026-01-02T03:04:05"},
    }


@pytest.fixture
def rows(tmp_path):
    folders = []
    for name, values, changed in (
        ("a", (0.01, 0.02, 0.06), {}),
        ("b", (-0.01, 0.0, 0.01), {"believe": 1.0, "labels_from": "random"}),
    ):
        folders.append(tmp_path / name)
        for seed, value in enumerate(values):
            (folders[-1] / f"seed{seed}").mkdir(parents=True)
            (folders[-1] / f"seed{seed}" / "report.json").write_text(json.dumps(report(seed, value, **changed)))
    path = natural.collect(folders, "0123456789abcdef", tmp_path / "results")
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_line_for_every_run_and_simclr_once(rows):
    assert [row["variant"] for row in rows] == ["simclr", "ccl"] * 3 + ["ccl, labels from random, believe 1.0"] * 3
    assert {row["commit"] for row in rows} == {"0123456789abcdef"}
    assert rows[1]["results"]["encoder/mahalanobis"]["near"] == {"auroc": 0.51, "fpr95_id": 0.49}
    assert [line["epoch"] for line in rows[1]["log"]] == [1, 2]  # its own, not the warm-up's


def test_gains_are_paired_and_their_interval_is_students(rows):
    theirs, ours, gain = natural.gains(rows, "ccl", lambda row: row["knn"]["head"])
    assert theirs == pytest.approx([0.4, 0.41, 0.42])
    assert ours == pytest.approx([0.41, 0.43, 0.48])
    assert gain == pytest.approx([0.01, 0.02, 0.06])
    # Student's t with two degrees of freedom: 4.303 at 97.5 %.
    assert natural.interval(gain) == pytest.approx(4.3027 * statistics.stdev(gain) / 3**0.5, rel=1e-4)


def test_the_tables(rows):
    table = natural.table(rows)
    width = f"{natural.interval([0.01, 0.02, 0.06]):.3f}"
    assert table[2].startswith("| all, ensemble (default) | near |")
    assert table[8] == f"| encoder, nearest neighbor | near | 0.510 | 0.540 | +0.030 ± {width} | 3 of 3 |"
    assert len(table) == 2 + 3 * len(natural.DETECTORS) + 2
    first, second = natural.ablation(rows)[2:]
    assert first.startswith(f"| ccl | 3 | +0.030 ± {width} |")
    assert first.endswith("| 0.40 -> 0.60 | 0.20 -> 0.30 |")
    assert second.startswith("| ccl, labels from random, believe 1.0 | 3 | +0.000 ± ")


def test_pages_get_both_tables(rows, tmp_path):
    path = next((tmp_path / "results").glob("*.jsonl"))
    page = tmp_path / "page.md"
    markers = ("natural", "ablation", "OOD")
    page.write_text("".join(f"<!-- measured {m} -->\nold {m}\n<!-- /measured {m} -->\n" for m in markers))
    readme.update(path, page)
    text = page.read_text()
    assert "old natural" not in text and "old ablation" not in text and "old OOD" in text
    assert "CIFAR-10 (JPEG), 1,234 images of the classes [0, 1]" in text


def test_no_reports_are_said_to_be_none(tmp_path):
    with pytest.raises(ValueError, match=r"^folders: expected reports"):
        natural.collect([tmp_path], None, tmp_path / "results")
