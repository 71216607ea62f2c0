# ruff: noqa: E402 (the extra must be there)
"""SimCLR against CCL over seeds."""

import json
import shutil
import statistics

import pytest
import yaml

for extra in ("mlxtend", "jsonargparse", "docstring_parser", "torchmetrics", "lightning", "kornia", "tensorboard"):
    pytest.importorskip(extra)  # the extra "train"

from ccl_fast.commands import compare_objectives
from ccl_fast.commands.command_line import main
from ccl_fast.errors import ArgumentError

pytestmark = pytest.mark.xdist_group("test_comparison")  # one process has the runs that all tests share

OPTIONS = [
    "--epochs=2",
    "--warmup_epochs=1",
    "--clusters=4",
    "--in_classes=[0,7]",
    "--batch_size=100",
    "--limit=200",
    "--far_ood=[noise]",
]


@pytest.fixture(scope="module")
def two_seeds(tmp_path_factory, no_page):
    folder = tmp_path_factory.mktemp("runs") / "two"
    assert main(["compare", f"--output={folder}", "--seeds=[3,5]", *OPTIONS]) == 0
    return folder


def test_says_what_the_reports_of_the_seeds_say(two_seeds):
    written = json.loads((two_seeds / "comparison.json").read_text())
    reports = [json.loads((two_seeds / f"seed{seed}" / "report.json").read_text()) for seed in (3, 5)]
    assert [report["arguments"]["seed"] for report in reports] == written["seeds"] == [3, 5]
    assert len(written["results"]) == 13
    assert written["environments"] == [report["environment"] for report in reports]
    assert written["arguments"]["clusters"] == 4
    cells = [(d, g, m) for d, groups in written["results"].items() for g, metrics in groups.items() for m in metrics]
    assert len(cells) == 13 * 2 * 5  # near and far, five metrics
    for detector, group, metric in cells:
        parts = written["results"][detector][group][metric]
        for objective in ("simclr", "ccl"):
            values = [report["results"][objective][detector][group][metric] for report in reports]
            assert parts[objective]["values"] == values
            assert parts[objective]["mean"] == pytest.approx(sum(values) / 2)
        gains = [a - b for a, b in zip(parts["ccl"]["values"], parts["simclr"]["values"], strict=True)]
        assert parts["gain"]["values"] == gains
        assert parts["gain"]["deviation"] == pytest.approx(statistics.stdev(gains))
    for level in ("encoder", "head"):
        parts = written["knn"][level]
        simclr, ccl = ([report["knn"][objective][level] for report in reports] for objective in ("simclr", "ccl"))
        assert (parts["simclr"]["values"], parts["ccl"]["values"]) == (simclr, ccl)
        assert parts["gain"]["values"] == [a - b for a, b in zip(ccl, simclr, strict=True)]
    for objective in ("simclr", "ccl"):
        values = [report["linear"][objective] for report in reports]
        assert written["linear"][objective]["values"] == values and min(values) > 0.5  # of two classes


def test_the_table_has_a_line_for_every_detector_and_kind_of_ood_set(two_seeds):
    written = json.loads((two_seeds / "comparison.json").read_text())
    lines = compare_objectives.format_comparison(written).splitlines()
    assert len(lines) == 2 + 13 * 2 + 2 + 1 + 1
    gain = written["results"]["all/ensemble"]["near"]["auroc"]["gain"]
    line = next(line for line in lines if line.startswith("all/ensemble *"))
    assert f"{gain['mean']:+.3f} +- {gain['deviation']:.3f}" in line
    assert line.endswith(f"{sum(value > 0 for value in gain['values'])} of 2")
    for number, name, gain in (
        (-3, "k-NN accuracy of the head ", written["knn"]["head"]["gain"]),
        (-2, "linear accuracy, encoder ", written["linear"]["gain"]),
    ):
        assert lines[number].startswith(name)
        assert f"{gain['mean']:+.3f} +- {gain['deviation']:.3f}" in lines[number]
    del written["knn"], written["linear"]  # as without classes
    assert compare_objectives.format_comparison(written).splitlines() == lines[:-4] + lines[-1:]


def test_resuming_runs_only_what_is_missing(two_seeds):
    before = json.loads((two_seeds / "comparison.json").read_text())
    (two_seeds / "seed5" / "report.json").unlink()
    (two_seeds / "comparison.json").unlink()
    finished = (two_seeds / "seed3" / "report.json").stat().st_mtime_ns
    assert main(["compare", f"--output={two_seeds.parent}", "--resume"]) == 0  # the newest in it, as it was given
    assert (two_seeds / "seed3" / "report.json").stat().st_mtime_ns == finished
    assert (two_seeds / "seed5" / "report.json").exists()
    after = json.loads((two_seeds / "comparison.json").read_text())
    assert after["results"] == before["results"]
    assert after["environments"][0] == before["environments"][0]


@pytest.mark.slow
def test_a_seed_killed_before_its_first_checkpoint_is_begun_again(two_seeds, tmp_path):
    folder = tmp_path / "again"
    shutil.copytree(two_seeds, folder)
    weights = [path.name for path in (folder / "seed5").glob("*.safetensors")]
    assert len(weights) == 4
    for name in ("report.json", "report.html", "metrics.jsonl", *weights):
        (folder / "seed5" / name).unlink(missing_ok=True)
    for name in ("checkpoints", "tensorboard"):
        shutil.rmtree(folder / "seed5" / name)
    before = json.loads((two_seeds / "comparison.json").read_text())["results"]
    assert main(["compare", f"--output={folder}", "--seeds=[3,5]", "--resume", *OPTIONS]) == 0
    assert json.loads((folder / "comparison.json").read_text())["results"] == before


def test_another_budget_is_not_mixed_in(two_seeds):
    with pytest.raises(ArgumentError, match=r"^epochs: expected 2"):
        compare_objectives.compare(
            two_seeds,
            [3, 5],
            resume=True,
            warmup_epochs=1,
            clusters=4,
            in_classes=[0, 7],
            batch_size=100,
            limit=200,
            far_ood=["noise"],
        )


def test_wrong_arguments_are_named(two_seeds, tmp_path, capsys, monkeypatch):
    def fails_with(message, *arguments):
        assert main(["compare", *OPTIONS, *arguments]) == 2
        assert message in capsys.readouterr().err

    fails_with("seeds: expected at least two different seeds, got [3]", "--seeds=[3]", f"--output={tmp_path / 'new'}")
    fails_with("seeds: expected at least two different seeds, got [3, 3]", "--seeds=[3,3]")
    fails_with("output: expected a folder that does not exist yet", f"--output={two_seeds}")
    monkeypatch.chdir(tmp_path)
    fails_with("there is nothing to resume in runs", "--resume")
    fails_with("output: expected the folder of a comparison to resume", "--resume", f"--output={tmp_path / 'typo'}")
    fails_with("overwrite: expected False when resuming", "--resume", "--overwrite", f"--output={two_seeds}")
    resumed = (f"--output={two_seeds}", "--seeds=[3,5]", "--resume")
    fails_with("clusters: expected 4, as the comparison to resume has it, got 5", *resumed, "--clusters=5")
    assert yaml.safe_load((two_seeds / "comparison.yaml").read_text())["clusters"] == 4
