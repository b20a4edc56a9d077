"""Row J4: what is no possible value of an option is one plain ValueError, at once."""

import ast
import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from conftest import toy_volumes, tree, write_case

from brats_utils import files
from brats_utils.cases import (
    check_cases,
    find_cases,
    load_case,
    rename_odd_segmentation,
    save_segmentation,
)
from brats_utils.evaluation import (
    hd95,
    lesion_scores,
    score_case,
    score_cases,
    summarise_scores,
    surface_dice,
    tune_decoding,
    tune_model,
)
from brats_utils.generator import BratsGenerator
from brats_utils.inference import (
    decode_probabilities,
    load_model,
    predict_case,
    predict_cases,
    predict_probabilities,
)
from brats_utils.labels import region_volumes_ml
from brats_utils.losses import RegionDice, supervise_deeply
from brats_utils.model import (
    PHANTOM_WEIGHTS,
    model_table,
    start_from,
    unet,
    unet_cicek2016,
    write_model,
)
from brats_utils.phantom import write_phantom
from brats_utils.plotting import (
    browse,
    browse_cases,
    plot_case,
    plot_history,
    plot_prediction,
    plot_slices,
    plot_surfaces,
    plot_uncertainty,
)
from brats_utils.prepare import (
    estimate_disk_gb,
    extract,
    prepare_case,
    prepare_dataset,
)
from brats_utils.split import split_dataset, split_folds
from brats_utils.training import train
from brats_utils.volumes import NORMALISATION, crop_box, scale_volume, standardise

NAN, INF = float("nan"), float("inf")
NOTEBOOKS = sorted(Path(__file__).parents[1].glob("notebooks/*.ipynb"))

# What no option of the kind may be.
WHOLE = (-1, 1.5, "3", True, NAN, INF, None, [2])
NUMBER = ("0.1", NAN, INF, True, None, [0.1])
EITHER = ("yes", "no", 1, 0, None)
SHAPE = ((8, 8), (0, 8, 8), (8, 8, 8.5), ("8", "8", "8"), (True,) * 3, "888", 8)
PATH = (None, 5, [], {})
CASE = (None, "BraTS20_Training_001", 5)
CASES = (None, 5, "BraTS20_Training_001", [None], ["a"])
UNLABELLED = object()  # stands for a list of such cases
MODALITIES = ((), {"flair", "t2"}, "flair", ("FLAIR", "t1ce", "t2"), 3, (1,))


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    """A small data set with all that is made from it, as keywords by name."""
    root = tmp_path_factory.mktemp("toys")
    for seed in range(1, 5):
        write_case(root / "raw", f"BraTS20_Training_{seed:03}", seed=seed)
    write_case(root / "raw", "BraTS20_Validation_001", seed=9, seg_name=None)
    options = {"crop_shape": (16, 16, 8), "jobs": 1}
    prepare_dataset(root / "raw", root / "prepared", **options)
    split_dataset(root / "prepared", root / "split")
    cases = find_cases(root / "raw")
    described = {"modalities": ["flair", "t1ce", "t2"], "outputs": "labels 0..3"}
    described |= {"normalisation": NORMALISATION, "orientation": "LPS"}
    network = unet((None, None, None, 3), filters=2, depth=2)
    write_model(network, root / "model.keras", described)
    patches = {"patch_shape": (8, 8, 8)}
    images, segmentation = toy_volumes()
    image = np.stack([images[m] for m in described["modalities"]], axis=-1)
    toys = {"root": root, "raw": root / "raw", "prepared": root / "prepared"}
    toys |= {"case": cases[0], "cases": cases[:4], "blind": cases[4:], "model": network}
    toys |= {"path": root / "model.keras", "folder": root / "split" / "train"}
    toys |= {"train_data": BratsGenerator(root / "split" / "train", **patches)}
    toys |= {"val_data": BratsGenerator(root / "split" / "val", **patches)}
    toys |= {"image": image, "segmentation": segmentation, "truth": segmentation}
    toys |= {"probabilities": np.full((2, 2, 2, 3), 0.9), "prediction": segmentation}
    toys |= {"scores": pd.DataFrame({"case": ["a", "b"], "dice": [0.5, 0.7]})}
    toys |= {name: root / name for name in ("out", "run_dir", "label_map.nii")}
    return SimpleNamespace(**toys)


