"""Print the results of recipes.py and real.py: each run, and ours minus each peer.

    python benchmarks/compare.py

The second table holds the difference ours - peer, so positive is better for Dice and
negative for HD95. Scores are paired by case, after averaging over the seeds that both
have (a network without training has them all). The interval is a bootstrap over cases:
it shows how much the difference varies between cases, not between repeated trainings.
"""

import itertools
from pathlib import Path

import pandas as pd

from brats_utils.evaluation import summarise_scores
from brats_utils.files import project_root
from brats_utils.labels import REGIONS

RUN = ["split", "recipe", "minutes", "seed"]
TABLES = {"recipes": ["ours"], "real": ["no training", "from phantoms", "second round"]}


def print_table(title, table):
    """Print a DataFrame as a Markdown table."""
    print(f"\n### {title}\n")
    print("|", " | ".join(table.columns), "|")
    print("|" + "---|" * len(table.columns))
    for row in table.to_numpy():
        print("|", " | ".join(map(str, row)), "|")


def against_peers(cases, ours="ours"):
    """Return a row for each recipe of a split that trained at least as long as ours."""
    cases = cases.replace({"split": r"fold\d+ .*"}, {"split": "folds"}, regex=True)
    columns = [f"{what}_{region}" for what in ("dice", "hd95") for region in REGIONS]
    columns = ["dice_mean", *columns]
    rows = []
    for split, group in cases.groupby("split"):
        runs, seeds = {}, group[["seed"]].drop_duplicates()
        for (time, recipe), part in group.groupby(["minutes", "recipe"]):
            if not time:
                part = part.drop(columns="seed").merge(seeds, how="cross")
            runs[time, recipe] = part.set_index(["seed", "case"])[columns]
        for (own_time, own), (time, peer) in itertools.product(runs, runs):
            shorter = time < own_time and "no training" not in peer
            if own != ours or peer == ours or shorter:
                continue
            difference = (runs[own_time, own] - runs[time, peer]).dropna()
            if difference.empty:  # no seed in common
                continue
            seeds = difference.index.unique("seed").size
            difference = difference.groupby("case").mean()
            summary = summarise_scores(difference, n_resamples=10_000)
            label = {"split": split, "ours, min": own_time, "minus": peer, "min": time}
            spans = {
                name: f"{row['mean']:+.3g} [{row['low']:+.3g}, {row['high']:+.3g}]"
                for name, row in summary.iterrows()
            }
            rows.append({**label, "seeds": seeds, "cases": len(difference), **spans})
    return pd.DataFrame(rows)


def main():
    """Print two tables for each file of results."""
    results = project_root(Path(__file__).parent) / "benchmarks/results"
    for table, ours in TABLES.items():
        lines = pd.read_csv(results / f"{table}.csv").drop(columns=["machine"])
        lines = lines.round(3).sort_values(RUN)
        print_table(f"{table}.py: scores of whole scans after a given time", lines)
        cases = pd.read_csv(results / f"{table}_cases.csv")
        columns = [f"dice_{region}" for region in REGIONS]
        cases["dice_mean"] = cases[columns].mean(axis=1)
        for one in ours:
            rows = against_peers(cases, one)
            print_table(f"{table}.py: {one} minus the others, 95 % intervals", rows)
    for recipe, group in cases.groupby("recipe"):
        summary = summarise_scores(group.filter(regex="dice|hd95"), n_resamples=10_000)
        summary = summary.round(3).reset_index(names="score")
        seeds = group.groupby("seed")["dice_mean"].mean().round(3).to_dict()
        title = (
            f"real.py: {recipe}, mean of {len(group)} scans (mean Dice by seed {seeds})"
        )
        print_table(title, summary)


if __name__ == "__main__":
    main()
