"""Demonstrations for notebooks/cloning.py: recorded from saved runs, or converted from public datasets.

    python notebooks/demos.py train 1000 --env Hopper-v4 --algo ppo               # a demonstrator of that mean return
    python notebooks/demos.py record runs/Hopper-v4__ppo__1 demos.npz --steps 100000
    python notebooks/demos.py convert hopper_medium-v2.hdf5 demos.npz             # D4RL; needs h5py
    python notebooks/demos.py convert minari:mujoco/hopper/expert-v0 demos.npz    # needs minari[all]

Several sources before the .npz become one file, demonstrations of mixed quality for example.
notebooks/cloning.py says what the .npz holds, and reads it.
"""

import argparse
import difflib
import io
import math
import sys
from contextlib import closing, suppress
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import ncdpo  # noqa: E402
from ncdpo import UserError  # noqa: E402
from notebooks.cloning import DEMO_KEYS, task_name  # noqa: E402

D4RL_KEYS = "observations actions rewards terminals timeouts".split()
CPU = torch.device("cpu")


class UntilReturn(ncdpo.Trainer):
    """A Trainer that is finished as soon as about the last 20 episodes have the mean return `goal`."""

    goal, recent = math.inf, ()

    def iterate(self):
        row = super().iterate()
        self.recent = [*self.recent, *[row.get("return")] * row["episodes"]][-20:]
        if len(self.recent) == 20 and np.mean(self.recent) >= self.goal:
            self.updates = self.done
        elif self.done == self.updates:
            print(f"demos: the mean return {self.goal:g} was not reached", file=sys.stderr)
        return row


