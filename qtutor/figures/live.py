"""Widgets that redraw a picture: what they share."""


from __future__ import annotations


def image_widget():
    """An empty picture that is shown in its own size: stretched to the page's width, it would blur."""
    import ipywidgets

    image = ipywidgets.Image(format="png", layout=ipywidgets.Layout(align_self="flex-start", max_width="100%"))
    image.add_class("qtutor-explorer-picture")
    return image


def live_picture(draw, **controls):
    """Controls above a picture that is drawn anew when one moves; ``draw(**values)`` returns a figure."""
    import ipywidgets
    import matplotlib.pyplot as plt

    from .. import plots

    def render():
        fig = draw(**{name: control.value for name, control in controls.items()})
        try:
            return plots.png(fig)
        finally:
            plt.close(fig)

    image = image_widget()
    image.value = render()

    def redraw(_):
        image.value = render()

    for control in controls.values():
        control.observe(redraw, names="value")
    return ipywidgets.VBox([ipywidgets.HBox(list(controls.values())), image])
