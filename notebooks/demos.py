"""Demonstrations for `ncdpo.py --demos`: recorded from saved runs, or converted from public datasets.

    python notebooks/demos.py record runs/Hopper-v4__ncdpo__1 demos.npz --steps 100000 --deterministic
    python notebooks/demos.py convert hopper_medium-v2.hdf5 demos.npz             # D4RL; needs h5py
    python notebooks/demos.py convert minari:mujoco/hopper/expert-v0 demos.npz    # needs minari[all]

Several sources before the .npz become one file, demonstrations of mixed quality for example.
notebooks/cloning.py says what the .npz holds, and reads it.
"""

from __future__ import annotations

import argparse
import difflib
import math
import sys
from contextlib import closing, suppress
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import ncdpo  # noqa: E402
from ncdpo import UserError, gist  # noqa: E402
from notebooks.cloning import DEMO_KEYS  # noqa: E402

D4RL_KEYS = "observations actions rewards terminals timeouts".split()


@torch.no_grad()
def record(run: Path, steps: int, deterministic: bool, device: str) -> dict[str, np.ndarray]:
    """Play a saved run for about `steps` steps in all, a chunk action by action: DEMO_KEYS of shape (N, T, ...)."""
    if steps < 1:
        raise UserError("--steps must be 1 or more for each run.")
    config, agent, _ = ncdpo.load_agent(run, device := ncdpo.pick_device(device))
    copies = min(config.num_envs, max(1, steps // 2000))  # T of 2000 leaves room for whole episodes
    env, seed = ncdpo.VectorEnv(config.env, copies, device), 2_000_003 + config.seed  # apart from training, evaluation
    N, H = env.num_envs, config.action_chunk  # an agent of a game counts as an environment
    torch.manual_seed(seed)
    with closing(env):
        obs, rows, used = env.reset(seed), [], torch.full((N,), H)
        plan = torch.zeros(N, H, dtype=torch.int64) if env.discrete else torch.zeros(N, H, env.act_dim)
        for _ in range(math.ceil(steps / N)):
            if (due := used == H).any():
                new = agent.policy.sample(agent.obs_norm(obs), deterministic)[0].cpu().view(plan.shape)
                plan[due], used[due] = new[due], 0
            action, used = plan[range(N), used], used + 1
            after, reward, terminated, truncated, _ = env.step(action)
            used[(terminated | truncated).cpu()] = H  # a new episode asks for a new chunk
            played = action + env.offset if env.discrete else env.center.cpu() + env.scale.cpu() * action.clamp(-1, 1)
            rows.append([x.cpu().numpy() for x in (obs, played, reward[:, 0], terminated, truncated)])
            obs = after
    return dict(zip(DEMO_KEYS, (np.stack(column, 1) for column in zip(*rows))))


def read_d4rl(path: str) -> dict[str, np.ndarray]:
    """DEMO_KEYS of shape (1, steps, ...) of a D4RL-style HDF5 file."""
    import h5py
    try:
        with h5py.File(path) as file:
            demos = {key: file[name][()][None] for key, name in zip(DEMO_KEYS, D4RL_KEYS)}
        if len(lengths := {x.shape[1] for x in demos.values()}) != 1 or 0 in lengths:
            raise ValueError("its arrays are empty or differ in length")
    except (OSError, KeyError, ValueError, TypeError, IndexError) as error:
        raise UserError(f"cannot read the arrays {', '.join(D4RL_KEYS)} of {path} ({gist(error)}).") from None
    return demos


def read_minari(name: str) -> dict[str, np.ndarray]:
    """DEMO_KEYS of shape (1, steps, ...) of a Minari dataset, downloaded if need be; last observations are left out."""
    import minari
    known = minari.list_local_datasets()
    try:
        episodes = list(minari.load_dataset(name, download=name not in known))
    except Exception as error:  # no such name, no network, a damaged download
        with suppress(Exception):
            known |= minari.list_remote_datasets()
        near = " or ".join(difflib.get_close_matches(name, known, n=3, cutoff=0.3)) or "one of `minari list remote`"
        raise UserError(f"Minari cannot load {name!r} ({gist(error)}); did you mean {near}?") from None
    if not all(isinstance(x, np.ndarray) for x in (episodes[0].observations, episodes[0].actions)):
        raise UserError(f"observations or actions of minari:{name} are not arrays, but of Dict or Tuple spaces.")
    return {key: np.concatenate([getattr(e, key)[:len(e.rewards)] for e in episodes])[None] for key in DEMO_KEYS}


def flatten(source: str, demos: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """DEMO_KEYS of shape (N, T, ...) as (N * T, ...); episodes cut off at T count as truncated. Prints a summary."""
    for key, kind in zip(DEMO_KEYS[2:], (float, bool, bool)):
        demos[key] = demos[key].reshape(demos["observations"].shape[:2]).astype(kind)
    ended = torch.as_tensor(demos["terminations"] | demos["truncations"]).T
    returns = ncdpo.discounted_sums(torch.as_tensor(demos["rewards"]).T, ended.double(), 0.0, gamma=1.0)[0][ended]
    demos["truncations"][:, -1] |= ~demos["terminations"][:, -1]
    mean = f" of mean return {returns.mean():.1f}" if len(returns) else ""
    cut_off = sum(~ended[-1])
    print(f"{source}: {ended.numel():,} steps, {len(returns)} whole episodes{mean}, {cut_off} cut off at the end")
    return {key: x.reshape(-1, *x.shape[2:]) for key, x in demos.items()}


def join(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """The demonstrations of several sources one after another; raises UserError if they are of different tasks."""
    if len(kinds := {tuple((x.shape[1:], x.dtype.kind) for x in part.values()) for part in parts}) > 1:
        shapes = " and ".join(sorted(f"{obs} and {action}" for (obs, _), (action, _), *_ in kinds))
        raise UserError(f"the sources are of different tasks: their observations and actions have shapes {shapes}.")
    return {key: np.concatenate([part[key] for part in parts]) for key in DEMO_KEYS}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands, files = parser.add_subparsers(dest="command", required=True), argparse.ArgumentParser(add_help=False)
    files.add_argument("source", nargs="+", help="run folders to record; .hdf5 files, or minari:DATASET, to convert")
    files.add_argument("out", type=Path, help="the .npz file to write")
    recorder, _ = (commands.add_parser(name, parents=[files]) for name in ("record", "convert"))
    recorder.add_argument("--steps", type=int, default=100_000, help="of all environments and sources [100000]")
    recorder.add_argument("--deterministic", action="store_true", help="leave out the final Gaussian's noise")
    recorder.add_argument("--device", default="auto")
    line = parser.parse_args(arguments)
    try:
        if line.out.exists() or not line.out.parent.is_dir():
            raise UserError(f"{line.out} exists, or its folder does not; choose another name.")
        parts = []
        for source in line.source:
            if line.command == "record":
                demos = record(Path(source), line.steps // len(line.source), line.deterministic, line.device)
            else:
                _, minari, name = source.rpartition("minari:")
                demos = read_minari(name) if minari else read_d4rl(name)
            parts.append(flatten(source, demos))
        joined = join(parts)
        ncdpo.write(line.out, lambda file: np.savez_compressed(file, **joined))
    except ImportError as error:
        print(f"demos: {source} needs the package {error.name}: pip install {error.name}.", file=sys.stderr)
    except UserError as error:
        print(f"demos: {error}", file=sys.stderr)
    else:
        return 0
    return 2


if __name__ == "__main__":
    sys.exit(main())