# A line for each function: arguments that are possible, by name in `toys` or given;
# then for each parameter what is not. A name after "=" is how the message calls it.
OF_THE_NETWORK = [
    (
        BratsGenerator,
        ["folder"],
        {
            "folder": PATH,
            "batch_size": (0, *WHOLE),
            "patches_per_case": (0, *WHOLE),
            "seed": WHOLE,
            "tumour_share": (2, -0.1, *NUMBER),
            "augment": ("flip", "yes", 3, None),
            "cache": EITHER,
            "full_batches": EITHER,
            "patch_shape": SHAPE,
        },
    ),
    (
        train,
        ["model", "train_data", "val_data", "run_dir", ("epochs", 2)],
        {
            "model": (None, 5, "model.keras"),
            "train_data": (None, 5, "data/split/train", [1]),
            "val_data": (None, 5, "data/split/val", [1]),
            "run_dir": PATH,
            "epochs": (0, *WHOLE),
            "loss": (None, 5, "no such loss", []),
            "learning_rate": (0, -0.1, *NUMBER),
            "deep_supervision": (99, *WHOLE),
            "average": (1, 1.5, -0.1, *NUMBER),
            "start_share": (0.5, 1, -0.1, *NUMBER),
            "validation_freq": (0, -1, 1.5, "3", True, NAN, INF, [2]),  # None: ten
            "max_minutes": (-1, "8", NAN, True, [1]),
            "minutes": (-1, "8", NAN, INF, True, [1]),
            "callbacks": (None, 5, True, "log", ["log"], [train]),
            "start=start|no model found": (
                5,
                True,
                "nowhere.keras",
                ["phantom"],
                NAN,
            ),
            "verbose": (*EITHER, 2),
        },
    ),
    (
        unet,
        [("input_shape", (16, 16, 16, 3))],
        {
            "input_shape": (
                (),
                (16, 3),
                (16,) * 4 + (3,),
                (16, 16, 16, None),
                (16, 16, 16, 0),
                (0, 16, 16, 3),
                (-16, 16, 16, 3),
                ("16", 16, 16, 3),
                (16.0, 16, 16, 3),
                (30, 32, 32, 3),
                (True, True, True, 3),
                None,
                16,
                "16x16x16x3",
            ),
            "n_classes": (2, 5, *WHOLE),
            "filters": (0, *WHOLE),
            "depth": (0, 30, 10**9, *WHOLE),
            "stem_stride": (0, 3, *WHOLE),
            "normalisation": (*EITHER, "instance"),
            "dropout": (1, 1.5, -0.1, *NUMBER),
        },
    ),
    (
        unet_cicek2016,
        [("input_shape", (16, 16, 16, 3))],
        {
            "input_shape": ((16, 16, 3), (12, 16, 16, 3), None, "16", (16, 16, 16, 0)),
            "n_classes": (2, 5, *WHOLE),
        },
    ),
    (
        supervise_deeply,
        ["model", ("levels", 1)],
        {"model": (None, 5), "levels": (0, 99, *WHOLE)},
    ),
    (
        model_table,
        ["model"],
        {
            "model": (None, 5),
            "input_shape": ((8, 8, 3), (7, 8, 8, 3), "8883", 8, (8, 8, 8, 2), None),
        },
    ),
    (RegionDice, [], {"region": ("XX", None, 3, [], ("WT",))}),
    (load_model, [], {"path=model": (*PATH, "nowhere.keras", "old.h5")}),
    (
        load_model,
        [("path", PHANTOM_WEIGHTS)],
        {"modalities": (5, True, "flair", [], ("FLAIR",), ("flair", "t1"), ["t1"] * 4)},
    ),
    (
        predict_case,
        ["model", "case"],
        {
            "model": (None, 5, [], [None], "nowhere.keras"),
            "case": CASE,
            "flips": EITHER,
            "uncertainty": EITHER,
            "patch_shape": (*SHAPE, (7, 8, 8)),
            "thresholds": ((0.5,), (0.5, 0.5, 2), 0.5, "abc", (NAN,) * 3, (True,) * 3),
            "min_et_voxels": (-1, 1.5, "3", "", True, False, NAN, [2], []),
            "min_island": (-0.1, 1.1, "0.1", "", True, False, NAN, [0.1], []),
            "modalities": (*MODALITIES, ("flair",), ("flair", "t1ce")),
            "engine": (None, 5, "onnx", ["keras"]),
        },
    ),
    (
        predict_cases,
        ["model", "cases", ("out_dir", "out")],
        {
            "model": (None, 5, [], [None], "nowhere.keras"),
            "cases=cases?": CASES,
            "out_dir": PATH,
            "flips": EITHER,
            "uncertainty": EITHER,
            "patch_shape": (*SHAPE, (7, 8, 8)),
            "thresholds": ((0.5,), (0.5, 0.5, 2), 0.5, "abc", (NAN,) * 3),
            "min_et_voxels": (-1, 1.5, "3", "", True, False, NAN, [2], []),
            "min_island": (-0.1, 1.1, "0.1", "", True, False, NAN, [0.1], []),
            "modalities": (*MODALITIES, ("flair",)),
            "flip": (True,),
            "tta": (8,),
        },
    ),
    (
        predict_probabilities,
        ["model", "image"],
        {
            "model": (None, 5, [], "nowhere.keras"),
            "image": (None, 5, np.zeros((8, 8, 8)), "scan"),
            "image=the model maps": (np.zeros((8, 8, 8, 2)),),
            "flips": EITHER,
            "patch_shape": (*SHAPE, (7, 8, 8)),
        },
    ),
    (
        decode_probabilities,
        ["probabilities"],
        {
            "probabilities": (None, 5, "abc", np.zeros((2, 5)), [], [["a"] * 3]),
            "thresholds": ((0.5,), (0.5,) * 4, (0.5, 0.5, 2), 0.5, "abc", (NAN,) * 3),
            "min_et_voxels": (-1, 1.5, "3", "", True, False, NAN, [2], []),
            "min_island": (-0.1, 1.1, "0.1", "", True, False, NAN, [0.1], []),
        },
    ),
    (
        score_case,
        ["prediction", "truth"],
        {
            "prediction": (None, 5, "map", np.zeros((2, 2, 2))),
            "prediction=labels": (np.full((24, 24, 16), 9),),
            "spacing_mm": ((1, 1), (0, 1, 1), (-1, 1, 1), (NAN, 1, 1), "111", 1, None),
        },
    ),
    *(
        (
            function,
            ["prediction", "truth"],
            {
                "prediction=shape": (None, 5, "map", np.zeros((2, 2, 2))),
                "spacing_mm": ((1, 1), (0, 1, 1), "111", 1, None),
            },
        )
        for function in (hd95, lesion_scores, surface_dice)
    ),
    (
        score_cases,
        [("predictions_dir", "out"), "cases"],
        {
            "predictions_dir": PATH,
            "predictions_dir=prediction": ("nowhere",),
            "cases=cases?": (*CASES, []),
        },
    ),
    (
        summarise_scores,
        ["scores"],
        {"scores": (None, 5, {}, "scores.csv"), "n_resamples": (0, *WHOLE)},
    ),
    (tune_decoding, [], {"cases": ([], None, 5, iter(()))}),
    (
        tune_decoding,
        [],
        {"cases=truth": ([(np.zeros((2, 2, 2, 3)), np.zeros((2, 2)))],)},
    ),
    (
        tune_model,
        [("run_dir", "path"), "cases"],
        {
            "run_dir=model": (*PATH, "nowhere"),
            "cases=case|cases": (*CASES, [], UNLABELLED),
            "flips": EITHER,
            "patch_shape": SHAPE,
            "modalities": (*MODALITIES, ("flair",)),
            "flip": (True,),
            "thresholds": ((0.5, 0.5, 0.5),),
        },
    ),
]
OF_OTHER_MODULES = [
    (
        find_cases,
        [("root", "raw")],
        {"root=root|folder": (*PATH, "nowhere"), "labels": (5, "3210", {1.7: 1})},
    ),
    (find_cases, [("root", "raw")], {"modalities": MODALITIES[1:]}),
    (check_cases, ["cases"], {"cases=cases?": CASES, "voxels": EITHER}),
    (check_cases, ["cases"], {"modalities": MODALITIES[1:]}),
    (load_case, ["case"], {"case": CASE, "modalities": MODALITIES[1:]}),
    (
        save_segmentation,
        ["segmentation", "case", ("path", "label_map.nii")],
        {
            "segmentation=label map": (None, 5, "map"),
            "case": CASE,
            "path=path|name of the file": (*PATH, "a.hdr"),
        },
    ),
    (
        prepare_case,
        ["case", "out"],
        {
            "case": CASE,
            "out": PATH,
            "crop_shape": SHAPE,
            "min_labelled": (1.5, -0.1, *NUMBER),
            "modalities": MODALITIES,
            "scaling": ("min-max", None, 3, []),
        },
    ),
    (
        prepare_dataset,
        ["raw", "out"],
        {
            "raw=raw|folder|cases": (*PATH, "nowhere"),
            "out": PATH,
            "crop_shape": SHAPE,
            "min_labelled": (1.5, -0.1, *NUMBER),
            "modalities": MODALITIES,
            "scaling": ("min-max", None, 3, []),
            "jobs": (0, -1, 1.5, "2", True),
            "skip_bad": EITHER,
            "labels": (5, "3210", None, {9: 9}, {1.7: 1}),
        },
    ),
    (
        split_dataset,
        ["prepared", "out"],
        {
            "prepared=prepared|data set": (*PATH, "nowhere"),
            "out": PATH,
            "ratio": ((0.5,), (1.5, -0.5), (0.5, 0.6), 0.25, "ab", None, (NAN, NAN)),
            "seed": WHOLE,
        },
    ),
    (
        split_folds,
        ["prepared", "out", ("folds", 2)],
        {
            "prepared=prepared|data set": (*PATH, "nowhere"),
            "out": PATH,
            "folds": (0, 1, 99, *WHOLE),
            "seed": (2**32, *WHOLE),
        },
    ),
    (
        write_phantom,
        [("root", "out"), ("n_cases", 1), ("shape", (16, 16, 16))],
        {
            "root": PATH,
            "n_cases": (0, *WHOLE),
            "seed": WHOLE,
            "shape": (*SHAPE, (8, 16, 16), None),
            "without_segmentation": WHOLE,
            "compressed": EITHER,
            "jobs": (0, -1, 1.5, "2", True),
        },
    ),
    (
        scale_volume,
        [("volume", np.arange(27.0).reshape(3, 3, 3))],
        {
            "volume": (None, "scan", np.full((2, 2, 2), NAN)),
            "method": ("z", None, 3, []),
        },
    ),
    (
        standardise,
        ["image"],
        {
            "image": (None, "scan", 5),
            "statistics": (5, (1, 2), "mean", np.ones((3, 2))),
        },
    ),
    (
        estimate_disk_gb,
        [("n_cases", 3)],
        {"n_cases": WHOLE, "crop_shape": SHAPE, "modalities": MODALITIES[1:]},
    ),
    (
        extract,
        [("archive", "out"), ("folder", "out")],
        {"archive": PATH, "folder": PATH, "max_gb": (-1, *NUMBER[:2], *NUMBER[3:])},
    ),
    (rename_odd_segmentation, [], {"root": PATH}),
    (
        crop_box,
        ["image"],
        {
            "image=image|brain": (None, "scan", 5, np.zeros((4, 4, 4))),
            "segmentation": ("map", 5, np.zeros((2, 2, 2))),
            "shape=crop_shape": SHAPE,
        },
    ),
    (
        plot_case,
        ["image"],
        {
            "image": (None, 5, "scan"),
            "segmentation=labels": (5, "map", np.zeros((2, 2, 2))),
            "index": (99, -1, 1.5, "3", True),
            "axis": (3, -1, 1.5, "2", None, True),
            "titles": (5, ["a"], "ab", {"a", "b", "c"}),
            "spacing_mm": (1, (1, 1), (0, 1, 1), "111", (NAN, 1, 1), None),
            "sides": (5, [True], [True] * 4, {True}, "LR"),
            "axes": (5, [], "axes", [1, 2, 3]),
        },
    ),
    (
        plot_prediction,
        ["image", "truth", "prediction"],
        {
            "channel": (3, -1, 0.5, "flair", None, 1.0, True),
            "index": (99, 1.5),
            "axis": (3, "z"),
        },
    ),
    (plot_slices, [], {"volumes": (None, 5, "scan", [None], [np.zeros((2, 2))])}),
    (
        plot_slices,
        [("volumes", [np.ones((4, 4, 4))])],
        {
            "overlays": (5, "map", [None, None]),
            "overlays=labels": ([5], [np.zeros((4, 4))], [np.full((4, 4, 4), 3)]),
            "boxes": (5, "box", [None, None], [5], ["box"], [(slice(2), slice(2))]),
            "boxes=boxes|boxes": ([(slice(2),) * 3], [(slice(0, 2),) * 4]),
            "sides": (5, [5], ["LR"], ["LRAPX"], "LR", [True, True]),
            "window": (5, (1,), (2, 1), "01", (NAN, 1), (0, 1, 2)),
        },
    ),
    (
        plot_uncertainty,
        ["image", "prediction", ("spread", np.zeros((24, 20, 16)))],
        {"spread=spread|labels": ("map", 5, np.zeros((2, 2, 2)))},
    ),
    (
        plot_surfaces,
        [("segmentations", [np.ones((4, 4, 4), np.uint8)]), ("titles", ["a"])],
        {
            "segmentations": (None, 5, "map", [5], [np.zeros((2, 2))], []),
            "segmentations=labels": (
                [np.full((4, 4, 4), 3)],
                [np.full((4, 4, 4), 0.5)],
            ),
            "titles": (None, 5, ["a", "b"], []),
            "spacing_mm": (1, (1, 1), (0, 1, 1), "111", None),
            "step": (0, -1, 1.5, "2", None),
        },
    ),
    (
        browse,
        ["image", "segmentation"],
        {
            "image": (None, 5, "scan"),
            "segmentation=labels": (5, "map", np.zeros((2, 2, 2))),
            "prediction=labels|prediction": (5, "map", np.zeros((2, 2, 2))),
            "axis": (3, "z", None),
            "spacing_mm": (1, (0, 1, 1), "111"),
        },
    ),
    (
        browse_cases,
        [("scores", pd.Series([0.5], ["a"])), ("load", len)],
        {
            "scores": (None, 5, "ids", np.zeros(3), pd.Series(["a"])),
            "load": (None, 5, "folder"),
        },
    ),
    (
        plot_history,
        [("history", pd.DataFrame({"loss": [1.0]}))],
        {"history": (None, 5, "history.csv", [1]), "axes": (5, [], [1, 2])},
    ),
    (
        region_volumes_ml,
        ["segmentation", ("spacing_mm", (1, 1, 1))],
        {
            "segmentation=labels": (None, 5, "map", np.full((2, 2, 2), 9)),
            "spacing_mm": ((1, 1), (0, 1, 1), (-1, 1, 1), (NAN, 1, 1), "111", None),
        },
    ),
]
SAYS = "expected|nowhere|multiples|set |choose|must end|convert|takes|no seg|Provide"
SAYS += "|check the|there is no|case's images|has a segmentation|one shape"


