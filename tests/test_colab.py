"""The notebooks on a simulated Colab and Kaggle: their versions, nothing of ours."""

import json
import os
import shutil
import subprocess
import tomllib
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from test_notebooks import NOTEBOOKS, PREDICT, ROOT, TINY, code_of

PYTHONS = {"colab": "3.13", "kaggle": "3.12"}


def find_python(version):
    """Return an interpreter of this version; skip where there is none."""
    pyenv = (Path.home() / ".pyenv" / "versions").glob(f"{version}*/bin/python")
    for found in [*sorted(pyenv), shutil.which(f"python{version}")]:
        if found and subprocess.run([found, "-c", ""]).returncode == 0:
            return found
    pytest.skip(f"no Python {version} here")


@pytest.fixture(scope="module", params=PYTHONS)
def colab(tmp_path_factory, request):
    """A venv with the versions of Colab or Kaggle, and a stub of `google.colab`."""
    venv = tmp_path_factory.mktemp(request.param) / "venv"
    python = find_python(PYTHONS[request.param])
    subprocess.run([python, "-m", "venv", venv], check=True)
    python = venv / "bin" / "python"
    quiet = ["-m", "pip", "install", "-q", "--only-binary=:all:"]
    versions = Path(__file__).with_name(f"{request.param}.txt")
    subprocess.run([python, *quiet, "-r", versions], check=True)
    (site,) = venv.glob("lib/python*/site-packages")
    (site / "google" / "colab").mkdir(parents=True)
    stub = "import os\n\ndef mount(path):\n    os.makedirs(path + '/MyDrive')\n"
    (site / "google" / "colab" / "drive.py").write_text(stub)
    return python


def installed(python):
    """Return {package: version} of an environment."""
    command = [python, "-m", "pip", "list", "--format=json"]
    found = subprocess.run(command, capture_output=True, check=True).stdout
    return {each["name"].lower(): each["version"] for each in json.loads(found)}


def address_of_project():
    """Return the repository's address, as pyproject.toml has it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return project["urls"]["Repository"]


def run_there(python, name, content, drive, **settings):
    """Run one notebook in a folder that holds nothing else, as Colab opens it."""
    path = content / f"{name}.ipynb"
    content.mkdir(exist_ok=True)
    shutil.copy(next(p for p in NOTEBOOKS if p.stem.startswith(name)), path)
    left_out = ("BRATS_", "PYTHON", "MPLBACKEND", "JUPYTER")
    outside = {k: v for k, v in os.environ.items() if not k.startswith(left_out)}
    settings |= {"DATA": str(drive)}
    outside |= {f"BRATS_{key}": value for key, value in settings.items()}
    # The project is fetched from here, instead of from its address.
    outside |= {"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_VALUE_0": address_of_project()}
    outside["GIT_CONFIG_KEY_0"] = f"url.file://{ROOT}.insteadOf"
    outside["PATH"] = f"{python.parent}:{outside['PATH']}"
    command = [python, "-m", "nbconvert", "--execute", "--to", "notebook", "--inplace"]
    result = subprocess.run(
        [*command, path], cwd=content, env=outside, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return nbformat.read(path, as_version=4)


@pytest.mark.slow
def test_from_the_first_cell_to_a_resumed_run_nothing_that_was_there_changes(
    colab, tmp_path
):
    before, drive = installed(colab), tmp_path / "drive" / "MyDrive"
    tiny = {**TINY, "OVERFIT_STEPS": "1"}
    run_there(colab, "01", tmp_path / "first", drive, **tiny)
    after = installed(colab)
    assert {name: after.get(name) for name in before} == before
    added = sorted(set(after) - set(before))
    print("added:", ", ".join(f"{name} {after[name]}" for name in added))
    assert {"brats-utils", "split-folders"} <= set(added)

    for name in ("02", "03"):  # each of Colab's notebooks has a machine of its own
        run_there(colab, name, tmp_path / f"machine{name}", drive, **tiny)
    run_there(colab, "04", tmp_path / "third", drive, **{**tiny, "EPOCHS": "2"})
    history = pd.read_csv(next(drive.rglob("history.csv")))
    # The session drops: the machine and what was installed on it are gone.
    subprocess.run([colab, "-m", "pip", "uninstall", "-q", "-y", "brats-utils"])
    shutil.rmtree(tmp_path / "third")
    run_there(colab, "04", tmp_path / "fourth", drive, **{**tiny, "EPOCHS": "3"})
    longer = pd.read_csv(next(drive.rglob("history.csv")))
    assert longer["epoch"].tolist() == [1, 2, 3]
    pd.testing.assert_frame_equal(longer[:2], history)


def test_the_address_is_the_same_everywhere():
    address = address_of_project()
    for path in [*NOTEBOOKS, PREDICT]:
        first = code_of(nbformat.read(path, as_version=4))[0]
        assert f'"git+{address}"' in first.source
        assert len(first.source.replace("\n\n", "\n").splitlines()) <= 5
    owner_and_name = address.removeprefix("https://github.com/")
    readme = (ROOT / "README.md").read_text()
    for path in NOTEBOOKS:
        badge = f"github/{owner_and_name}/blob/main/notebooks/{path.name}"
        assert f"https://colab.research.google.com/{badge}" in readme
    assert address in (ROOT / "CITATION.cff").read_text()
