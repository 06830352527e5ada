"""Several equally good goals: which of them does a cloned policy still reach after fine-tuning?

    python notebooks/modes.py run dense                  # clone and fine-tune 20 seeds -> curves/modes/dense.csv
    python notebooks/modes.py run quiet --reward sparse --lines ncdpo --critic-sees-chain -- --noise-scale 0.3
    python notebooks/modes.py run clip --sweep clip_coef 0.01 0.05 1000
    python notebooks/modes.py table dense sparse         # means over seeds, and differences from the first line
    python notebooks/modes.py mechanism mechanism        # gradients and first updates -> curves/modes/mechanism.csv
    python notebooks/modes.py figure                     # curves/modes/modes.png, of dense and dense-sees-chain
    python ncdpo.py --env "notebooks.modes:goals?reward=sparse&worth=1,1,1,0.5&closed=0"

What stands behind `--` are flags of ncdpo.py. Runs and clones are kept in runs/modes; RESULTS.md has what came out.
"""

import argparse
import contextlib
import csv
import io
import math
import shutil
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from urllib.parse import parse_qsl

import gymnasium as gym
import numpy as np
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import ncdpo  # noqa: E402
from notebooks import cloning, curves, moving, verdicts  # noqa: E402

CPU = torch.device("cpu")
GOALS = range(4)
CURVES = HERE / "curves" / "modes"
RUNS = HERE.parent / "runs" / "modes"
STEPS, DECISIONS = 8, 4  # of a decision, of an episode
SPEED = 0.1  # length of a full step along an axis
RADIUS, ARRIVED = 0.8, 0.1  # of the circle of goals, of a goal

# ----- the task -------------------------------------------------------------------------------------------------------

def make_vec(name, num_envs, device):
    """The task of `goals?reward=dense&worth=1,1,1,1&limit=end&closed=2` (by default none is closed); or ValueError."""
    task, _, query = name.partition("?")
    given = dict(parse_qsl(query, keep_blank_values=True, strict_parsing=bool(query)))
    worth = [float(x) for x in given.pop("worth", "1,1,1,1").split(",")]
    reward, limit = given.pop("reward", "dense"), given.pop("limit", "end")
    closed = int(given.pop("closed", -1))
    known = task == "goals" and not given and reward in ("dense", "sparse") and limit in ("end", "cut")
    if not known or not -1 <= closed < len(worth):
        raise ValueError("give goals?reward=dense or sparse&worth=1,1,1,1&limit=end or cut&closed=0, or some of it")
    return Goals(num_envs, device, worth, reward == "dense", limit == "end", closed)


