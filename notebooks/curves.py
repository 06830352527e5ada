"""Training curves of the comparison: make them, and turn them into the tables and figures of README and RESULTS.

    python notebooks/curves.py train HalfCheetah-v4 ncdpo   # 5 seeds, two at a time -> curves/HalfCheetah-v4__ncdpo.csv
    python notebooks/curves.py train HalfCheetah-v4 dppo --program e16.py --scored-steps 2 --name e16/HalfCheetah-v4__m2
    python notebooks/curves.py                              # all curves/*.csv -> the table (printed) and curves.png
    python notebooks/curves.py --folder finetune            # the same of curves/finetune/*.csv; steps and
                                                            # sampling: against the number of steps
    python notebooks/curves.py show runs/A runs/B           # the returns of any runs, as a picture: curve.png

Each CSV file holds one task and algorithm: for each seed 100 rows of equal numbers of steps with the columns seed, step
(environment steps at the row's end), seconds (of wall clock until then), episodes (that ended in the row), the means
of return, length and success over those episodes (empty where none ended or the task has no success), and the means of
the diagnostics of metrics.csv over the row's updates (empty where the algorithm has none): RUNNING.md explains them.
Files of older runs have a column more, chain_clipped, which nothing here reads.
"""

import argparse
import csv
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import ncdpo  # noqa: E402

DIAGNOSTICS = ["approx_kl", "clip_fraction", "explained_variance", "entropy", "sigma", "chain_std",
               "chain_gradient_ratio"]
OF_EPISODES = ["return", "length", "success"]
COLUMNS = ["seed", "step", "seconds", "episodes", *OF_EPISODES, *DIAGNOSTICS]
ALGORITHMS = {"ncdpo": "NCDPO", "ppo": "MLP+PPO", "dppo": "DPPO"}
LINES = {**ALGORITHMS, "ncdpo-quiet": "NCDPO, quieter", "dppo-quiet": "DPPO, quieter",  # of table and figure
         "dppo-1e-3": "DPPO, rate 1e-3", "dppo-official": "DPPO, its authors' settings",
         "ncdpo-sample": 'NCDPO, "sample"', "dppo-sample": 'DPPO, "sample"',
         "ppo-e01": "MLP+PPO, bonus 0.01", "dppo-e01": "DPPO, bonus 0.01"}
STYLES = {"ncdpo": dict(color="#c1272d", linestyle="-"), "ppo": dict(color="#0000a7", linestyle="--"),
          "dppo": dict(color="#777777", linestyle=":"), "ncdpo-quiet": dict(color="#e28413", linestyle="-."),
          "dppo-quiet": dict(color="#008176", linestyle=(0, (1, 1))),
          "dppo-1e-3": dict(color="#008176", linestyle=(0, (1, 1))),
          "dppo-official": dict(color="#e28413", linestyle="-."),
          "ncdpo-sample": dict(color="#e28413", linestyle="-."),
          "dppo-sample": dict(color="#008176", linestyle=(0, (1, 1))),
          "ppo-e01": dict(color="#008176", linestyle="--"), "dppo-e01": dict(color="#e28413", linestyle=":")}


def thin(history, bins=100):
    """The history that `ncdpo.train` returns, as `bins` rows with the columns above (all but the seed)."""
    rows, edges = [], np.linspace(0, history["step"][-1], bins + 1)
    for low, high in zip(edges[:-1], edges[1:]):
        inside = (history["step"] > low) & (history["step"] <= high)
        ended = inside & (history["episodes"] > 0)
        weight = history["episodes"][ended]
        row = {"step": round(high), "seconds": f"{np.interp(high, history['step'], history['seconds']):.1f}",
               "episodes": int(weight.sum())}
        for name in OF_EPISODES:
            mean = np.average(history[name][ended], weights=weight) if len(weight) and name in history else np.nan
            row[name] = "" if np.isnan(mean) else f"{mean:.5g}"
        for name in DIAGNOSTICS:
            x = history[name][inside]
            row[name] = f"{x.mean():.4g}" if len(x) and not np.isnan(x).any() else ""
        rows.append(row)
    return rows


