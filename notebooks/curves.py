"""Training curves of the comparison: make them, and turn them into the tables and figures of README and RESULTS.

    python notebooks/curves.py train Hopper-v4 ncdpo --name mine/Hopper-v4__ncdpo   # 5 seeds -> curves/mine/...csv
    python notebooks/curves.py train Hopper-v4 dppo --program e16.py --scored-steps 2 --name mine/Hopper-v4__dppo-m2
    python notebooks/curves.py                              # all curves/*.csv -> tables (printed) and curves.png
    python notebooks/curves.py --folder finetune            # the same of curves/finetune/*.csv; of two: all their seeds
    python notebooks/curves.py --folder e16 --ratios dppo-s20-m1/dppo-s20-m20   # these lines and their ratios alone
    python notebooks/curves.py --folder finetune-frozen --against finetune-moving   # a line / itself in another folder
    python notebooks/curves.py --folder finetune-frozen --against finetune-moving --ratios ncdpo/dppo  # / DPPO there
    python notebooks/curves.py coverage                     # how often the intervals of verdicts.py hold the true ratio
    python notebooks/curves.py show runs/A runs/B           # the returns of any runs, as a picture: curve.png

Each CSV file holds one task and algorithm: for each seed 100 rows of equal numbers of steps with the columns seed, step
(environment steps at the row's end), seconds (of wall clock until then), episodes (that ended in the row), the means
of return, length and success over those episodes, and of the diagnostics of metrics.csv over the row's updates (what
there is not is empty; RUNNING.md explains them). evaluations.csv beside them has what each run printed at its end.
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
sys.path[:0] = [str(HERE.parent), str(HERE)]

import ncdpo  # noqa: E402
from verdicts import coverage_table, interval, markdown, ratio, ratio_table  # noqa: E402, F401

OF_EPISODES = ["return", "length", "success"]
DIAGNOSTICS = "approx_kl clip_fraction explained_variance entropy sigma chain_std".split()
COLUMNS = ["seed", "step", "seconds", "episodes", *OF_EPISODES, *DIAGNOSTICS]
ALGORITHMS = {"ncdpo": "NCDPO", "ppo": "MLP+PPO", "dppo": "DPPO"}
LINES = {**ALGORITHMS, "ncdpo-quiet": "NCDPO, quieter", "dppo-quiet": "DPPO, quieter",  # of tables and figures
         "dppo-1e-3": "DPPO, rate 1e-3", "dppo-official": "DPPO, its authors' settings",
         "ncdpo-sample": 'NCDPO, "sample"', "dppo-sample": 'DPPO, "sample"', "dppo-matched": "DPPO, matched noise",
         "ncdpo-std0.05": "NCDPO, sigma 0.05", "ncdpo-cut": "NCDPO, cut", "ncdpo-unclipped": "NCDPO, unclipped",
         "ncdpo-warm": "NCDPO, warm clone", "dppo-warm": "DPPO, warm clone", "dppo-5e-4": "DPPO, rate 5e-4",
         "ppo-e01": "MLP+PPO, bonus 0.01", "dppo-e01": "DPPO, bonus 0.01"}
FIRST = {"ncdpo": ("#c1272d", "-"), "ppo": ("#0000a7", "--"), "dppo": ("#777777", ":")}
FURTHER = {"ncdpo": ("#e28413", "-."), "ppo": ("#008176", "--"), "dppo": ("#008176", (0, (1, 1)))}
STYLES = {line: dict(zip(("color", "linestyle"), FIRST.get(line, FURTHER[line.split("-")[0]]))) for line in LINES}
STYLES["dppo-official"] = dict(color="#a3228c", linestyle=(0, (5, 1)))
STYLES["dppo-1e-3"] = STYLES["dppo-5e-4"] = dict(color="#7a5230", linestyle=(0, (3, 1, 1, 1)))
OWN_STARTS = "finetune-frozen", "finetune-better", "finetune-moving", "games-33", "manipulation"  # one for each seed
WAYS = ["exploring", "mean action", "zero noise"]


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


def evaluation(log):
    """What a run printed at its end: {"mean action": its return, "mean action success": a share, ...}."""
    found = {}
    for way, mean, success in re.findall(rf"^ *({'|'.join(WAYS)}): return (\S+)(?:.* success ([\d.]+)%)?", log, re.M):
        found[way] = float(mean)
        if success:
            found[f"{way} success"] = round(float(success) / 100, 4)
    return found


def train(env, algo, seeds, jobs, flags, name, program=None):
    """Run the seeds, `jobs` at a time with one thread each, and write the CSV files; finished runs are not repeated.

    {seed} in a flag becomes the seed, so that every seed can start from its own clone. Called again after an
    interruption it resumes the runs that have a checkpoint. `program` is a file of this folder instead of ncdpo.py.
    A CSV file with other seeds, or a run that was made with other flags, is not replaced.
    """
    task_name = re.sub("[/:]", "_", env.split("?")[0])  # as ncdpo.py names its runs
    name = name or f"{task_name}__{algo}"
    if "__" not in Path(name).name:
        raise SystemExit(f"curves: --name {name} must end in TASK__LINE, as {task_name}__{algo}")
    runs, script = HERE.parent / "runs" / name, HERE / program if program else HERE.parent / "ncdpo.py"
    path = HERE / "curves" / f"{name}.csv"
    said = " ".join(["made with", script.name, *[env] * ("?" in env), *flags])  # a run's name has no arguments
    if lost := {row["seed"] for row in rows_of(path)} - set(map(str, seeds)):
        raise SystemExit(f"curves: {path} has seeds that would be lost ({', '.join(sorted(lost, key=int))}): name "
                         "them, too, or give another --name")

    def call(task, log):
        with open(log, "w") as file:
            print(said, file=file, flush=True)
            return subprocess.run([sys.executable, str(script), *task], stdout=file, stderr=file,
                                  env={**os.environ, "OMP_NUM_THREADS": "1"})

    def one(seed):
        run, log = runs / f"{task_name}__{algo}__{seed}", runs / f"{task_name}__{algo}__{seed}.log"
        written = log.read_text() if run.exists() and log.exists() else ""
        if (first := written.split("\n", 1)[0]).startswith("made with") and first != said:
            raise SystemExit(f"curves: {run} was {first}, not {said}: give another --name, or remove it")
        # only a finished run prints an evaluation, which is an old one if the run has gone on since
        if "mean action" not in evaluation(written) or (run / "metrics.csv").stat().st_mtime > log.stat().st_mtime:
            task = ["--env", env, "--algo", algo, "--seed", str(seed), "--runs", str(runs)]
            if run.exists():
                if not (run / "checkpoint.pt").exists():
                    raise SystemExit(f"{run} is unfinished and has no checkpoint to resume from: remove it.")
                task = ["--resume", str(run)]
            task += [flag.replace("{seed}", str(seed)) for flag in flags]
            done = call(task, log)
            if done.returncode and "is finished after" in log.read_text():  # only its evaluation is missing
                done = call(["--evaluate", *task[1:]], log)
            if done.returncode:
                raise SystemExit(f"curves: {run} failed; {log} ends with\n{log.read_text().strip()[-500:]}")
        print(run, flush=True)
        return [{"seed": seed, **row} for row in thin(ncdpo.read_metrics(run))], evaluation(log.read_text())

    runs.mkdir(parents=True, exist_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(jobs) as pool:
        curves, ends = zip(*pool.map(one, seeds))
    write(path, [row for rows in curves for row in rows])
    task, _, line = path.stem.partition("__")
    file = path.with_name("evaluations.csv")
    others = [row for row in rows_of(file) if (row["task"], row["line"]) != (task, line)]
    write(file, others + [{"task": task, "line": line, "seed": seed, **end} for seed, end in zip(seeds, ends)])


def rows_of(path):
    """The rows of a CSV file as dictionaries; none if there is no such file."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def write(path, rows):
    """Write rows as a CSV file whose columns are all that a row has."""
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, dict.fromkeys(name for row in rows for name in row))
        writer.writeheader()
        writer.writerows(rows)


