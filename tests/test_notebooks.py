"""The notebooks: clean as committed, and run alone, twice, and top to bottom."""

import re
import zipfile
from pathlib import Path
from types import SimpleNamespace

import nbclient
import nbformat
import pandas as pd
import pytest

from brats_utils.cases import find_cases, load_labels
from brats_utils.files import read_json, write_json
from brats_utils.phantom import write_phantom

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
TINY = {
    "N_PHANTOMS": "6",
    "PHANTOM_SHAPE": "48,48,40",
    "CROP_SHAPE": "32,32,32",
    "MIN_LABELLED": "0.001",
    "PATCH_SHAPE": "32,32,32",
    "FILTERS": "4",
    "DEPTH": "3",
    "EPOCHS": "2",
    "OVERFIT_STEPS": "3",
    "LIBRARY_STEPS": "1",
}
SECRETS = re.compile(
    r"/(home|root|Users)/\w|KAGGLE_KEY\s*=|\"key\"\s*:\s*\"[0-9a-f]{32}|"
    r"-----BEGIN|AKIA[0-9A-Z]{16}|gh[pousr]_\w{30}|hf_\w{30}"
)


def code_of(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def execute(path, data, monkeypatch, **settings):
    """Run a notebook with its own folder as the current one; return it."""
    for name, value in {**settings, "DATA": str(data)}.items():
        monkeypatch.setenv(f"BRATS_{name}", value)
    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(
        notebook, timeout=900, resources={"metadata": {"path": str(path.parent)}}
    )
    return client.execute()


def test_there_are_four():
    names = ["01_prepare", "02_generator", "03_model", "04_train_predict"]
    assert [path.stem for path in NOTEBOOKS] == names


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_with_pictures_clean_and_without_errors(path):
    notebook = nbformat.read(path, as_version=4)
    outputs = [output for cell in code_of(notebook) for output in cell.outputs]
    assert not [o for o in outputs if o.output_type == "error"]
    assert sum("image/png" in o.get("data", {}) for o in outputs) >= 2
    assert all(cell.execution_count is None for cell in code_of(notebook))
    assert path.stat().st_size < 1.5e6
    assert any("parameters" in c.metadata.get("tags", []) for c in code_of(notebook))


def find_secrets(text):
    return SECRETS.findall(text)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_G02_no_secret_and_no_home_path(path):
    assert not find_secrets(path.read_text(encoding="utf-8"))


def test_G02_can_fail():
    assert find_secrets('{"username":"me","key":"0123456789abcdef0123456789abcdef"}')
    assert find_secrets("saved to /home/me/BraTS2020/data")


@pytest.mark.notebooks
def test_G04_top_to_bottom_on_tiny_phantoms_then_each_again(tmp_path, monkeypatch):
    for name in ("RAW", "MODEL"):
        monkeypatch.delenv(f"BRATS_{name}", raising=False)
    for path in NOTEBOOKS:
        notebook = execute(path, tmp_path, monkeypatch, EXPORT="1", **TINY)
    assert exported_difference(notebook) < 1e-4
    (table,) = (tmp_path / "predictions").rglob("scores.csv")
    scores = pd.read_csv(table)
    assert {"case", "dice_WT", "hd95_ET", "mean_iou"} <= set(scores.columns)
    (notes,) = (tmp_path / "models").rglob("model.json")
    tuned = {**read_json(notes), "decoding": {"thresholds": [0.9, 0.9, 0.9]}}
    write_json(notes, tuned)  # on the cases that are scored: it must not be used there
    for path in reversed(NOTEBOOKS):
        execute(path, tmp_path, monkeypatch, **TINY)
    pd.testing.assert_frame_equal(pd.read_csv(table), scores)
    check_a_trained_model_on_a_folder(tmp_path, monkeypatch)
    check_folds_by_the_winners_recipe(tmp_path, monkeypatch)


def exported_difference(notebook):
    """Return by how much the exported network's answer differs from the original's."""
    (text,) = (
        output["text"]
        for cell in code_of(notebook)
        for output in cell.outputs
        if "model.onnx differs" in output.get("text", "")
    )
    return float(re.search(r"at most (\S+)", text)[1])


def check_folds_by_the_winners_recipe(data, monkeypatch):
    """Each prepared case is scored by the network of the fold that left it out."""
    winners = {"RUN": "winners", "FOLDS": "2", "N_CLASSES": "3", "AVERAGE": "0.9"}
    winners |= {"DEEP_SUPERVISION": "1", "FLIPS": "1"}
    for name in ("MODEL", "RAW"):
        monkeypatch.delenv(f"BRATS_{name}", raising=False)
    execute(NOTEBOOKS[3], data, monkeypatch, **{**TINY, **winners})
    scores = pd.read_csv(data / "predictions" / "phantom-winners-folds2" / "scores.csv")
    report = pd.read_csv(data / "prepared" / "cases.csv").query("kept")
    assert sorted(scores["case"]) == sorted(report["case"])
    runs = sorted((data / "models").glob("phantom-winners-fold*"))
    notes = [read_json(run / "model.json") for run in runs]
    assert [len(note["train_cases"]) for note in notes] == [3, 3]
    assert notes[0]["decoding"] == notes[1]["decoding"]
    assert notes[0]["deep_supervision"] == 1 and notes[0]["outputs"] == "WT, TC, ET"


def check_a_trained_model_on_a_folder(data, monkeypatch):
    """With `MODEL`, nobody trained on is scored, and no other scores are replaced."""
    (run,) = (data / "models").glob("*-quick")
    with pytest.raises(nbclient.exceptions.CellExecutionError, match="01_prepare"):
        execute(NOTEBOOKS[3], data, monkeypatch, RAW=str(data), **TINY)
    (before,) = (data / "predictions").rglob("scores.csv")
    noted = before.stat().st_mtime_ns
    other = {**TINY, "PATCH_SHAPE": "64,64,64", "RAW": str(data / "phantom")}
    execute(NOTEBOOKS[3], data, monkeypatch, MODEL=str(run / "best.keras"), **other)
    after = data / "predictions" / f"{run.name}-on-phantom" / "scores.csv"
    trained_on = read_json(run / "model.json")["train_cases"]
    assert not set(pd.read_csv(after)["case"]) & set(trained_on)
    assert before.stat().st_mtime_ns == noted


@pytest.mark.notebooks
def test_G04_later_notebooks_alone_say_what_is_missing(tmp_path, monkeypatch):
    for path in NOTEBOOKS[1:]:
        with pytest.raises(nbclient.exceptions.CellExecutionError, match="01_prepare"):
            execute(path, tmp_path / "empty", monkeypatch, **TINY)


@pytest.mark.notebooks
def test_a_wrong_folder_is_an_error_and_never_replaced_by_phantoms(
    tmp_path, monkeypatch
):
    with pytest.raises(nbclient.exceptions.CellExecutionError, match="no folder"):
        execute(NOTEBOOKS[0], tmp_path, monkeypatch, RAW=str(tmp_path / "x"), **TINY)
    assert not (tmp_path / "phantom").exists()


@pytest.mark.notebooks
@pytest.mark.parametrize(
    "rows, expected",
    [
        (("one,True,", "two,False,small", "six,False,not sound: cut"), ["two"]),
        (("one,True,", "two,True,"), []),
    ],
)
def test_cases_left_out_as_not_sound_are_not_predicted(tmp_path, rows, expected):
    (tmp_path / "prepared").mkdir()
    table = "\n".join(("case,kept,reason", *rows))
    (tmp_path / "prepared" / "cases.csv").write_text(table)
    cells = code_of(nbformat.read(NOTEBOOKS[3], as_version=4))
    (source,) = (cell.source for cell in cells if "report_path" in cell.source)
    scores = pd.DataFrame({"case": ["two"], "dice_WT": [1.0]})
    names = {
        "scans": {i: SimpleNamespace(segmentation=i) for i in ("one", "two", "six")},
        "inference": SimpleNamespace(predict_cases=lambda *args, **options: None),
        "evaluation": SimpleNamespace(score_cases=lambda folder, cases: scores),
        **{"DATA": tmp_path, "MODEL": None, "FLIPS": False, "pd": pd},
        **{"models": [], "out_dir": tmp_path},
    }
    exec(source, names)  # this one cell, where prediction would raise on "six"
    assert [case.segmentation for case in names["dropped"]] == expected


def test_scans_without_labels_are_sent_to_notebook_04(tmp_path, monkeypatch):
    write_phantom(tmp_path / "raw", 0, without_segmentation=1, shape=(48, 48, 40))
    with pytest.raises(nbclient.exceptions.CellExecutionError, match="notebook 04"):
        execute(NOTEBOOKS[0], tmp_path, monkeypatch, RAW=str(tmp_path / "raw"), **TINY)


@pytest.mark.notebooks
def test_a_zip_of_real_cases_from_scan_to_label_map(real_cases, tmp_path, monkeypatch):
    small = {"FILTERS": "4", "DEPTH": "4", "EPOCHS": "1"}
    small |= {"PATCH_SHAPE": "64,64,64"}
    archive = tmp_path / "scans.zip"
    with zipfile.ZipFile(archive, "w") as zipped:
        for folder in sorted(real_cases.glob("*/"))[:4]:
            for path in folder.iterdir():
                zipped.write(path, f"{folder.name}/{path.name}")
    for path in (NOTEBOOKS[0], NOTEBOOKS[3]):
        execute(path, tmp_path, monkeypatch, RAW=str(archive), **small)
    written = list((tmp_path / "predictions").rglob("*.nii.gz"))
    cases = {case.id: case for case in find_cases(tmp_path / "raw" / "scans")}
    assert written
    for path in written:
        segmentation, affine = load_labels(path)
        case = cases[path.name.removesuffix(".nii.gz")]
        truth, expected = load_labels(case.segmentation)
        assert segmentation.shape == truth.shape
        assert (affine == expected).all()


KAGGLEHUB = """
def dataset_download(handle):
    assert handle == "awsaf49/brats20-dataset-training-validation"
    return {folder!r}
"""


@pytest.mark.notebooks
def test_the_kaggle_set_is_downloaded_when_asked_for(tmp_path, monkeypatch):
    write_phantom(tmp_path / "cache", 6, shape=(48, 48, 40))
    stub = KAGGLEHUB.format(folder=str(tmp_path / "cache"))
    (tmp_path / "stubs").mkdir()
    (tmp_path / "stubs" / "kagglehub.py").write_text(stub)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "stubs"))
    before = sorted((tmp_path / "cache").rglob("*"))
    execute(NOTEBOOKS[0], tmp_path / "data", monkeypatch, DOWNLOAD="1", **TINY)
    settings = read_json(tmp_path / "data" / "split" / "train" / "settings.json")
    assert settings["raw"] == str(tmp_path / "cache")
    assert sorted((tmp_path / "cache").rglob("*")) == before  # Kaggle's is read-only
    assert not (tmp_path / "data" / "phantom").exists()


@pytest.mark.notebooks
def test_the_notebooks_run_on_jax(tmp_path, monkeypatch):
    pytest.importorskip("jax", reason="JAX is not installed: pip install jax")
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
    for path in NOTEBOOKS:
        notebook = execute(path, tmp_path, monkeypatch, DEVICES="2", **TINY)
    text = "".join(
        output.get("text", "") for cell in code_of(notebook) for output in cell.outputs
    )
    assert "on jax" in text
    assert list((tmp_path / "predictions").rglob("scores.csv"))
