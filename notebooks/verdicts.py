"""The rule of all verdicts of README and RESULTS: t intervals of means over seeds and of ratios of means. NumPy alone.

A ratio with its interval [low, high] is called higher if low > 1, lower if high < 1, else as high if low > 0.9, else it
is undecided. `python notebooks/curves.py coverage` prints how often such intervals hold the true ratio.
"""

import numpy as np


def student(dof):
    """The 97.5% quantile of Student's t distribution with dof >= 1 degrees of freedom."""
    # t = sqrt(dof) tan(angle), where the angle's density is proportional to cos(angle) ** (dof - 1)
    edges = np.linspace(0, np.pi / 2, 10_001)
    share = np.cumsum(np.cos((edges[1:] + edges[:-1]) / 2) ** (dof - 1))
    return np.sqrt(dof) * np.tan(np.interp(0.95, share / share[-1], edges[1:]))


def interval(x):
    """95% interval (low, high) of the mean over seeds of x, (seeds, ...); NaN for a single seed."""
    n, mean = len(x), np.mean(x, 0)
    half = student(n - 1) * np.std(x, 0, ddof=1) / np.sqrt(n) if n > 1 else np.nan
    return mean - half, mean + half


def ratio(ours, theirs, paired=False):
    """Ratio of the means of two sets of seeds with its 95% interval: (ratio, low, high).

    Lists of sets, one a task, give the geometric mean of the tasks' ratios. It is Welch's interval for the logarithm:
    log(mean x) varies as mean(x / mean x) does, so a single seed may be 0 or negative (a return, a share of successes).
    paired: the i-th seeds have a demonstrator or a team, good or bad, which no other seed has; then it is the geometric
    mean of the pairs' ratios and the t interval of their logarithms. NaN of a single seed, and where a mean (in pairs:
    a seed) is not positive.
    """
    tasks = [(ours, theirs)] if np.ndim(ours[0]) == 0 else list(zip(ours, theirs, strict=True))
    logs, terms = [], []
    for x, y in tasks:
        x, y = np.asarray(x, float), np.asarray(y, float)
        smallest = min(x.min(), y.min()) if paired else min(x.mean(), y.mean())
        if smallest <= 0 or min(len(x), len(y)) < 2:
            return np.nan, np.nan, np.nan
        if paired:
            terms.append(np.log(x / y))
            logs.append(terms[-1].mean())
        else:
            terms += [x / x.mean(), y / y.mean()]
            logs.append(np.log(x.mean() / y.mean()))
    squares = np.array([term.var(ddof=1) / len(term) for term in terms])  # squared standard errors
    dof = squares.sum() ** 2 / sum(s**2 / (len(term) - 1) for s, term in zip(squares, terms)) if squares.any() else 1
    half = student(dof) * np.sqrt(squares.sum()) / len(tasks)
    return tuple(float(np.exp(np.mean(logs) + step)) for step in (0, -half, half))


def improvement(ours, theirs, paired=False):
    """Probability that a seed of ours is above one of theirs, or above its own pair: a share, its mean over tasks."""
    if paired:
        return np.mean([np.mean(np.greater(x, y)) for x, y in zip(ours, theirs, strict=True)])
    return np.mean([np.mean(np.subtract.outer(x, y) > 0) for x, y in zip(ours, theirs, strict=True)])


def word(low, high, seeds):
    """The verdict on an interval, "" if it is undecided; of fewer than five seeds it is provisional."""
    found = ""
    if low > 1:
        found = "higher"
    elif high < 1:
        found = "lower"
    elif low > 0.9:
        found = "as high"
    return f"{found}, provisional" if found and seeds < 5 else found