def is_refused(function, arguments, name, value):
    """Return what is wrong with how a function takes a value; empty if nothing."""
    try:
        function(**arguments)
    except ValueError as error:
        text = str(error)
        if value is None and re.search(r"expected .*or None\b", text):
            return f"offers what was refused: {text[:150]}"
        if not re.search(rf"\b({name})\b", text):
            return f"does not name it: {text[:150]}"
        return "" if re.search(SAYS, text) else f"says nothing possible: {text[:150]}"
    except Exception as error:  # what this test is about
        return f"{type(error).__name__}: {str(error)[:100]}"
    return "is accepted"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "rows", [OF_THE_NETWORK, OF_OTHER_MODULES], ids=["network", "others"]
)
def test_J4_impossible_values_are_one_plain_error(toys, monkeypatch, tmp_path, rows):
    monkeypatch.chdir(tmp_path)
    before, wrong, n = tree(toys.root), [], 0
    for function, given, table in rows:
        pairs = [(g, g) if isinstance(g, str) else g for g in given]
        possible = {k: getattr(toys, v) if isinstance(v, str) else v for k, v in pairs}
        for name, values in table.items():
            name, _, called = name.partition("=")
            for value in values:
                value = toys.blind if value is UNLABELLED else value
                arguments = {**possible, name: value}
                found = is_refused(function, arguments, called or name, value)
                n += 1
                if found:
                    wrong.append(f"{function.__name__}({name}={value!r:.40}) {found}")
    assert not wrong, f"{len(wrong)} of {n}:\n" + "\n".join(wrong)
    assert tree(toys.root) == before and not [*tmp_path.iterdir()]
    assert n > 100


