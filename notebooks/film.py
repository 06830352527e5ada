"""A film of a saved run: an episode of its mean action. Or a strip of frames, a row for each run.

    python notebooks/film.py runs/Hopper-v4__ncdpo__1 hopper.gif     # .gif needs nothing more, .mp4 imageio-ffmpeg
    python notebooks/film.py CLONE RUN strip.png                     # white where an episode has ended
    MUJOCO_GL=egl python notebooks/film.py ...                       # without a screen (or osmesa)
"""

import argparse
import importlib.util
import io
import math
import os
import sys
import traceback
import warnings
from contextlib import closing, contextmanager
from pathlib import Path

import gymnasium as gym
import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import ncdpo  # noqa: E402
from ncdpo import UserError  # noqa: E402

CPU = torch.device("cpu")
OPENGL = ("OpenGL.", "glfw", "mujoco.", "gymnasium.envs.mujoco.mujoco_rendering")


@contextmanager
def drawing(env_id):
    """Want of OpenGL or of pygame becomes a UserError; an error of the task's own stays what it is."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="glfw")  # on the screen that it does not find
            yield
    except gym.error.DependencyNotInstalled as error:
        raise UserError(f"cannot draw {env_id}: {error}") from error
    except Exception as error:
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        if not frame.f_globals.get("__name__", "").startswith(OPENGL):
            raise
        sys.unraisablehook = lambda unraisable: None  # of Gymnasium's viewer, which is thrown away half made
        chosen = os.environ.get("MUJOCO_GL", "unset")
        raise UserError(f"cannot draw {env_id} with MUJOCO_GL {chosen} ({error}): without a screen, take "
                        "MUJOCO_GL=osmesa (the Debian package libosmesa6) or MUJOCO_GL=egl (libegl1, and the driver of "
                        "a GPU or Mesa's)") from error


def screen_for(env_id):
    """The task as a Gymnasium environment that draws itself."""
    try:
        screen = ncdpo.make_env(env_id, render_mode="rgb_array")
    except TypeError as error:
        if "render_mode" not in str(error):
            raise
        raise UserError(f"{env_id} cannot be drawn: its class takes no render_mode") from error
    if renderer := getattr(screen.unwrapped, "mujoco_renderer", None):  # follow the robot; -1 is Gymnasium's own view
        import mujoco
        renderer.camera_id = mujoco.mj_name2id(screen.unwrapped.model, mujoco.mjtObj.mjOBJ_CAMERA, "track")
    return screen


@torch.no_grad()
@torch.random.fork_rng([])
def play(run, max_steps=10_000):
    """Frames (height, width, 3) of an episode, uint8; how many a second are true to life; and the rewards (steps,).

    The episode is the one that `ncdpo.evaluate(run, episodes=1)` plays by the mean action: here, too, as one row of as
    many as there are ways to play, all of which draw from the same noise.
    """
    config, agent, state = ncdpo.load_agent(run)
    rows, row = 3, 1
    with drawing(config.env), closing(ncdpo.VectorEnv(config.env, rows, CPU, chunk=config.action_chunk)) as env:
        ncdpo.require_spaces(env, state)
        film = Film(env.envs, config.env, row)
        ended, rewards = False, []
        seed = 1_000_003 + config.seed
        torch.default_generator.manual_seed(seed)
        obs = env.reset(seed, repeat=rows)
        film.look()
        while not ended and len(rewards) < max_steps:  # some tasks never end
            omega, noise = agent.policy.draw_noise(rows)
            obs, reward, terminated, truncated, _ = env.step(agent.act(obs, omega, torch.zeros_like(noise))[0])
            rewards += reward[row][~reward[row].isnan()].tolist()
            ended = terminated[row] | truncated[row]
        film.screen.close()
    return pictures(film.frames[:len(rewards) // film.every + 1]), film.fps / film.every, rewards


class Film:
    """Frames of one row of a VectorEnv's simulator: at the start, by `look`, and then each `every` steps by itself."""

    def __init__(self, envs, env_id, row):
        batched = isinstance(envs, ncdpo.MujocoEnvs)
        if not batched and not isinstance(envs, ncdpo.GymnasiumEnvs):
            raise UserError(f"{env_id} has a simulator of its own (make_vec), and only Gymnasium's tasks can be filmed")
        self.env_id, self.screen = env_id, screen_for(env_id)
        self.frames, self.played = [], 0
        self.fps = self.screen.metadata.get("render_fps") or 30
        self.every = max(2, math.ceil(self.fps / 50))  # at more than 50 frames a second browsers slow a .gif down
        self.envs, self.row = envs if batched else None, row
        if batched:  # its states are shown
            self.screen.reset()
        else:  # it is that row
            envs.tasks[row].close()
            envs.tasks[row] = self.screen
        moving, name = (envs, "advance") if batched else (self.screen, "step")
        step = getattr(moving, name)

        def watched(*action):
            result = step(*action)
            self.played += 1
            self.look()
            return result

        setattr(moving, name, watched)

    def look(self):
        if self.played % self.every == 0:
            if self.envs:
                self.screen.unwrapped.set_state(self.envs.qpos[self.row].numpy(), self.envs.qvel[self.row].numpy())
            try:
                self.frames.append(self.screen.render())
            except NotImplementedError:  # its class has no render
                self.frames.append(None)
            if self.frames[-1] is None:
                raise UserError(f"{self.env_id} cannot be drawn: it knows no render_mode rgb_array")


