"""Behaviour cloning for ncdpo.py --demos: reads the one file of demonstrations, an .npz, and clones it.

notebooks/demos.py writes that file: a row for each environment step, episode by episode, under the keys of DEMO_KEYS.
Observations are (steps, S), actions (steps, A) as the task takes them, or (steps,) of a Discrete task, the others
(steps,). Of a team, each agent's episodes follow one another.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch.optim import swa_utils

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
        raise ValueError(f"row {good.argmin()} of {source} has a number that is not finite or an action outside of the "
                         f"task's space: scale them, or drop that episode. It is {demos['actions'][good.argmin()]}")
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


def clone(agent, config, demos) -> None:
    """Behaviour cloning (E2): Adam, a cosine schedule, and at the end a moving average of the weights.

    The policy of an ncdpo.Agent learns by its `bc_loss` from `demos` as `load` returns them, and the agent's normaliser
    takes in their observations. A twentieth of the episodes is held out; its loss is printed beside the other.
    """
    obs, action, episode = demos
    agent.obs_norm.update(obs)
    obs, episodes, policy = agent.obs_norm(obs), np.unique(episode), agent.policy
    held_out = np.random.default_rng(config.seed).permutation(episodes)[:math.ceil(len(episodes) / 20)]
    held_out = np.isin(episode, held_out)
    seen, unseen = (torch.as_tensor(np.flatnonzero(x), device=obs.device) for x in (~held_out, held_out))
    optimizer = torch.optim.Adam(policy.parameters(), config.bc_learning_rate)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config.bc_steps)
    decay = max(0.0, 1 - 10 / config.bc_steps)  # the last tenth of the steps
    average = swa_utils.AveragedModel(policy, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(decay))
    devices = [] if obs.device.type == "cpu" else [obs.device]
    total, every = 0.0, max(1, config.bc_steps // 20)
    for step in range(1, config.bc_steps + 1):
        pick = seen[torch.randint(len(seen), (256,), device=obs.device)]
        loss = policy.bc_loss(obs[pick], action[pick])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        cosine.step()
        average.update_parameters(policy)
        total += loss.detach()
        if step % every == 0:
            with torch.no_grad(), torch.random.fork_rng(devices, device_type=obs.device.type):
                torch.manual_seed(0)  # the same noise each time, so that only learning moves the loss
                unseen_loss = average.module.bc_loss(obs[unseen], action[unseen])
            print(f"{step:>13,} cloning steps, loss {total / every:.4f}, held out {unseen_loss:.4f}", flush=True)
            total = 0.0
    policy.load_state_dict(average.module.state_dict())
    if config.finetune_steps and config.algo != "ppo":
        policy.denoiser.frozen.load_state_dict(policy.denoiser.denoiser.state_dict())
