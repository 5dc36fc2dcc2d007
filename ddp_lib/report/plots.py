"""Pictures of a run, from its folder: loss per rank, test accuracy, images/s.

Figures are made without pyplot, so no global state changes and no window opens.
"""

from functools import partial
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from ddp_lib.errors import UserError
from ddp_lib.run_dir.log import name_disk_errors, read_events, read_run

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LineStyle = str | tuple[int, tuple[int, ...]]

# On white each has a contrast of at least 4.5:1, which the paler colours of the usual sets for colour-blind
# readers do not reach. Any two differ by 20 or more in CIELAB, also as colour-blind readers see them (Machado
# 2009). Black is the mean of all ranks.
_COLORS = ("#0072B2", "#B85A05", "#26533E", "#7C0B6F", "#520BE2", "#8B0006")
_DASHES = ((4, 1), (1, 1), (6, 1, 1, 1), (9, 2), (4, 1, 1, 1, 1, 1), (2, 2))
# One more than there are colours: a pair of both repeats only after 42 ranks. 7 differ even without colour.
_LINE_STYLES: tuple[LineStyle, ...] = ("-", *((0, dashes) for dashes in _DASHES))
_MANY_RANKS = 8  # with more ranks: thinner lines, and no faint unsmoothed lines behind them
_LEGEND_RANKS = 24
_MOST_ROWS = 2**20  # of the table of steps; of more, some steps become one


def rank_style(rank: int) -> tuple[str, LineStyle]:
    """A rank's colour (hex) and line style (as matplotlib takes it), the same in every figure."""
    return _COLORS[rank % len(_COLORS)], _LINE_STYLES[rank % len(_LINE_STYLES)]


def plot_run(folder: str | Path, out: str | Path | None = None) -> Path:
    """Draws the run in `folder` to the file `out` (default: `folder`/loss.png) and returns its path. The
    suffix of `out` chooses the format (.png, .svg, .pdf). UserError if there is no log, no step in it, or
    `out` cannot be written."""
    figure = draw_run(folder)
    path = Path(folder) / "loss.png" if out is None else Path(out)
    formats = figure.canvas.get_supported_filetypes()
    if path.suffix.lower().removeprefix(".") not in formats:
        known = ", ".join(f".{name}" for name in formats)
        raise UserError(f"--out {str(path)!r} has the suffix {path.suffix!r}: give one of {known}")
    with name_disk_errors(path, "or name another --out"):
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)
    return path


def draw_run(folder: str | Path) -> "Figure":
    """The figure that `plot_run` saves: loss on the left, accuracy and speed on the right. A notebook shows
    it, also without `%matplotlib inline`. Raises as `plot_run`."""
    log, events = read_run(folder), read_events(folder)
    if log.empty:
        raise UserError(f"{folder} has no step in its logs yet: plot it when the run has begun")
    steps, ranks = log["step"].nunique(), log["rank"].nunique()
    title = f"{Path(folder).resolve().name}: {ranks} rank{'s' if ranks > 1 else ''}, {steps:,} steps"
    width = 1
    while len(log) > _MOST_ROWS * width:
        width *= 2
    return draw_steps(log if width == 1 else thin(log, width), events, title, width)


def thin(log: "pd.DataFrame", width: int) -> "pd.DataFrame":
    """A row for every `width` steps of a rank: their samples, the mean loss over these, and their seconds."""
    import numpy as np
    import pandas as pd

    rank, part = log["rank"].to_numpy(), log["step"].to_numpy() // width
    begins = np.flatnonzero(np.diff(rank, prepend=-1) | np.diff(part, prepend=-1))
    samples, step_s = (np.add.reduceat(log[name].to_numpy(), begins) for name in ("samples", "step_s"))
    loss = np.add.reduceat((log["loss"] * log["samples"]).to_numpy(), begins) / samples
    columns = {"rank": rank[begins], "step": part[begins] * width}
    return pd.DataFrame({**columns, "samples": samples, "loss": loss, "step_s": step_s})