def settings():
    """Yield (notebook, name, default) for each parameter that a notebook sets."""
    names = {"files": files, "GPU": False, "DATA": Path("data"), "Path": Path}
    names |= {"NAME": "name", "usual": "best.keras", "read_by_01": {}}
    names |= {"MINUTES": 8.0, "real": True, "FAST": "keras"}
    for path in NOTEBOOKS:
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            source = "".join(cell["source"])
            if cell["cell_type"] != "code" or "files.setting(" not in source:
                continue
            for node in ast.walk(ast.parse(source)):
                is_call = isinstance(node, ast.Call)
                if is_call and getattr(node.func, "attr", "") == "setting":
                    name, default = map(ast.unparse, node.args)
                    if name != "name":
                        yield path.name, ast.literal_eval(name), eval(default, names)
                    continue
                if isinstance(node, ast.Dict) and "files.setting(name" in source:
                    for name, row in eval(ast.unparse(node), names).items():
                        yield path.name, name, row[0]  # of the table of options


def test_J4_every_parameter_of_a_notebook_refuses_nonsense(toys, monkeypatch):
    # Text goes on to the function that knows what is possible.
    takes_text = {
        "SCALING": lambda text: prepare_case(toys.case, toys.out, scaling=text),
        "CROP_SHAPE": lambda text: prepare_case(toys.case, toys.out, crop_shape=text),
        "MODALITIES": lambda text: prepare_case(toys.case, toys.out, modalities=text),
        "FOLD": lambda text: BratsGenerator(toys.root / f"fold{text}" / "train"),
        "MODEL": lambda text: load_model(*text),
        "RAW": find_cases,
        "EPOCHS": lambda text: train(None, None, None, toys.out, epochs=text),
        "START": lambda text: start_from(text, None, None, None),
        "ENGINE": lambda text: predict_case(toys.model, toys.case, engine=text),
        "AUGMENT": lambda text: BratsGenerator(toys.folder, augment=text),
        **dict.fromkeys(("DATA", "RUN", "OUT")),  # any name will do
    }
    found = list(settings())
    assert len(found) > 35
    for notebook, name, default in found:
        monkeypatch.setenv(f"BRATS_{name}", "nonsense")
        if name not in takes_text:
            with pytest.raises(ValueError, match=f"BRATS_{name} is 'nonsense', expec"):
                pytest.fail(f"{notebook}: {files.setting(name, default)}")
        elif takes_text[name] is not None:
            with pytest.raises((ValueError, FileNotFoundError), match="nonsense"):
                takes_text[name](files.setting(name, default))
