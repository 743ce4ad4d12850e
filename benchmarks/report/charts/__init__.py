"""Charts as plain shapes: geometry is computed here, one template draws it as SVG, and the style sheet colours it."""