def read(path):
    """A CSV file as arrays (seeds, rows) by column."""
    rows = rows_of(path)
    seeds = len({row["seed"] for row in rows})
    return {c: np.array([float(row.get(c) or "nan") for row in rows]).reshape(seeds, -1) for c in COLUMNS}


def returns(curve):
    """Return at every row (seeds, rows), interpolated over the rows in which no episode ended."""
    return np.array([np.interp(step, step[there], r[there]) if (there := ~np.isnan(r)).any() else r
                     for step, r in zip(curve["step"], curve["return"])])


def final(curve, name="return"):
    """Mean return (or success) of the episodes of the last tenth of training, per seed."""
    last = slice(-curve["step"].shape[1] // 10, None)
    episodes = curve["episodes"][:, last]
    with np.errstate(invalid="ignore"):  # NaN where none ended
        return np.where(episodes > 0, curve[name][:, last] * episodes, 0).sum(1) / episodes.sum(1)


def area(curve):
    """Mean return over all of training (the area under the curve over its length), per seed."""
    return returns(curve).mean(1)


def reach(curve, threshold, column="step"):
    """Steps or "seconds" until the return, averaged over 5% of training, is at the threshold, by seed; or infinity."""
    smooth = np.stack([np.convolve(r, np.ones(5) / 5, "valid") for r in returns(curve)])
    there = smooth >= threshold
    first = np.take_along_axis(curve[column][:, 4:], there.argmax(1)[:, None], 1)[:, 0]
    return np.where(there.any(1), first, np.inf)


def measures(curve):
    """What tables compare, {name: one value a seed}; of evaluations where a file has them."""
    found = {"seed": curve["seed"][:, 0]}
    told = not np.isnan(curve["success"]).all()
    if told:
        found["final success"] = final(curve, "success")
    if told and np.allclose(curve["return"], curve["success"], equal_nan=True):  # success is all that is paid for
        found["area of success"], more = area(curve), ["mean action success"]
    else:
        found |= {"final return": final(curve), "area": area(curve)}
        more = ["mean action", "mean action success"]
    return found | {name: curve[name] for name in more if name in curve}


def load(*folders, only=None):
    """curves[env][line] of the files <env>__<line>.csv: the lines `only`, else those of LINES with any number of steps.

    The seeds of several folders are put together. Beside its columns, (seeds, rows), a curve has those of
    evaluations.csv, (seeds,), if that names all its seeds.
    """
    curves = {}
    for folder in folders:
        evaluated = {(row["task"], row["line"], float(row["seed"])): row for row in rows_of(folder / "evaluations.csv")}
        for path in sorted(folder.glob("*__*.csv")):
            env, _, line = path.stem.partition("__")
            if line not in only if only else steps_of(line)[0] not in LINES:
                continue
            curve = read(path)
            ends = [evaluated.get((env, line, seed), {}) for seed in curve["seed"][:, 0]]
            ways = [way for way in ends[0] if way not in ("task", "line", "seed") and all(end.get(way) for end in ends)]
            curve |= {way: np.array([float(end[way]) for end in ends]) for way in ways}
            known = curves.setdefault(env, {}).get(line)
            if known and np.isin(curve["seed"], known["seed"]).any():
                raise SystemExit(f"curves: {path} has seeds that another of these folders has, too: give one alone")
            if known:
                curve = {name: np.concatenate([known[name], curve[name]]) for name in curve if name in known}
            curves[env][line] = curve
    place = lambda line: only.index(line) if only else ([*LINES].index(steps_of(line)[0]), steps_of(line)[1])
    return {env: {line: by_line[line] for line in sorted(by_line, key=place)} for env, by_line in curves.items()}


def steps_of(line):
    """The line and K of a name such as ncdpo-k20, or S of ncdpo-s20; 0 if the name has none."""
    name, steps = re.fullmatch(r"(.*?)(?:-[ks](\d+))?", line).groups()
    return name, int(steps or 0)


def label(line):
    """What table and figure call a line."""
    name, steps = steps_of(line)
    return f"{LINES.get(name, name)}, {line[len(name) + 1].upper()} = {steps}" if steps else LINES.get(name, name)


def table(curves):
    """The lines as Markdown: means over seeds, with 95% intervals but for evaluations, of returns or of successes."""
    rows = []
    for env, by_line in curves.items():
        for line, curve in by_line.items():
            row = {"task": env, "algorithm": label(line), "seeds": len(curve["seed"])}
            for name, x in measures(curve).items():
                if not name.startswith(("seed", "mean action")):
                    digits = 2 if "success" in name else 0
                    row[name] = "{:.{d}f} [{:.{d}f}, {:.{d}f}]".format(x.mean(), *interval(x), d=digits)
            for ending, digits in ((" success", 2), ("", 0)):  # a success where it is told, else a return
                ways = [curve[way + ending] for way in WAYS if way + ending in curve]
                if ways:
                    row[" / ".join(WAYS)] = " / ".join(f"{x.mean():.{digits}f}" for x in ways)
                    break
            rows.append(row | {"minutes": f"{np.median(curve['seconds'][:, -1]) / 60:.1f}"})
    return markdown(rows)


def band(axes, x, values, **style):
    """Mean over seeds of values (seeds, rows) against x (rows,), with its 95% interval as a band."""
    axes.fill_between(x, *interval(values), color=style.get("color"), alpha=0.15, linewidth=0)
    axes.plot(x, np.mean(values, 0), linewidth=1.8, **style)


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
    picture.suptitle(f"{title}: mean over seeds and its 95% interval", fontsize=10)
    picture.axes[0].set_ylabel("return of training episodes")
    handles = {label: line for axes in picture.axes for line, label in zip(*axes.get_legend_handles_labels())}
    picture.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles), frameon=False)
    return picture


