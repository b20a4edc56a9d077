"""Print the tables of recipes.py: each run, and ours against each peer, case by case.

    python benchmarks/compare.py

The intervals are of a paired bootstrap over the scored cases, each case's score the
mean of the seeds that both have: the difference ours - peer, so that more is better in
Dice and less in HD95. They say how the cases differ, not how two trainings would.
"""

import itertools
from pathlib import Path

import pandas as pd

from brats_utils.evaluation import summarise_scores
from brats_utils.files import project_root
from brats_utils.labels import REGIONS

RUN = ["split", "recipe", "minutes", "seed"]


def print_table(title, table):
    """Print a DataFrame as a Markdown table."""
    print(f"\n### {title}\n")
    print("|", " | ".join(table.columns), "|")
    print("|" + "---|" * len(table.columns))
    for row in table.to_numpy():
        print("|", " | ".join(map(str, row)), "|")


def against_peers(cases):
    """Return a row for each split and recipe that had as long as ours, or longer."""
    cases = cases.replace({"split": r"fold\d+ .*"}, {"split": "folds"}, regex=True)
    columns = [f"{what}_{region}" for what in ("dice", "hd95") for region in REGIONS]
    cases["dice_mean"] = cases[columns[:3]].mean(axis=1)
    columns = ["dice_mean", *columns]
    rows = []
    for split, group in cases.groupby("split"):
        runs = {
            run: part.set_index(["seed", "case"])[columns]
            for run, part in group.groupby(["minutes", "recipe"])
        }
        for (own_time, own), (time, peer) in itertools.product(runs, runs):
            if own != "ours" or peer == "ours" or time < own_time:
                continue
            difference = (runs[own_time, own] - runs[time, peer]).dropna()
            seeds = difference.index.unique("seed").size
            difference = difference.groupby("case").mean()
            summary = summarise_scores(difference, n_resamples=10_000)
            label = {"split": split, "ours, min": own_time, "less": peer, "min": time}
            spans = {
                name: f"{row['mean']:+.3g} [{row['low']:+.3g}, {row['high']:+.3g}]"
                for name, row in summary.iterrows()
            }
            rows.append({**label, "seeds": seeds, "cases": len(difference), **spans})
    return pd.DataFrame(rows)


def main():
    """Print both tables."""
    results = project_root(Path(__file__).parent) / "benchmarks/results"
    lines = pd.read_csv(results / "recipes.csv").drop(columns=["machine"])
    lines = lines.round(3).sort_values(RUN)
    print_table("Whole scans never trained on, against the clock", lines)
    rows = against_peers(pd.read_csv(results / "recipes_cases.csv"))
    print_table("Ours less the others, with 95 % intervals", rows)


if __name__ == "__main__":
    main()
