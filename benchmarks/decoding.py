"""Score networks with other decodings: how islands and thresholds were chosen.

    BRATS_REAL_CASES=folder:another python benchmarks/decoding.py
    BRATS_REAL_CASES=folder:another python benchmarks/decoding.py --kept folder
    ... --kept folder --name "without T1, no share of the start-10-0" --share 0.35

Every scan of the folds of real.py is predicted once, by the phantom weights or by the
network of its fold that `real.py --keep folder` has kept, and decoded in several ways.
With `--share`, its weights are averaged with the start's as `train(start_share=)` does
after the last epoch, the only one that real.py validates: the result is the same.
A row for each scan and decoding goes to benchmarks/results/decoding.csv; the means are
printed, what is best without the scan that is scored, and what each gains or loses
against the phantom weights as they are. `--print` only prints what is in the table.
"""

import argparse
from pathlib import Path

import pandas as pd
import real
import seed_recipe

from brats_utils.evaluation import score_case, summarise_scores
from brats_utils.files import atomic_write, project_root
from brats_utils.inference import decode_probabilities, load_model, predict_scan
from brats_utils.labels import ALL_MODALITIES, MODALITIES
from brats_utils.model import PHANTOM_DECODING, PHANTOM_WEIGHTS, read_model
from brats_utils.nifti import load_labels, spacing_mm

RESULTS = project_root(Path(__file__).parent) / "benchmarks/results/decoding.csv"
SHARES = (0.0, 0.1, 0.2, 0.3, 0.5, 1.0)
THRESHOLDS = [(t, t, t) for t in (0.1, 0.2, 0.3, 0.4, 0.5)] + [(0.3, 0.2, 0.3)]
DECODINGS = [(None, share) for share in SHARES]  # the label with the highest one
DECODINGS += [(thresholds, 0.5) for thresholds in THRESHOLDS]


def score(network, trained, case, flips):
    """Return a row for each decoding of a scan."""
    how = {"patch_shape": (96, 96, 96), "flips": flips}
    found, rows = predict_scan([trained], case, **how), []
    truth, affine = load_labels(case.segmentation, case.labels)
    for thresholds, share in DECODINGS:
        options = {"thresholds": thresholds, "min_island": share}
        segmentation = found.place(decode_probabilities(found.probabilities, **options))
        scores = score_case(segmentation, truth, spacing_mm(affine))
        name = "/".join(map(str, thresholds or ["none"]))
        key = {"network": network, "thresholds": name, "min_island": share}
        rows.append({**key, "case": case.id, **scores})
    return rows


def score_left_out(table):
    """Return the scores of each scan, decoded as is best for all the others."""
    mean = table.filter(like="dice").mean(axis=1)
    grid = mean.groupby([table["case"], table["decoding"]]).first().unstack()
    chosen = {case: grid.drop(case).mean().idxmax() for case in grid.index}
    mine = table["decoding"] == table["case"].map(chosen)
    return table[mine].set_index("case").filter(regex="dice|hd95")


def main():
    """Predict, decode, score and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kept", type=Path, help="folder of `real.py --keep`")
    parser.add_argument("--name", default="from phantoms-10-0", help="of its files")
    parser.add_argument("--share", type=float, default=0.0, help="of the start")
    parser.add_argument(
        "--without-t1", action="store_true", help="phantom weights only"
    )
    parser.add_argument("--flips", action="store_true", help="average 8 mirror images")
    parser.add_argument("--print", action="store_true", help="nothing is predicted")
    options = parser.parse_args()
    if options.kept and options.without_t1:
        parser.error("--without-t1 is for the phantom weights")
    network, rows = options.name if options.kept else "phantom", []
    share = options.share
    name = f"{network}, share {share}" if share else network
    name += ", without T1" * options.without_t1 + ", flips" * options.flips
    data = project_root(Path(__file__).parent) / "data/real"
    for fold in () if options.print else real.fold_folders(data):
        channels = MODALITIES if options.without_t1 else ALL_MODALITIES
        trained = load_model("phantom", channels)
        if options.kept:
            trained = load_model(options.kept / fold.name / f"{network}.keras")
        start, _ = read_model(PHANTOM_WEIGHTS, trained.description["modalities"])
        pairs = zip(trained.model.get_weights(), start.get_weights(), strict=True)
        trained.model.set_weights([(1 - share) * w + share * w0 for w, w0 in pairs])
        for case in seed_recipe.split_cases(fold)[1]:
            rows += score(name, trained, case, options.flips)
    former = pd.read_csv(RESULTS, keep_default_na=False) if RESULTS.exists() else None
    if rows:
        table = pd.DataFrame(rows).filter(regex="^(?!sens|spec|mean_iou)").round(4)
        others = [] if former is None else [former[former["network"] != name]]
        with atomic_write(RESULTS) as temporary:
            pd.concat([*others, table]).to_csv(temporary, index=False)
    else:
        table = former[former["network"] == name].copy()
    keys = ["thresholds", "min_island"]
    print(table.groupby(keys, sort=False).mean(numeric_only=True).round(3).to_string())
    table["decoding"] = table["thresholds"] + " " + table["min_island"].astype(str)
    print(f"{name}, decoded as is best for the other scans:")
    print_means(score_left_out(table))
    stored = "/".join(map(str, PHANTOM_DECODING["thresholds"]))
    every = pd.read_csv(RESULTS).set_index("case")
    mine = (every["network"] == "phantom") & (every["thresholds"] == stored)
    stored = every[mine & (every["min_island"] == PHANTOM_DECODING["min_island"])]
    for decoding, part in table.groupby("decoding", sort=False):
        scores = part.set_index("case").filter(regex="dice|hd95")
        print(f"{name}, {decoding}:")
        print_means(scores)
        print("minus the phantom weights as they are decoded by default:")
        print_means(scores - stored[scores.columns])


def print_means(scores):
    """Print the means of scores, their Dice's too, with 95 % intervals."""
    mean = scores.filter(like="dice").mean(axis=1)
    summary = summarise_scores(scores.assign(dice_mean=mean), n_resamples=10_000)
    print(summary.round(3).to_string())


if __name__ == "__main__":
    main()