def picture(runs):
    """Return of the training episodes of run folders against environment steps and against seconds."""
    from matplotlib.figure import Figure

    picture = Figure(figsize=(9, 3.2), layout="constrained")
    for axes, x in zip(picture.subplots(1, 2, sharey=True), ("step", "seconds")):
        for run in runs:
            history = ncdpo.read_metrics(run)
            there = ~np.isnan(history["return"])
            axes.plot(history[x][there], history["return"][there], ".-" if there.sum() < 30 else "-", label=str(run))
        axes.set(xlabel={"step": "environment steps", "seconds": "seconds"}[x], ylabel="return of training episodes")
        axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return picture


def compare(folders, against, chosen, pool):
    """Print the tables of folders inside curves/, and draw the figure of a single one.

    Ratios: the `chosen` LINE/LINE, the second in `against` if that is given; or each line / itself in `against`; or
    NCDPO (with the same ending) / any other.
    """
    folders = [os.path.normpath(folder) for folder in folders]
    paths, pairs = [HERE / "curves" / folder for folder in folders], [pair.split("/") for pair in chosen]
    only = list(dict.fromkeys(line for pair in pairs for line in pair))
    curves = load(*paths, only=only)
    others = load(HERE / "curves" / against, only=only) if against else curves
    if any(len(pair) != 2 for pair in pairs):
        raise SystemExit("curves: --ratios wants LINE/LINE, as in ncdpo/dppo")
    lines, paired = dict.fromkeys(line for by_line in curves.values() for line in by_line), folders[0] in OWN_STARTS
    for theirs in lines:
        ours = re.sub("^(dppo|ppo)", "ncdpo", theirs)
        if against and not chosen:
            pairs.append([theirs, theirs])
        elif not chosen and ours != theirs:
            pairs.append([ours if ours in lines else "ncdpo", theirs])
    cases = {}
    for ours, theirs in pairs:
        tasks = [env for env in curves if ours in curves[env] and theirs in others.get(env, {})]
        if paired:
            tasks = [env for env in tasks if np.isin(curves[env][ours]["seed"], others[env][theirs]["seed"]).any()]
        others_name = label(theirs)
        if against:
            others_name = against if ours == theirs else f"{label(theirs)}, {against}"
        cases[f"{label(ours)} / {others_name}"] = {
            env: (measures(curves[env][ours]), measures(others[env][theirs])) for env in tasks}
    used = [(side if against else 0, line) for pair in pairs for side, line in enumerate(pair)]
    if pool and len(set(used)) < len(used):
        raise SystemExit("curves: --pool wants --ratios without a line in common, as it takes them for independent")
    if pool:
        cases = {"pooled": {f"{case}, {env}": pair for case in cases for env, pair in cases[case].items()}}
    if not any(cases.values()):
        raise SystemExit("curves: there are no such lines in such folders inside curves/, or only one of a task, or "
                         "two without a common seed")
    for env in curves:
        both = [*curves[env].items(), *(others.get(env, {}).items() if against else ())]
        for line, curve in both:
            if np.isnan(final(curve)).any():
                print(f"curves: no episode ended in the last tenth of a seed of {label(line)}, {env}", file=sys.stderr)
        last = sorted({int(curve["step"].max()) for _, curve in both})
        if last[-1] > 1.05 * last[0]:
            print(f"curves: lines of {env} end after different numbers of steps, {last}", file=sys.stderr)
    print(table(curves), ratio_table(cases, paired), sep="\n\n")
    if not (against or chosen or folders[1:]) and lines.keys() & LINES.keys():
        tuned = folders[0] in ("games-ft", "games-warm", "games-33") or folders[0].startswith(
            ("finetune", "field", "manipulation"))
        title = "Fine-tuning" if tuned else "From scratch"
        figure(curves, title=title).savefig(paths[0] / "curves.png", dpi=130)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", nargs="+", default=["."], help="inside curves/")
    parser.add_argument("--against", help="a folder inside curves/")
    parser.add_argument("--ratios", nargs="+", default=[], help="LINE/LINE, else NCDPO over each other line")
    parser.add_argument("--pool", action="store_true", help="all ratios together")
    commands = parser.add_subparsers(dest="command")
    commands.add_parser("coverage", help="of the intervals")
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
    if flags and line.command != "train":
        parser.error(f"unrecognized arguments: {' '.join(flags)}")
    if line.command == "train":
        train(line.env, line.algo, line.seeds, line.jobs, flags, line.name, line.program)
    elif line.command == "show":
        for run in line.runs:
            if not (run / "metrics.csv").exists():
                raise SystemExit(f"curves: {run} is no run folder, it has no metrics.csv")
        picture(line.runs).savefig(line.to, dpi=120)
        print(line.to)
    elif line.command == "coverage":
        paths = sorted((HERE / "curves").glob("**/*__*.csv"))
        print(coverage_table({f"{path.parent.name}/{path.stem}": final(read(path)) for path in paths}))
    else:
        compare(line.folder, line.against, line.ratios, line.pool)


if __name__ == "__main__":
    main()
