"""The picture of a run says what the log says, and can be read without colours."""

import math
import subprocess
import sys

import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from ddp_lib.errors import UserError
from ddp_lib.report import plots
from ddp_lib.report.plots import draw_run, global_mean, plot_run, rank_style
from ddp_lib.run_dir.log import RunLog, read_run


def write_run(folder, ranks=2, steps=range(60), epochs=1, start_time=100.0):
    for rank in range(ranks):
        with RunLog(folder, rank) as log:
            log.start(step=steps[0], world_size=ranks, time=start_time)
            for step in steps:
                log.write(
                    epoch=step // 60,
                    step=step,
                    samples=10 * (rank + 1),
                    loss=2.0 - step / 60 + rank,
                    lr=0.1,
                    data_s=0.01,
                    compute_s=0.04,
                    step_s=0.05,
                    time=start_time + step,
                )
            for epoch in range(epochs if rank == 0 else 0):
                log.write(event="epoch", epoch=epoch, step=60, test_accuracy=0.5 + epoch / 10)
    return folder


def labelled(axes):
    return {line.get_label(): line for line in axes.get_lines() if line.get_label()[0] != "_"}


def test_a_picture_in_the_folder_or_where_asked(tmp_path):
    write_run(tmp_path)
    assert plot_run(tmp_path) == tmp_path / "loss.png"
    pixels = imread(tmp_path / "loss.png")
    assert pixels.shape[:2] == (672, 1320) and pixels[..., :3].std() > 0.05
    other = tmp_path / "new" / "picture.svg"
    assert plot_run(str(tmp_path), str(other)) == other and "<svg" in other.read_text()


def test_a_notebook_shows_the_figure_without_matplotlibs_magic(tmp_path):
    from IPython.core.formatters import PNGFormatter

    assert PNGFormatter()(draw_run(write_run(tmp_path))).startswith(b"\x89PNG")


def test_what_the_panels_show(tmp_path):
    loss, accuracy, speed = draw_run(write_run(tmp_path, epochs=3)).axes
    for axes in (loss, accuracy, speed):
        assert axes.get_xlabel() and axes.get_ylabel()
    lines = labelled(loss)
    assert set(lines) == {"rank 0", "rank 1", "mean of all images"}
    # Loss is rank 0's plus 1 on rank 1, which has two thirds of the images.
    gap = lines["mean of all images"].get_ydata() - lines["rank 0"].get_ydata()
    assert gap == pytest.approx([2 / 3] * 60)
    assert lines["mean of all images"].get_color() == "black"
    assert list(accuracy.get_lines()[0].get_xdata()) == [1, 2, 3]
    assert list(accuracy.get_lines()[0].get_ydata()) == pytest.approx([0.5, 0.6, 0.7])
    speeds = labelled(speed)
    assert speeds["rank 0"].get_ydata() == pytest.approx([200] * 60)
    assert speeds["rank 1"].get_ydata() == pytest.approx([400] * 60)
    assert "600 images/s" in speed.get_title()


@pytest.mark.parametrize("epochs", [1, 5, 6])  # 50 %, up to 90 %, up to 100 %
def test_the_axis_of_accuracy_ends_at_100_percent(tmp_path, epochs):
    accuracy = draw_run(write_run(tmp_path, epochs=epochs)).axes[1]
    low, high = accuracy.get_ylim()
    values = accuracy.get_lines()[0].get_ydata()
    assert low < min(values) <= max(values) <= high <= 1


def test_the_mean_counts_images_not_ranks(tmp_path):
    mean = global_mean(read_run(write_run(tmp_path, ranks=3, steps=range(2))))
    assert mean.to_dict() == pytest.approx({0: 2 + 8 / 6, 1: 2 - 1 / 60 + 8 / 6})


def test_restarts_are_marked(tmp_path):
    write_run(tmp_path, steps=range(45))
    write_run(tmp_path, steps=range(40, 60), start_time=200.0)
    loss, accuracy, speed = draw_run(tmp_path).axes
    for axes in (loss, speed):
        assert list(labelled(axes)["restart"].get_xdata()) == [40, 40]
    assert "restart" not in labelled(accuracy)
    assert list(labelled(loss)["rank 1"].get_xdata()) == [*range(60)]


