"""The notebooks: clean as committed, and run alone, twice, and top to bottom."""

import os
import re
import zipfile
from pathlib import Path
from types import SimpleNamespace

import nbclient
import nbformat
import pandas as pd
import pytest

from brats_utils import evaluation, files, inference
from brats_utils.cases import find_cases
from brats_utils.files import describe_file, read_manifest
from brats_utils.nifti import load_labels
from brats_utils.phantom import write_phantom

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("0*.ipynb"))
PREDICT = ROOT / "notebooks" / "predict_your_scans.ipynb"
# TensorFlow's start-up lines stay out of the outputs, as in the Makefile.
QUIET = ["--IPKernelApp.capture_fd_output=False"]
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


def environment(data, **settings):
    """Return the environment variables of a notebook with these parameters only."""
    outside = {k: v for k, v in os.environ.items() if not k.startswith("BRATS_")}
    settings = {**settings, "DATA": str(data)}
    return outside | {f"BRATS_{name}": value for name, value in settings.items()}


def execute(path, data, **settings):
    """Run a notebook with its own folder as the current one; return it."""
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(path.parent)}}
    options = {"timeout": 900, "extra_arguments": QUIET, "resources": resources}
    client = nbclient.NotebookClient(notebook, **options)
    return client.execute(env=environment(data, **settings))


def warnings_in(notebook):
    outputs = [output for cell in code_of(notebook) for output in cell.outputs]
    return [output["text"] for output in outputs if output.get("name") == "stderr"]


def test_there_are_four_and_one_to_predict_with():
    names = ["01_prepare", "02_generator", "03_model", "04_train_predict"]
    assert [path.stem for path in NOTEBOOKS] == names
    assert sorted(PREDICT.parent.glob("*.ipynb")) == [*NOTEBOOKS, PREDICT]
    setups = {code_of(nbformat.read(p, 4))[0].source for p in [*NOTEBOOKS, PREDICT]}
    assert len(setups) == 1


@pytest.mark.parametrize("path", [*NOTEBOOKS, PREDICT], ids=lambda path: path.stem)
def test_committed_with_pictures_clean_and_without_errors(path):
    notebook = nbformat.read(path, as_version=4)
    outputs = [output for cell in code_of(notebook) for output in cell.outputs]
    assert not [o for o in outputs if o.output_type == "error"]
    assert sum("image/png" in o.get("data", {}) for o in outputs) >= 2
    for cell in code_of(notebook):
        if re.search(r"^(plotting\.plot_|ax\b)", cell.source, re.M):
            assert any("image/png" in o.get("data", {}) for o in cell.outputs)
    assert all(cell.execution_count is None for cell in code_of(notebook))
    assert path.stat().st_size < 1.5e6
    assert any("parameters" in c.metadata.get("tags", []) for c in code_of(notebook))


def find_secrets(text):
    return SECRETS.findall(text)


@pytest.mark.parametrize("path", [*NOTEBOOKS, PREDICT], ids=lambda path: path.stem)
def test_G02_no_secret_and_no_home_path(path):
    assert not find_secrets(path.read_text(encoding="utf-8"))


def test_G02_can_fail():
    assert find_secrets('{"username":"me","key":"0123456789abcdef0123456789abcdef"}')
    assert find_secrets("saved to /home/me/BraTS2020/data")


@pytest.mark.parametrize("path", [*NOTEBOOKS, PREDICT], ids=lambda path: path.stem)
def test_what_is_done_by_hand_equals_the_package(path):
    cells = code_of(nbformat.read(path, as_version=4))
    text = "".join(o.get("text", "") for cell in cells for o in cell.outputs)
    for n, total in re.findall(r"(\d+) of (\d+) \w+ are the same", text):
        assert n == total
    assert not re.findall(r"(?:same|hand|equal)\b.*: False", text)


