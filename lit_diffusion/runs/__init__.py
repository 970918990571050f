"""A run's directory: lock, events, configuration, best checkpoints, dashboard."""
