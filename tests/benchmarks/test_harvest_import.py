"""What becomes of a harvested folder, and of the prediction beside it."""

import json

import pytest

from benchmarks.harvest import plan, prediction, report
from benchmarks.harvest.importing import ImportRefused, import_folders
from benchmarks.pages import readme

MACHINE = {
    "device": "made up for a test",
    "driver": "1",
    "torch": "2",
    "triton": "3",
    "commit": "0123456789abcdef",
    "date": "2026-01-02T03:04:05+00:00",
}
CEILINGS = {"matrix_rate": 1e14, "exponential_rate": 1e12}


def timed(p50: float) -> dict:
    return {"p20": 0.99 * p50, "p50": p50, "p80": 1.01 * p50, "repetitions": 5, "note": ""}


def made_up_lines() -> list[dict]:
    """As a harvest leaves them; no number of it comes from a device."""
    rival = {"case": "nt-xent", "n": 8192, "d": 128, "stage": "losses", "clusters": 128}
    return [
        {"stage": "environment", "case": "machine", **MACHINE},
        *({"stage": "environment", "case": "ceiling", "name": name, "value": x} for name, x in CEILINGS.items()),
        *({"stage": "losses", **key, "dtype": "bfloat16", **timed(0.003)} for key in plan.loss_keys()),
        rival | {"contender": "ours", "to_ours": 1.0, **timed(0.004)},
        rival | {"contender": "inf-cl", "to_ours": 2.0, **timed(0.008)},
        rival | {"contender": "memeff", "note": "memeff is not installed", "p50": None},
        *(
            {"stage": "launches", **key, "n": 65536, "launch": [64, 64, key["d"], 4, 2], **timed(0.01)}
            for key in plan.launch_keys()
        ),
        *(
            {"stage": "kmeans", **key, "doubtful": 12345, "rechecked": 67, "note": "", "assign p50": 0.005}
            for key in plan.cluster_keys()
        ),
    ]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Writes a harvest's folder; the pages are copies with nothing measured."""
    for name, what in (("README.md", " GPU"), ("docs/benchmarks.md", " GPU k-means")):
        page = tmp_path / name
        page.parent.mkdir(exist_ok=True)
        page.write_text(f"above\n<!-- measured{what} -->\nnot measured yet\n<!-- /measured{what} -->\nbelow\n")
    monkeypatch.setattr(readme, "README", tmp_path / "README.md")
    monkeypatch.setattr(readme, "PAGES", {" GPU k-means": tmp_path / "docs" / "benchmarks.md"})

    def write(lines, smoke=({"stage": "smoke", "check": "a", "ok": True, "note": ""},)):
        out = tmp_path / "harvested"
        out.mkdir(exist_ok=True)
        for name in report.FILES:
            (out / name).touch()
        for name, found in (("results.jsonl", lines), ("smoke.jsonl", smoke)):
            (out / name).write_text("".join(json.dumps(line) + "\n" for line in found))
        return out

    return write


def test_files_tables_and_proposals_come_from_a_folder(folder, tmp_path):
    lines = made_up_lines()
    faster = next(line for line in lines if line.get("tried") == str(plan.CANDIDATES["backward_rows", 128][1]))
    faster |= {"launch": [128, 64, 128, 8, 3], **timed(0.007)}
    text = import_folders([folder(lines)], tmp_path / "results")
    assert "backward_rows, D = 128: Launch(128, 64, 128, 8, 3)" in text and "10.000 -> 7.000 ms" in text
    assert "forward_triangle, D = 128: as it is" in text
    assert "matrix_rate: assumed 7.9e+14, measured 1e+14" in text

    files = {path.name: path for path in (tmp_path / "results").iterdir()}
    stem = "2026-01-02-made-up-for-a-test-gpu"
    assert files.keys() == {f"{stem}.jsonl", f"{stem}-kmeans.jsonl", f"{stem}-launches.jsonl"}
    rows = [json.loads(line) for line in files[f"{stem}.jsonl"].read_text().splitlines()]
    assert len(rows) == len(plan.loss_keys()) + 3 and all(row["commit"] == MACHINE["commit"] for row in rows)
    backward = next(row for row in rows if row.get("pass") == "backward" and (row["n"], row["d"]) == (65536, 128))
    assert backward["units"] == 2 and backward["floor"] == pytest.approx(2 * 2 * 65536**2 * 128 / 1e14)

    page, of_kmeans = (tmp_path / "README.md").read_text(), (tmp_path / "docs" / "benchmarks.md").read_text()
    assert page.startswith("above\n") and page.endswith("below\n") and "not measured" not in page + of_kmeans
    assert "| self-contrast | 65,536 | 128 | 3 ms | 3 ms |" in page and "8 ms (2.0x)" in page
    assert "| 1,000,000, 128, 1,000 | float16 | 1 | 5 ms | 12,345 | 67 |" in of_kmeans
    assert page == readme.SECTION.sub(lambda old: readme.section(files[f"{stem}.jsonl"], tmp_path), page)


