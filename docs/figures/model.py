"""Draw the graphical model of MixSCVI and its posterior: ``python docs/figures/model.py``."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Circle, FancyBboxPatch

from mixscvi.pl.drawing import COLORS
from mixscvi.system import write_beside

OUTPUT = Path(__file__).with_suffix(".png")
RADIUS = 0.42
OBSERVED, DRAWN, COMPUTED = "0.82", "white", "none"
Place = tuple[float, float]


def node(axes: Axes, place: Place, text: str, kind: str, color: str = "black") -> None:
    """Draw a quantity; what is computed from others has no circle."""
    if kind != COMPUTED:
        axes.add_patch(
            Circle(place, RADIUS, facecolor=kind, edgecolor=color, linewidth=1.6, zorder=2)
        )
    axes.text(*place, text, ha="center", va="center", fontsize=14, color=color, zorder=3)


def arrow(axes: Axes, start: Place, end: Place, color: str = "0.25") -> None:
    """Draw that one quantity depends on another."""
    axes.annotate(
        "",
        end,
        start,
        arrowprops={
            "arrowstyle": "-|>",
            "color": color,
            "linewidth": 1.3,
            "mutation_scale": 13,
            "shrinkA": 20,
            "shrinkB": 20,
        },
        zorder=1,
    )


def plate(axes: Axes, low: Place, high: Place, text: str) -> None:
    """Draw a frame around what there is one of for each cell, gene or component."""
    axes.add_patch(
        FancyBboxPatch(
            low,
            high[0] - low[0],
            high[1] - low[1],
            boxstyle="round,pad=0,rounding_size=0.2",
            fill=False,
            edgecolor="0.55",
            linewidth=1.1,
            zorder=0,
        )
    )
    axes.text(high[0] - 0.12, high[1] - 0.1, text, ha="right", va="top", fontsize=9, color="0.3")


def draw_generative(axes: Axes) -> None:
    """Draw what is assumed of counts."""
    prior, z, s, size = (1.7, 5.6), (1.7, 4.2), (3.6, 4.2), (5.5, 4.2)
    shares, dropout, x, theta = (1.7, 2.5), (3.6, 2.5), (3.6, 0.9), (6.9, 0.9)
    for start, end in (
        *((prior, z), (z, shares), (z, dropout), (s, shares), (s, dropout)),
        *((shares, x), (dropout, x), (size, x), (theta, x)),
    ):
        arrow(axes, start, end)
    node(axes, prior, "$p(z)$", COMPUTED)
    node(axes, z, "$z_n$", DRAWN)
    node(axes, s, "$s_n$", OBSERVED)
    node(axes, size, r"$\ell_n$", OBSERVED)
    node(axes, shares, r"$\rho_{ng}$", COMPUTED)
    node(axes, dropout, r"$\pi_{ng}$", COMPUTED)
    node(axes, x, "$x_{ng}$", OBSERVED)
    node(axes, theta, r"$\theta_g$", COMPUTED)
    plate(axes, (0.6, 0.05), (6.2, 5.1), "cells $n$")
    plate(axes, (0.85, 0.2), (7.7, 3.1), "genes $g$")
    axes.text(4.2, 6.65, "generative process", ha="center", fontsize=12)


def draw_posterior(axes: Axes) -> None:
    """Draw how the posterior is made of counts."""
    x, z = (3.9, 0.9), (3.9, 5.6)
    heights = {"encoder": 2.5, "component": 4.0}
    columns = (0.9, 2.9, 4.9, 6.9)
    node(axes, x, "$x_n$", OBSERVED)
    node(axes, z, "$z_n$", DRAWN)
    for place, column in enumerate(columns):
        color = COLORS[place]
        encoder, component = (column, heights["encoder"]), (column, heights["component"])
        arrow(axes, x, encoder, color)
        arrow(axes, encoder, component, color)
        arrow(axes, component, z, color)
        number = place + 1
        node(axes, encoder, rf"$\mu_{number},\,\sigma_{number}$", COMPUTED, color)
        node(axes, component, f"$q_{number}$", DRAWN, color)
    mixture = r"$q(z_n \mid x_n) = \frac{1}{A}\sum_a q_a(z_n \mid x_n)$"
    axes.text(4.9, 5.5, mixture, va="center", fontsize=13)
    plate(axes, (0.1, 0.05), (8.3, 6.3), "cells $n$")
    axes.text(4.2, 6.65, "mixture posterior, $A = 4$", ha="center", fontsize=12)


def main() -> None:
    """Draw both side by side."""
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(12, 5.1), layout="constrained", width_ratios=(7.6, 8.6)
    )
    draw_generative(left)
    draw_posterior(right)
    for axes, width in ((left, 7.8), (right, 8.8)):
        axes.set(xlim=(0, width), ylim=(-0.05, 7), aspect="equal")
        axes.axis("off")
    write_beside(OUTPUT, lambda path: figure.savefig(path, dpi=130, format="png"))
    plt.close(figure)


if __name__ == "__main__":
    main()