def draw_steps(log: "pd.DataFrame", events: "pd.DataFrame", title: str, width: int = 1) -> "Figure":
    """The figure of these steps and events, as read_run and read_events give them. width: how many steps a
    row of `log` stands for, with their means and sums."""
    from matplotlib.figure import Figure

    by_rank = {rank: log[log["rank"] == rank].set_index("step") for rank in sorted(set(log["rank"]))}
    figure = Figure(figsize=(11, 5.6), layout="constrained")  # whole on the screen of a laptop
    panels = figure.subplot_mosaic([["loss", "accuracy"], ["loss", "speed"]])
    loss, accuracy, speed = (panels[name] for name in ("loss", "accuracy", "speed"))
    window = max(1, log["step"].nunique() // 30)  # rows to average over
    _draw_loss(loss, log, by_rank, window, width)
    _draw_speed(speed, log, by_rank, window)
    _draw_accuracy(accuracy, events)
    _mark_restarts([loss, speed], events)
    figure.suptitle(title)
    _legend(figure, loss)
    figure._repr_png_ = partial(_png, figure)  # type: ignore[attr-defined]  # what IPython asks for
    return figure


def _png(figure: "Figure") -> bytes:
    picture = BytesIO()
    figure.savefig(picture, format="png", bbox_inches="tight")
    return picture.getvalue()


def global_mean(log: "pd.DataFrame") -> "pd.Series":
    """The mean loss over all images of each step, indexed by step; `log` as read_run returns it.

    Ranks are weighted by their numbers of images: the plain mean of the ranks' means would be wrong
    if these numbers differ.
    """
    import numpy as np
    import pandas as pd

    row_groups, step_numbers = pd.factorize(log["step"], sort=True)
    images = np.bincount(row_groups, weights=log["samples"])
    # bincount and not groupby: a loss that is NaN on one rank makes the step's mean NaN.
    total = np.bincount(row_groups, weights=log["loss"] * log["samples"])
    return pd.Series(total / images, index=step_numbers)


def _draw_loss(
    axes: "Axes", log: "pd.DataFrame", by_rank: "dict[int, pd.DataFrame]", window: int, width: int
) -> None:
    for rank, rows in by_rank.items():
        _rank_line(axes, rank, rows["loss"], _smooth(rows["loss"], window), len(by_rank))
    if len(by_rank) > 1:
        mean = _smooth(global_mean(log), window)
        axes.plot(mean.index, mean, color="black", linewidth=1.3, label="mean of all images")
    single = f"means of {width}" if width > 1 else "single steps"
    faint = f", {single} faint" if len(by_rank) <= _MANY_RANKS else ""
    note = f", mean over {window * width} steps{faint}" if window * width > 1 else ""
    _label(axes, f"Loss of each rank{note}", "step (one global batch)", "training loss (nats per image)")


def _draw_speed(axes: "Axes", log: "pd.DataFrame", by_rank: "dict[int, pd.DataFrame]", window: int) -> None:
    for rank, rows in by_rank.items():
        # Images of the whole window over its seconds: a mean of speeds would favour the fast steps.
        smooth = _smooth(rows["samples"], window) / _smooth(rows["step_s"], window)
        _rank_line(axes, rank, rows["samples"] / rows["step_s"], smooth, len(by_rank))
    axes.set_ylim(0, axes.get_ylim()[1])
    by_step = log.groupby("step")
    all_ranks = (by_step["samples"].sum() / by_step["step_s"].max()).median()
    title = f"Throughput of each rank; together {all_ranks:,.0f} images/s (median)"
    _label(axes, title, "step (one global batch)", "images/s of one rank")


def _draw_accuracy(axes: "Axes", events: "pd.DataFrame") -> None:
    from matplotlib.ticker import PercentFormatter

    _label(axes, "Accuracy on the test images", "epochs trained", "test accuracy (%)")
    epoch_ends = events[events["event"] == "epoch"]
    if epoch_ends.empty:
        axes.text(0.5, 0.5, "no epoch has ended yet", ha="center", transform=axes.transAxes)
        axes.set(xticks=[], yticks=[])
        return
    epoch_ends = epoch_ends.drop_duplicates("epoch", keep="last")
    epochs, values = [*(epoch_ends["epoch"] + 1)], [*epoch_ends["test_accuracy"]]
    # Not clipped, so that a marker at 100 %, on the panel's edge, is drawn whole.
    axes.plot(epochs, values, "ko-", markersize=5, clip_on=False)
    points = list(zip(epochs, values, strict=True))
    for epoch, value in points if len(points) <= 20 else points[-1:]:
        axes.annotate(f"{value:.1%}", (epoch, value), xytext=(3, -14), textcoords="offset points")
    axes.set_xlim(min(epochs) - 0.3, max(epochs) + 0.5)
    axes.margins(y=0.2)
    axes.set_ylim(top=min(1.0, axes.get_ylim()[1]))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, symbol=""))


def _rank_line(axes: "Axes", rank: int, raw: "pd.Series", smooth: "pd.Series", ranks: int) -> None:
    color, style = rank_style(rank)
    few = ranks <= _MANY_RANKS
    if few:
        axes.plot(raw.index, raw, color=color, linewidth=0.7, alpha=0.3)
    marker = "o" if len(smooth) == 1 else ""  # a single point would not show as a line
    width, label = 1.8 if few else 0.8, f"rank {rank}"
    axes.plot(smooth.index, smooth, color=color, linestyle=style, linewidth=width, marker=marker, label=label)


def _mark_restarts(panels: "list[Axes]", events: "pd.DataFrame") -> None:
    of_one_rank = events["rank"] == events["rank"].min()
    restarts = events[of_one_rank & (events["event"] == "start") & (events["start"] > 0)]
    for number, step in enumerate(restarts.get("step", [])):  # no column if there is no event
        for axes in panels:
            label = "restart" if number == 0 else None
            axes.axvline(step, color="0.35", linestyle="--", linewidth=1, label=label)


def _legend(figure: "Figure", axes: "Axes") -> None:
    from matplotlib.lines import Line2D

    lines, labels = axes.get_legend_handles_labels()
    ranks = [line for line, label in zip(lines, labels, strict=True) if label.startswith("rank ")]
    others = lines[len(ranks) :]
    if hidden := len(ranks[_LEGEND_RANKS:]):
        others = [Line2D([], [], linestyle="none", label=f"and {hidden} more ranks"), *others]
    handles = ranks[:_LEGEND_RANKS] + others
    figure.legend(handles=handles, loc="outside lower center", ncols=7, handlelength=3.5)


def _label(axes: "Axes", title: str, x: str, y: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set(xlabel=x, ylabel=y)
    axes.set_title(title, fontsize="medium")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _smooth(values: "pd.Series", window: int) -> "pd.Series":
    """The mean over the `window` steps around each step; values that are not finite are left out."""
    finite = values.where(abs(values) < float("inf"))
    return finite.rolling(window, center=True, min_periods=1).mean()
