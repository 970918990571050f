"""Figures of points, fields and curves, and the panels of a run."""
