"""How fast it is: the simulator alone, and training, at several numbers of environments, as a Markdown table.

    python notebooks/speed.py                                                   # this machine's CPU
    python notebooks/speed.py --device cuda --num-envs 4096 8192 16384          # physics by MuJoCo Warp, on the GPU
    python notebooks/speed.py --vector sync --num-envs 64                       # Gymnasium's environments
    python notebooks/speed.py --compile                                         # what torch.compile would gain
    python notebooks/speed.py --env "notebooks.games:football?n_red_agents=1" --num-envs 256   # and its adapter's cost

Environment steps a second, the best of three rounds after one that is not counted (it compiles). Training is a rollout
of --num-steps steps and its update, 4 epochs with minibatches of --num-envs * --num-steps / 4 decisions. The peak
memory is that of a GPU. --compile is an experiment of this file: nothing else uses torch.compile.
"""

import argparse
import sys
import time
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import ncdpo  # noqa: E402


def best(work, device, rounds=3):
    """Seconds that work() takes, until the device has finished it."""
    times = []
    for _ in range(1 + rounds):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])


def simulate(env, steps):
    """A function that plays random actions, drawn before."""
    shape = (env.num_envs,) if env.discrete else (env.num_envs, env.act_dim)
    actions = torch.randint(env.act_dim, (steps, *shape)) if env.discrete else torch.randn(steps, *shape)
    actions = actions.to(env.device)
    env.reset(1)
    return partial(play, env.step, actions)


def play(step, actions):
    for action in actions:
        step(action)


def adapter(env, steps):
    """What a step through the adapter of a game costs in units of the game's own, taken in turn; no episode ends."""
    ours = theirs = 0.0
    for _ in range(3):
        env.reset(1)
        ours += best(simulate(env, steps), env.device, 1)
        actions = torch.randint(env.act_dim, (steps, env.num_envs)) if env.discrete else torch.rand(
            steps, env.num_envs, env.act_dim)
        parts = [list(a.to(env.device).view(env.envs.worlds, env.envs.agents, -1).unbind(1)) for a in actions]
        env.reset(1)
        theirs += best(partial(play, env.envs.game.step, parts), env.device, 1)
    return ours / theirs


def measure(trainer):
    """Environment steps a second of the simulator alone and of training; peak memory in GiB, NaN without a GPU."""
    device = trainer.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    alone = trainer.batch_size / best(simulate(trainer.env, trainer.config.num_steps), device)
    trainer.obs = trainer.env.reset(1)
    training = trainer.batch_size / best(trainer.iterate, device)
    return alone, training, torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else float("nan")


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="HalfCheetah-v4")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--vector", default="auto")
    parser.add_argument("--num-envs", type=int, nargs="+", default=[32, 64, 256])
    parser.add_argument("--num-steps", type=int, default=32)
    parser.add_argument("--denoising-steps", type=int, nargs="+", default=[5])
    parser.add_argument("--compile", action="store_true", help="with torch.compile, of the loss and of acting")
    line = parser.parse_args(arguments)

    def build(num_envs, algo="ppo", K=5):
        batch = num_envs * line.num_steps
        return ncdpo.Trainer(ncdpo.Config(
            env=line.env, algo=algo, device=line.device, vector=line.vector, num_envs=num_envs, update_epochs=4,
            num_steps=line.num_steps, minibatch_size=batch // 4, total_timesteps=100 * batch, denoising_steps=K))

    if line.env.startswith("notebooks.games:"):
        for num_envs in line.num_envs:
            cost = adapter(build(num_envs).env, line.num_steps)
            print(f"{num_envs} worlds: a step through the adapter takes {cost:.3f} of VMAS's own")
    print("| environments | policy | simulator alone, steps/s | training, steps/s | of it | peak GiB |")
    print("|---" * 6 + "|")
    for num_envs in line.num_envs:
        for algo, K in [*(("ncdpo", K) for K in line.denoising_steps), ("ppo", 5)]:
            trainer = build(num_envs, algo, K)
            if line.compile:
                torch.compiler.reset()  # or all policies share one small cache
                trainer.loss, trainer.agent.act = map(torch.compile, (trainer.loss, trainer.agent.act))
            alone, training, memory = measure(trainer)
            trainer.env.close()
            policy = f"NCDPO, K = {K}" if algo == "ncdpo" else "MLP"
            print(f"| {num_envs} | {policy} | {alone:,.0f} | {training:,.0f} | {training / alone:.0%} | {memory:.2f} |",
                  flush=True)


if __name__ == "__main__":
    try:
        main()
    except ncdpo.UserError as error:
        sys.exit(f"speed: {error}.")