@pytest.mark.notebooks
def test_G04_top_to_bottom_on_tiny_phantoms_then_each_again(tmp_path):
    for path in NOTEBOOKS:
        assert not warnings_in(execute(path, tmp_path, **TINY))
    (table,) = (tmp_path / "predictions").rglob("scores.csv")
    scores = pd.read_csv(table)
    assert {"case", "dice_WT", "hd95_ET", "mean_iou"} <= set(scores.columns)
    (run_dir,) = (tmp_path / "models").glob("*/")
    trained = inference.load_model(run_dir)
    trained.description["decoding"] = {"thresholds": [0.9, 0.9, 0.9]}
    # Tuned on the cases that are scored: it must not be used for their scores.
    evaluation.store_description(trained)
    names = "by-hand/mine.txt", "by-hand.keras", "overfit.keras"
    mine = [tmp_path / "models" / name for name in names]
    mine[0].parent.mkdir()
    for path in mine:
        path.write_text("mine")
    for path in reversed(NOTEBOOKS):
        assert not warnings_in(execute(path, tmp_path, **TINY))
    assert {path.read_text() for path in mine} == {"mine"}
    pd.testing.assert_frame_equal(pd.read_csv(table), scores)
    check_a_trained_model_on_other_scans(tmp_path, run_dir)
    check_folds_by_the_winners_recipe(tmp_path)


def check_a_trained_model_on_other_scans(data, run_dir):
    """Without any parameter, the newest run labels the scans that have no labels."""
    tables = sorted((data / "predictions").rglob("*.csv"))
    before = [path.read_bytes() for path in tables]
    assert not warnings_in(execute(PREDICT, data))
    assert [path.read_bytes() for path in tables] == before
    out_dir = data / "predictions" / f"{run_dir.name}-on-phantom"
    expected = {"BraTS20_Validation_001", "BraTS20_Validation_002"}
    assert set(pd.read_csv(out_dir / "volumes_ml.csv")["case"]) == expected
    for folder in (out_dir, out_dir / "uncertainty"):
        found = {path.name.removesuffix(".nii.gz") for path in folder.glob("*.gz")}
        assert found == expected
    times = [path.stat().st_mtime_ns for path in sorted(out_dir.rglob("*.gz"))]
    execute(PREDICT, data)
    assert [p.stat().st_mtime_ns for p in sorted(out_dir.rglob("*.gz"))] == times
    check_labelled_scans_that_it_was_not_trained_on(data, run_dir)


def check_labelled_scans_that_it_was_not_trained_on(data, run_dir):
    raw, out_dir = data / "phantom" / "BraTS2020_TrainingData", data / "labelled"
    execute(PREDICT, data, RAW=str(raw), OUT=str(out_dir), FLIPS="0")
    trained_on = inference.load_model(run_dir).description["train_cases"]
    expected = {case.id for case in find_cases(raw)} - {*trained_on}
    assert set(pd.read_csv(out_dir / "volumes_ml.csv")["case"]) == expected


@pytest.mark.notebooks
def test_without_a_run_the_phantom_weights_label_a_folder_of_scans(tmp_path):
    write_phantom(tmp_path / "raw", 0, without_segmentation=1, shape=(48, 48, 40))
    notebook = execute(PREDICT, tmp_path, FLIPS="0")
    assert not warnings_in(notebook)
    text = "".join(o.get("text", "") for c in code_of(notebook) for o in c.outputs)
    assert "phantom takes" in text and "synthetic patients" in text
    [path] = (tmp_path / "predictions" / "phantom-on-raw").glob("*.nii.gz")
    assert load_labels(path)[0].shape == (48, 48, 40)


def check_folds_by_the_winners_recipe(data):
    """Each run is scored on its own fold; two of them make an ensemble."""
    winners = {"RUN": "winners", "N_CLASSES": "3", "AVERAGE": "0.9"}
    winners |= {"DEEP_SUPERVISION": "1", "FLIPS": "1"}
    runs = [data / "models" / f"phantom-winners-fold{i}" for i in range(2)]
    scored = []
    for number, run_dir in enumerate(runs):
        execute(NOTEBOOKS[3], data, **{**TINY, **winners, "FOLD": str(number)})
        description = inference.load_model(run_dir).description
        assert description["outputs"] == "WT, TC, ET"
        table = pd.read_csv(data / "predictions" / run_dir.name / "scores.csv")
        assert sorted(table["case"]) == description["val_cases"]
        assert not {*description["val_cases"]} & {*description["train_cases"]}
        scored += description["val_cases"]
    assert len(set(scored)) == len(scored)
    out_dir = data / "ensemble"
    names = {"MODEL": ",".join(map(str, runs)), "OUT": str(out_dir), "FLIPS": "0"}
    execute(PREDICT, data, **names)
    volumes_ml = pd.read_csv(out_dir / "volumes_ml.csv")
    assert list(volumes_ml["case"]) == [
        "BraTS20_Validation_001",
        "BraTS20_Validation_002",
    ]
    assert len(read_manifest(out_dir)["made_from"]["models"]) == 2