def pictures(frames):
    """Frames (height, width, 3), uint8, of those that a task gives: grey, with alpha, or of floats up to 1 or 255."""
    frames = [np.atleast_3d(frame)[..., :3] for frame in frames]
    unit = 255 if all(frame.dtype.kind in "fb" and frame.max() <= 1 for frame in frames) else 1
    for i, frame in enumerate(frames):
        if frame.dtype != np.uint8:
            frames[i] = (frame * unit).round().clip(0, 255).astype(np.uint8)
    return [np.broadcast_to(frame, (*frame.shape[:2], 3)) for frame in frames]


def save(frames, fps, out):
    """Write a .gif or .mp4 of `fps` frames a second."""
    if out.suffix == ".mp4":
        from imageio import v2 as imageio  # comes with gymnasium[mujoco]
        ncdpo.write(out, imageio.mimsave("<bytes>", frames, format="mp4", fps=fps))
        return
    first, *others = map(Image.fromarray, frames)
    times = np.round(np.arange(len(frames) + 1) * 100 / fps)  # a .gif counts in hundredths of a second
    first.save(buffer := io.BytesIO(), "GIF", save_all=True, append_images=others, loop=0,
               duration=[10 * int(t) for t in np.diff(times)])
    ncdpo.write(out, buffer.getvalue())


def strip(films, frames=8, size=150):
    """One row for each film: `frames` moments, evenly spaced over the longest one."""
    picture = Image.new("RGB", (frames * size, len(films) * size), "white")
    for y, film in enumerate(films):
        for x, moment in enumerate(np.linspace(0, max(map(len, films)) - 1, frames).round().astype(int)):
            if moment < len(film):
                picture.paste(Image.fromarray(film[moment]).resize((size, size)), (x * size, y * size))
    return picture


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, nargs="+", help="run folder; several for a strip")
    parser.add_argument("out", type=Path, help="the .gif, .mp4 or (a strip) .png to write")
    line = parser.parse_args(arguments)
    try:
        if line.out.suffix not in (".gif", ".mp4", ".png") or not line.out.parent.is_dir():
            raise UserError(f"{line.out} does not end in .gif, .mp4 or .png, or its folder does not exist")
        if len(line.run) > 1 and line.out.suffix != ".png":
            raise UserError("a film shows one run; several make a strip, a .png")
        if line.out.suffix == ".mp4" and not importlib.util.find_spec("imageio_ffmpeg"):
            raise UserError("an .mp4 needs the package imageio-ffmpeg: pip install imageio-ffmpeg; a .gif needs none")
        films = []
        for run in line.run:
            frames, fps, rewards = play(run)
            films.append(frames)
            print(f"{run}: an episode of {len(rewards)} steps with the return {sum(rewards):.1f}, {len(frames)} frames")
        if line.out.suffix == ".png":
            strip(films).save(buffer := io.BytesIO(), format="PNG")
            ncdpo.write(line.out, buffer.getvalue())
        else:
            save(frames, fps, line.out)
    except UserError as error:
        print(f"film: {' '.join(str(error).split()).rstrip('.')}.", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