@torch.no_grad()
def record(run, steps, deterministic, part=0):
    """Play a saved run for about `steps` steps in all, a chunk action by action: DEMO_KEYS of shape (N, T, ...).

    The parts of one file have start states and noise of their own, also where their runs have the same seed.
    """
    if steps < 1:
        raise UserError("--steps must be 1 or more for each run")
    config, agent, _ = ncdpo.load_agent(run)
    copies = min(config.num_envs, max(1, steps // 2000))  # T of 2000 leaves room for whole episodes
    env, seed = ncdpo.VectorEnv(config.env, copies, CPU), 2_000_003 + config.seed  # apart from training, evaluation
    N, H = env.num_envs, config.action_chunk  # an agent of a game counts as an environment
    kinds = [env.envs.observation_space.dtype, env.envs.action_space.dtype, float, bool, bool]
    torch.manual_seed(seed + 10**10 * part)
    with closing(env):
        obs, rows, used = env.reset(seed, part), [], torch.full((N,), H)
        plan = torch.zeros(N, H, dtype=torch.int64) if env.discrete else torch.zeros(N, H, env.act_dim)
        for _ in range(math.ceil(steps / N)):
            if (due := used == H).any():
                new = agent.policy.sample(agent.obs_norm(obs), deterministic)[0].view(plan.shape)
                plan[due] = new[due]
                used[due] = 0
            action = plan[range(N), used]
            used += 1
            after, reward, terminated, truncated, _ = env.step(action)
            used[terminated | truncated] = H  # a new episode asks for a new chunk
            row = obs, ncdpo.to_task(action, **env.bounds), reward[:, 0], terminated, truncated
            rows.append([x.numpy().astype(kind) for x, kind in zip(row, kinds)])
            obs = after
    return dict(zip(DEMO_KEYS, (np.stack(column, 1) for column in zip(*rows))))


def read_d4rl(path):
    """DEMO_KEYS of shape (1, steps, ...) of a D4RL-style HDF5 file."""
    import h5py
    try:
        with h5py.File(path) as file:
            demos = {key: file[name][()][None] for key, name in zip(DEMO_KEYS, D4RL_KEYS)}
        if len(lengths := {x.shape[1] for x in demos.values()}) != 1 or 0 in lengths:
            raise ValueError("they are empty or differ in length")
    except (OSError, KeyError, ValueError, TypeError, IndexError) as error:
        raise UserError(f"cannot read the arrays {', '.join(D4RL_KEYS)} of {path} ({error})") from error
    return demos


def read_minari(name):
    """DEMO_KEYS of shape (1, steps, ...) of a Minari dataset, downloaded if need be; last observations are left out."""
    import minari
    known = minari.list_local_datasets()
    try:
        dataset = minari.load_dataset(name, download=name not in known)
        episodes = list(dataset)
    except Exception as error:  # no such name, no network, a damaged download
        with suppress(Exception):
            known |= minari.list_remote_datasets()
        near = " or ".join(difflib.get_close_matches(name, known, n=3, cutoff=0.3)) or "one of `minari list remote`"
        raise UserError(f"Minari cannot load {name!r}, did you mean {near}? ({error})") from error
    episodes = [episode for episode in episodes if len(episode.rewards)]
    if not episodes:
        raise UserError(f"minari:{name} has no step")
    columns = {key: [getattr(episode, key) for episode in episodes] for key in DEMO_KEYS}
    columns["observations"] = [flat_columns(dataset.observation_space, x) for x in columns["observations"]]
    if not all(isinstance(columns[key][0], np.ndarray) for key in ("observations", "actions")):
        raise UserError(f"observations or actions of minari:{name} are neither arrays nor a Dict of them")
    demos = {key: np.concatenate([x[:len(e.rewards)] for x, e in zip(parts, episodes)])[None]
             for key, parts in columns.items()}
    last = np.cumsum([len(episode.rewards) for episode in episodes]) - 1
    demos["truncations"][0, last] |= demos["terminations"][0, last] == 0  # an episode may end without a flag
    return demos


def flat_columns(space, x):
    """Observations (steps, S) of a Dict or Discrete space, as Gymnasium's FlattenObservation; others as they are."""
    if isinstance(space, gym.spaces.Discrete):
        return np.eye(space.n)[x - space.start]
    if not isinstance(space, gym.spaces.Dict):
        return x
    parts = [flat_columns(part, x[key]) for key, part in space.spaces.items()]
    if not all(isinstance(part, np.ndarray) for part in parts):
        return None
    return np.concatenate([part.reshape(len(part), -1) for part in parts], 1)


def flatten(source, demos):
    """DEMO_KEYS of shape (N, T, ...) as (N * T, ...); episodes cut off at T count as truncated. Prints a summary."""
    for key, kind in zip(DEMO_KEYS[2:], (float, bool, bool)):
        demos[key] = demos[key].reshape(demos["observations"].shape[:2]).astype(kind)
    ended = torch.as_tensor(demos["terminations"] | demos["truncations"]).T
    returns = ncdpo.discounted_sums(torch.as_tensor(demos["rewards"]).T, ended, 0.0, gamma=1.0)[0][ended]
    demos["truncations"][:, -1] |= ~demos["terminations"][:, -1]
    mean = f" of mean return {returns.mean():.1f}" if len(returns) else ""
    cut_off = sum(~ended[-1])
    print(f"{source}: {ended.numel():,} steps, {len(returns)} whole episodes{mean}, {cut_off} cut off at the end")
    return {key: x.reshape(-1, *x.shape[2:]) for key, x in demos.items()}


def join(parts):
    """The demonstrations of several sources one after another; raises UserError if they are of different tasks."""
    if len(kinds := {tuple((x.shape[1:], x.dtype.kind) for x in part.values()) for part in parts}) > 1:
        shapes = " and ".join(sorted(f"{obs} and {action}" for (obs, _), (action, _), *_ in kinds))
        raise UserError(f"the sources are of different tasks: their observations and actions have shapes {shapes}")
    return {key: np.concatenate([part[key] for part in parts]) for key in DEMO_KEYS}


def collect(line):
    """Write the .npz that the command line asks for."""
    if line.out.exists() or not line.out.parent.is_dir():
        raise UserError(f"{line.out} exists, or its folder does not; choose another name")
    tasks = [ncdpo.load_config(run).env for run in line.source if line.command == "record"]
    if len(set(map(task_name, tasks))) > 1:
        raise UserError(f"the sources are of different tasks: {' and '.join(sorted(set(tasks)))}")
    parts = []
    for part, source in enumerate(line.source):
        if line.command == "record":
            demos = record(source, line.steps // len(line.source), line.deterministic, part)
        else:
            _, minari, name = source.rpartition("minari:")
            try:
                demos = read_minari(name) if minari else read_d4rl(name)
            except ImportError as error:
                package = "'minari[all]'" if minari else error.name
                raise UserError(f"{source} needs the package {error.name}: pip install {package}") from error
        parts.append(flatten(source, demos))
    of_task = {"env": task for task in tasks}  # what is converted does not say of which it is
    np.savez_compressed(buffer := io.BytesIO(), **join(parts), **of_task)
    ncdpo.write(line.out, buffer.getvalue())


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    commands, files = parser.add_subparsers(dest="command", required=True), argparse.ArgumentParser(add_help=False)
    files.add_argument("source", nargs="+", help="run folders to record; .hdf5 files, or minari:DATASET, to convert")
    files.add_argument("out", type=Path, help="the .npz file to write")
    trainer = commands.add_parser("train", help="train until a return; all other flags are those of ncdpo.py")
    trainer.add_argument("goal", type=float, help="mean return of about the last 20 episodes")
    recorder, _ = (commands.add_parser(name, parents=[files]) for name in ("record", "convert"))
    recorder.add_argument("--steps", type=int, default=100_000, help="of all environments and sources [100000]")
    recorder.add_argument("--deterministic", action="store_true", help="no final noise; such data are cloned badly")
    line, flags = parser.parse_known_args(arguments)
    if line.command == "train":
        UntilReturn.goal = line.goal
        ncdpo.Trainer = UntilReturn
        return ncdpo.main(flags)
    if flags:
        parser.error(f"unrecognized arguments: {' '.join(flags)}")
    try:
        collect(line)
    except UserError as error:
        print(f"demos: {' '.join(str(error).split()).rstrip('.')}.", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
