"""Texts and legends of figures, and whether they are readable."""

from itertools import combinations

from matplotlib.text import Text


def words(figure):
    return "\n".join(text.get_text() for text in figure.findobj(Text) if text.get_visible())


def legend(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def assert_no_overlap(figure):
    """No two texts cover each other, all are on the page, and none is smaller than 8 pt."""
    figure.draw_without_rendering()
    ticks, shown = set(), []
    for axes in figure.axes:
        for axis, (low, high) in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim())):
            for tick in (*axis.get_major_ticks(), *axis.get_minor_ticks()):
                ticks |= {tick.label1, tick.label2}
                if tick.label1.get_visible() and min(low, high) <= tick.get_loc() <= max(low, high):
                    shown.append(tick.label1)
    shown += [text for text in figure.findobj(Text) if text.get_visible() and text not in ticks]
    boxes = {text: Text.get_window_extent(text) for text in shown if text.get_text().strip()}
    assert all(text.get_fontsize() >= 8 for text in boxes)
    for text, box in boxes.items():
        assert figure.bbox.x0 <= box.x0, text
        assert box.x1 <= figure.bbox.x1, text
        assert figure.bbox.y0 <= box.y0, text
        assert box.y1 <= figure.bbox.y1, text
    for (a, box), (b, other) in combinations(boxes.items(), 2):
        assert not box.padded(-1.5).overlaps(other.padded(-1.5)), (a, b)
