"""A film of a saved run: one episode, played by the policy's mean action. Or a strip of frames, a row for each run.

    python notebooks/film.py runs/Hopper-v4__ncdpo__1 hopper.gif     # .gif needs nothing more, .mp4 imageio-ffmpeg
    python notebooks/film.py CLONE RUN strip.png                     # white where an episode has ended
    MUJOCO_GL=egl python notebooks/film.py ...                       # without a screen (or osmesa)
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import sys
import warnings
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import ncdpo  # noqa: E402
from ncdpo import UserError, gist  # noqa: E402


@contextmanager
def drawing(env_id: str):
    """Whatever goes wrong inside as a UserError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # GLFW, on the screen it does not find
            yield
    except Exception as error:
        raise UserError(f"cannot draw {env_id} ({gist(error)}); without a screen, MuJoCo tasks need the "
                        "environment variable MUJOCO_GL=egl or MUJOCO_GL=osmesa.") from error


@torch.no_grad()
def play(run: Path, device: str = "auto", max_steps: int = 10_000) -> tuple[list[np.ndarray], float, list[float]]:
    """Frames (height, width, 3) of an episode, uint8; how many a second are true to life; and the rewards (steps,).

    The episode is the one that `ncdpo.evaluate(run, episodes=1)` plays by the mean action.
    """
    config, agent, _ = ncdpo.load_agent(run, device := ncdpo.pick_device(device))
    with drawing(config.env):
        env = ncdpo.make_env(config.env, render_mode="rgb_array")
        if renderer := getattr(env.unwrapped, "mujoco_renderer", None):  # follow the robot; -1 is Gymnasium's own view
            import mujoco
            renderer.camera_id = mujoco.mj_name2id(env.unwrapped.model, mujoco.mjtObj.mjOBJ_CAMERA, "track")
    space, fps, seed = env.action_space, env.metadata.get("render_fps", 30), 1_000_003 + config.seed
    every = max(2, math.ceil(fps / 50))  # steps a frame; at more than 50 frames a second browsers slow a .gif down
    torch.manual_seed(seed)
    frames, rewards, chunk, ended = [], [], [], False
    with closing(env):
        obs, _ = env.reset(seed=int(np.random.SeedSequence([seed]).generate_state(1)[0] // 2))  # as VectorEnv.reset
        while not ended and len(rewards) < max_steps:  # a task without a time limit may never end
            if len(rewards) % every == 0:
                with drawing(config.env):
                    frames.append(env.render())
            if not len(chunk):
                obs = torch.as_tensor(obs.reshape(1, -1), dtype=torch.float32, device=device)
                action = agent.policy.sample(agent.obs_norm(obs), deterministic=True)[0].cpu().numpy()
                chunk = action.reshape(config.action_chunk, -1)
            action, chunk = chunk[0], chunk[1:]
            if isinstance(space, gym.spaces.Discrete):  # as VectorEnv.step
                action = action[0] + space.start
            else:
                center, scale = (space.high + space.low) / 2, (space.high - space.low) / 2
                action = (center + scale * action.clip(-1, 1)).astype(space.dtype)
            obs, reward, terminated, truncated, _ = env.step(action)
            rewards.append(float(reward))
            ended = terminated or truncated
    return frames, fps / every, rewards


def save(frames: list[np.ndarray], fps: float, out: Path) -> None:
    """Write a .gif or .mp4 of `fps` frames a second."""
    if out.suffix == ".mp4":
        from imageio import v2 as imageio  # comes with gymnasium[mujoco]
        ncdpo.write(out, lambda file: file.write(imageio.mimsave("<bytes>", frames, format="mp4", fps=fps)))
        return
    first, *others = map(Image.fromarray, frames)
    times = np.round(np.arange(len(frames) + 1) * 100 / fps)  # a .gif counts in hundredths of a second
    ncdpo.write(out, lambda file: first.save(file, "GIF", save_all=True, append_images=others, loop=0,
                                             duration=[10 * int(t) for t in np.diff(times)]))


def strip(films: list[list[np.ndarray]], frames: int = 8, size: int = 150) -> Image.Image:
    """One row for each film: `frames` moments, evenly spaced over the longest one."""
    picture = Image.new("RGB", (frames * size, len(films) * size), "white")
    for y, film in enumerate(films):
        for x, moment in enumerate(np.linspace(0, max(map(len, films)) - 1, frames).round().astype(int)):
            if moment < len(film):
                picture.paste(Image.fromarray(film[moment]).resize((size, size)), (x * size, y * size))
    return picture


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="+", help="run folder; several for a strip")
    parser.add_argument("out", type=Path, help="the .gif, .mp4 or (a strip) .png to write")
    parser.add_argument("--device", default="auto")
    line = parser.parse_args(arguments)
    try:
        if line.out.suffix not in (".gif", ".mp4", ".png") or not line.out.parent.is_dir():
            raise UserError(f"{line.out} does not end in .gif, .mp4 or .png, or its folder does not exist.")
        if len(line.run) > 1 and line.out.suffix != ".png":
            raise UserError("a film shows one run; several make a strip, a .png.")
        if line.out.suffix == ".mp4" and not importlib.util.find_spec("imageio_ffmpeg"):
            raise UserError("an .mp4 needs the package imageio-ffmpeg: pip install imageio-ffmpeg; a .gif needs none.")
        films = []
        for run in line.run:
            frames, fps, rewards = play(run, line.device)
            films.append(frames)
            print(f"{run}: an episode of {len(rewards)} steps with the return {sum(rewards):.1f}, {len(frames)} frames")
        if line.out.suffix == ".png":
            ncdpo.write(line.out, partial(strip(films).save, format="PNG"))
        else:
            save(frames, fps, line.out)
    except UserError as error:
        print(f"film: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
