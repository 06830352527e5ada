"""How fast it is: the simulator alone, and training, at several numbers of environments, as a Markdown table.

    python notebooks/speed.py                                                   # this machine's CPU
    python notebooks/speed.py --device cuda --num-envs 4096 8192 16384          # physics by MuJoCo Warp, on the GPU
    python notebooks/speed.py --vector sync --num-envs 64                       # Gymnasium's environments
    python notebooks/speed.py --env "vmas:football?n_red_agents=1" --num-envs 256   # and what the adapter of VMAS costs

Environment steps a second, the best of three rounds after one that is not counted (it compiles). Training is a rollout
of --num-steps steps and its update, in 4 minibatches, 4 epochs. The peak memory is that of a GPU.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import ncdpo  # noqa: E402


def best(work, device: torch.device, rounds: int = 3) -> float:
    """Seconds that work() takes, until the device has finished it."""
    times = []
    for _ in range(1 + rounds):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times[1:])


def simulate(env: ncdpo.VectorEnv, steps: int):
    """Random actions, drawn before."""
    shape = (env.num_envs,) if env.discrete else (env.num_envs, env.act_dim)
    actions = torch.randint(env.act_dim, (steps, *shape)) if env.discrete else torch.randn(steps, *shape)
    actions = actions.to(env.device)
    env.reset(1)
    return lambda: [env.step(action) for action in actions]


def adapter(env: ncdpo.VectorEnv, steps: int) -> float:
    """What a step through the adapter of a game costs in units of the game's own, taken in turn; no episode ends."""
    ours, theirs, game = 0.0, 0.0, env.envs.game
    for _ in range(3):
        env.reset(1)
        ours += best(simulate(env, steps), env.device, 1)
        actions = torch.randint(env.act_dim, (steps, env.num_envs)) if env.discrete else torch.rand(
            steps, env.num_envs, env.act_dim)
        parts = [list(a.to(env.device).view(env.envs.worlds, env.envs.agents, -1).unbind(1)) for a in actions]
        env.reset(1)
        theirs += best(lambda: [game.step(part) for part in parts], env.device, 1)
    return ours / theirs


def measure(config: ncdpo.Config) -> tuple[float, float, float]:
    """Environment steps a second of the simulator alone and of training; peak memory in GiB, NaN without a GPU."""
    trainer = ncdpo.Trainer(config)
    device, steps = trainer.device, trainer.env.num_envs * config.num_steps
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    alone = steps / best(simulate(trainer.env, config.num_steps), device)
    trainer.obs = trainer.env.reset(1)
    training = steps / best(trainer.iterate, device)
    trainer.env.close()
    return alone, training, torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else float("nan")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="HalfCheetah-v4")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--vector", default="auto")
    parser.add_argument("--num-envs", type=int, nargs="+", default=[32, 64, 256])
    parser.add_argument("--num-steps", type=int, default=32)
    parser.add_argument("--denoising-steps", type=int, nargs="+", default=[5])
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile")
    line = parser.parse_args(arguments)
    if line.env.startswith("vmas:"):
        for num_envs in line.num_envs:
            env = ncdpo.VectorEnv(line.env, num_envs, ncdpo.pick_device(line.device))
            cost = adapter(env, line.num_steps)
            print(f"{num_envs} worlds: a step through the adapter takes {cost:.3f} of VMAS's own")
    print("| environments | policy | simulator alone, steps/s | training, steps/s | of it | peak GiB |")
    print("|---" * 6 + "|")
    for num_envs in line.num_envs:
        for algo, K in [*(("ncdpo", K) for K in line.denoising_steps), ("ppo", 5)]:
            batch = num_envs * line.num_steps
            alone, training, memory = measure(ncdpo.Config(
                env=line.env, algo=algo, device=line.device, vector=line.vector, num_envs=num_envs, update_epochs=4,
                num_steps=line.num_steps, minibatch_size=batch // 4, total_timesteps=100 * batch, denoising_steps=K,
                compile=not line.no_compile))
            policy = f"NCDPO, K = {K}" if algo == "ncdpo" else "MLP"
            print(f"| {num_envs} | {policy} | {alone:,.0f} | {training:,.0f} | {training / alone:.0%} | {memory:.2f} |",
                  flush=True)


if __name__ == "__main__":
    try:
        main()
    except ncdpo.UserError as error:
        sys.exit(f"speed: {error}")