@pytest.mark.notebooks
def test_G04_later_notebooks_alone_say_what_is_missing(tmp_path):
    missing = {path: "01_prepare" for path in NOTEBOOKS[1:]} | {PREDICT: "no folder"}
    for path, match in missing.items():
        with pytest.raises(nbclient.exceptions.CellExecutionError, match=match):
            execute(path, tmp_path / "empty", **TINY)


@pytest.mark.notebooks
def test_a_wrong_folder_is_an_error_and_never_replaced_by_phantoms(tmp_path):
    with pytest.raises(nbclient.exceptions.CellExecutionError, match="no folder"):
        execute(NOTEBOOKS[0], tmp_path, RAW=str(tmp_path / "x"), **TINY)
    assert not (tmp_path / "phantom").exists()


def options_of_notebook_04(data, kind, gpu, monkeypatch, **settings):
    """Run the one cell that chooses the options, for a set of scans of this kind."""
    for name in ("START", "AUGMENT", "DEPTH", "LEARNING_RATE", "FLIPS"):
        monkeypatch.delenv(f"BRATS_{name}", raising=False)
    for name, value in settings.items():
        monkeypatch.setenv(f"BRATS_{name}", value)
    manifests = {data / "split": {"made_from": {"settings": {"raw": "scans"}}}}
    fakes = SimpleNamespace(setting=files.setting, read_manifest=manifests.get)
    fakes.lies_in = lambda folder, other: (folder, kind) == (data / "scans", other)
    cells = code_of(nbformat.read(NOTEBOOKS[3], as_version=4))
    (source,) = (cell.source for cell in cells if '"LEARNING_RATE"' in cell.source)
    names = {"DATA": data, "GPU": gpu, "files": fakes, "pd": pd}
    exec(source, names)
    return {"start": names["start"], **names["config"]}


def test_options_follow_the_machine_and_the_data(tmp_path, monkeypatch):
    quick = options_of_notebook_04(tmp_path, "phantoms", False, monkeypatch)
    kept = {"start_share": 0.0}
    kept |= {"start": "none", "learning_rate": 3e-3, "augment": "none", "depth": 5}
    kept |= {"n_classes": 4, "deep_supervision": 0, "average": 0.0, "devices": 1}
    assert quick == {**kept, "tumour_share": 0.0, "flips": False}
    real = options_of_notebook_04(tmp_path, None, False, monkeypatch)
    varied = {"start": "phantom", "learning_rate": 1e-3, "augment": "all"}
    varied["start_share"] = 0.35
    assert real == {**quick, **varied, "tumour_share": 1 / 3}
    full = {**real, "start": "none", "n_classes": 3, "deep_supervision": 2}
    full |= {"average": 0.999, "flips": True, "start_share": 0.0}
    for kind in ("phantoms", None):
        assert options_of_notebook_04(tmp_path, kind, True, monkeypatch) == full


def test_options_from_outside_win_and_nonsense_is_refused(tmp_path, monkeypatch):
    at = tmp_path, "phantoms", False, monkeypatch
    started = options_of_notebook_04(*at, START="my.keras", DEPTH="3", FLIPS="true")
    assert (started["start"], started["depth"], started["flips"]) == ("my.keras", 3, 1)
    # A start brings its learning rate and augmentation.
    assert (started["learning_rate"], started["augment"]) == (1e-3, "all")
    with pytest.raises(ValueError, match="DEPTH is 'many', expected"):
        options_of_notebook_04(*at, DEPTH="many")


@pytest.mark.notebooks
def test_scans_without_labels_are_sent_to_the_notebook_that_predicts(tmp_path):
    write_phantom(tmp_path / "raw", 0, without_segmentation=1, shape=(48, 48, 40))
    with pytest.raises(nbclient.exceptions.CellExecutionError, match=PREDICT.stem):
        execute(NOTEBOOKS[0], tmp_path, RAW=str(tmp_path / "raw"), **TINY)


