"""Behaviour cloning (E2): demonstrations become a run folder, which `ncdpo.py --init-from` improves.

    python notebooks/cloning.py demos.npz --env Hopper-v4 --seed 1 --runs runs/clones      # and other flags of ncdpo.py
    python ncdpo.py --init-from runs/clones/Hopper-v4__ncdpo__1

notebooks/demos.py writes demos.npz, or np.savez does: a row for each environment step, episode by episode. The keys are
observations (steps, S), actions (steps, A) as the task takes them, or (steps,) of a Discrete task, and rewards,
terminations and truncations (steps,); one of the last two is 1 in an episode's last row. A key env may name the task.
Of a team, each agent's episodes follow one another. PRESET has the defaults of flags, which stay in the clone's
config.json and hold for the run that starts from it.
"""

import argparse
import contextlib
import math
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.optim import swa_utils

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import ncdpo  # noqa: E402
from ncdpo import UserError  # noqa: E402

DEMO_KEYS = ("observations", "actions", "rewards", "terminations", "truncations")
PRESET = dict(  # whatever the task; the last line is ours, as the target "sample" is: less chain noise
    denoising_steps=20, action_chunk=4, gamma=0.99, gae_lambda=0.95, num_envs=16, num_steps=64, minibatch_size=256,
    learning_rate=3e-4, critic_warmup=4, critic_learning_rate=1e-3,
    sampling_steps=5, noise_scale=0.3, init_std=0.1, min_std=0.05, mean_log_prob=True, clip_coef=0.05)


def task_name(env_id):
    """A task without module, version and arguments: those that differ in these alone may use one another's data."""
    return re.sub(r"^[\w.]+:|(-v\d+)?(\?.*)?$", "", env_id)


def load(source, env):
    """Chunks that stay inside an episode: observations (n, S), actions (n, H * A) in [-1, 1], episode numbers (n,).

    `env` is the ncdpo.VectorEnv of the task. A Discrete action becomes a one-hot vector of -1 and 1. Raises UserError
    for a file that cannot be read, for demonstrations of another task, and for the first row that cannot be right.
    Prints a summary.
    """
    try:
        with np.load(source, allow_pickle=False) as file:
            if lacks := set(DEMO_KEYS) - file.keys():
                raise ValueError(f"it lacks {', '.join(sorted(lacks))}, see --help")
            demos = {key: np.asarray(file[key], float) for key in DEMO_KEYS}
            task = str(file["env"]) if "env" in file else env.env_id  # tasks of one suite have the same shapes
    except Exception as error:  # a damaged file can raise anything
        raise UserError(f"cannot read demonstrations from {source} ({error}); notebooks/demos.py writes such a file: "
                        "it records a run, and converts D4RL and Minari") from error
    if task_name(task) != task_name(env.env_id):
        raise UserError(f"{source} has demonstrations of {task}, not of {env.env_id}: give --env {task}")
    n, H, dims = demos["rewards"].size, env.chunk, 1 if env.discrete else env.act_dim // env.chunk
    for key, size in zip(DEMO_KEYS, (env.obs_dim, dims, 1, 1, 1)):
        if demos[key].shape[:1] != (n,) or demos[key].size != n * size or not n:
            raise UserError(f"{key} of {source} have the shape {demos[key].shape}, but {n} steps of {env.env_id} need "
                            f"({n}, {size}): these are not demonstrations of this task")
        demos[key] = demos[key].reshape(n, size)
    if env.discrete:
        action = 2.0 * (demos["actions"] - env.bounds["low"] == np.arange(env.act_dim)) - 1
        inside, extreme = (action > 0).any(1), ""
    else:
        action, inside = from_task(demos["actions"], env)
        extreme = f", {(np.abs(action) > 0.999).mean():.0%} of the actions at a bound"
    good = np.isfinite(np.hstack(list(demos.values()))).all(1) & inside
    if not good.all():
        raise UserError(f"row {good.argmin()} of {source} has a number that is not finite or an action outside of "
                        "the task's space: clip or scale it, or drop that episode; the action is "
                        f"{demos['actions'][good.argmin()]}")
    end = (demos["terminations"] + demos["truncations"] > 0).squeeze(1)
    episode = np.cumsum(end) - end  # the number of each row's episode
    start = np.flatnonzero(episode[H - 1:] == episode[:max(0, n + 1 - H)])
    if not len(start) or not episode[start[0]] < episode[start[-1]]:
        raise UserError(f"{source} has fewer than two episodes of at least --action-chunk {H} steps: record more, and "
                        "mark each one's last row in terminations or truncations")
    returns = np.bincount(episode, demos["rewards"][:, 0])
    print(f"{source}: {len(returns)} episodes, {n:,} steps, mean return {returns.mean():.1f} "
          f"(what was cut off included){extreme}", flush=True)
    chunks = np.lib.stride_tricks.sliding_window_view(action.clip(-1, 1), H, 0)[start].swapaxes(1, 2)
    obs, action = (torch.as_tensor(x.reshape(len(start), -1), device=env.device) for x in
                   (demos["observations"][start], chunks))
    return obs, action.to(torch.get_default_dtype()), episode[start]