def test_predicted_stands_beside_measured_for_every_case(folder, tmp_path):
    text = import_folders([folder(made_up_lines())], tmp_path / "results")
    _, _, predicted = prediction.read()
    beside = text.partition("predicted beside measured")[2].partition("the launch table")[0].splitlines()[2:-1]
    assert len(beside) == len(predicted)
    for line, given in zip(beside, predicted, strict=True):
        assert f"{given['case']} {given['n']} x {given['d']}" in line
        assert f" {given['ms']:.3f} " in line and " 3.000 " in line


def test_a_second_folder_adds_to_the_first_and_no_file_is_overwritten(folder, tmp_path):
    given = folder(made_up_lines())
    second = tmp_path / "second"
    second.mkdir()
    large = {"stage": "large", "case": "self-contrast", "contender": "ours", "n": 1 << 20, "d": 128}
    large |= {"pass": "forward", "mode": "graph", **timed(0.5)}
    (second / "results.jsonl").write_text(json.dumps(large) + "\n")
    (second / "stages.txt").touch()
    for _ in range(2):
        import_folders([given, second], tmp_path / "results")
    assert len(list((tmp_path / "results").iterdir())) == 6
    assert "| self-contrast | 1,048,576 | 128 | 500 ms | - |" in (tmp_path / "README.md").read_text()


def test_a_dry_run_is_refused(folder, tmp_path):
    lines = made_up_lines()
    lines[-1]["dry_run"] = True
    with pytest.raises(ImportRefused, match="a dry run"):
        import_folders([folder(lines)], tmp_path / "results")
    assert not (tmp_path / "results").exists() and "not measured yet" in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("missing, said", [("machine", "which machine"), ("commit", "--commit names it")])
def test_a_folder_without_machine_or_commit_is_refused(missing, said, folder, tmp_path):
    lines = made_up_lines()
    lines = lines[1:] if missing == "machine" else [lines[0] | {"commit": None}, *lines[1:]]
    with pytest.raises(ImportRefused, match=said):
        import_folders([folder(lines)], tmp_path / "results")
    if missing == "commit":
        import_folders([folder(lines)], tmp_path / "results", commit="abc")


def test_figures_of_wrong_kernels_reach_no_page(folder, tmp_path):
    text = import_folders(
        [folder(made_up_lines(), [{"stage": "smoke", "check": "NaN in a bias", "note": "finite"}])],
        tmp_path / "results",
    )
    assert "no page has been touched" in text and "NaN in a bias: finite" in text
    assert "not measured yet" in (tmp_path / "README.md").read_text()


# ---- the prediction


def test_the_committed_prediction_is_what_its_counts_and_ceilings_give():
    ceilings, counts, predicted = prediction.read()
    assert predicted == prediction.predict(counts, ceilings)
    assert ceilings.keys() == prediction.ASSUMED.keys()


def test_every_case_of_the_losses_is_predicted():
    _, _, predicted = prediction.read()
    for key in plan.loss_keys():
        found = [line for line in predicted if key.items() <= line.items()]
        too_large = key["case"] == plan.PRODUCTS and key["n"] > 200_000  # the matrix does not fit
        assert len(found) == (0 if too_large else 1), key
        assert all(line["ms"] > 0 and line["limiter"] for line in found)


def test_the_prediction_is_of_the_launches_that_are_shipped():
    pytest.importorskip("triton")
    from ccl_fast.kernels.launch import launch_on

    for name, counts in prediction.read()[1].items():
        shipped = launch_on(90, counts.kernel, 2, int(name.split("D=")[1].split()[0]), name.endswith("ids"))
        assert counts.launch == tuple(shipped), f"{name}: python -m benchmarks predict"


def test_a_prediction_is_never_below_the_busiest_unit_and_falls_with_a_faster_one():
    ceilings, counts, _ = prediction.read()
    for name, of_kernel in counts.items():
        d = int(name.split("D=")[1].split()[0])
        parts = prediction.tile_seconds(of_kernel, d, ceilings)
        whole = parts.pop("tile")
        assert whole >= max(parts.values()) > 0
        twice = {ceiling: 2 * rate for ceiling, rate in ceilings.items()}
        assert prediction.tile_seconds(of_kernel, d, twice)["tile"] == pytest.approx(whole / 2)