def ratio_table(cases, paired=False):
    """Ratios as Markdown, of each task and pooled over all: cases {name: {task: (values of ours, values of theirs)}}.

    Values are {measure: array of one value a seed, "seed": their seeds}; paired: only seeds that both have count. The
    last column is the chance of a seed of ours to be above one of theirs by the first measure that has a ratio.
    """
    rows = []
    for case, by_task in cases.items():
        if paired:
            by_task = {task: in_pairs(*pair) for task, pair in by_task.items()}
        groups = {task: [pair] for task, pair in by_task.items()}
        if len(groups) > 1:
            groups[f"all {len(groups)}"] = list(by_task.values())
        for task, pairs in groups.items():
            seeds = sorted({len(values["seed"]) for pair in pairs for values in pair})
            row = {"ratio": case, "task": task, "seeds": " to ".join(map(str, dict.fromkeys((seeds[0], seeds[-1]))))}
            chances = []
            for name in (name for name in pairs[0][0] if name != "seed"):
                if all(name in values for pair in pairs for values in pair):
                    ours, theirs = ([pair[i][name] for pair in pairs] for i in (0, 1))
                    row[name] = cell(*ratio(ours, theirs, paired), seeds[0])
                    if row[name]:
                        chances.append(f"{improvement(ours, theirs, paired):.0%}")
            rows.append(row | {"chance above": next(iter(chances), "")})
    return markdown(rows)


def markdown(rows):
    """Rows {column: text} as a table, with the columns of all, those of the row that has most first."""
    names = list(dict.fromkeys(name for row in sorted(rows, key=len, reverse=True) for name in row))
    lines = [f"| {' | '.join(map(str, names))} |", "|---" * len(names) + "|"]
    lines += [f"| {' | '.join(str(row.get(name, '')) for name in names)} |" for row in rows]
    return "\n".join(lines)


def in_pairs(ours, theirs):
    """The values of the seeds that both have, in one order."""
    _, *rows = np.intersect1d(ours["seed"], theirs["seed"], return_indices=True)
    return [{name: x[which] for name, x in values.items()} for values, which in zip((ours, theirs), rows)]


def cell(point, low, high, seeds):
    """A ratio as text, with so many digits that one sees on which side of 1 or 0.9 it is."""
    if np.isnan(point):
        return ""
    digits = [next((n for n in range(2, 8) if round(x, n) not in (0.9, 1)), 3) for x in (point, low, high)]
    point, *ends = (f"{x:.{n}f}" for x, n in zip((point, low, high), digits))
    verdict = word(low, high, seeds)
    return f"{point} [{', '.join(ends)}]" + (f" **{verdict}**" if verdict else "")


def coverage(pairs, shapes, seeds, paired=False, samples=2000):
    """Share of intervals that hold the true ratio of `pairs` [(x, y), ...], one a task, with this number of seeds.

    A simulated seed of x is mean(x) + std(x) * e, where e is drawn from `shapes`, standardised deviations. In pairs a
    lognormal factor with a spread of 0.5 is common to the i-th seeds: demonstrators differ so.
    """
    rng = np.random.default_rng(seeds)
    everyone = [[x.mean() + x.std(ddof=1) * shapes for x in pair] for pair in pairs]
    if paired:
        truth = np.mean([np.log(x).mean() - np.log(y).mean() for x, y in everyone])
    else:
        truth = np.mean([np.log(x.mean() / y.mean()) for x, y in everyone])
    held = []
    for _ in range(samples):
        starts = np.exp(0.5 * rng.normal(size=(len(pairs), seeds)) * paired)
        drawn = [[rng.choice(x, seeds) * start for x in pair] for pair, start in zip(everyone, starts)]
        _, low, high = ratio(*zip(*drawn), paired)
        held.append(low <= np.exp(truth) <= high)
    return np.mean(held)


def coverage_table(ends):
    """Coverage by the number of seeds as Markdown, for means and spreads of lines {"folder/task__line": (seeds,)}."""
    shapes = np.concatenate([(x - x.mean()) / x.std() for x in ends.values() if len(x) >= 5 and x.std() > 0])
    tasks = ["HalfCheetah-v4", "Hopper-v4", "Walker2d-v4"]
    cases = {f"{task}, from scratch": [[ends[f"curves/{task}__{line}"] for line in ("ncdpo", "ppo")]] for task in tasks}
    cases["the three pooled"] = [pair for pairs in cases.values() for pair in pairs]
    for name in ("fine-tuning, pooled", "fine-tuning, pooled, in pairs"):
        cases[name] = [[ends[f"finetune-again/{task}__{line}-sample"] for line in ("ncdpo", "dppo")] for task in tasks]
    return markdown([
        {"seeds": case} | {n: f"{coverage(pairs, shapes, n, 'pairs' in case):.1%}" for n in (3, 5, 10, 20)}
        for case, pairs in cases.items()])