def from_task(action, env):
    """Box actions (n, A) of the task in [-1, 1], what ncdpo.to_task undoes, and whether they are in its space (n,)."""
    low, high = (env.bounds[name][:action.shape[1]].cpu().numpy() for name in ("low", "high"))
    center, half = (high + low) / 2, (high - low) / 2
    off, slack = action - center, 1e-3 * half + 1e-6 * np.abs(center)  # it may have been rounded to a float32
    inside = (np.abs(off) <= half + slack) & ((action == action.round()) | (not env.bounds["whole"]))
    return np.divide(off, half, out=np.zeros_like(off), where=half > 0), inside.all(1)


def bc_loss(policy, obs, action):
    """The loss of cloning, obs (B, S), action (B, A): E2, or of an MLP squared error of the mean, or cross entropy."""
    if not isinstance(policy, ncdpo.MLPPolicy):
        return policy.bc_loss(obs, action)
    mean = policy.mean(obs, None)
    if isinstance(policy.head, ncdpo.Categorical):
        return -policy.head.log_prob(mean, action.argmax(-1)).mean()
    return F.mse_loss(mean, action)


def likelihood_loss(policy, obs, action):
    """-log pi(a | s, omega) (E8) of one-hot actions, with fresh noise; obs (B, S), action (B, A).

    Its mean is at least that of -log pi(a | s) (Jensen), and equal to it if the likelihood does not depend on omega: if
    the chain leaves the choice to the softmax, which can have any frequencies, and explores where the score sees it.
    """
    omega, _ = policy.draw_noise(len(obs), device=obs.device)
    return -policy.log_prob(obs, action.argmax(-1), omega).mean()


def clone(agent, demos, seed, steps=20_000, learning_rate=1e-3, likelihood_steps=0):
    """Behaviour cloning, then NCDPO's likelihood: Adam, a cosine schedule, and at the end an average of the weights.

    The policy of an ncdpo.Agent learns from `demos` as `load` returns them, and the agent's normaliser takes in their
    observations: for good, as --init-from keeps them. A twentieth of the episodes, drawn by `seed`, is held out; its
    loss is printed beside the other.
    """
    obs, action, episode = demos
    agent.obs_norm.update(obs)
    spread = agent.obs_norm.var[agent.obs_norm.var > 0]
    # what (nearly) stands still in the demonstrations may move later: not by 1e4 standard deviations
    agent.obs_norm.var.clamp_(min=1e-4 * spread.median().item() if len(spread) else 1.0)
    obs, episodes = agent.obs_norm(obs), np.unique(episode)
    held_out = np.random.default_rng(seed).permutation(episodes)[:math.ceil(len(episodes) / 20)]
    held_out = np.isin(episode, held_out)
    seen, unseen = (torch.as_tensor(np.flatnonzero(x), device=obs.device) for x in (~held_out, held_out))
    for loss_of, count in ((bc_loss, steps), (likelihood_loss, likelihood_steps)):
        if count:
            fit(agent.policy, loss_of, obs, action, seen, unseen, count, learning_rate)


