"""What the notebooks share and a reader may skip: frames of pictures, tables, and `show`. It also finds ncdpo.py."""

import contextlib
import inspect
import sys
import textwrap
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from IPython.display import Code, Markdown

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

plt.rcParams.update({"figure.dpi": 90, "axes.grid": True, "grid.alpha": 0.3, "figure.constrained_layout.use": True,
                     "axes.titlesize": 10, "figure.titlesize": 11, "legend.fontsize": 8.5, "legend.frameon": False})
COLOURS, MARKERS = ["#12356b", "#cc5f0c", "#3d9a50", "#777777", "#a3228c", "#111111"], ["^", "v", "o", "s", "D", "x"]
LOOKS = [dict(color=color, marker=marker, linestyle=line, markersize=4.5)
         for color, marker, line in zip(COLOURS, MARKERS, ["-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1))])]


def show(*functions):
    """The source of functions of ncdpo.py, as it is right now."""
    return Code("\n".join(textwrap.dedent(inspect.getsource(f)) for f in functions), language="python")


def table(head, rows, form=".3g"):
    """Markdown of rows (sequences) under the names in `head`, split at "|"; numbers that are no int in this format."""
    def cell(x):
        if isinstance(x, (str, int)):
            return str(x)
        return "" if x is None else format(float(x), form)

    names = [name.strip() for name in head.split("|")]
    cells = [names, ["---"] * len(names), *([cell(x) for x in row] for row in rows)]
    return Markdown("\n".join(f"| {' | '.join(row)} |" for row in cells))


@contextlib.contextmanager
def panels(title, names, rows=1, x="", y="", size=(10, 3.4), share=(False, False), **settings):
    """A figure with one axes for each of `names`, a grid of axes (rows, columns); on leaving, one legend for all.

    x is the label below each column and y that beside each row: one for all, or a list. `share` are sharex and sharey
    of plt.subplots, and `settings` those of ax.set.
    """
    columns = len(names) // rows
    figure, grid = plt.subplots(rows, columns, figsize=size, squeeze=False, sharex=share[0], sharey=share[1])
    for ax, name in zip(grid.flat, names):
        ax.set(title=name, **settings)
    for ax, label in zip(grid[-1], [x] * columns if isinstance(x, str) else x):
        ax.set_xlabel(label)
    for ax, label in zip(grid[:, 0], [y] * rows if isinstance(y, str) else y):
        ax.set_ylabel(label)
    yield grid
    labels = {label: handle for ax in grid.flat for handle, label in zip(*ax.get_legend_handles_labels())}
    if labels:
        figure.legend(labels.values(), labels.keys(), loc="outside lower center", ncols=min(len(labels), 5),
                      markerscale=1.4)
    figure.suptitle(title)
    plt.show()


def lines(ax, x, curves, **more):
    """One line for each of `curves` (label: values against x), told apart by colour, marker and dashes."""
    for look, (label, values) in zip(LOOKS, curves.items()):
        ax.plot(x, values, label=label, **{**look, **more})


def scene(ax, obstacle, radius, ways, points=(), way=(), limit=1.15):
    """Notebook 1's robot at the origin, its obstacle, and points (B, 2) marked by the way (B,) that they take."""
    ax.add_patch(plt.Circle(obstacle, radius, facecolor="0.9", edgecolor="0.4", hatch="///", zorder=0))
    ax.plot(0, 0, "+", color="black", markersize=9, label="robot")
    ax.set(xlim=(-limit, limit), ylim=(-limit, limit), aspect="equal")
    for m, name in enumerate(ways if len(points) else ()):
        ax.scatter(*points[way == m].T, s=8, marker=MARKERS[m], color=COLOURS[m], linewidths=0, alpha=0.6, label=name)


def landscape(ax, function, omega, pair, names):
    """Notebook 2's image of a function of the chain's noise: two coordinates of omega (K, 1) vary; bold: it is 0."""
    side = torch.linspace(-3, 3, 121)
    rows = omega.expand(len(side) ** 2, *omega.shape).clone()
    rows[:, list(pair), 0] = torch.cartesian_prod(side, side).flip(1)
    with torch.no_grad():
        f = function(rows).reshape(len(side), len(side))
    image = ax.contourf(side, side, f, levels=np.linspace(-1, 1, 21), cmap="cividis", extend="both")
    contours = ax.contour(side, side, f, levels=[-0.6, -0.3, 0, 0.3, 0.6], colors="white", linewidths=[1, 1, 2.5, 1, 1])
    ax.clabel(contours, fontsize=7)
    ax.set(xlabel=names[0], ylabel=names[1])
    ax.grid(False)
    if ax.get_subplotspec().is_last_col():
        ax.figure.colorbar(image, ax=ax, label="action f")