class Goals:
    """A point that starts at the origin, and G goals on a circle around it: an episode ends well at any of them.

    A decision (N, 16) is a chunk of 8 steps in [-1, 1]^2. An observation is the position and the share of the episode
    that is over, (N, 3). Arriving at goal g earns worth[g]; a dense reward adds the approach to the nearest goal, less
    0.01 a step. An episode ends after 4 decisions, or is cut there (truncated). A `closed` goal is not there, which no
    observation tells. Of the last decision: `goal` (N,), where it arrived, or -1; `path` (N, 8, 2), then NaN.
    """

    kind = "batched"
    observation_space = gym.spaces.Box(-np.inf, np.inf, (3,))
    action_space = gym.spaces.Box(-1, 1, (2 * STEPS,))

    def __init__(self, num_envs, device, worth=(1.0,) * 4, dense=True, limit_ends=True, closed=-1):
        angle = 2 * math.pi * torch.arange(len(worth), device=device) / len(worth)
        self.goals = RADIUS * torch.stack([angle.cos(), angle.sin()], 1)
        self.worth = torch.tensor(worth, device=device)
        self.dense = dense
        self.limit_ends = limit_ends
        self.closed = closed
        self.device = device
        self.success = torch.zeros(num_envs, device=device)

    def reset(self, seeds):
        self.position = torch.zeros(len(self.success), 2, device=self.device)
        self.age = torch.zeros(len(self.success), device=self.device)
        return self.observe()

    def observe(self):
        """Position and the share of the episode that is over, (N, 3)."""
        return torch.cat([self.position, self.age[:, None] / DECISIONS], 1)

    def distances(self, position):
        """From positions (..., 2) to the goals, (..., G); infinite to a closed one."""
        distance = (position[..., None, :] - self.goals).norm(dim=-1)
        if self.closed >= 0:
            distance[..., self.closed] = torch.inf
        return distance

    def step(self, action):
        path = self.position[:, None] + SPEED * action.float().view(-1, STEPS, 2).cumsum(1)
        nearest, goal = self.distances(path).min(-1)  # (N, 8)
        there = nearest < ARRIVED
        arrived = there.any(1)
        last = torch.where(arrived, there.float().argmax(1), STEPS - 1)[:, None]  # index of the last step
        self.path = path.where(torch.arange(STEPS, device=self.device)[:, None] <= last[..., None], torch.nan)
        self.goal = goal.gather(1, last)[:, 0].where(arrived, -1)
        reward = self.worth[self.goal] * arrived
        if self.dense:  # the approaches of the single steps add up to that of the decision
            approach = self.distances(self.position).min(-1).values - nearest.gather(1, last)[:, 0]
            reward = reward + approach - 0.01 * (last[:, 0] + 1)
        self.position = path.gather(1, last[..., None].expand(-1, 1, 2))[:, 0]
        self.age = self.age + 1
        final_obs = self.observe()
        late = ~arrived & (self.age >= DECISIONS)
        ended = arrived | late
        self.success = arrived.float()
        self.age = self.age.masked_fill(ended, 0)
        self.position = self.position.masked_fill(ended[:, None], 0)
        truncated = late & (not self.limit_ends)
        return self.observe(), reward[:, None], ended & ~truncated, truncated, final_obs

    def close(self):
        pass