def train(env, algo, seeds, jobs, flags, name, program=None):
    """Run the seeds, `jobs` at a time with one thread each, and write the CSV file; finished runs are not repeated.

    {seed} in a flag becomes the seed, so that every seed can start from its own clone. Called again after an
    interruption it resumes the runs that have a checkpoint. `program` is a file of this folder instead of ncdpo.py.
    """
    task_name = re.sub("[/:]", "_", env.split("?")[0])  # as ncdpo.py names its runs
    name = name or f"{task_name}__{algo}"
    runs, script = HERE.parent / "runs" / name, HERE / program if program else HERE.parent / "ncdpo.py"

    def one(seed):
        run, log = runs / f"{task_name}__{algo}__{seed}", runs / f"{task_name}__{algo}__{seed}.log"
        if not (log.exists() and "mean action: " in log.read_text()):  # what only a finished run prints
            task = ["--env", env, "--algo", algo, "--seed", str(seed), "--runs", str(runs)]
            if run.exists():
                if not (run / "checkpoint.pt").exists():
                    raise SystemExit(f"{run} is unfinished and has no checkpoint to resume from: remove it.")
                task = ["--resume", str(run)]
            task += [flag.replace("{seed}", str(seed)) for flag in flags]
            with open(log, "w") as file:
                subprocess.run([sys.executable, str(script), *task], check=True, stdout=file, stderr=file,
                               env={**os.environ, "OMP_NUM_THREADS": "1"})
        print(run, flush=True)

    runs.mkdir(parents=True, exist_ok=True)
    (HERE / "curves" / name).parent.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(one, seeds))
    with open(HERE / "curves" / f"{name}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        for seed in seeds:
            history = ncdpo.read_metrics(runs / f"{task_name}__{algo}__{seed}")
            writer.writerows({"seed": seed, **row} for row in thin(history))


def read(path):
    """A CSV file as arrays (seeds, rows) by column."""
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    seeds = len({row["seed"] for row in rows})
    return {c: np.array([float(row.get(c) or "nan") for row in rows]).reshape(seeds, -1) for c in COLUMNS}


def returns(curve):
    """Return at every row (seeds, rows), interpolated over the rows in which no episode ended."""
    return np.array([np.interp(step, step[there := ~np.isnan(r)], r[there])
                     for step, r in zip(curve["step"], curve["return"])])


def final(curve):
    """Mean return of the episodes of the last tenth of training, per seed."""
    last = slice(-curve["step"].shape[1] // 10, None)
    episodes = curve["episodes"][:, last]
    return np.nansum(curve["return"][:, last] * episodes, 1) / episodes.sum(1)


def area(curve):
    """Mean return over all of training (the area under the curve over its length), per seed."""
    return returns(curve).mean(1)


def reach(curve, threshold, column="step"):
    """Steps or "seconds" until the return, averaged over 5% of training, is at the threshold, by seed; or infinity."""
    smooth = np.stack([np.convolve(r, np.ones(5) / 5, "valid") for r in returns(curve)])
    there = smooth >= threshold
    first = np.take_along_axis(curve[column][:, 4:], there.argmax(1)[:, None], 1)[:, 0]
    return np.where(there.any(1), first, np.inf)


def interquartile_mean(x, axis=-1):
    """Mean without the lowest and the highest quarter, each rounded down (Agarwal et al., 2021; scipy's trim_mean)."""
    x = np.sort(np.asarray(x, float), axis)
    cut = x.shape[axis] // 4
    return np.take(x, range(cut, x.shape[axis] - cut), axis).mean(axis)


def bootstrap(x, resamples=20_000, seed=0):
    """Interquartile means of `resamples` resamples over seeds of x (seeds, ...): (resamples, ...)."""
    x = np.asarray(x, float)
    pick = np.random.default_rng(seed).integers(0, len(x), (resamples, len(x)))
    return interquartile_mean(x[pick], 1)


def interval(samples):
    """Percentile interval of 95%."""
    return tuple(np.percentile(samples, [2.5, 97.5], axis=0))


def ratio(ours, theirs):
    """Ratio of the interquartile means of two sets of seeds, and its 95% bootstrap interval."""
    low, high = interval(bootstrap(ours, seed=1) / bootstrap(theirs, seed=2))
    return float(interquartile_mean(ours) / interquartile_mean(theirs)), float(low), float(high)


def load(folder):
    """curves[env][line] of the files <env>__<line>.csv whose line is one of LINES, perhaps with a number of steps."""
    curves = {}
    for path in sorted(folder.glob("*__*.csv")):
        env, _, line = path.stem.partition("__")
        if steps_of(line)[0] in LINES:
            curves.setdefault(env, {})[line] = read(path)
    order = lambda line: (list(LINES).index(steps_of(line)[0]), steps_of(line)[1])
    return {env: {line: by_line[line] for line in sorted(by_line, key=order)} for env, by_line in curves.items()}


def steps_of(line):
    """The line and K of a name such as ncdpo-k20, or S of ncdpo-s20; 0 if the name has none."""
    name, steps = re.fullmatch(r"(.*?)(?:-[ks](\d+))?", line).groups()
    return name, int(steps or 0)


def label(line):
    """What table and figure call a line."""
    name, steps = steps_of(line)
    return LINES[name] + (f", {line[len(name) + 1].upper()} = {steps}" if steps else "")


def table(curves):
    """The comparison as Markdown: interquartile means over seeds, 95% bootstrap intervals, ratios to NCDPO."""
    lines = ["| task | algorithm | seeds | final return | area under the curve | NCDPO's final / this "
             "| NCDPO's area / this | minutes a run |", "|---|---|---|---|---|---|---|---|"]
    for env, by_algo in curves.items():
        for algo, curve in by_algo.items():
            cells = []
            for measure in (final, area):
                low, high = interval(bootstrap(measure(curve)))
                cells.append(f"{interquartile_mean(measure(curve)):.0f} [{low:.0f}, {high:.0f}]")
            for measure in (final, area):
                cells.append("" if algo == "ncdpo" or "ncdpo" not in by_algo else
                             "{:.2f} [{:.2f}, {:.2f}]".format(*ratio(measure(by_algo["ncdpo"]), measure(curve))))
            minutes = np.median(curve["seconds"][:, -1]) / 60
            lines.append(f"| {env} | {label(algo)} | {len(curve['seed'])} | {' | '.join(cells)} | {minutes:.1f} |")
    return "\n".join(lines)


def band(axes, x, values, resamples=2000, **style):
    """Interquartile mean over seeds of values (seeds, rows) against x (rows,), with its 95% bootstrap band."""
    low, high = interval(bootstrap(values, resamples))
    axes.fill_between(x, low, high, color=style.get("color"), alpha=0.15, linewidth=0)
    axes.plot(x, interquartile_mean(values, 0), linewidth=1.8, **style)


def figure(curves, against="step", title="From scratch"):
    """One panel a task: the return of all algorithms against environment steps ("step") or wall clock ("seconds")."""
    from matplotlib.figure import Figure

    unit, name = {"step": (1e6, "million environment steps"), "seconds": (60, "minutes of wall clock")}[against]
    picture = Figure(figsize=(max(8, 3.6 * len(curves)), 3.1), layout="constrained")
    for axes, (env, by_algo) in zip(picture.subplots(1, len(curves), squeeze=False)[0], curves.items()):
        for algo in (a for a in LINES if a in by_algo):
            curve = by_algo[algo]
            band(axes, np.median(curve[against], 0) / unit, returns(curve), label=LINES[algo], **STYLES[algo])
        axes.set(title=env, xlabel=name)
        axes.grid(alpha=0.3)
    seeds = sorted({len(curve["seed"]) for by_algo in curves.values() for curve in by_algo.values()})
    seeds = " to ".join(map(str, sorted({seeds[0], seeds[-1]})))
    picture.suptitle(f"{title}: interquartile mean over {seeds} seeds and its 95% bootstrap interval", fontsize=10)
    picture.axes[0].set_ylabel("return of training episodes")
    handles = {label: line for axes in picture.axes for line, label in zip(*axes.get_legend_handles_labels())}
    picture.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles), frameon=False)
    return picture


