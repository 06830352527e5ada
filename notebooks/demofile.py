"""The one file of demonstrations: an .npz, which notebooks/demos.py writes and ncdpo.py --demos clones.

A row for each environment step, episode by episode, under the keys of DEMO_KEYS: observations (steps, S), actions
(steps, A) as the task takes them, or (steps,) of a Discrete task; the others (steps,). Of a team, each agent's episodes
follow one another.
"""

from __future__ import annotations

import numpy as np
import torch

DEMO_KEYS = ("observations", "actions", "rewards", "terminations", "truncations")


def load(source: str, env) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """Chunks that stay inside an episode: observations (n, S), actions (n, H * A) in [-1, 1], episode numbers (n,).

    `env` is the ncdpo.VectorEnv of the task. A Discrete action becomes a one-hot vector of -1 and 1. Raises ValueError
    for a file that cannot be read, for demonstrations of another task, and for the first row that cannot be right.
    Prints a summary.
    """
    try:
        with np.load(source, allow_pickle=False) as file:
            demos = {key: np.asarray(file[key], float) for key in DEMO_KEYS}
    except Exception as error:  # a damaged file can raise anything
        raise ValueError(f"cannot read demonstrations from {source} ({error}); notebooks/demos.py writes such a file: "
                         "it records a run, and converts D4RL and Minari.") from error
    n, H, dims = demos["rewards"].size, env.chunk, 1 if env.discrete else env.act_dim // env.chunk
    for key, size in zip(DEMO_KEYS, (env.obs_dim, dims, 1, 1, 1)):
        if demos[key].size != n * size or not n:
            raise ValueError(f"{key} of {source} have the shape {demos[key].shape}, but {n} steps of {env.env_id} need "
                             f"({n}, {size}): these are not demonstrations of this task.")
        demos[key] = demos[key].reshape(n, size)
    if env.discrete:
        action = 2.0 * (demos["actions"] - env.offset == np.arange(env.act_dim)) - 1
        inside, extreme = (action > 0).any(1), ""
    else:
        action = (demos["actions"] - env.center[:dims].cpu().numpy()) / env.scale[:dims].cpu().numpy()
        inside = (np.abs(action) <= 1.001).all(1)
        extreme = f", {(np.abs(action) > 0.999).mean():.0%} of the actions at a bound"
    good = np.isfinite(np.hstack(list(demos.values()))).all(1) & inside
    if not good.all():
        raise ValueError(f"row {good.argmin()} of {source} has a number that is not finite or an action outside of "
                         f"the task's space ({demos['actions'][good.argmin()]}): scale them, or drop that episode.")
    end = (demos["terminations"] + demos["truncations"] > 0).squeeze(1)
    episode = np.cumsum(end) - end  # the number of each row's episode
    start = np.flatnonzero(episode[H - 1:] == episode[:max(0, n + 1 - H)])
    if not len(start) or not episode[start[0]] < episode[start[-1]]:
        raise ValueError(f"{source} has fewer than two episodes of at least --action-chunk {H} steps; record more.")
    returns = np.bincount(episode, demos["rewards"][:, 0])
    print(f"{source}: {len(returns)} episodes, {n:,} steps, mean return {returns.mean():.1f}{extreme}", flush=True)
    chunks = np.lib.stride_tricks.sliding_window_view(action.clip(-1, 1), H, 0)[start].swapaxes(1, 2)
    tensor = lambda x: torch.as_tensor(x.reshape(len(start), -1), dtype=torch.float32).to(env.device)
    return tensor(demos["observations"][start]), tensor(chunks), episode[start]