@pytest.mark.parametrize(("ranks", "named", "raw"), [(8, 8, True), (9, 9, False), (40, 24, False)])
def test_of_many_ranks_some_are_named(tmp_path, ranks, named, raw):
    figure = draw_run(write_run(tmp_path, ranks=ranks, steps=range(3), epochs=0))
    loss = figure.axes[0]
    assert sum(name.startswith("rank") for name in labelled(loss)) == ranks
    assert (len(loss.get_lines()) == 2 * ranks + 1) == raw
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert sum(text.startswith("rank") for text in texts) == named
    assert (f"and {ranks - 24} more ranks" in texts) == (ranks > 24)


@pytest.mark.parametrize("steps", [1, 2])
def test_a_run_that_has_just_begun(tmp_path, steps):
    write_run(tmp_path, ranks=1, steps=range(steps), epochs=0)
    assert plot_run(tmp_path).stat().st_size > 1000


def test_a_loss_that_is_not_finite_leaves_a_gap_and_no_error(tmp_path):
    write_run(tmp_path, steps=range(3))
    with RunLog(tmp_path, 1) as log:
        line = dict(lr=0.1, data_s=0.0, compute_s=0.1, step_s=0.1, time=1.0)
        log.write(epoch=0, step=3, samples=10, loss=float("inf"), **line)
        log.write(epoch=0, step=4, samples=10, loss=float("nan"), **line)
    assert plot_run(tmp_path).exists()
    mean = global_mean(read_run(tmp_path))
    assert math.isinf(mean[3]) and math.isnan(mean[4]) and math.isfinite(mean[2])


def test_a_rank_without_a_finite_loss_makes_the_mean_not_finite(tmp_path):
    write_run(tmp_path, steps=range(2))
    steps = read_run(tmp_path)
    steps.loc[steps["rank"] == 1, "loss"] = math.nan
    assert global_mean(steps).isna().all()


def test_nothing_to_draw_is_one_line(tmp_path):
    with pytest.raises(UserError, match="nowhere"):
        plot_run(tmp_path / "nowhere")
    with RunLog(tmp_path, 0) as log:
        log.start(step=0)
    with pytest.raises(UserError, match="no step") as caught:
        plot_run(tmp_path)
    assert "\n" not in str(caught.value) and not (tmp_path / "loss.png").exists()


def test_ranks_differ_with_and_without_colour():
    assert len({rank_style(rank) for rank in range(42)}) == 42
    assert len({rank_style(rank)[1] for rank in range(7)}) == 7
    assert len({rank_style(rank)[0] for rank in range(6)}) == 6


def test_each_ranks_line_stands_out_from_white():
    for red, green, blue in (to_rgb(rank_style(rank)[0]) for rank in range(6)):
        parts = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (red, green, blue)]
        luminance = 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]
        assert 1.05 / (luminance + 0.05) >= 4.5  # WCAG's contrast


def test_a_laptops_screen_shows_all_of_it(tmp_path):
    write_run(tmp_path, ranks=40, steps=range(3))
    (tmp_path / "shown.png").write_bytes(draw_run(tmp_path)._repr_png_())
    height, width, _ = imread(tmp_path / "shown.png").shape
    assert height <= 600 and width <= 1200


@pytest.mark.process
def test_pyplot_stays_out(tmp_path):
    write_run(tmp_path)
    code = (
        "import sys; from ddp_lib.report.plots import plot_run; plot_run(sys.argv[1]); "
        "sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, timeout=120)


def test_of_many_rows_some_steps_become_one(tmp_path, monkeypatch):
    write_run(tmp_path, ranks=3, steps=range(10))
    log = read_run(tmp_path)
    thinned = plots.thin(log, 4)
    assert thinned[["rank", "step"]].values.tolist() == [
        [rank, step] for rank in range(3) for step in (0, 4, 8)
    ]
    for name in ("samples", "step_s"):
        assert thinned[name].sum() == pytest.approx(log[name].sum())
    total = (log["loss"] * log["samples"]).sum()
    assert (thinned["loss"] * thinned["samples"]).sum() == pytest.approx(total)
    monkeypatch.setattr(plots, "_MOST_ROWS", 8)
    figure = draw_run(tmp_path)
    lines = [line for line in figure.axes[0].get_lines() if line.get_label() == "rank 2"]
    assert list(lines[0].get_xdata()) == [0, 4, 8]