def against_steps(curves):
    """One panel a task: final returns against the number of denoising steps, with 95% bootstrap intervals."""
    from matplotlib.figure import Figure

    picture = Figure(figsize=(4.2 * len(curves), 3.1), layout="constrained")
    for axes, (env, by_line) in zip(picture.subplots(1, len(curves), squeeze=False)[0], curves.items()):
        for algo in dict.fromkeys(steps_of(line)[0] for line in by_line):
            ends = {steps_of(line)[1]: final(curve) for line, curve in by_line.items() if steps_of(line)[0] == algo}
            middle = np.array([interquartile_mean(x) for x in ends.values()])
            low, high = np.array([interval(bootstrap(x)) for x in ends.values()]).T
            axes.errorbar(list(ends), middle, [middle - low, high - middle], marker="o", label=LINES[algo],
                          capsize=3, **STYLES[algo])
        ticks = sorted({steps_of(line)[1] for line in by_line})
        axes.set(title=env, xlabel="denoising steps", ylabel="final return", xscale="log", xticks=ticks,
                 xticklabels=ticks)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return picture


def picture(runs):
    """Return of the training episodes of run folders against environment steps and against seconds."""
    from matplotlib.figure import Figure

    picture = Figure(figsize=(9, 3.2), layout="constrained")
    for axes, x in zip(picture.subplots(1, 2, sharey=True), ("step", "seconds")):
        for run in runs:
            history = ncdpo.read_metrics(run)
            there = ~np.isnan(history["return"])
            axes.plot(history[x][there], history["return"][there], ".-" if there.sum() < 30 else "-", label=run.name)
        axes.set(xlabel={"step": "environment steps", "seconds": "seconds"}[x], ylabel="return of training episodes")
        axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return picture


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default=".", help="inside curves/")
    commands = parser.add_subparsers(dest="command")
    trainer = commands.add_parser("train", help="unknown flags go to ncdpo.py")
    trainer.add_argument("env")
    trainer.add_argument("algo", choices=ALGORITHMS)
    trainer.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3, 4, 5])
    trainer.add_argument("--jobs", type=int, default=2, help="runs at a time, one thread each")
    trainer.add_argument("--name", help="of the CSV file, else <env>__<algo>; each set of a game's arguments needs one")
    trainer.add_argument("--program", help="a file of notebooks/ instead of ncdpo.py, such as e16.py")
    shower = commands.add_parser("show", help="a picture of runs")
    shower.add_argument("runs", type=Path, nargs="+", help="run folders")
    shower.add_argument("--to", default="curve.png", help="file of the picture")
    line, flags = parser.parse_known_args()
    if line.command == "train":
        train(line.env, line.algo, line.seeds, line.jobs, flags, line.name, line.program)
    elif line.command == "show":
        picture(line.runs).savefig(line.to, dpi=120)
        print(line.to)
    else:
        curves = load(HERE / "curves" / line.folder)
        print(table(curves))
        compared = {env: by_algo for env, by_algo in curves.items() if len(by_algo) > 1}
        title = "Fine-tuning" if line.folder.startswith(("finetune", "field")) else "From scratch"
        if compared:
            drawn = against_steps(curves) if line.folder in ("steps", "sampling") else figure(compared, title=title)
            drawn.savefig(HERE / "curves" / line.folder / "curves.png", dpi=130)


if __name__ == "__main__":
    main()
