"""The drawing of every kind, and what cannot be drawn."""
import io

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from distill_nb.pictures import _KINDS, draw_kind, plot_bars, plot_lines


@pytest.mark.parametrize('kind', _KINDS)
def test_a_drawing_is_small_and_nothing_of_it_lies_outside_or_on_other_text(kind):
    fig, png = draw_kind(kind), io.BytesIO()
    FigureCanvasAgg(fig).print_png(png)
    assert len(png.getvalue()) < 40_000
    draw, sheet = fig.canvas.get_renderer(), fig.bbox
    words = [t.get_window_extent(draw) for t in fig.axes[0].texts if t.get_text().strip()]
    assert all(sheet.x0 <= w.x0 and w.x1 <= sheet.x1 and sheet.y0 <= w.y0 and w.y1 <= sheet.y1 for w in words)
    assert not any(a.overlaps(b) for i, a in enumerate(words) for b in words[:i])


@pytest.mark.parametrize('said, more', [
    ('that of x, 2, but is 1', {'lines': {'a': [1.]}}), ('styles must be', {'styles': []}),
    ('styles must be', {'styles': ['line']}), ('log must be', {'log': 'z'}),
    ('x must be a list of numbers', {'x': [None]*2}), ('xlabel must be', {'xlabel': '\ud800'})])
def test_what_can_not_be_drawn_as_lines_is_refused(said, more):
    with pytest.raises(ValueError, match=said): plot_lines(**({'x': [1, 2], 'lines': {'a': [1., 2.]}} | more))


@pytest.mark.parametrize('said, more', [
    ('panels must be', {'panels': {}}), ("panels\\['a'\\] must be a list of numbers", {'panels': {'a': 3}}),
    ('ticks must be one for each of 2 bars', {'ticks': ['x']}), ('figsize must be', {'figsize': (1e18, 1)})])
def test_what_can_not_be_drawn_as_bars_is_refused(said, more):
    with pytest.raises(ValueError, match=said): plot_bars(**({'panels': {'a': [1., 2.]}} | more))