@pytest.mark.notebooks
def test_a_zip_of_real_cases_from_scan_to_label_map(real_cases, tmp_path):
    small = {"EPOCHS": "1", "PATCHES_PER_EPOCH": "9", "PATCH_SHAPE": "64,64,64"}
    archive = tmp_path / "scans.zip"
    with zipfile.ZipFile(archive, "w") as zipped:
        for folder in sorted(real_cases.glob("*/"))[:4]:
            for path in folder.iterdir():
                zipped.write(path, f"{folder.name}/{path.name}")
    for path in (NOTEBOOKS[0], NOTEBOOKS[3]):
        execute(path, tmp_path, RAW=str(archive), **small)
    start = inference.load_model(tmp_path / "models" / "scans-quick").description[
        "start"
    ]
    assert start == describe_file(inference.load_model("phantom").path)["sha256"]
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
    execute(NOTEBOOKS[0], tmp_path / "data", DOWNLOAD="1", **TINY)
    settings = read_manifest(tmp_path / "data" / "split")["made_from"]["settings"]
    assert settings["raw"] == str(tmp_path / "cache")
    assert sorted((tmp_path / "cache").rglob("*")) == before  # Kaggle's is read-only
    assert not (tmp_path / "data" / "phantom").exists()


@pytest.mark.notebooks
def test_the_notebooks_run_on_jax(tmp_path, monkeypatch):
    pytest.importorskip("jax", reason="JAX is not installed: pip install jax")
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("XLA_FLAGS", "--xla_force_host_platform_device_count=2")
    for path in (NOTEBOOKS[0], NOTEBOOKS[3]):
        notebook = execute(path, tmp_path, DEVICES="2", **TINY)
    text = "".join(
        output.get("text", "") for cell in code_of(notebook) for output in cell.outputs
    )
    assert "on jax" in text
    assert list((tmp_path / "predictions").rglob("scores.csv"))


AS_IF_ON_A_GPU = """
import os
import keras
cpus = keras.distribution.list_devices
keras.distribution.list_devices = lambda kind=None: cpus()
from brats_utils.training import Checkpoint
begin = Checkpoint.on_epoch_begin
def on_epoch_begin(self, epoch, logs=None):
    if epoch == int(os.environ.get("STOP_AT", -1)):
        raise KeyboardInterrupt
    begin(self, epoch, logs)
Checkpoint.on_epoch_begin = on_epoch_begin
"""


@pytest.mark.slow
@pytest.mark.notebooks
def test_the_full_run_is_rehearsed_and_resumes(tmp_path, monkeypatch):
    pytest.importorskip("jax", reason="JAX is not installed: pip install jax")
    data, profile = tmp_path / "data", {"PATCH_SHAPE": "32,32,32", "FILTERS": "4"}
    profile |= {"EPOCHS": "3", "PATCHES_PER_EPOCH": "4", "BATCH_SIZE": "1"}
    execute(NOTEBOOKS[0], data, **TINY)
    (tmp_path / "sitecustomize.py").write_text(AS_IF_ON_A_GPU)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("KERAS_BACKEND", "jax")  # trains in half precision on a CPU
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("STOP_AT", "2")
    with pytest.raises(nbclient.exceptions.CellExecutionError, match="Interrupt"):
        execute(NOTEBOOKS[3], data, **profile)
    run_dir = data / "models" / "phantom-full"
    assert len(pd.read_csv(run_dir / "history.csv")) == 2
    monkeypatch.delenv("STOP_AT")
    execute(NOTEBOOKS[3], data, **profile)
    assert len(pd.read_csv(run_dir / "history.csv")) == 3
    description = inference.load_model(run_dir).description
    assert description["precision"] == "mixed_float16"
    assert description["outputs"] == "WT, TC, ET"
    optimizer = description["optimizer"]
    assert (optimizer["deep_supervision"], optimizer["average"]) == (2, 0.999)
    drawn = description["train_data"]
    assert drawn["augment"] is True and 0 < drawn["tumour_share"] < 1
    scores = pd.read_csv(data / "predictions" / "phantom-full" / "scores.csv")
    assert sorted(scores["case"]) == description["val_cases"]