def demonstrate(path, seed, episodes=400):
    """Write demonstrations: each goal equally often, aimed at so sloppily that half of them fail; their success."""
    env = Goals(episodes, CPU)
    draw = torch.Generator().manual_seed(seed)
    goals = env.goals.repeat(episodes // 4, 1)
    obs = env.reset(None)
    alive = torch.ones(episodes, dtype=torch.bool)
    success = torch.zeros(episodes)
    rows = []
    for _ in range(DECISIONS):
        aim = goals + 0.2 * torch.randn(episodes, 2, generator=draw)
        now, steps = obs[:, :2], []
        for _ in range(STEPS):
            way = (aim - now) / SPEED
            way = way * (0.35 / way.norm(dim=1, keepdim=True)).clamp(max=1)
            steps.append((way + 0.2 * torch.randn(way.shape, generator=draw)).clamp(-1, 1))
            now = now + SPEED * steps[-1]
        action = torch.cat(steps, 1)
        after, reward, ended, cut, _ = env.step(action)
        columns = obs, action, reward[:, 0], ended, cut
        rows += [(i, *(column[i].tolist() for column in columns)) for i in alive.nonzero().flatten().tolist()]
        success = torch.where(alive, env.success, success)
        alive &= ~ended
        obs = after
    rows.sort(key=lambda row: row[0])  # episode by episode
    np.savez(path, **dict(zip(cloning.DEMO_KEYS, map(np.array, list(zip(*rows))[1:]))))
    return success.mean().item()


# ----- the critic: V(s), or V(s, omega)? ------------------------------------------------------------------------------

class SeesChain(ncdpo.Trainer):
    """Advantages of NCDPO against a baseline V(s, f(s, omega)) that knows where the chain ended (E10).

    Bootstrapping stays with V(s). The second head judges a rollout before it learns from it, so that it knows nothing
    of the final Gaussian's draws: the gradient stays unbiased.
    """

    def __init__(self, config):
        super().__init__(config)
        inputs = self.env.obs_dim + self.env.act_dim
        self.baseline = ncdpo.mlp(inputs, config.hidden, 1, config.activation, last_gain=1.0).to(self.device)
        self.fit = torch.optim.Adam(self.baseline.parameters(), config.critic_learning_rate or config.learning_rate)
        self.fitted = False  # nor is it in a checkpoint

    @torch.no_grad()
    def make_batch(self, rollout):
        batch, explained_variance = super().make_batch(rollout)
        seen = torch.cat([batch["obs"], self.agent.policy.mean(batch["obs"], batch["latent"])], 1)
        target = batch["target"]
        if self.fitted:  # before, the head knows nothing
            batch["advantage"] = target - self.baseline(seen).squeeze(1)
            explained_variance = 1 - (batch["advantage"].var() / target.var().clamp(min=1e-8)).item()
        with torch.enable_grad():
            for _ in range(self.config.update_epochs):
                for pick in torch.randperm(len(target), device=self.device).split(self.config.minibatch_size):
                    loss = (self.baseline(seen[pick]).squeeze(1) - target[pick]).square().mean()
                    self.fit.zero_grad()
                    loss.backward()
                    self.fit.step()
        self.fitted |= self.config.update_epochs > 0
        return batch, explained_variance


# ----- runs -----------------------------------------------------------------------------------------------------------

LINES = {"ncdpo": dict(algo="ncdpo"), "dppo": dict(algo="dppo"), "dppo-matched": dict(algo="dppo", min_std=0.1),
         "ppo": dict(algo="ppo")}
NAMES = {"ncdpo": "NCDPO", "dppo": "DPPO", "dppo-matched": "DPPO, floor 0.1", "ppo": "MLP+PPO"}
SETTINGS = {**cloning.PRESET, "action_chunk": 1, "noise_scale": 1.0, "hidden": 32, "num_envs": 128, "num_steps": 8,
            "minibatch_size": 512, "learning_rate": 3e-3, "device": "cpu", "total_timesteps": 60_000}
DIAGNOSTICS = ["approx_kl", "clip_fraction", "explained_variance", "sigma", "chain_std"]
COLUMNS = ["line", "setting", "seed", "decisions", "success", "mean_action", "return", "entropy",
           *(f"share{g}" for g in GOALS), *(f"closed{g}" for g in GOALS), *DIAGNOSTICS]


def clone(algo, seed):
    """The run folder of a clone, made if it is not there; NCDPO and DPPO start from the same."""
    algo = "ppo" if algo == "ppo" else "ncdpo"
    folder = RUNS / "clones"
    run = folder / f"notebooks.modes_goals__{algo}__{seed}"
    if not (run / "checkpoint.pt").exists():
        shutil.rmtree(run, ignore_errors=True)  # one that was stopped
        folder.mkdir(parents=True, exist_ok=True)
        source = folder / f"demos-{algo}-{seed}.npz"
        demonstrate(source, seed)
        config = ncdpo.Config(env="notebooks.modes:goals", algo=algo, seed=seed, runs=folder, **SETTINGS)
        with contextlib.redirect_stdout(io.StringIO()):
            run = cloning.make(source, config, steps=4000, learning_rate=2e-3)
    return run


@torch.no_grad()
@torch.random.fork_rng([])
def play(agent, env, episodes=512, mean_action=False):
    """Success, return and goal (-1 for none), each (episodes,), and paths (episodes, 32, 2), NaN behind an end."""
    env = ncdpo.VectorEnv(env, episodes, CPU)
    torch.default_generator.manual_seed(1)
    obs = env.reset(1)
    alive, total = torch.ones(episodes), torch.zeros(episodes)
    goal = torch.full((episodes,), -1)
    paths = []
    for _ in range(DECISIONS):
        omega, noise = agent.policy.draw_noise(episodes)
        obs, reward, *_ = env.step(agent.act(obs, omega, noise * (not mean_action))[0])
        total += alive * reward[:, 0]
        paths.append(env.envs.path.masked_fill(alive[:, None, None] == 0, torch.nan))
        goal = env.envs.goal.where(alive.bool(), goal)
        alive *= 1 - env.envs.success
    return (goal >= 0).float(), total, goal, torch.cat(paths, 1)


def entropy(shares):
    """Entropy of shares (G,) over log G: 1 if all goals are reached equally often, 0 if one alone; NaN if none is."""
    p = np.asarray(shares, float) / np.sum(shares) if np.sum(shares) else np.full(len(shares), np.nan)
    return float(-(p * np.log(np.where(p > 0, p, 1))).sum() / math.log(len(p)))


def measure(agent, env, at_end=True):
    """The columns of a CSV file that come from episodes; those of mean actions and closed goals at the end alone."""
    success, total, goal, _ = play(agent, env)
    shares = [(goal == g).float().mean().item() for g in GOALS]
    row = {"success": success.mean().item(), "return": total.mean().item(), "entropy": entropy(shares)}
    row |= {f"share{g}": share for g, share in enumerate(shares)}
    if at_end:
        row["mean_action"] = play(agent, env, mean_action=True)[0].mean().item()
        row |= {f"closed{g}": play(agent, f"{env}&closed={g}")[0].mean().item() for g in GOALS}
    return row


def start(line, seed, env, trainer=ncdpo.Trainer, **changed):
    """A trainer of one of LINES that starts from its clone of this seed."""
    source = clone(LINES[line]["algo"], seed)
    trainer = trainer(ncdpo.Config(**{**SETTINGS, **LINES[line], **changed, "env": env, "seed": seed,
                                      "init_from": source}))
    ncdpo.start_from(trainer, source)
    return trainer


def fine_tune(name, line, seed, env, trainer, evaluations, changed):
    """Fine-tune, keep the run folder, and return the rows of a CSV file."""
    trainer = start(line, seed, env, trainer, runs=RUNS / name / line, **changed)
    rows, row = [], {}
    for update in range(trainer.updates + 1):
        if update * evaluations // trainer.updates > (update - 1) * evaluations // trainer.updates:
            about = {"line": line, "seed": seed, "decisions": update * trainer.batch_size}
            rows.append({**about, **measure(trainer.agent, env, update in (0, trainer.updates)), **row})
        if update < trainer.updates:
            row = trainer.iterate()
            row = {column: row[column] for column in DIAGNOSTICS if column in row}
    run = ncdpo.new_run_folder(trainer.config)
    ncdpo.save_config(trainer.config, run)
    ncdpo.save_checkpoint(trainer, run)
    return rows


def of_seed(seed, name, lines, env, trainer, evaluations, settings, changed):
    """The rows of all runs of a seed, which share its clones; `settings` are {what a row says: fields of Config}."""
    torch.set_num_threads(1)
    rows = []
    for line in lines:
        for setting, fields in settings.items():
            more = fine_tune(name, line, seed, env, trainer, evaluations, changed | fields)
            rows += [row | {"setting": setting} for row in more]
    print(f"seed {seed} done", flush=True)
    return rows


def run(options, flags):
    """Fine-tune all lines and seeds, and write the CSV file: a row is an evaluation of a run."""
    if options.critic_sees_chain and (options.moving or any(LINES[line]["algo"] == "dppo" for line in options.lines)):
        raise ncdpo.UserError("--critic-sees-chain is for --lines ncdpo (or ppo), and not with --moving")
    if options.evaluations < 1 or options.jobs < 1 or options.sweep and len(options.sweep) < 2:
        raise ncdpo.UserError("--evaluations and --jobs are at least 1, and --sweep wants a field and its values")
    changed = ncdpo.parse([flag for flag in flags if flag != "--"], SETTINGS)[3]
    if own := {*changed, *(options.sweep or [])[:1]} & {"env", "algo", "seed", "runs", "init_from"}:
        raise ncdpo.UserError(f"{', '.join(sorted(own))}: modes.py chooses these itself, by NAME, --lines, --seeds")
    before = [run for line in options.lines for seed in options.seeds
              for run in (RUNS / options.name / line).glob(f"*__{seed}")]
    if before and not options.sweep:
        raise ncdpo.UserError(f"there is {before[0]} from before, which the figure would show: remove it, or give the "
                              "runs another name")
    settings = {"": {}}
    if options.sweep:
        field, *values = options.sweep
        flag = "--" + field.replace("_", "-")
        settings = {f"{field}={value}": ncdpo.parse([flag, value], SETTINGS)[3] for value in values}
    trainer = moving.Moving if options.moving else ncdpo.Trainer
    if options.critic_sees_chain:
        trainer = SeesChain
    in_parallel(options, partial(of_seed, name=options.name, lines=options.lines, env=task(options), trainer=trainer,
                                 evaluations=options.evaluations, settings=settings, changed=changed), COLUMNS,
                [(line, setting) for line in options.lines for setting in settings])


def task(options):
    """The environment that a command line asks for."""
    worth = ",".join(map(str, options.worth))
    return f"notebooks.modes:goals?reward={options.reward}&worth={worth}&limit={options.limit}"


def in_parallel(options, rows_of, columns, runs):
    """Write the rows of all seeds, a process for each, as a CSV file; `runs` are its pairs of line and setting.

    What stops it leaves those of the seeds that are finished in a .tmp file, and an older CSV file as it was.
    """
    CURVES.mkdir(parents=True, exist_ok=True)
    path = CURVES / f"{options.name}.csv"
    if path.exists():
        with open(path, newline="") as file:
            before = {(row["line"], row.get("setting", ""), int(row["seed"])) for row in csv.DictReader(file)}
        if lost := before - {(*run, seed) for run in runs for seed in options.seeds}:
            line, setting, seed = min(lost)
            raise ncdpo.UserError(f"{path} has {len(lost)} runs that would be lost, as {line} {setting} of seed "
                                  f"{seed}: name their lines, values and seeds, too, or give another name")
    unfinished = path.with_suffix(".tmp")
    with ProcessPoolExecutor(options.jobs) as pool, open(unfinished, "w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        for of_one in pool.map(rows_of, options.seeds):
            for row in of_one:
                writer.writerow({key: f"{x:.4g}" if isinstance(x, float) else x for key, x in row.items()})
            file.flush()
    unfinished.replace(path)


# ----- the mechanism --------------------------------------------------------------------------------------------------

CASES = {"ncdpo": {}, "dppo-matched": {}, "dppo": {}, "ncdpo, no clip": {"clip_coef": 1e3},
         "dppo-matched, no clip": {"clip_coef": 1e3}, "ncdpo, critic sees chain": {}}
MEASURED = ["between", "within", "cosine", "needed", "displaced", "switched", "moved", "clip_fraction",
            "explained_variance", "chain_std"]


def gradients(policy, batch, advantage, groups):
    """The policy gradient E[score * advantage] of the network's weights in each of `groups` of a batch, (groups, P)."""
    weights = [p for name, p in policy.named_parameters() if not name.startswith("head")]
    objective = getattr(policy, "objective", ncdpo.clipped_objective)
    result = []
    for pick in torch.arange(len(advantage)).chunk(groups):
        log_prob = policy.log_prob(batch["obs"][pick], batch["action"][pick], batch["latent"][pick])
        value = objective(log_prob - log_prob.detach(), advantage[pick], 0.2)[0]  # no clip bites at a ratio of 1
        result.append(torch.cat([g.flatten() for g in torch.autograd.grad(value, weights)]))
    return torch.stack(result).double()


def inner(x, y):
    """Unbiased estimate of <E x, E y> from paired rows (groups, P): products of different rows alone."""
    return ((x.sum(0) @ y.sum(0) - (x * y).sum()) / (len(x) * (len(x) - 1))).item()


def lead(action):
    """Where decisions (B, 16) from the start lead, (B, 2)."""
    return SPEED * action.clamp(-1, 1).view(-1, STEPS, 2).sum(1)


@torch.no_grad()
@torch.random.fork_rng([])
def ends(policy, obs):
    """Where 8,192 decisions from the start (1, S) lead, (8192, 2), with the same noise at each call."""
    torch.default_generator.manual_seed(1)
    return lead(policy.act(obs.expand(8192, -1), *policy.draw_noise(8192))[0])


def starts(trainer, decisions):
    """A batch of first decisions of episodes, under the policy as it is."""
    parts = []
    epochs = trainer.config.update_epochs
    trainer.config.update_epochs = 0  # a critic that sees the chain learns nothing here, as the other one
    while sum(len(part["obs"]) for part in parts) < decisions:
        rollout = trainer.play()
        first = (rollout["obs"][..., -1] == 0).flatten()
        parts.append({name: x[first] for name, x in trainer.make_batch(rollout)[0].items()})
    trainer.config.update_epochs = epochs
    return {name: torch.cat([part[name] for part in parts])[:decisions] for name in parts[0]}


def decompose(seed, env, groups=64, decisions=32_768, warmup=20, updates=10):
    """Rows of a mechanism's CSV file: the gradient at the start, where a goal is chosen, and what ten updates do there.

    A decision's goal is the nearest one to where it ends. `between` is the squared norm of the gradient's part that
    comes from the mean advantage of each goal, `within` of the rest, as shares of the whole's. `cosine` is that of the
    angle to NCDPO's, `needed` the number of decisions whose gradient is as large as its noise. After the updates
    `displaced` is how far the ends of decisions of the same noise have moved (root mean square), `switched` the share
    of these that lead to another goal now, `moved` the change of the goals' shares (total variation).
    """
    torch.set_num_threads(1)
    rows, reference = [], None
    for case, changed in CASES.items():
        kind = SeesChain if "sees" in case else ncdpo.Trainer
        trainer = start(case.split(",")[0], seed, env, kind, total_timesteps=10**9, critic_warmup=warmup, **changed)
        for _ in range(warmup):
            trainer.iterate()
        policy = trainer.agent.policy
        goals = trainer.env.envs.goals
        nearest = lambda end: (end[:, None] - goals).norm(dim=-1).argmin(1)
        torch.manual_seed(1_000 * seed + len(rows))  # or the cases would share their samples
        batch = starts(trainer, decisions)
        goal = nearest(lead(batch["action"]))
        advantage = batch["advantage"]
        A = (advantage - advantage.mean()) / advantage.std()
        of_goals = torch.stack([A[goal == g].mean() for g in GOALS])[goal]
        between, within = (gradients(policy, batch, part, groups) for part in (of_goals, A - of_goals))
        whole = between + within
        signal = inner(whole, whole)
        noise = whole.var(0).sum().item() * decisions / groups  # of one decision
        reference = whole if reference is None else reference
        cosine = inner(whole, reference) / math.sqrt(signal * inner(reference, reference))
        before = ends(policy, batch["obs"][:1])
        for _ in range(updates):
            report = trainer.iterate()
        after = ends(policy, batch["obs"][:1])
        old, new = nearest(before), nearest(after)
        shares = [torch.bincount(goal, minlength=len(GOALS)) / len(goal) for goal in (old, new)]
        rows.append({"line": case, "seed": seed, "between": inner(between, between) / signal,
                     "within": inner(within, within) / signal, "cosine": cosine, "needed": noise / signal,
                     "displaced": (after - before).square().sum(1).mean().sqrt().item(),
                     "switched": (old != new).float().mean().item(),
                     "moved": 0.5 * (shares[1] - shares[0]).abs().sum().item(),
                     "clip_fraction": report["clip_fraction"], "chain_std": ncdpo.chain_std(policy, batch["obs"]),
                     "explained_variance": 1 - (advantage.var() / batch["target"].var()).item()})
    print(f"seed {seed} done", flush=True)
    return rows


# ----- tables and the figure ------------------------------------------------------------------------------------------

def read(name):
    """{(line, setting): {column: (seeds, evaluations)}} of a CSV file."""
    if not (CURVES / f"{name}.csv").exists():
        raise ncdpo.UserError(f"there is no {CURVES / name}.csv: `modes.py run {name}` makes it")
    with open(CURVES / f"{name}.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    runs = {}
    for row in rows:
        seeds = runs.setdefault((row["line"], row.get("setting", "")), {})
        seeds.setdefault(row["seed"], []).append({key: float(x or "nan") for key, x in row.items()
                                                  if key not in ("line", "setting")})
    return {run: {column: np.array([[row[column] for row in seed] for seed in seeds.values()])
                  for column in next(iter(seeds.values()))[0]} for run, seeds in runs.items()}


def measures(curve):
    """What a table tells of each seed, {name: (seeds,)}. A run that reaches no goal keeps none: its entropy is 0."""
    if "between" in curve:
        return {column: curve[column][:, 0] for column in MEASURED}
    keeps = np.nan_to_num(curve["entropy"])
    good = curve["success"] >= 0.9
    first = np.arange(len(keeps)), good.argmax(1)
    shares = np.stack([curve[f"share{g}"][:, -1] for g in GOALS], 1)
    closed = np.stack([curve[f"closed{g}"][:, -1] for g in GOALS], 1)
    return {"success": curve["success"][:, -1], "mean action": curve["mean_action"][:, -1],
            "success while training": curve["success"].mean(1), "return": curve["return"][:, -1],
            "decisions until 90% arrive": np.where(good.any(1), curve["decisions"][first], np.nan),
            "entropy then": np.where(good.any(1), keeps[first], np.nan), "entropy": keeps[:, -1],
            "goals in use": (shares > 0.02).sum(1).astype(float), "worst closed": closed.min(1),
            "share of goal 0": shares[:, 0] / np.maximum(shares.sum(1), 1e-9)}


def short(x, sign=""):
    """A number in three digits, or whole if it is long; with its sign if that is "+"."""
    return f"{x:{sign},.0f}" if abs(x) >= 1000 else f"{x:{sign}.3g}"


def mean(x):
    """Mean and 95% t interval over the seeds that are not NaN, as text, and how many these are if not all."""
    there = x[~np.isnan(x)]
    if len(there) < 2:
        return f"({len(there)})"
    low, high = verdicts.interval(there)
    text = f"{short(there.mean())} [{short(low)}, {short(high)}]"
    return text + (f" ({len(there)})" if len(there) < len(x) else "")


def difference(ours, theirs):
    """Difference of means and Welch's 95% interval, as text; "" where less than two seeds have a number."""
    ours, theirs = ours[~np.isnan(ours)], theirs[~np.isnan(theirs)]
    if min(len(ours), len(theirs)) < 2:
        return ""
    parts = np.array([x.var(ddof=1) / len(x) for x in (ours, theirs)])
    half = 0.0
    if parts.sum() > 0:
        freedom = parts.sum() ** 2 / (parts**2 / [len(ours) - 1, len(theirs) - 1]).sum()
        half = verdicts.student(freedom) * math.sqrt(parts.sum())
    middle = ours.mean() - theirs.mean()
    return f"{short(middle, '+')} [{short(middle - half, '+')}, {short(middle + half, '+')}]"


def table(names):
    """Means over the seeds of all runs of CSV files, and differences from the first, as Markdown."""
    found = {(name, *run): measures(curve) for name in names for run, curve in read(name).items()}
    columns = list(next(iter(found.values())))
    if any(list(values) != columns for values in found.values()):
        raise ncdpo.UserError("files of `run` and of `mechanism` have no table in common: give them one by one")
    rows = ["| | | | seeds | " + " | ".join(columns) + " |", "|---" * (len(columns) + 4) + "|"]
    for run, values in found.items():
        cells = [str(len(values[columns[0]])), *(mean(values[column]) for column in columns)]
        rows.append("| " + " | ".join([*run, *cells]) + " |")
    first, *others = found
    for run in others:
        cells = [difference(found[first][column], found[run][column]) for column in columns]
        rows.append("| " + " | ".join(["first minus " + run[0], *run[1:], "", *cells]) + " |")
    return "\n".join(rows)


def figure():
    """modes.png: paths of a clone and of what becomes of it, and how many goals remain in use.

    The paths are those of the seed whose entropies under both critics are nearest to the medians over the seeds.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Circle

    found, sees = read("dense"), read("dense-sees-chain")["ncdpo", ""]
    both = np.stack([measures(curve)["entropy"] for curve in (found["ncdpo", ""], sees)])
    seed = int(sees["seed"][np.abs(both - np.median(both, 1, keepdims=True)).sum(0).argmin(), 0])
    shown = {"cloned from\ndemonstrations": clone("ncdpo", seed)}
    titles = {"NCDPO": "dense/ncdpo", "NCDPO, critic\nsees the noise": "dense-sees-chain/ncdpo", "DPPO": "dense/dppo",
              "MLP+PPO": "dense/ppo"}
    for title, runs in titles.items():
        shown[title] = RUNS / runs / f"notebooks.modes_goals__{runs.split('/')[1]}__{seed}"
    picture = Figure(figsize=(14, 2.7), layout="constrained")
    *panels, last = picture.subplots(1, 6, width_ratios=[1, 1, 1, 1, 1, 1.3])
    for axes, (title, run) in zip(panels, shown.items()):
        success, _, _, paths = play(ncdpo.load_agent(run)[1], "notebooks.modes:goals")
        for path, arrived in zip(paths[:80], success):
            color = "#333333" if arrived else "#d62728"
            axes.plot(*np.r_[np.zeros((1, 2)), path].T, color=color, linewidth=0.7, alpha=0.5)
        for goal in Goals(1, CPU).goals:
            axes.add_patch(Circle(goal, ARRIVED, color="#2ca02c", alpha=0.7, zorder=3))
        axes.set(xlim=(-1.05, 1.05), ylim=(-1.05, 1.05), xticks=[], yticks=[], aspect="equal")
        axes.set_title(title, fontsize=11)
        axes.set_xlabel(f"{success.mean():.0%} arrive{', red: not' if success.mean() < 0.9 else ''}", fontsize=11)
    drawn = {"NCDPO, critic\nsees the noise": (sees, curves.STYLES["ncdpo-sample"])}
    drawn |= {NAMES[line]: (values, curves.STYLES[line]) for (line, _), values in found.items()}
    for name, (values, style) in drawn.items():
        x, y = 100 * values["success"].mean(0), np.nan_to_num(values["entropy"]).mean(0)
        last.plot(x, y, label=name, linewidth=2, **style)
    last.set(xlabel="% of episodes that arrive", xlim=(0, 103), ylim=(-0.05, 1.05), yticks=[0, 0.5, 1],
             yticklabels=["one", "two", "all four"])
    last.set_title(f"goals in use while success rises\n(mean of {len(sees['seed'])} seeds)", fontsize=11)
    last.legend(frameon=False, fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
    picture.savefig(CURVES / "modes.png", dpi=130)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    runner = commands.add_parser("run", help="fine-tune; unknown flags go to ncdpo.py")
    runner.add_argument("--lines", nargs="+", default=list(LINES), choices=LINES)
    runner.add_argument("--evaluations", type=int, default=20, help="of each run, and one before")
    runner.add_argument("--sweep", nargs="+", help="a field of ncdpo.Config and its values")
    runner.add_argument("--critic-sees-chain", action="store_true", help="the baseline is V(s, f(s, omega))")
    runner.add_argument("--moving", action="store_true", help="statistics of observations move, as in moving.py")
    taker = commands.add_parser("mechanism", help="take first updates apart")
    for command in (runner, taker):
        command.add_argument("name", help="of the CSV file")
        command.add_argument("--reward", default="dense", choices=["dense", "sparse"])
        command.add_argument("--worth", type=float, nargs=4, default=[1, 1, 1, 1])
        command.add_argument("--limit", default="end", choices=["end", "cut"])
        command.add_argument("--seeds", type=int, nargs="+", default=range(1, 21))
        command.add_argument("--jobs", type=int, default=2, help="processes, one thread each")
    commands.add_parser("table", help="of CSV files").add_argument("names", nargs="+")
    commands.add_parser("figure")
    options, flags = parser.parse_known_args(arguments)
    if flags and options.command != "run":
        parser.error(f"unrecognized arguments: {' '.join(flags)}")
    try:
        if options.command == "run":
            run(options, flags)
        elif options.command == "mechanism":
            in_parallel(options, partial(decompose, env=task(options)), ["line", "seed", *MEASURED],
                        [(line, "") for line in CASES])
        elif options.command == "table":
            print(table(options.names))
        else:
            figure()
    except ncdpo.UserError as error:
        print(f"modes: {' '.join(str(error).split()).rstrip('.')}.", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
