"""The tests; a package, so that processes which they start find their functions by name, whatever else is installed."""
