"""`make run`: the plan it prints, and the notebooks it executes in place."""

import importlib.util
import os
from pathlib import Path

import nbformat
import pytest

from brats_utils.training import has_gpu

SCRIPT = Path(__file__).parents[1] / "notebooks" / "run.py"


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("run", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_notebook(path, *sources):
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return path


def test_the_plan_fits_the_budget_until_the_machine_is_much_too_slow(script):
    fast, slow = script.REFERENCE_SECONDS / 2, script.REFERENCE_SECONDS * 1.2
    minutes, settings = script.make_plan(fast, 2)
    assert settings == {"MINUTES": 8}
    assert minutes <= script.BUDGET_MINUTES
    minutes, settings = script.make_plan(slow, 2)
    assert settings["OVERFIT_STEPS"] == 60
    assert 2 <= settings["MINUTES"] < 8
    assert minutes <= script.BUDGET_MINUTES + 0.5
    assert script.make_plan(fast, 1)[1]["MINUTES"] < 8
    assert script.make_plan(100 * slow, 2)[1]["MINUTES"] == 2


def test_one_line_a_cell_then_a_notebook_with_outputs(script, tmp_path, capsys):
    bar = "from brats_utils.files import progress_bar\nfor _ in progress_bar([1]): pass"
    path = write_notebook(tmp_path / "a.ipynb", "# a comment\nprint('seen')", bar)
    script.execute(path)
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if " s  " in line]) == 2
    assert "1/2" in lines[0]
    assert lines[0].endswith("print('seen')")
    first, second = nbformat.read(path, as_version=4).cells
    assert first.outputs[0]["text"] == "seen\n"
    assert "100%" in second.outputs[0]["text"]
    assert "\r" not in second.outputs[0]["text"]  # of a bar the end is kept
    assert first.execution_count is None


@pytest.mark.parametrize("last", ["1 / 0", "import os; os._exit(3)"])
def test_a_failing_notebook_stops_the_run_and_keeps_its_outputs(script, tmp_path, last):
    path = write_notebook(tmp_path / "a.ipynb", "print('seen')", last)
    before = path.read_bytes()
    with pytest.raises(SystemExit, match="a.ipynb"):
        script.execute(path)
    assert path.read_bytes() == before


def test_parameters_from_outside_win_over_the_plan(script, tmp_path, monkeypatch):
    for name in ("BRATS_RAW", "BRATS_EPOCHS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("BRATS_DATA", str(tmp_path))
    monkeypatch.setattr(script, "sample_seconds", lambda: 100.0)
    for name in ("BRATS_MINUTES", "BRATS_OVERFIT_STEPS"):
        monkeypatch.setenv(name, "to be restored")
        monkeypatch.delenv(name)
    monkeypatch.setenv("BRATS_LIBRARY_STEPS", "5")
    source = "import os\nprint(os.environ['BRATS_LIBRARY_STEPS'])"
    paths = [write_notebook(tmp_path / f"{name}.ipynb", source) for name in "ab"]
    script.main([str(path) for path in paths])
    for path in paths:
        (cell,) = nbformat.read(path, as_version=4).cells
        assert cell.outputs[0]["text"] == "5\n"
    assert os.environ["BRATS_MINUTES"] == "2"


@pytest.mark.parametrize("name", ["BRATS_RAW", "BRATS_EPOCHS"])
def test_ones_own_scans_or_epochs_and_a_gpu_are_not_planned(
    script, tmp_path, monkeypatch, capsys, name
):
    source = "import os\nprint(os.environ.get('BRATS_MINUTES'))"
    paths = [write_notebook(tmp_path / f"{each}.ipynb", source) for each in "ab"]
    for each in ("BRATS_RAW", "BRATS_EPOCHS", "BRATS_MINUTES"):
        monkeypatch.delenv(each, raising=False)
    monkeypatch.setenv("BRATS_DATA", str(tmp_path))
    with monkeypatch.context() as patch:
        patch.setenv(name, "4")
        script.main([str(path) for path in paths])
    (tmp_path / "raw" / "a_real_case").mkdir(parents=True)
    script.main([str(path) for path in paths])
    (tmp_path / "raw" / "a_real_case").rmdir()
    monkeypatch.setattr(script, "has_gpu", lambda: True)
    script.main([str(path) for path in paths])
    assert "this machine" not in capsys.readouterr().out
    (cell,) = nbformat.read(paths[0], as_version=4).cells
    assert cell.outputs[0]["text"] == "None\n"


def test_the_gpu_is_the_one_that_the_package_finds(script):
    assert script.has_gpu() == has_gpu()