def fit(policy, loss_of, obs, action, seen, unseen, steps, learning_rate):
    """Minimise `loss_of(policy, obs, action)` over the rows `seen`; print it, and that of the rows `unseen`."""
    optimizer = torch.optim.Adam(policy.parameters(), learning_rate)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    decay = max(0.0, 1 - 10 / steps)  # the last tenth of the steps
    average = swa_utils.AveragedModel(policy, multi_avg_fn=swa_utils.get_ema_multi_avg_fn(decay))
    devices = [] if obs.device.type == "cpu" else [obs.device]
    what = "cloning" if loss_of is bc_loss else "likelihood"
    total, every = 0.0, max(1, steps // 20)
    policy.train()  # the average stays as it was, in the mode in which the agent plays
    for step in range(1, steps + 1):
        pick = seen[torch.randint(len(seen), (256,), device=obs.device)]
        loss = loss_of(policy, obs[pick], action[pick])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        cosine.step()
        average.update_parameters(policy)
        total += loss.detach()
        if step % every == 0:
            with torch.no_grad(), torch.random.fork_rng(devices, device_type=obs.device.type):
                torch.manual_seed(0)  # the same noise each time, so that only learning moves the loss
                unseen_loss = loss_of(average.module, obs[unseen], action[unseen])
            print(f"{step:>13,} {what} steps, loss {total / every:.4f}, held out {unseen_loss:.4f}", flush=True)
            total = 0.0
    policy.eval().load_state_dict(average.module.state_dict())


def make(source, config, steps=20_000, learning_rate=1e-3, likelihood_steps=None):
    """Clone the demonstrations `source`; returns the new run folder, whose metrics.csv has no row yet.

    `likelihood_steps` are 4,000 of an ncdpo clone with Discrete actions, if not given, and else none.
    """
    trainer = ncdpo.Trainer(config)
    with contextlib.closing(trainer.env):
        warms = trainer.env.discrete and config.algo == "ncdpo"
        if likelihood_steps is None:
            likelihood_steps = 4_000 if warms else 0
        if likelihood_steps and not warms:
            raise UserError("--likelihood-steps are for --algo ncdpo and Discrete actions: a Gaussian would lose "
                            "modes, an MLP is cloned by its likelihood, and dppo starts from an ncdpo clone")
        demos = load(source, trainer.env)
        run = ncdpo.new_run_folder(config)
        try:
            with ncdpo.locked(run):
                ncdpo.save_config(config, run)
                print(f"cloning {source} with {config.algo} on {trainer.device}, in {run}", flush=True)
                clone(trainer.agent, demos, config.seed, steps, learning_rate, likelihood_steps)
                ncdpo.write(run / "metrics.csv", (",".join(ncdpo.COLUMNS) + "\n").encode())
                ncdpo.save_checkpoint(trainer, run)
        except BaseException:  # nothing could go on from there, and the folder's name is wanted
            shutil.rmtree(run)  # the lock is closed: Windows removes no open file
            raise
    return run


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    parser.add_argument("demos", help="the .npz file; all other flags behind it are those of ncdpo.py")
    parser.add_argument("--bc-steps", type=int, default=20_000, help="gradient steps, on minibatches of 256 [20000]")
    parser.add_argument("--bc-learning-rate", type=float, default=1e-3, help="it falls to 0 along a cosine [0.001]")
    parser.add_argument("--likelihood-steps", type=int, help="after these, of an ncdpo clone with Discrete actions: "
                        "leave the choice to the softmax (E8) [4000]")
    line, flags = parser.parse_known_args(arguments)
    try:
        if line.bc_steps < 1 or not 0 < line.bc_learning_rate < math.inf:
            raise UserError("--bc-steps and --bc-learning-rate must be above 0")
        if (line.likelihood_steps or 0) < 0:
            raise UserError("--likelihood-steps must be 0 or more")
        if not Path(line.demos).is_file():
            raise UserError(f"cannot read demonstrations from {line.demos}: no such file; give it first, then flags")
        config, evaluated, resumed, _ = ncdpo.parse(flags, PRESET)
        if evaluated or resumed or config.init_from:
            raise UserError("a clone is a new run: leave out --evaluate, --resume and --init-from")
        run = make(line.demos, config, line.bc_steps, line.bc_learning_rate, line.likelihood_steps)
        print(ncdpo.describe(ncdpo.evaluate(run)), flush=True)
    except UserError as error:
        print(f"cloning: {' '.join(str(error).split()).rstrip('.')}.", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
