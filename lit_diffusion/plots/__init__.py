"""Plots: axes, figures of points and curves, and the panels of a run."""
