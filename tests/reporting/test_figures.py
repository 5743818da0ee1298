import made
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from mtl_jax.reporting import figures, read, render, statistics


def test_weights_that_vary_in_a_phase_have_a_figure(tmp_path):
    """Shares of the weights of the second phase, a colour for each learning rate."""
    found = made.entries(rates=(1e-3, 3e-3), methods=())
    for entry in found:
        entry["values"]["phases.1.weights"] = entry["values"].pop("weights")
    study = read([made.write_ablation(tmp_path, found)])
    (figure,) = figures.against(study, statistics.groups(study))
    assert figure.slug == "against-phases-1-weights"
    assert [panel.title for panel in figure.panels] == [f"{task}: test {metric}" for task, metric in made.TASKS.items()]
    assert figure.legend == ("learning_rate 0.001", "learning_rate 0.003")
    with render._style(render.PAPER):
        axes = render._picture(figure).axes[0]
    assert axes.get_xlabel() == "weight in phases 1 of tweets"
    assert sorted(axes.lines[0].get_xdata()) == [0, 0, 0.2, 0.4, 0.5, 1]
    (simplex,) = figures.simplex(study, statistics.groups(study))
    assert (simplex.slug, simplex.title) == ("simplex-phases-1-weights", "The simplex of weights in phases 1")
    assert len(simplex.panels) == 4  # three tasks and the criterion


def test_the_labels_of_a_colour_bar_are_on_the_picture():
    """Four decimals and a sign; they end within their panel."""
    points = {(("a", 1.0), ("b", 0.0), ("c", 0.0)): -0.1234, (("a", 0.0), ("b", 1.0), ("c", 0.0)): -0.13}
    points[(("a", 0.0), ("b", 0.0), ("c", 1.0))] = -0.1251
    panel = render.Panel("title", figures._triangle(("a", "b", "c"), points), frame=False)
    with render._style(render.PAPER):
        canvas = render._picture(render.Figure("s", "t", "c", (panel, panel)))
        FigureCanvasAgg(canvas).draw()
        for number, bar in enumerate(canvas.axes[1::2], 1):  # after each triangle
            labels = bar.get_yticklabels()
            assert [label.get_text() for label in labels] == ["-0.1300", "-0.1267", "-0.1234"]
            assert max(label.get_window_extent().x1 for label in labels) <= number * canvas.bbox.x1 / 2


@pytest.mark.parametrize("names", [("a",), tuple(f"a name of {40 * 'x'} {n}" for n in range(8))])
@pytest.mark.parametrize("panels", [1, 2, 4])
def test_nothing_is_cut_off_at_the_edges_of_a_png(names, panels):
    def draw(axes, palette):
        axes.plot([0, 1], [0.7925, 0.8025])
        axes.set_xlabel("step")

    figure = render.Figure("s", "t", "c", (render.Panel("title", draw),) * panels, legend=names)
    with render._style(render.PAPER):
        canvas = render._picture(figure)
        FigureCanvasAgg(canvas).draw()
        labels = [label for axes in canvas.axes for label in (*axes.get_yticklabels(), axes.xaxis.label) if label.get_text()]
        for thing in (*labels, *canvas.legends):
            box = thing.get_window_extent()
            assert min(box.x0, box.y0, canvas.bbox.x1 - box.x1) >= 0
        (legend,) = canvas.legends
        assert legend.get_window_extent().y1 <= min(axes.xaxis.label.get_window_extent().y0 for axes in canvas.axes)
